//! gptoss: makes gpt-oss models smaller and faster, and proves what it did.
//!
//! `source -> plan -> for each group of tensors: read, round, pack -> sink`. The plan is made from headers alone; what
//! cannot work fails there. Nothing is ever held whole: input is mapped, output is written at planned offsets.

pub mod algorithms;
pub mod bench;
pub mod calibrate;
pub mod checkpoint;
pub mod containers;
pub mod device;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod formats;
pub mod generate;
mod guard;
pub mod kernels;
pub mod manifest;
pub mod model;
pub mod ops;
pub mod pipeline;
pub mod recipe;
pub mod runtimes;
pub mod text;
pub mod verify;

pub use error::{Error, Result};
