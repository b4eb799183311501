//! The inner loops: a short scalar reference and, beside it, the fast path for this processor. Both give the same bits;
//! one shared list of shapes tests the two.

pub mod decode;
pub mod dequantize;
pub mod round;
