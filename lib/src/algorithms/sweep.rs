//! The column sweep that GPTQ and SparseGPT share: columns are rounded (or set to zero) one after the other, and each takes
//! up what the errors before it ask for.
//!
//! With H = X^T X + damping = R R^T, R upper triangular, the loss of an error D = W - Q is |D R|^2. Row by row its term for
//! column j is R_jj^2 (w_j - q_j + sum over k < j of d_k R_kj / R_jj)^2, which depends on no later column: so column j is
//! rounded from w_j + sum d_k M_kj, with M_kj = R_kj / R_jj. This is GPTQ's update (arXiv 2210.17323, algorithm 1) without
//! the inverse: Babai's nearest plane, as arXiv 2507.18553 shows. The sum is one chain over k, so neither blocks nor threads
//! show in the bits.

use rayon::prelude::*;

use super::rtn::Target;
use crate::formats::Params;
use crate::formats::float::Float;
use crate::ops::cholesky::cholesky;
use crate::ops::matmul::{HEIGHT, WIDTH, kernel};
use crate::ops::{for_this_cpu, round};
use crate::recipe::{ActOrder, Mask};

/// Panels of [`WIDTH`] rows that go through the columns together.
const PANELS: usize = 4;
/// How the damping grows when a factorization fails: by this share of the mean diagonal, then tenfold.
const DAMPING_STEP: f64 = 0.01;
/// From here on a damped matrix is hardly anything but its diagonal.
const MOST_DAMPING: f64 = 10.0;

/// The Hessian of a layer's inputs, factored for the sweep.
pub struct Factor {
    /// The column that each step takes.
    order: Vec<usize>,
    /// M: for each tile of [`HEIGHT`] columns, rows 0 to the tile's end, [k, height].
    tiles: Vec<Vec<f32>>,
    /// R_jj, by step.
    pivots: Vec<f32>,
    /// The share of the mean diagonal that was added, greater than asked for where that did not suffice.
    pub dampening_frac: f64,
    /// Columns whose inputs are always zero, by step.
    is_dead: Vec<bool>,
}

/// Why there is no factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfactorable {
    /// A sum is NaN or infinite.
    NotFinite,
    /// Every input is zero.
    Empty,
}

impl Factor {
    /// Factors `gram` [n, n], the sum of x x^T over `count` tokens. Dead columns get the diagonal 1.
    pub fn new(gram: &[f32], count: u64, n: usize, order: ActOrder, dampening_frac: f64) -> Result<Self, Unfactorable> {
        let diagonal: Vec<f64> = (0..n).map(|i| f64::from(gram[i * n + i]) / count.max(1) as f64).collect();
        // An off-diagonal sum is bounded by the diagonal ones.
        if !diagonal.iter().all(|d| d.is_finite()) {
            return Err(Unfactorable::NotFinite);
        }
        if diagonal.iter().sum::<f64>() <= 0.0 {
            return Err(Unfactorable::Empty);
        }
        let mut columns: Vec<usize> = (0..n).collect();
        if order == ActOrder::Static {
            columns.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
        }
        let (matrix, fraction) = damped(gram, count, &columns, &diagonal, dampening_frac)?;
        let r = |k: usize, j: usize| matrix[(n - 1 - k) * n + n - 1 - j];
        let tile = |t: usize| {
            let columns = t * HEIGHT..n.min((t + 1) * HEIGHT);
            let inverse: Vec<f64> = columns.clone().map(|j| 1.0 / r(j, j)).collect();
            let mut tile = Vec::with_capacity(columns.end * columns.len());
            for k in 0..columns.end {
                let row = columns.clone().zip(&inverse);
                tile.extend(row.map(|(j, inv)| if k < j { (r(k, j) * inv) as f32 } else { 0.0 }));
            }
            tile
        };
        Ok(Self {
            tiles: (0..n.div_ceil(HEIGHT)).into_par_iter().map(tile).collect(),
            pivots: (0..n).map(|j| r(j, j) as f32).collect(),
            is_dead: columns.iter().map(|&j| diagonal[j] == 0.0).collect(),
            order: columns,
            dampening_frac: fraction,
        })
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.order.len()
    }

