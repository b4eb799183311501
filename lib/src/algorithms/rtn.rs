//! Round to nearest: each group of a row gets the scale (and zero point) that its extremes ask for, each weight the
//! nearest code. The floor that every other algorithm is measured against.

use crate::formats::float::Float;
use crate::formats::{NumberFormat, Params};
use crate::ops::round;
use crate::recipe::Observer;

use super::scales;

/// What to round to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// Width and kind.
    pub format: NumberFormat,
    /// Columns that share a scale; divides the row.
    pub group: usize,
    /// The type that the weights have and that scales are stored in.
    pub float: Float,
}

/// Some rows of a matrix in codes. Dimension letters: R rows, K columns, G groups a row.
#[derive(Debug, Default)]
pub struct Codes {
    /// i8 [R, K]: integers, or the bits of small floats.
    pub codes: Vec<i8>,
    /// [R, G].
    pub params: Vec<Params>,
}

/// Rounds `w`, f32 [R, K] with K = `columns`, into `out`; gives the error that this made.
pub fn rtn(w: &[f32], columns: usize, target: Target, observer: Observer, out: &mut Codes) -> ErrorSums {
    out.codes.resize(w.len(), 0);
    out.params.clear();
    let mut sums = ErrorSums::default();
    for (row, codes) in w.chunks_exact(columns).zip(out.codes.chunks_exact_mut(columns)) {
        for (w, q) in row.chunks_exact(target.group).zip(codes.chunks_exact_mut(target.group)) {
            let params = scales::fit_group(w, target, observer);
            round::group(w, target.format, params, target.float, q, &mut sums);
            out.params.push(params);
        }
    }
    sums
}

/// Lanes of the running sums: their order is part of the result, so it is fixed here and not left to the processor.
pub const LANES: usize = 8;

/// Sums from which errors are reported; merging in a fixed order gives the same bits on every machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct ErrorSums {
    /// Sum of (dequantized - weight)^2, by lane.
    pub squared_error: [f64; LANES],
    /// Sum of weight^2, by lane.
    pub squared_weight: [f64; LANES],
    /// Greatest |dequantized - weight|.
    pub max_error: f32,
    /// Numbers seen.
    pub count: u64,
    /// Numbers that are NaN or infinite on one side, left out of the sums.
    pub non_finite: u64,
}

impl ErrorSums {
    /// Adds another part's sums behind this one's.
    pub fn merge(&mut self, other: &Self) {
        for i in 0..LANES {
            self.squared_error[i] += other.squared_error[i];
            self.squared_weight[i] += other.squared_weight[i];
        }
        self.max_error = self.max_error.max(other.max_error);
        self.count += other.count;
        self.non_finite += other.non_finite;
    }
}
