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
    /// Columns whose inputs are always zero.
    pub dead: usize,
    /// Which those are, by step.
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
        let mean = diagonal.iter().sum::<f64>() / n as f64;
        if mean <= 0.0 {
            return Err(Unfactorable::Empty);
        }
        let mut columns: Vec<usize> = (0..n).collect();
        if order == ActOrder::Static {
            columns.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
        }
        let mut fraction = dampening_frac;
        let mut matrix = vec![0f64; n * n];
        loop {
            // R is the lower factor of the matrix read backwards, itself read backwards.
            let scale = 1.0 / count.max(1) as f64;
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
                Ok(()) => break,
                Err(_) if fraction < MOST_DAMPING => {
                    fraction = if fraction < 0.1 { fraction + DAMPING_STEP } else { fraction * 10.0 };
                }
                Err(_) => return Err(Unfactorable::NotFinite),
            }
        }
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
            dead: diagonal.iter().filter(|d| **d == 0.0).count(),
        })
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.order.len()
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
    /// Mean over tokens of the squared error of the layer's outputs, damping included.
    pub loss: f64,
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
        loss: 0.0,
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
                let groups = n / target.group;
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
        strip.finish(codes, values, made)
    };
    let losses: Vec<Vec<f64>> = outs.into_par_iter().enumerate().map(one).collect();
    swept.loss = losses.iter().flatten().sum();
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
    loss: Vec<[f64; WIDTH]>,
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
            let groups = n / target.group;
            let of = |g: usize, lane: usize| params[row(panel, lane) * groups + g];
            let one =
                |g| (std::array::from_fn(|l| of(g, l).scale), std::array::from_fn(|l| f32::from(of(g, l).zero_point)));
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
            loss: vec![[0.0; WIDTH]; panels],
        }
    }

    /// Takes the columns a block at a time: a tile, or what a mask is chosen among.
    fn run(&mut self) {
        let n = self.factor.columns();
        let block = match self.zeros {
            Zeros::Choose(Mask::Structured { of, .. }, _, _) => of,
            Zeros::Choose(Mask::Unstructured, _, block) => block.max(1),
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
        let mut column = Column {
            w: &self.w[panel][j],
            sum,
            keep,
            pivot: self.factor.pivots[j],
            q: &mut self.q[panel][j],
            d: &mut self.d[panel][j],
            loss: &mut self.loss[panel],
        };
        match self.rounding {
            Rounding::Floats(float) => to_floats(&mut column, float),
            Rounding::Codes(target, _) => {
                let params = &self.params[panel][self.factor.order[j] / target.group];
                to_codes(&mut column, target, params, &mut self.codes[panel][j]);
            }
        }
    }

    /// Puts the results in their places; gives each row's loss.
    fn finish(self, codes: &mut [i8], values: &mut [f32], zeros: &mut [bool]) -> Vec<f64> {
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
        (0..self.rows).map(|row| self.loss[row / WIDTH][row % WIDTH]).collect()
    }
}

/// One column of a panel.
pub(super) struct Column<'a> {
    pub(super) w: &'a Lanes,
    pub(super) sum: &'a Lanes,
    pub(super) keep: &'a Lanes,
    pub(super) pivot: f32,
    pub(super) q: &'a mut Lanes,
    pub(super) d: &'a mut Lanes,
    pub(super) loss: &'a mut [f64; WIDTH],
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
    settle(c, &now);
}

#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "lanes of several arrays at once")]
fn to_floats_body(c: &mut Column<'_>, float: Float) {
    let mut now = [0f32; WIDTH];
    for l in 0..WIDTH {
        now[l] = c.w[l] + c.sum[l];
        c.q[l] = float.round(now[l]);
    }
    settle(c, &now);
}

