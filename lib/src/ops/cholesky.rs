//! The Cholesky factorization A = L L^T of a symmetric positive definite matrix of f64, in place.
//!
//! Every element is one chain of fused multiply-adds, s = fma(-l_ik, l_jk, s) for k = 0, 1, .., j - 1 in this order, from
//! s = a_ij; then l_jj = sqrt(s) on the diagonal and l_ij = s / l_jj below it. Between two blocks the chain rests in `a`,
//! which holds f64 as the registers do: the same bits for any block width, any number of threads and any processor.
//!
//! Block columns from left to right: the square on the diagonal is factored by one thread, the rows below it are solved
//! against it, and what lies to their right is brought up to date. All three go through one [`kernel`]: a
//! group of rows, from the first-level cache, meets tile after tile of columns, from the second.

use rayon::prelude::*;

use super::for_this_cpu;

/// Rows of L that are packed together, as [columns of the block, TILE]: one AVX register of columns for the kernel.
const TILE: usize = 4;
/// Tiles that one kernel call takes as rows.
const TILES: usize = 3;
/// Rows of one kernel call: 12 accumulators, as many as hide the latency of two FMA units. (Four rows by three registers
/// of columns load less, but take all 16 registers, and the compiler then keeps a sum in memory: 0.65 of the rate.)
const GROUP: usize = TILE * TILES;
/// Columns of a block, a multiple of [`GROUP`]: a group of rows takes half of the first-level cache.
const BLOCK: usize = 240;
/// Rows that a task brings up to date, a multiple of [`GROUP`].
const ROWS: usize = 96;
/// Columns that those rows meet before the next, a multiple of [`TILE`]: 360 KiB of packed tiles.
const COLUMNS: usize = 192;

/// Cholesky factorization in place: the lower triangle of the symmetric positive definite `a` [n, n] (row-major) becomes
/// L with A = L L^T. What lies above the diagonal is neither read nor written. By the threads of the current pool, with
/// scratch of about n x 240 values.
///
/// # Errors
/// The number of the first column whose pivot is not positive and finite (NaN included); `a` is then half overwritten.
/// Without an error every value of L is finite.
///
/// # Panics
/// Where `a` does not have n * n values.
pub fn cholesky(a: &mut [f64], n: usize) -> Result<(), usize> {
    assert_eq!(a.len(), n * n, "the caller gives a square");
    let mut packed = vec![0f64; n.next_multiple_of(GROUP) * n.min(BLOCK).next_multiple_of(TILE)];
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        // Where there are rows below, this is BLOCK.
        let depth = width.next_multiple_of(TILE);
        let (square, below) = a[start * n..].split_at_mut(width * n);
        let (corner, tiles) = packed.split_at_mut(width.next_multiple_of(GROUP) * depth);
        let place = Place { n, start, depth };
        factor(square, place, corner)?;
        let groups = below.par_chunks_mut(GROUP * n).zip(tiles.par_chunks_mut(GROUP * depth));
        groups.for_each(|(rows, group)| solve(rows, place, corner, group));
        // The long rows first, so that no thread is left with one at the end.
        let rows = below.par_chunks_mut(ROWS * n).enumerate().rev().with_max_len(1);
        rows.for_each(|(i, rows)| update(rows, place, tiles, i * ROWS));
    }
    Ok(())
}

/// A block of columns: it begins at column `start` of n. `depth` is its width, rounded up to whole tiles.
#[derive(Clone, Copy)]
struct Place {
    n: usize,
    start: usize,
    depth: usize,
}

for_this_cpu! {
    /// Factors the block's `square` on the diagonal (whole rows of the matrix) and packs it into `corner`.
    fn factor(square: &mut [f64], place: Place, corner: &mut [f64]) -> Result<(), usize> = factor_body
}

for_this_cpu! {
    /// Solves the block's columns in a group of `rows` below the square against `corner` and packs them into `group`.
    fn solve(rows: &mut [f64], place: Place, corner: &[f64], group: &mut [f64]) = solve_body
}

for_this_cpu! {
    /// Brings `rows`, which begin `first` rows below the square, up to date to the right of the block. `tiles` are all rows
    /// below the square, packed.
    fn update(rows: &mut [f64], place: Place, tiles: &[f64], first: usize) = update_body
}

/// What one kernel call works on: a tile's columns in a group of rows.
type Sums = [[f64; TILE]; GROUP];
/// The same by columns.
type Columns = [[f64; GROUP]; TILE];
/// The square that a tile of columns has on the diagonal, [column][row].
type Corner = [[f64; TILE]; TILE];

