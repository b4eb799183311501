//! Coordinate descent behind GPTQ: every column is rounded again, with the errors of all others in mind and not only of those
//! that the sweep had passed. The loss tr(D H D^T) is quadratic in one column, so each step takes its least value on the
//! grid, and no pass can raise it. (QuIP, arXiv 2307.13304, calls it greedy updates.)

use rayon::prelude::*;

use super::gptq::Quantized;
use super::rtn::Target;
use super::sweep::{Column, Lanes, to_codes};
use crate::ops::matmul::{HEIGHT, WIDTH, kernel};

/// Panels of [`WIDTH`] rows that meet a tile of columns before the next.
const PANELS: usize = 4;

/// A Hessian, column by column over its diagonal: H_kj / H_jj, and 0 for k = j.
pub struct Quadratic {
    /// For each tile of [`HEIGHT`] columns all rows, [k, height].
    tiles: Vec<Vec<f32>>,
    /// H_jj, damped.
    diagonal: Vec<f32>,
    columns: usize,
}

impl Quadratic {
    /// From `gram` [n, n], a sum over tokens, damped by this share of its mean diagonal. Dead columns stand alone.
    pub fn new(gram: &[f32], n: usize, dampening_frac: f64) -> Self {
        let diagonal: Vec<f64> = (0..n).map(|i| f64::from(gram[i * n + i])).collect();
        let damping = dampening_frac * diagonal.iter().sum::<f64>() / n as f64;
        let tile = |t: usize| {
            let columns = t * HEIGHT..n.min((t + 1) * HEIGHT);
            let inverse: Vec<f64> =
                columns.clone().map(|j| 1.0 / (diagonal[j] + damping).max(f64::MIN_POSITIVE)).collect();
            let mut tile = Vec::with_capacity(n * columns.len());
            for (k, row) in gram.chunks_exact(n).enumerate() {
                let one = |(j, inv): (usize, &f64)| if k == j { 0.0 } else { (f64::from(row[j]) * inv) as f32 };
                tile.extend(columns.clone().zip(&inverse).map(one));
            }
            tile
        };
        let tiles = (0..n.div_ceil(HEIGHT)).into_par_iter().map(tile).collect();
        Self { tiles, diagonal: diagonal.iter().map(|d| (d + damping) as f32).collect(), columns: n }
    }
}

/// One pass over the columns of `q`, which stands for `w` [rows, columns]; `zeros` stay zero.
pub fn descend(w: &[f32], q: &mut Quantized, quadratic: &Quadratic, target: Target, zeros: Option<&[bool]>) {
    let n = quadratic.columns;
    let height = PANELS * WIDTH * n;
    let groups = target.groups(n);
    let strips = w.par_chunks(height).zip(q.codes.codes.par_chunks_mut(height)).zip(q.values.par_chunks_mut(height));
    let params = q.codes.params.par_chunks(PANELS * WIDTH * groups);
    strips.zip(params).enumerate().for_each(|(i, (((w, codes), values), params))| {
        let zeros = zeros.map(|z| &z[i * height..][..w.len()]);
        let rows = w.len() / n;
        let mut panels: Vec<Panel> = (0..rows.div_ceil(WIDTH))
            .map(|p| Panel::new(w, values, zeros, n, |lane| (p * WIDTH + lane).min(rows - 1)))
            .collect();
        for (t, tile) in quadratic.tiles.iter().enumerate() {
            for (p, panel) in panels.iter_mut().enumerate() {
                let of = |lane: usize, g: usize| params[(p * WIDTH + lane).min(rows - 1) * groups + g];
                panel.step(t * HEIGHT, tile, n, target, |g| {
                    (std::array::from_fn(|l| of(l, g).scale), std::array::from_fn(|l| of(l, g).zero_point))
                });
            }
        }
        for row in 0..rows {
            let (panel, lane) = (&panels[row / WIDTH], row % WIDTH);
            for j in 0..n {
                values[row * n + j] = panel.q[j][lane];
                codes[row * n + j] = panel.codes[j][lane];
            }
        }
    });
}