/// Makes the zeros; notes the error and what it costs.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "lanes of several arrays at once")]
fn settle(c: &mut Column<'_>, now: &Lanes) {
    for l in 0..WIDTH {
        c.q[l] = if c.keep[l] == 0.0 { 0.0 } else { c.q[l] };
        c.d[l] = c.w[l] - c.q[l];
        let error = f64::from((now[l] - c.q[l]) * c.pivot);
        c.loss[l] += error * error;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::algorithms::gptq::gptq;
    use crate::algorithms::rtn::{Codes, rtn};
    use crate::formats::NumberFormat;
    use crate::formats::int::IntFormat;
    use crate::ops::moments;
    use crate::recipe::Observer;
    use proptest::prelude::*;

    /// Numbers between -1 and 1 that depend on the seed alone.
    pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
        let mut s = seed | 1;
        let mut next = || {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((s >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// Sums of x x^T over tokens whose columns depend on each other; `dead` columns are zero.
    pub(crate) fn gram(seed: u64, tokens: usize, n: usize, dead: usize) -> Vec<f32> {
        let raw = noise(seed, tokens * n);
        let mut x = vec![0f32; tokens * n];
        for (x, raw) in x.chunks_exact_mut(n).zip(raw.chunks_exact(n)) {
            for j in 0..n {
                x[j] = raw[j] * (1.0 + (j % 7) as f32) + 0.8 * raw[(j + 1) % n] + 0.5 * raw[(j * 3) % n];
            }
            x[n - dead..].fill(0.0);
        }
        let mut gram = vec![0f32; n * n];
        moments::add_gram(&x, n, &mut gram);
        moments::mirror(&mut gram, n);
        gram
    }

    /// tr(D G D^T) / count with D = q - w.
    pub(crate) fn loss(q: &[f32], w: &[f32], gram: &[f32], n: usize, count: usize) -> f64 {
        let mut total = 0f64;
        for (q, w) in q.chunks_exact(n).zip(w.chunks_exact(n)) {
            let d: Vec<f64> = q.iter().zip(w).map(|(q, w)| f64::from(q - w)).collect();
            for (d_i, row) in d.iter().zip(gram.chunks_exact(n)) {
                total += d_i * row.iter().zip(&d).map(|(g, d)| f64::from(*g) * d).sum::<f64>();
            }
        }
        total / count as f64
    }

    fn formats() -> impl Strategy<Value = NumberFormat> {
        let int = (2u8..=8, any::<bool>())
            .prop_map(|(num_bits, symmetric)| NumberFormat::Int(IntFormat { num_bits, symmetric }));
        prop_oneof![3 => int, 1 => Just(NumberFormat::Fp8), 1 => Just(NumberFormat::Mxfp4)]
    }

    fn orders() -> impl Strategy<Value = ActOrder> {
        prop_oneof![Just(ActOrder::Static), Just(ActOrder::Off)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn gptq_loses_no_more_than_rounding_to_nearest(
            seed: u64,
            rows in 24usize..60,
            groups in 1usize..4,
            dead in 0usize..3,
            format in formats(),
            order in orders(),
        ) {
            let (n, tokens) = (32 * groups, 256);
            let (w, gram) = (noise(seed ^ 77, rows * n), gram(seed, tokens, n, dead));
            let target = Target { format, group: 32, float: Float::Bf16 };
            let w: Vec<f32> = w.into_iter().map(|w| Float::Bf16.round(w)).collect();
            let factor = Factor::new(&gram, tokens as u64, n, order, 0.01).unwrap();
            prop_assert_eq!((factor.dead, factor.dampening_frac), (dead, 0.01));
            let ours = gptq(&w, &factor, target, Observer::Minmax, Zeros::None);
            for (i, (&code, value)) in ours.codes.codes.iter().zip(&ours.values).enumerate() {
                prop_assert_eq!(format.dequantize(code, ours.codes.params[i / 32], Float::Bf16), *value);
            }
            let mut nearest = Codes::default();
            rtn(&w, n, target, Observer::Minmax, &mut nearest);
            let value = |(i, &c): (usize, &i8)| format.dequantize(c, nearest.params[i / 32], Float::Bf16);
            let rounded: Vec<f32> = nearest.codes.iter().enumerate().map(value).collect();
            let (a, b) = (loss(&ours.values, &w, &gram, n, tokens), loss(&rounded, &w, &gram, n, tokens));
            prop_assert!(a <= b, "{} > {}", a, b);
            // The sweep's own sum has the damping in it.
            prop_assert!(ours.loss >= a * 0.999, "{} < {}", ours.loss, a);
        }

        #[test]
        fn two_of_four_become_zero_and_stay_zero(seed: u64, rows in 1usize..40, n in 1usize..16, order in orders()) {
            let (n, tokens) = (n * 16, 300);
            let (w, gram) = (noise(seed ^ 5, rows * n), gram(seed, tokens, n, 0));
            let factor = Factor::new(&gram, tokens as u64, n, ActOrder::Off, 0.01).unwrap();
            let mask = Mask::Structured { zeros: 2, of: 4 };
            let sparse = sweep(&w, &factor, Rounding::Floats(Float::F32), Zeros::Choose(mask, 0.5, 128));
            for (zeros, values) in sparse.zeros.chunks(4).zip(sparse.values.chunks(4)) {
                prop_assert_eq!(zeros.iter().filter(|z| **z).count(), 2);
                prop_assert!(zeros.iter().zip(values).all(|(z, v)| !z || *v == 0.0));
            }
            // Choosing with what the others make up for is better than choosing by magnitude alone.
            let cut = crate::algorithms::wanda::zeros(&w, n, None, mask, 0.5);
            let kept: Vec<f32> = w.iter().zip(&cut).map(|(w, z)| if *z { 0.0 } else { *w }).collect();
            let by_size = loss(&kept, &w, &gram, n, tokens);
            prop_assert!(loss(&sparse.values, &w, &gram, n, tokens) <= by_size);
            let format = NumberFormat::Int(IntFormat { num_bits: 4, symmetric: seed % 2 == 0 });
            let target = Target { format, group: 16, float: Float::Bf16 };
            let ordered = Factor::new(&gram, tokens as u64, n, order, 0.01).unwrap();
            let coded = gptq(&sparse.values, &ordered, target, Observer::Minmax, Zeros::Fixed(&sparse.zeros));
            prop_assert!(sparse.zeros.iter().zip(&coded.values).all(|(z, v)| !z || *v == 0.0));
        }

        #[test]
        fn threads_and_blocks_do_not_show(seed: u64, rows in 1usize..90, n in 1usize..70, share in 0.1f64..0.9) {
            let tokens = 2 * n + 3;
            let (w, gram) = (noise(seed ^ 9, rows * n), gram(seed, tokens, n, 0));
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let factor = Factor::new(&gram, tokens as u64, n, ActOrder::Off, 0.01).unwrap();
                    let zeros = Zeros::Choose(Mask::Unstructured, share, 1 + n / 2);
                    let sparse = sweep(&w, &factor, Rounding::Floats(Float::Bf16), zeros);
                    let target = Target {
                        format: NumberFormat::Int(IntFormat { num_bits: 3, symmetric: true }),
                        group: n,
                        float: Float::F16,
                    };
                    let coded = gptq(&w, &factor, target, Observer::Mse, Zeros::Fixed(&sparse.zeros));
                    (sparse.values, sparse.zeros, sparse.loss.to_bits(), coded.values, coded.loss.to_bits())
                })
            };
            let one = run(1);
            prop_assert_eq!(&one, &run(2));
            prop_assert_eq!(&one, &run(5));
        }
    }

    #[test]
    fn a_singular_hessian_is_damped_more_and_says_so() {
        let n = 24;
        // Three tokens: rank 3, and without damping nothing to divide by.
        let gram = gram(3, 3, n, 0);
        let factor = Factor::new(&gram, 3, n, ActOrder::Static, 0.0).unwrap();
        assert!(factor.dampening_frac > 0.0, "{}", factor.dampening_frac);
        let swept = sweep(&noise(4, 5 * n), &factor, Rounding::Floats(Float::Bf16), Zeros::None);
        assert!(swept.values.iter().all(|v| v.is_finite()));
        let zeros = vec![0f32; n * n];
        assert_eq!(Factor::new(&zeros, 9, n, ActOrder::Off, 0.01).err(), Some(Unfactorable::Empty));
        let mut broken = gram.clone();
        broken[0] = f32::NAN;
        assert_eq!(Factor::new(&broken, 3, n, ActOrder::Off, 0.01).err(), Some(Unfactorable::NotFinite));
    }
}