#[inline(always)]
fn factor_body(square: &mut [f64], place: Place, corner: &mut [f64]) -> Result<(), usize> {
    let Place { n, start, depth } = place;
    for (i, rows) in square.chunks_mut(GROUP * n).enumerate() {
        let (first, height) = (i * GROUP, rows.len() / n);
        let (done, own) = corner.split_at_mut(first * depth);
        let own = &mut own[..GROUP * depth];
        solve_body(rows, place, done, own);
        // The columns whose tiles are these rows themselves.
        for inner in (0..height).step_by(TILE) {
            let column = first + inner;
            let mut sums = load(rows, n, start + first, start + column);
            kernel(own, &own[inner * depth..][..TILE * depth], depth, column, &mut sums);
            let l = pivots(&sums[inner..inner + TILE], TILE.min(height - inner)).map_err(|c| start + column + c)?;
            let mut columns = solved(&sums, &l);
            for c in 0..TILE {
                columns[c][inner + c] = l[c][c];
            }
            pack(&columns, own, depth, column);
            store(rows, n, start + first, start + column, &by_rows(&columns));
        }
    }
    Ok(())
}

#[inline(always)]
fn solve_body(rows: &mut [f64], place: Place, corner: &[f64], group: &mut [f64]) {
    let Place { n, start, depth } = place;
    for (tile, column) in corner.chunks_exact(TILE * depth).zip((0..depth).step_by(TILE)) {
        // Every row that is solved lies below the columns that it is solved for.
        let below = start + depth;
        let mut sums = load(rows, n, below, start + column);
        kernel(group, tile, depth, column, &mut sums);
        let mut l = [[0f64; TILE]; TILE];
        l.as_flattened_mut().copy_from_slice(&tile[column * TILE..][..TILE * TILE]);
        let columns = solved(&sums, &l);
        pack(&columns, group, depth, column);
        store(rows, n, below, start + column, &by_rows(&columns));
    }
}

#[inline(always)]
fn update_body(rows: &mut [f64], place: Place, tiles: &[f64], first: usize) {
    let Place { n, start, depth } = place;
    let (right, last) = (start + depth, first + rows.len() / n);
    for left in (0..last).step_by(COLUMNS) {
        for (i, rows) in rows.chunks_mut(GROUP * n).enumerate() {
            let row = first + i * GROUP;
            let group = &tiles[row * depth..][..GROUP * depth];
            let end = (left + COLUMNS).min(row + rows.len() / n);
            for column in (left..end).step_by(TILE) {
                let mut sums = load(rows, n, right + row, right + column);
                kernel(group, &tiles[column * depth..][..TILE * depth], depth, depth, &mut sums);
                store(rows, n, right + row, right + column, &sums);
            }
        }
    }
}

/// Columns from `column` on in a group of `rows`, of which the first is row `row` of the matrix: what does not lie above
/// the diagonal. The rest is zero.
#[inline(always)]
fn load(rows: &[f64], n: usize, row: usize, column: usize) -> Sums {
    let mut sums = [[0f64; TILE]; GROUP];
    if rows.len() == GROUP * n && row + 1 >= column + TILE {
        for r in 0..GROUP {
            sums[r].copy_from_slice(&rows[r * n + column..][..TILE]);
        }
    } else {
        for (r, values) in rows.chunks_exact(n).enumerate() {
            let count = (row + r + 1).saturating_sub(column).min(TILE);
            sums[r][..count].copy_from_slice(&values[column..column + count]);
        }
    }
    sums
}

/// Writes what [`load`] reads.
#[inline(always)]
fn store(rows: &mut [f64], n: usize, row: usize, column: usize, sums: &Sums) {
    if rows.len() == GROUP * n && row + 1 >= column + TILE {
        for r in 0..GROUP {
            rows[r * n + column..][..TILE].copy_from_slice(&sums[r]);
        }
    } else {
        for (r, values) in rows.chunks_exact_mut(n).enumerate() {
            let count = (row + r + 1).saturating_sub(column).min(TILE);
            values[column..column + count].copy_from_slice(&sums[r][..count]);
        }
    }
}

/// Factors a tile's square, of the `height` columns that are there; the number of the pivot that fails. Columns that are
/// not there divide by one.
#[inline(always)]
fn pivots(square: &[[f64; TILE]], height: usize) -> Result<Corner, usize> {
    let mut l = [[0f64; TILE]; TILE];
    for c in 0..TILE {
        for r in c..height {
            l[c][r] = (0..c).fold(square[r][c], |s, k| (-l[k][r]).mul_add(l[k][c], s));
        }
        if c >= height {
            l[c][c] = 1.0;
        } else if l[c][c] > 0.0 && l[c][c].is_finite() {
            l[c][c] = l[c][c].sqrt();
        } else {
            return Err(c);
        }
        for r in c + 1..height {
            l[c][r] /= l[c][c];
        }
    }
    Ok(l)
}