/// The scale of every group by least squares, its codes and all other errors as they are: s + (d H c^T) / (c H c^T), group
/// after group, for codes c and the errors d of a row. For scales of single rows, of formats without zero points.
pub fn refit(w: &[f32], q: &mut Quantized, quadratic: &Quadratic, target: Target) {
    let n = quadratic.columns;
    let (height, groups) = (PANELS * WIDTH * n, target.groups(n));
    let strips = w.par_chunks(height).zip(q.codes.codes.par_chunks(height)).zip(q.values.par_chunks_mut(height));
    let params = q.codes.params.par_chunks_mut(PANELS * WIDTH * groups);
    strips.zip(params).for_each(|(((w, codes), values), params)| {
        let rows = w.len() / n;
        for first in (0..rows).step_by(WIDTH) {
            // Rows that are not there repeat the last.
            let row = |lane: usize| (first + lane).min(rows - 1);
            let mut d: Vec<Lanes> =
                (0..n).map(|j| std::array::from_fn(|l| w[row(l) * n + j] - values[row(l) * n + j])).collect();
            let c: Vec<Lanes> = (0..n).map(|j| std::array::from_fn(|l| f32::from(codes[row(l) * n + j]))).collect();
            for g in 0..groups {
                let columns = g * target.group..n.min((g + 1) * target.group);
                let step = quadratic.step(&d, &c, columns.clone());
                for l in 0..WIDTH.min(rows - first) {
                    let p = &mut params[(first + l) * groups + g];
                    let scale = target.stored_scale(p.scale + step[l]);
                    if !(scale > 0.0 && scale.is_finite() && step[l] != 0.0) {
                        continue;
                    }
                    p.scale = scale;
                    for j in columns.clone() {
                        let at = (first + l) * n + j;
                        values[at] = target.format.dequantize(codes[at], *p, target.float);
                        d[j][l] = w[at] - values[at];
                    }
                }
            }
        }
    });
}

impl Quadratic {
    /// What the scales of the group `columns` lack: (d H c^T) / (c H c^T) of each row, 0 where its codes are all 0.
    fn step(&self, d: &[Lanes], c: &[Lanes], columns: std::ops::Range<usize>) -> Lanes {
        let (mut lack, mut own) = ([0f32; WIDTH], [0f32; WIDTH]);
        for t in columns.start / HEIGHT..columns.end.div_ceil(HEIGHT) {
            let tile = &self.tiles[t];
            let height = tile.len() / self.columns;
            let (mut through, mut inside) = ([[0f32; WIDTH]; HEIGHT], [[0f32; WIDTH]; HEIGHT]);
            kernel(tile, height, d.as_flattened(), &mut through);
            let part = &tile[columns.start * height..columns.end * height];
            kernel(part, height, c[columns.clone()].as_flattened(), &mut inside);
            for r in (0..height).filter(|r| columns.contains(&(t * HEIGHT + r))) {
                let j = t * HEIGHT + r;
                for l in 0..WIDTH {
                    // A tile has ratios to the diagonal, and 0 on it.
                    let weight = c[j][l] * self.diagonal[j];
                    lack[l] = weight.mul_add(through[r][l] + d[j][l], lack[l]);
                    own[l] = weight.mul_add(inside[r][l] + c[j][l], own[l]);
                }
            }
        }
        std::array::from_fn(|l| if own[l] > 0.0 { lack[l] / own[l] } else { 0.0 })
    }
}

/// [`WIDTH`] rows, by column.
struct Panel {
    w: Vec<Lanes>,
    q: Vec<Lanes>,
    d: Vec<Lanes>,
    codes: Vec<[i8; WIDTH]>,
    keep: Vec<Lanes>,
}