    /// Columns whose inputs are always zero.
    pub fn dead(&self) -> usize {
        self.is_dead.iter().filter(|d| **d).count()
    }
}

/// The lower factor of the mean of x x^T, its columns in reversed order, damped by as much as that takes; and by how much that
/// was.
fn damped(
    gram: &[f32],
    count: u64,
    columns: &[usize],
    diagonal: &[f64],
    dampening_frac: f64,
) -> Result<(Vec<f64>, f64), Unfactorable> {
    let n = columns.len();
    let mean = diagonal.iter().sum::<f64>() / n as f64;
    let scale = 1.0 / count.max(1) as f64;
    let mut fraction = dampening_frac;
    let mut matrix = vec![0f64; n * n];
    loop {
        // R is the lower factor of the matrix read backwards, itself read backwards.
        let fill = |(i, row): (usize, &mut [f64])| {
            let from = &gram[columns[n - 1 - i] * n..][..n];
            for (j, v) in row[..=i].iter_mut().enumerate() {
                *v = f64::from(from[columns[n - 1 - j]]) * scale;
            }
            let d = diagonal[columns[n - 1 - i]];
            row[i] = if d == 0.0 { 1.0 } else { d + fraction * mean };
        };
        matrix.par_chunks_mut(n).enumerate().for_each(fill);
        match cholesky(&mut matrix, n) {
            Ok(()) => return Ok((matrix, fraction)),
            Err(_) if fraction < MOST_DAMPING => {
                fraction = if fraction < 0.1 { fraction + DAMPING_STEP } else { fraction * 10.0 };
            }
            Err(_) => return Err(Unfactorable::NotFinite),
        }
    }
}

/// What a column becomes.
#[derive(Clone, Copy)]
pub enum Rounding<'a> {
    /// Codes, with parameters [rows, groups] that are fitted already.
    Codes(Target, &'a [Params]),
    /// Floats of this type: only zeros are made.
    Floats(Float),
}

/// Which numbers become zero.
#[derive(Clone, Copy)]
pub enum Zeros<'a> {
    /// None but by rounding.
    None,
    /// These [rows, columns].
    Fixed(&'a [bool]),
    /// Those that cost least, as SparseGPT chooses: (w_j R_jj)^2 with every earlier error taken up. The share of zeros is
    /// for [`Mask::Unstructured`], which chooses among `block` columns of a row.
    Choose(Mask, f64, usize),
}

/// A matrix after the sweep, [rows, columns] each.
#[derive(Debug, Default)]
pub struct Swept {
    /// Empty for floats.
    pub codes: Vec<i8>,
    /// What the codes stand for.
    pub values: Vec<f32>,
    /// True where a zero was made; empty where none was asked for.
    pub zeros: Vec<bool>,
}

/// Where a strip's codes, values and zeros go.
type Outputs<'o> = ((&'o mut [i8], &'o mut [f32]), &'o mut [bool]);

