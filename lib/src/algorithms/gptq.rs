//! GPTQ (Frantar et al. 2022, arXiv 2210.17323): the codes of a matrix one column at a time, each column making up for the
//! errors before it. Scales are fitted once, from the weights before the sweep, as llm-compressor does; rounding and value
//! are those of the types on disk, so the error that is passed on is the error on disk.

use super::rtn::{Codes, Target};
use super::scales;
use super::sweep::{Factor, Rounding, Zeros, sweep};
use crate::recipe::Observer;

/// A matrix in codes.
#[derive(Debug, Default)]
pub struct Quantized {
    /// The codes.
    pub codes: Codes,
    /// What they stand for, f32 [rows, columns].
    pub values: Vec<f32>,
}

/// Quantizes `w` [rows, columns], of which `zeros` stay zero.
pub fn gptq(w: &[f32], factor: &Factor, target: Target, observer: Observer, zeros: Zeros) -> Quantized {
    let params = scales::fit(w, factor.columns(), target, observer, None);
    let swept = sweep(w, factor, Rounding::Codes(target, &params), zeros);
    Quantized {
        codes: Codes { codes: swept.codes, params, global: target.global, input_scale: 0.0 },
        values: swept.values,
    }
}
