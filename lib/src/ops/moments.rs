//! Sums over tokens: |x| and x x^T. Every sum is one chain over all tokens in their order, so it does not matter how the
//! tokens are cut into calls.

use rayon::prelude::*;

use super::matmul::{HEIGHT, WIDTH, kernel};

/// Tokens that are laid out for the kernel at a time.
const TOKENS: usize = 256;

/// sums[j] += |x[t][j]| for every token t.
pub fn add_abs(x: &[f32], sums: &mut [f32]) {
    for row in x.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(s, v)| *s += v.abs());
    }
}

/// max[j] becomes at least |x[t][j]| for every token t.
pub fn raise_max(x: &[f32], max: &mut [f32]) {
    for row in x.chunks_exact(max.len()) {
        max.iter_mut().zip(row).for_each(|(m, v)| *m = m.max(v.abs()));
    }
}

/// gram[i][j] += x[t][i] x[t][j] for every token t, in the upper triangle (and a little below it); see [`mirror`].
pub fn add_gram(x: &[f32], n: usize, gram: &mut [f32]) {
    for x in x.chunks(TOKENS * n) {
        let tokens = x.len() / n;
        // Columns of x as the kernel takes them: `wide` is the weight's side, [n / 16][tokens][16].
        let mut wide = vec![0f32; n.div_ceil(WIDTH) * tokens * WIDTH];
        wide.par_chunks_mut(tokens * WIDTH).enumerate().for_each(|(p, panel)| {
            let columns = p * WIDTH..n.min((p + 1) * WIDTH);
            // Whole chunks are copied in registers, not by calls.
            for (row, to) in x.chunks_exact(n).zip(panel.as_chunks_mut::<WIDTH>().0) {
                match row[columns.start..].first_chunk::<WIDTH>() {
                    Some(chunk) => *to = *chunk,
                    None => to[..columns.len()].copy_from_slice(&row[columns.clone()]),
                }
            }
        });
        gram.par_chunks_mut(HEIGHT * n).enumerate().for_each(|(t, rows)| {
            let (first, height) = (t * HEIGHT, rows.len() / n);
            let mut tile = vec![0f32; tokens * height];
            if height == HEIGHT {
                let chunks = x.chunks_exact(n).filter_map(|row| row[first..].first_chunk::<HEIGHT>());
                tile.as_chunks_mut::<HEIGHT>().0.iter_mut().zip(chunks).for_each(|(to, chunk)| *to = *chunk);
            } else {
                let rows = x.chunks_exact(n).map(|row| &row[first..first + height]);
                tile.chunks_exact_mut(height).zip(rows).for_each(|(to, row)| to.copy_from_slice(row));
            }
            for (p, panel) in wide.chunks_exact(tokens * WIDTH).enumerate().skip(first / WIDTH) {
                let columns = p * WIDTH..n.min((p + 1) * WIDTH);
                let mut sums = [[0f32; WIDTH]; HEIGHT];
                for (sums, row) in sums.iter_mut().zip(rows.chunks_exact(n)) {
                    sums[..columns.len()].copy_from_slice(&row[columns.clone()]);
                }
                kernel(&tile, height, panel, &mut sums);
                for (sums, row) in sums.iter().zip(rows.chunks_exact_mut(n)) {
                    row[columns.clone()].copy_from_slice(&sums[..columns.len()]);
                }
            }
        });
    }
}

/// Copies the upper triangle of `gram` [n, n] into the lower one.
pub fn mirror(gram: &mut [f32], n: usize) {
    for i in 0..n {
        for j in 0..i {
            gram[i * n + j] = gram[j * n + i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_are_chains_over_tokens_however_they_are_cut(
            n in 1usize..50,
            tokens in 1usize..600,
            cut in 0usize..600,
            seed in prop::collection::vec(-2f32..2.0, 97),
        ) {
            let x: Vec<f32> = (0..n * tokens).map(|i| seed[(i * 31 + i / 97) % 97]).collect();
            let cut = cut.min(tokens) * n;
            let (mut gram, mut abs) = (vec![0f32; n * n], vec![0f32; n]);
            for part in [&x[..cut], &x[cut..]] {
                add_gram(part, n, &mut gram);
                add_abs(part, &mut abs);
            }
            mirror(&mut gram, n);
            for i in 0..n {
                let column = |j: usize| x.iter().skip(j).step_by(n);
                let want = column(i).fold(0f32, |s, v| s + v.abs());
                prop_assert_eq!(abs[i], want);
                for j in i..n {
                    let want = column(i).zip(column(j)).fold(0f32, |s, (a, b)| a.mul_add(*b, s));
                    prop_assert_eq!(gram[i * n + j].to_bits(), want.to_bits(), "at {}, {}", i, j);
                    prop_assert_eq!(gram[j * n + i].to_bits(), want.to_bits());
                }
            }
        }
    }
}