/// Sweeps `w` [rows, columns].
pub fn sweep(w: &[f32], factor: &Factor, rounding: Rounding, zeros: Zeros) -> Swept {
    let n = factor.columns();
    let rows = w.len() / n;
    let coded = matches!(rounding, Rounding::Codes(..));
    let masked = !matches!(zeros, Zeros::None);
    let mut swept = Swept {
        codes: vec![0; if coded { w.len() } else { 0 }],
        values: vec![0.0; w.len()],
        zeros: vec![false; if masked { w.len() } else { 0 }],
    };
    // Enough strips for every thread, but no smaller than a panel.
    let panels = rows.div_ceil(WIDTH).div_ceil(2 * rayon::current_num_threads()).clamp(1, PANELS);
    let height = panels * WIDTH;
    // Where there are no codes or zeros, every strip gets an empty part.
    fn parts<T>(all: &mut [T], len: usize, count: usize) -> Vec<&mut [T]> {
        if all.is_empty() { (0..count).map(|_| Default::default()).collect() } else { all.chunks_mut(len).collect() }
    }
    let count = rows.div_ceil(height);
    let outs: Vec<_> = parts(&mut swept.codes, height * n, count)
        .into_iter()
        .zip(parts(&mut swept.values, height * n, count))
        .zip(parts(&mut swept.zeros, height * n, count))
        .collect();
    let one = |(i, ((codes, values), made)): (usize, Outputs)| {
        let rows = i * height..rows.min((i + 1) * height);
        let part = match rounding {
            Rounding::Codes(target, params) => {
                let groups = target.groups(n);
                Rounding::Codes(target, &params[rows.start * groups..rows.end * groups])
            }
            floats => floats,
        };
        let zeros = match zeros {
            Zeros::Fixed(mask) => Zeros::Fixed(&mask[rows.start * n..rows.end * n]),
            other => other,
        };
        let mut strip = Strip::new(&w[rows.start * n..rows.end * n], factor, part, zeros);
        strip.run();
        strip.finish(codes, values, made);
    };
    outs.into_par_iter().enumerate().for_each(one);
    swept
}

/// One number of each row of a panel.
pub(super) type Lanes = [f32; WIDTH];

/// Some panels of rows on their way through the columns; arrays are [panel][step].
struct Strip<'a> {
    factor: &'a Factor,
    rounding: Rounding<'a>,
    zeros: Zeros<'a>,
    rows: usize,
    w: Vec<Vec<Lanes>>,
    q: Vec<Vec<Lanes>>,
    d: Vec<Vec<Lanes>>,
    codes: Vec<Vec<[i8; WIDTH]>>,
    /// 1 where a number stays, 0 where it becomes zero.
    keep: Vec<Vec<Lanes>>,
    /// Scales and zero points [panel][group].
    params: Vec<Vec<(Lanes, Lanes)>>,
}

impl<'a> Strip<'a> {
    fn new(w: &[f32], factor: &'a Factor, rounding: Rounding<'a>, zeros: Zeros<'a>) -> Self {
        let n = factor.columns();
        let rows = w.len() / n;
        let panels = rows.div_ceil(WIDTH);
        // Rows that are not there repeat the last.
        let row = |panel: usize, lane: usize| (panel * WIDTH + lane).min(rows - 1);
        let gather = |panel: usize| -> Vec<Lanes> {
            let lanes = |&j: &usize| std::array::from_fn(|lane| w[row(panel, lane) * n + j]);
            factor.order.iter().map(lanes).collect()
        };
        let keep = |panel: usize| -> Vec<Lanes> {
            match zeros {
                Zeros::None => Vec::new(),
                Zeros::Choose(..) => vec![[1.0; WIDTH]; n],
                Zeros::Fixed(mask) => {
                    let lanes =
                        |&j: &usize| std::array::from_fn(|lane| if mask[row(panel, lane) * n + j] { 0.0 } else { 1.0 });
                    factor.order.iter().map(lanes).collect()
                }
            }
        };
        let params = |panel: usize| -> Vec<(Lanes, Lanes)> {
            let Rounding::Codes(target, params) = rounding else { return Vec::new() };
            let groups = target.groups(n);
            let of = |g: usize, lane: usize| params[row(panel, lane) * groups + g];
            let one = |g| (std::array::from_fn(|l| of(g, l).scale), std::array::from_fn(|l| of(g, l).zero_point));
            (0..groups).map(one).collect()
        };
        Self {
            factor,
            rounding,
            zeros,
            rows,
            w: (0..panels).map(gather).collect(),
            q: vec![vec![[0.0; WIDTH]; n]; panels],
            d: vec![vec![[0.0; WIDTH]; n]; panels],
            codes: vec![vec![[0; WIDTH]; n]; panels],
            keep: (0..panels).map(keep).collect(),
            params: (0..panels).map(params).collect(),
        }
    }

