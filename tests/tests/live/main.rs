//! Address spaces that are kept in step with a guest that runs.
#![allow(clippy::unwrap_used)]

mod batches;
mod behaviour;
#[path = "../configs/mod.rs"]
mod configs;
mod empties;
mod equality;
mod failing;
mod guest;
mod hardware;
mod holes;
mod marking;
mod marks;
#[path = "../hostile/mutate.rs"]
#[allow(dead_code)]
mod mutate;
mod racing;
mod room;
mod rows;
mod second_stage;
mod space;
mod stages;
mod support;
mod ways;
