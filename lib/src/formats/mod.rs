//! Number formats, one file each: a value table plus a scale rule. A *code* is the stored integer, a *value* the real
//! number it stands for.

pub mod activations;
pub mod float;
pub mod int;
pub mod mxfp4;
