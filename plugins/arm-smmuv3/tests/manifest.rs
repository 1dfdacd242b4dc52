//! The manifest says what the code does: no setting is missing, and none is too many.
#![allow(clippy::unwrap_used)]

mod common;

use common::settings;
use stagecraft_plugin_arm_smmuv3::{Stage1, Stage2};
use stagecraft_sdk::{Error, Format, Settings};

const MANIFEST: &str = include_str!("../manifest.json");

/// Names and defaults of a format's settings, in order.
fn listed(format: &str) -> Vec<(String, Option<u64>)> {
    let (_, rest) = MANIFEST.split_once(&format!("\"name\": \"{format}\"")).unwrap();
    let lines = rest.lines().skip(1).take_while(|line| !line.trim().starts_with(']'));
    let setting = |line: &str| {
        let (_, rest) = line.split_once("{\"name\": \"")?;
        let (name, rest) = rest.split_once('"')?;
        let (_, rest) = rest.split_once("\"default\": ")?;
        Some((name.to_owned(), rest.split(',').next()?.parse().ok()))
    };
    lines.filter_map(setting).collect()
}

fn known_names(refusal: Result<(), Error>) -> Vec<String> {
    let Err(Error::Invalid(invalid)) = refusal else { panic!("{refusal:?}") };
    invalid.reason.split_once("there are ").unwrap().1.split(", ").map(str::to_owned).collect()
}

#[test]
fn settings_are_those_of_the_formats() {
    let wrong: Settings = settings(&[("no-such-setting", 0)]);
    let names = |format: &str| listed(format).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(Stage1::NAME), known_names(Stage1::open(&wrong).map(drop)));
    assert_eq!(names(Stage2::NAME), known_names(Stage2::open(&wrong).map(drop)));
}

#[test]
fn defaults_are_those_of_the_formats() {
    let defaults =
        |format: &str| listed(format).into_iter().filter_map(|(name, value)| Some((name, value?))).filter(|(name, _)| !name.ends_with("-high"));
    let one: Settings = defaults(Stage1::NAME).collect();
    assert_eq!(Stage1::open(&one).unwrap().geometry(), Stage1::open(&Settings::default()).unwrap().geometry());
    assert_eq!(one.get("mair"), Some(0xffff_ffff_f404_ff44));
    let two: Settings = defaults(Stage2::NAME).collect();
    assert_eq!(Stage2::open(&two).unwrap().geometry(), Stage2::open(&Settings::default()).unwrap().geometry());
}

#[test]
fn the_head_names_contract_unit_and_registers() {
    for line in
        ["\"contract\": \"stagecraft:format@0.1.0\"", "\"name\": \"arm-smmuv3\"", "\"units\": [\"arm-smmuv3\"]", "\"license\": \"Apache-2.0 OR MIT\""]
    {
        assert!(MANIFEST.contains(line), "{line}");
    }
    for register in ["CR0", "CR2", "GBPA", "IDR0", "IDR1", "IDR3", "IDR5", "STRTAB_BASE", "STRTAB_BASE_CFG"] {
        assert!(MANIFEST.contains(&format!("\"{register}\"")), "{register} is read");
    }
}