    /// Takes the columns a block at a time: a tile, or what a mask is chosen among.
    fn run(&mut self) {
        let n = self.factor.columns();
        let block = match self.zeros {
            Zeros::Choose(Mask::Structured { of, .. }, _, _) => of,
            Zeros::Choose(Mask::Unstructured, _, block) => block.clamp(1, n),
            Zeros::None | Zeros::Fixed(_) => HEIGHT,
        };
        let mut sums = vec![[[0f32; WIDTH]; HEIGHT]; block.div_ceil(HEIGHT) + 1];
        for first in (0..n).step_by(block) {
            let columns = first..n.min(first + block);
            let tiles = first / HEIGHT..columns.end.div_ceil(HEIGHT);
            for panel in 0..self.w.len() {
                // What the columns before the block ask for.
                for (sums, t) in sums.iter_mut().zip(tiles.clone()) {
                    *sums = [[0.0; WIDTH]; HEIGHT];
                    let tile = &self.factor.tiles[t];
                    let height = tile.len() / n.min((t + 1) * HEIGHT);
                    let before = self.d[panel][..first].as_flattened();
                    kernel(&tile[..first * height], height, before, sums);
                }
                if let Zeros::Choose(mask, share, _) = self.zeros {
                    self.choose(panel, columns.clone(), &sums, mask, share);
                }
                for j in columns.clone() {
                    let sum = self.sum(panel, first, j, &sums);
                    self.round(panel, j, &sum);
                }
            }
        }
    }

    /// The whole sum for column `j` of the block that begins at `first`.
    fn sum(&self, panel: usize, first: usize, j: usize, sums: &[[Lanes; HEIGHT]]) -> Lanes {
        let (t, r) = (j / HEIGHT, j % HEIGHT);
        let tile = &self.factor.tiles[t];
        let height = HEIGHT.min(self.factor.columns() - t * HEIGHT);
        let mut sum = sums[t - first / HEIGHT][r];
        chain(&self.d[panel][first..j], &tile[first * height..], height, r, &mut sum);
        sum
    }

    /// Chooses the zeros of a block, from what its numbers would be with all errors so far taken up.
    fn choose(
        &mut self,
        panel: usize,
        columns: std::ops::Range<usize>,
        sums: &[[Lanes; HEIGHT]],
        mask: Mask,
        share: f64,
    ) {
        let mut scores: Vec<Lanes> = Vec::with_capacity(columns.len());
        for j in columns.clone() {
            let sum = self.sum(panel, columns.start, j, sums);
            // Left as it is, the column makes no error of its own: d takes back what was added.
            self.d[panel][j] = sum.map(|s| -s);
            // What nobody reads costs nothing.
            let pivot = if self.factor.is_dead[j] { 0.0 } else { self.factor.pivots[j] };
            scores.push(std::array::from_fn(|l| ((self.w[panel][j][l] + sum[l]) * pivot).powi(2)));
        }
        let zeros = match mask {
            Mask::Structured { zeros, of } => zeros * columns.len() / of,
            Mask::Unstructured => (share * columns.len() as f64).round() as usize,
        };
        let mut ranked: Vec<usize> = Vec::with_capacity(columns.len());
        #[allow(clippy::needless_range_loop, reason = "a lane is a column of `scores`")]
        for lane in 0..WIDTH {
            ranked.clear();
            ranked.extend(0..columns.len());
            ranked.sort_by(|&a, &b| scores[a][lane].total_cmp(&scores[b][lane]).then(a.cmp(&b)));
            for &i in &ranked[..zeros] {
                self.keep[panel][columns.start + i][lane] = 0.0;
            }
        }
    }

