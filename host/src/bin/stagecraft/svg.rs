//! Writes SVG: elements with escaped text, counted.

use std::fmt::{Display, Write as _};

/// A picture that grows downwards.
pub struct Svg {
    width: u32,
    body: String,
    /// Elements so far.
    pub elements: u64,
}

impl Svg {
    /// An empty picture of this width.
    pub const fn new(width: u32) -> Self {
        Self { width, body: String::new(), elements: 0 }
    }

    /// A rectangle, with a text that a browser shows when it is pointed at.
    pub fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), style: impl Display, title: &str) {
        self.elements += 1;
        let _ = write!(self.body, "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height:.1}\" {style}");
        if title.is_empty() {
            self.body.push_str("/>\n");
        } else {
            let _ = writeln!(self.body, "><title>{}</title></rect>", escape(title));
        }
    }

    /// A line of text that starts, is centred or ends at `x`, as its class says.
    pub fn text(&mut self, (x, y): (f64, f64), class: &str, text: &str) {
        self.elements += 1;
        let _ = writeln!(self.body, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>", escape(text));
    }

    /// A line.
    pub fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), class: &str) {
        self.elements += 1;
        let _ = writeln!(self.body, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>");
    }

    /// A line through points `x,y`, separated by blanks.
    pub fn polyline(&mut self, points: &str, colour: &str) {
        self.elements += 1;
        let _ = writeln!(self.body, "<polyline points=\"{points}\" stroke=\"{colour}\"/>");
    }

    /// The document, `height` high, with these definitions in front.
    pub fn finish(self, height: f64, title: &str, definitions: &str) -> String {
        let (width, body) = (self.width, self.body);
        let height = height.ceil();
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\">\n<title>{}</title>\n{definitions}\n{body}</svg>\n",
            escape(title)
        )
    }
}

/// `text` as XML character data: what XML cannot say is replaced.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() && c != '\n' => escaped.push(char::REPLACEMENT_CHARACTER),
            '\u{fffe}' | '\u{ffff}' => escaped.push(char::REPLACEMENT_CHARACTER),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut svg = Svg::new(10);
        svg.text((0.0, 0.0), "label", "</text><script>&\"\u{1b}");
        let document = svg.finish(10.0, "<", "");
        assert!(document.contains("&lt;/text&gt;&lt;script&gt;&amp;&quot;\u{fffd}"), "{document}");
        assert!(!document.contains("<script"));
    }
}