/// Solves a group's columns against their square `l`.
#[inline(always)]
fn solved(sums: &Sums, l: &Corner) -> Columns {
    let mut columns = [[0f64; GROUP]; TILE];
    for c in 0..TILE {
        for r in 0..GROUP {
            let mut s = sums[r][c];
            for k in 0..c {
                s = (-columns[k][r]).mul_add(l[k][c], s);
            }
            columns[c][r] = s / l[c][c];
        }
    }
    columns
}

/// Solved columns into the packed `group`, from its column `column` on.
#[inline(always)]
fn pack(columns: &Columns, group: &mut [f64], depth: usize, column: usize) {
    for (t, tile) in group.chunks_exact_mut(TILE * depth).enumerate() {
        for (to, from) in tile[column * TILE..].as_chunks_mut::<TILE>().0.iter_mut().zip(columns) {
            to.copy_from_slice(&from[t * TILE..][..TILE]);
        }
    }
}

#[inline(always)]
fn by_rows(columns: &Columns) -> Sums {
    let mut sums = [[0f64; TILE]; GROUP];
    for r in 0..GROUP {
        for c in 0..TILE {
            sums[r][c] = columns[c][r];
        }
    }
    sums
}

/// sums[r][j] goes on as the chain over the first `depth` columns of -group[r][k] * tile[j][k]. A tile is
/// `stride` columns long, a group is [`TILES`] of them.
#[inline(always)]
fn kernel(group: &[f64], tile: &[f64], stride: usize, depth: usize, sums: &mut Sums) {
    let columns = |t: usize| group[t * TILE * stride..][..TILE * depth].as_chunks::<TILE>().0;
    let (group, tile) = ([columns(0), columns(1), columns(2)], tile[..TILE * depth].as_chunks::<TILE>().0);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: AVX2 and FMA are there.
        return unsafe { avx2::kernel(group, tile, sums) };
    }
    kernel_reference(group, tile, sums);
}