    fn round(&mut self, panel: usize, j: usize, sum: &Lanes) {
        let keep = self.keep[panel].get(j).unwrap_or(&[1.0; WIDTH]);
        let mut column = Column { w: &self.w[panel][j], sum, keep, q: &mut self.q[panel][j], d: &mut self.d[panel][j] };
        match self.rounding {
            Rounding::Floats(float) => to_floats(&mut column, float),
            Rounding::Codes(target, _) => {
                let params = &self.params[panel][self.factor.order[j] / target.group];
                to_codes(&mut column, target, params, &mut self.codes[panel][j]);
            }
        }
    }

    /// Puts the results in their places.
    fn finish(self, codes: &mut [i8], values: &mut [f32], zeros: &mut [bool]) {
        let n = self.factor.columns();
        for row in 0..self.rows {
            let (panel, lane) = (row / WIDTH, row % WIDTH);
            for (step, &j) in self.factor.order.iter().enumerate() {
                values[row * n + j] = self.q[panel][step][lane];
                if !codes.is_empty() {
                    codes[row * n + j] = self.codes[panel][step][lane];
                }
                if !zeros.is_empty() {
                    zeros[row * n + j] = self.keep[panel][step][lane] == 0.0;
                }
            }
        }
    }
}

/// One column of a panel.
pub(super) struct Column<'a> {
    pub(super) w: &'a Lanes,
    pub(super) sum: &'a Lanes,
    pub(super) keep: &'a Lanes,
    pub(super) q: &'a mut Lanes,
    pub(super) d: &'a mut Lanes,
}

for_this_cpu! {
    /// `sum` goes on as the chain over k of d[k] times entry `r` of row k of `m` [k, height].
    fn chain(d: &[Lanes], m: &[f32], height: usize, r: usize, sum: &mut Lanes) = chain_body
}

for_this_cpu! {
    /// Rounds a column to codes.
    pub(super) fn to_codes(c: &mut Column<'_>, target: Target, params: &(Lanes, Lanes), codes: &mut [i8; WIDTH]) = to_codes_body
}

for_this_cpu! {
    /// Rounds a column to floats.
    fn to_floats(c: &mut Column<'_>, float: Float) = to_floats_body
}

#[inline(always)]
fn chain_body(d: &[Lanes], m: &[f32], height: usize, r: usize, sum: &mut Lanes) {
    for (d, row) in d.iter().zip(m.chunks_exact(height)) {
        for l in 0..WIDTH {
            sum[l] = row[r].mul_add(d[l], sum[l]);
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "lanes of several arrays at once")]
fn to_codes_body(c: &mut Column<'_>, target: Target, (scale, zero): &(Lanes, Lanes), codes: &mut [i8; WIDTH]) {
    let mut now = [0f32; WIDTH];
    for l in 0..WIDTH {
        now[l] = c.w[l] + c.sum[l];
    }
    round::lanes((target.format, target.float, true), &now, scale, zero, codes, c.q);
    for l in 0..WIDTH {
        // The code of 0 is the zero point, and 0 among floats.
        codes[l] = if c.keep[l] == 0.0 { zero[l] as i8 } else { codes[l] };
    }
    settle(c);
}

#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "lanes of several arrays at once")]
fn to_floats_body(c: &mut Column<'_>, float: Float) {
    let mut now = [0f32; WIDTH];
    for l in 0..WIDTH {
        now[l] = c.w[l] + c.sum[l];
        c.q[l] = float.round(now[l]);
    }
    settle(c);
}

/// Makes the zeros; notes the error.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "lanes of several arrays at once")]
fn settle(c: &mut Column<'_>) {
    for l in 0..WIDTH {
        c.q[l] = if c.keep[l] == 0.0 { 0.0 } else { c.q[l] };
        c.d[l] = c.w[l] - c.q[l];
    }
}

#[cfg(test)]
pub(super) mod tests;
