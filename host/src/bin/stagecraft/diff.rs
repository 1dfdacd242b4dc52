//! stub
use crate::failure::Status;
use crate::options::Global;
/// Diff
#[derive(clap::Args, Debug)]
pub struct Arguments {}
/// Runs the command.
pub fn run(_: &Global, _: &Arguments) -> anyhow::Result<Status> {
    anyhow::bail!("not yet")
}
