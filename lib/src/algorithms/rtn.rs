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
    /// Columns that share a scale. A row's last group may be shorter.
    pub group: usize,
    /// Rows that share theirs: 1, a block's, or [`Self::ALL`].
    pub rows: usize,
    /// The type that the weights have and that scales are stored in.
    pub float: Float,
    /// Least and greatest weight, where all rows share a scale.
    pub extremes: (f32, f32),
    /// NVFP4's global scale, 1 for others.
    pub global: f32,
}

impl Target {
    /// [`Self::rows`] where the whole matrix shares one scale.
    pub const ALL: usize = usize::MAX;

    /// Groups of so many columns of single rows.
    pub fn new(format: NumberFormat, group: usize, float: Float) -> Self {
        Self { format, group, rows: 1, float, extremes: (0.0, 0.0), global: 1.0 }
    }

    /// Groups of a row.
    pub fn groups(self, columns: usize) -> usize {
        columns.div_ceil(self.group)
    }

    /// `scale` as it is stored: ggml's are rounded where they are used.
    #[inline(always)]
    pub fn stored_scale(self, scale: f32) -> f32 {
        if matches!(self.format, NumberFormat::Ggml(_)) { scale } else { self.float.round(scale) }
    }

    /// The parameters for weights between `min` and `max`.
    #[inline(always)]
    pub fn fit(self, min: f32, max: f32) -> Params {
        self.format.fit(min, max, self.float, self.global)
    }
}

/// Some rows of a matrix in codes. Dimension letters: R rows, K columns, G groups a row.
#[derive(Debug, Default)]
pub struct Codes {
    /// i8 [R, K]: integers, or the bits of small floats.
    pub codes: Vec<i8>,
    /// [R, G]; rows that share parameters repeat them.
    pub params: Vec<Params>,
    /// [`Target::global`].
    pub global: f32,
    /// The scale of the layer's inputs, where its scheme has a fixed one.
    pub input_scale: f32,
}

/// Rounds `w`, f32 [R, K] with K = `columns`, into `out`; gives the error that this made. Rows that share scales come
/// together.
pub fn rtn(w: &[f32], columns: usize, target: Target, observer: Observer, out: &mut Codes) -> ErrorSums {
    out.codes.resize(w.len(), 0);
    out.params.clear();
    out.global = target.global;
    let mut sums = ErrorSums::default();
    let mut params = vec![Params::default(); target.groups(columns)];
    let strip = target.rows.min(w.len() / columns).max(1) * columns;
    for (w, codes) in w.chunks(strip).zip(out.codes.chunks_mut(strip)) {
        scales::fit_rows(w, columns, target, observer, None, &mut params);
        for (row, codes) in w.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)) {
            for ((w, q), p) in row.chunks(target.group).zip(codes.chunks_mut(target.group)).zip(&params) {
                round::group(w, target.format, *p, target.float, q, &mut sums);
            }
            out.params.extend_from_slice(&params);
        }
    }
    sums.zeros = zeros(target.format, &out.codes);
    sums
}

/// How many codes are 0, where a format has so few that it matters, and 0 stands for 0.
pub fn zeros(format: NumberFormat, codes: &[i8]) -> Option<u64> {
    let counts = format.bits() == 2 && format.symmetric();
    counts.then(|| codes.iter().filter(|c| **c == 0).count() as u64)
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
    /// Codes that are 0, of formats of two bits where 0 stands for 0.
    pub zeros: Option<u64>,
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
        self.zeros = match (self.zeros, other.zeros) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
        self.non_finite += other.non_finite;
    }
}