fn kernel_reference(group: [&[[f64; TILE]]; TILES], tile: &[[f64; TILE]], sums: &mut Sums) {
    for (k, columns) in tile.iter().enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = -group[r / TILE][k][r % TILE];
            for (s, &l) in sums.iter_mut().zip(columns) {
                *s = x.mul_add(l, *s);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{GROUP, Sums, TILE, TILES};

    /// [`super::kernel_reference`] with the sums in registers.
    #[target_feature(enable = "avx2,fma")]
    pub fn kernel(group: [&[[f64; TILE]]; TILES], tile: &[[f64; TILE]], sums: &mut Sums) {
        let mut acc = [_mm256_setzero_pd(); GROUP];
        for (acc, sums) in acc.iter_mut().zip(sums.iter()) {
            // SAFETY: four values.
            *acc = unsafe { _mm256_loadu_pd(sums.as_ptr()) };
        }
        for (((l, x0), x1), x2) in tile.iter().zip(group[0]).zip(group[1]).zip(group[2]) {
            // SAFETY: four values.
            let l = unsafe { _mm256_loadu_pd(l.as_ptr()) };
            for (t, x) in [x0, x1, x2].into_iter().enumerate() {
                for r in 0..TILE {
                    acc[t * TILE + r] = _mm256_fnmadd_pd(_mm256_set1_pd(x[r]), l, acc[t * TILE + r]);
                }
            }
        }
        for (acc, sums) in acc.into_iter().zip(sums) {
            // SAFETY: room for four values.
            unsafe { _mm256_storeu_pd(sums.as_mut_ptr(), acc) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What [`cholesky`] computes, element by element.
    fn reference(a: &mut [f64], n: usize) -> Result<(), usize> {
        for j in 0..n {
            for i in j..n {
                let chain = (0..j).fold(a[i * n + j], |s, k| (-a[i * n + k]).mul_add(a[j * n + k], s));
                if i > j {
                    a[i * n + j] = chain / a[j * n + j];
                } else if chain > 0.0 && chain.is_finite() {
                    a[j * n + j] = chain.sqrt();
                } else {
                    return Err(j);
                }
            }
        }
        Ok(())
    }

    /// Random below the diagonal, which outweighs the rest of its row; NaN above it, which must not be read.
    fn definite(n: usize, seed: u64) -> Vec<f64> {
        let mut s = seed | 1;
        let mut next = || {
            s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (s >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        let mut a = vec![f64::NAN; n * n];
        for i in 0..n {
            a[i * n..=i * n + i].iter_mut().for_each(|v| *v = next());
            a[i * n + i] = 0.8 * n as f64 + 1.0 + next();
        }
        a
    }

    /// Every bit is that of the reference, with one, two and five threads, and L L^T is near A.
    fn check(n: usize, seed: u64) {
        let a = definite(n, seed);
        let mut want = a.clone();
        assert_eq!(reference(&mut want, n), Ok(()));
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut l = a.clone();
            assert_eq!(pool.install(|| cholesky(&mut l, n)), Ok(()));
            let differ = l.iter().zip(&want).position(|(l, w)| l.to_bits() != w.to_bits());
            assert_eq!(differ.map(|i| (i / n, i % n)), None, "n = {n}, {threads} threads");
        }
        for i in 0..n {
            for j in 0..=i {
                let dot: f64 = want[i * n..][..=j].iter().zip(&want[j * n..]).map(|(x, y)| x * y).sum();
                assert!((dot - a[i * n + j]).abs() < 1e-13 * n as f64, "n = {n} at {i}, {j}: {dot}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn small_ones_are_the_reference_bit_for_bit(n in 1usize..200, seed: u64) {
            check(n, seed);
        }

        #[test]
        fn the_first_bad_pivot_is_named(n in 1usize..300, at in 0usize..300, seed: u64, bad in 0usize..4) {
            let (at, mut a) = (at % n, definite(n, seed));
            a[at * n + at] = [-1.0, 0.0, f64::NAN, f64::INFINITY][bad];
            let mut want = a.clone();
            prop_assert_eq!(reference(&mut want, n), Err(at));
            prop_assert_eq!(cholesky(&mut a, n), Err(at));
        }
    }

    #[test]
    fn edges_of_blocks_and_tasks_are_the_reference_bit_for_bit() {
        for n in [1, 239, 240, 241, 251, 252, 253, 335, 336, 337, 480, 517, 733] {
            check(n, n as u64);
        }
    }

    #[test]
    fn both_bodies_give_the_same_bits() {
        const WIDTH: usize = 60;
        let n = 151;
        let place = Place { n, start: 0, depth: WIDTH };
        let run = |fast: bool| {
            let (mut a, mut packed) = (definite(n, 7), vec![0f64; n.next_multiple_of(GROUP) * WIDTH]);
            let (square, below) = a.split_at_mut(WIDTH * n);
            let (corner, tiles) = packed.split_at_mut(WIDTH * WIDTH);
            assert_eq!(if fast { factor(square, place, corner) } else { factor_body(square, place, corner) }, Ok(()));
            for (rows, group) in below.chunks_mut(GROUP * n).zip(tiles.chunks_mut(GROUP * WIDTH)) {
                if fast { solve(rows, place, corner, group) } else { solve_body(rows, place, corner, group) }
            }
            if fast {
                update(below, place, tiles, 0)
            } else {
                update_body(below, place, tiles, 0)
            }
            a.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert!(run(true) == run(false));
        for depth in [0, 1, 7, 60] {
            let numbers: Vec<f64> = definite(60, 2).into_iter().filter(|v| !v.is_nan()).collect();
            let (group, tile) = (&numbers[..GROUP * 60], &numbers[GROUP * 60..][..TILE * 60]);
            let (mut fast, mut plain) = ([[1f64; TILE]; GROUP], [[1f64; TILE]; GROUP]);
            let columns = |t: usize| group[t * TILE * 60..][..TILE * depth].as_chunks::<TILE>().0;
            kernel(group, tile, 60, depth, &mut fast);
            kernel_reference([columns(0), columns(1), columns(2)], tile[..TILE * depth].as_chunks().0, &mut plain);
            assert_eq!(fast.map(|r| r.map(f64::to_bits)), plain.map(|r| r.map(f64::to_bits)));
        }
    }

    #[test]
    fn what_is_not_definite_is_an_error() {
        assert_eq!(cholesky(&mut [], 0), Ok(()));
        let mut one = [9.0];
        assert_eq!((cholesky(&mut one, 1), one), (Ok(()), [3.0]));
        assert_eq!(cholesky(&mut [-1.0], 1), Err(0));
        assert_eq!(cholesky(&mut [f64::NAN], 1), Err(0));
        assert_eq!(cholesky(&mut [0.0; 25], 5), Err(0));
        assert_eq!(cholesky(&mut [1.0, 0.0, 2.0, 1.0], 2), Err(1), "indefinite");
        // A NaN off the diagonal fails its row's pivot, wherever the row lies; so does an infinity.
        for (i, j) in [(299, 0), (299, 298), (250, 3), (8, 5)] {
            for bad in [f64::NAN, f64::INFINITY] {
                let mut a = definite(300, 1);
                a[i * 300 + j] = bad;
                assert_eq!(cholesky(&mut a, 300), Err(i));
            }
        }
    }
}