impl Panel {
    fn new(w: &[f32], values: &[f32], zeros: Option<&[bool]>, n: usize, row: impl Fn(usize) -> usize) -> Self {
        let lanes = |from: &[f32]| -> Vec<Lanes> {
            (0..n).map(|j| std::array::from_fn(|lane| from[row(lane) * n + j])).collect()
        };
        let (w, q) = (lanes(w), lanes(values));
        let d = w.iter().zip(&q).map(|(w, q)| std::array::from_fn(|l| w[l] - q[l])).collect();
        let keep = |z: &[bool]| {
            let one = |j: usize| std::array::from_fn(|lane| if z[row(lane) * n + j] { 0.0 } else { 1.0 });
            (0..n).map(one).collect()
        };
        let keep = zeros.map_or_else(|| vec![[1.0; WIDTH]; n], keep);
        Self { w, q, d, codes: vec![[0; WIDTH]; n], keep }
    }

    /// The columns of one tile, one after the other.
    fn step(&mut self, first: usize, tile: &[f32], n: usize, target: Target, params: impl Fn(usize) -> (Lanes, Lanes)) {
        let height = tile.len() / n;
        let mut sums = [[0f32; WIDTH]; HEIGHT];
        kernel(tile, height, self.d.as_flattened(), &mut sums);
        for r in 0..height {
            let j = first + r;
            let before = self.d[j];
            let mut column =
                Column { w: &self.w[j], sum: &sums[r], keep: &self.keep[j], q: &mut self.q[j], d: &mut self.d[j] };
            to_codes(&mut column, target, &params(j / target.group), &mut self.codes[j]);
            for later in r + 1..height {
                let m = tile[j * height + later];
                for l in 0..WIDTH {
                    sums[later][l] += (self.d[j][l] - before[l]) * m;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::gptq::gptq;
    use crate::algorithms::sweep::tests::{gram, loss, noise};
    use crate::algorithms::sweep::{Factor, Zeros};
    use crate::formats::NumberFormat;
    use crate::formats::float::Float;
    use crate::formats::int::IntFormat;
    use crate::recipe::{ActOrder, Observer};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_pass_never_raises_the_loss(seed: u64, rows in 1usize..70, groups in 1usize..4, num_bits in 2u8..=8, mask: bool) {
            let (n, tokens) = (groups * 16, 200);
            let (w, gram) = (noise(seed ^ 3, rows * n), gram(seed, tokens, n, 1));
            let format = NumberFormat::Int(IntFormat { num_bits, symmetric: seed % 2 == 0 });
            let target = Target::new(format, 16, Float::F32);
            let zeros: Vec<bool> = (0..w.len()).map(|i| mask && i % 3 == 0).collect();
            let factor = Factor::new(&gram, tokens as u64, n, ActOrder::Static, 0.01).unwrap();
            let mut q = gptq(&w, &factor, target, Observer::Minmax, Zeros::Fixed(&zeros));
            // With the damping, which is part of what is made less.
            let mut damped = gram.clone();
            let mean = (0..n).map(|i| gram[i * n + i]).sum::<f32>() / n as f32;
            (0..n).for_each(|i| damped[i * n + i] += 0.01 * mean);
            let before = loss(&q.values, &w, &damped, n, tokens);
            descend(&w, &mut q, &Quadratic::new(&gram, n, 0.01), target, Some(&zeros));
            let after = loss(&q.values, &w, &damped, n, tokens);
            prop_assert!(after <= before * (1.0 + 1e-5), "{} > {}", after, before);
            // Scales by least squares lose no more either: exact ones, in f32.
            if format.symmetric() {
                refit(&w, &mut q, &Quadratic::new(&gram, n, 0.01), target);
                let refitted = loss(&q.values, &w, &damped, n, tokens);
                prop_assert!(refitted <= after * (1.0 + 1e-5), "{} > {}", refitted, after);
            }
            for (i, (&code, value)) in q.codes.codes.iter().zip(&q.values).enumerate() {
                prop_assert_eq!(format.dequantize(code, q.codes.params[i / 16], Float::F32), *value);
                prop_assert!(!zeros[i] || *value == 0.0);
            }
        }
    }
}
