//! The kernels for any processor: the sums are plain loops of fixed length, which the compiler vectorizes.

use super::inputs::Inputs;
use super::reference::{CHAINS, sum};
use super::view::{GROUP, Kind, View};

/// `out`[i][r] = row `rows.start + r` of an integer weight times row i of the inputs. A unit is decoded once for all of them.
pub fn integers(view: &View, rows: std::ops::Range<usize>, inputs: &Inputs, out: &mut [&mut [f32]]) {
    // The kind is a constant in each arm, so that decoding has no choices left.
    macro_rules! arms {
        ($($kind:ident),*) => {
            match view.kind() {
                $(Kind::$kind => integers_of::<{ Kind::$kind.unit() }>(Kind::$kind, view, rows, inputs, out),)*
                _ => panic!("floats are no integers"),
            }
        };
    }
    arms!(E2m1, E2m1Halves, Int4, Int4Halves, Int8, Int8Offset, Int2, Ternary, Base3, Tq2);
}

#[inline(always)]
fn integers_of<const UNIT: usize>(
    kind: Kind,
    view: &View,
    rows: std::ops::Range<usize>,
    inputs: &Inputs,
    out: &mut [&mut [f32]],
) {
    let groups = view.groups();
    let mut codes = [0i16; UNIT];
    let mut chains = vec![[0f32; 2]; out.len()];
    for (at, r) in rows.enumerate() {
        chains.fill([0.0; 2]);
        for (u, first) in (0..inputs.columns).step_by(UNIT).enumerate() {
            unpack(kind, view.unit(r, u), &mut codes);
            for (i, chains) in chains.iter_mut().enumerate() {
                let x = &inputs.codes[i * inputs.columns..][first..inputs.columns.min(first + UNIT)];
                for (g, (codes, x)) in codes.as_chunks::<GROUP>().0.iter().zip(x.as_chunks::<GROUP>().0).enumerate() {
                    let mut sum = 0i32;
                    for j in 0..GROUP {
                        sum += i32::from(codes[j]) * i32::from(x[j]);
                    }
                    let g = u * (UNIT / GROUP) + g;
                    let scale = view.scale(r, g * GROUP) * (inputs.scales[i * groups + g] * kind.step());
                    chains[g % 2] = (sum as f32).mul_add(scale, chains[g % 2]);
                }
            }
        }
        out.iter_mut().zip(&chains).for_each(|(out, chains)| out[at] = chains[0] + chains[1]);
    }
}

#[inline(always)]
fn unpack<const UNIT: usize>(kind: Kind, unit: &[u8], codes: &mut [i16; UNIT]) {
    let unit = &unit[..kind.bytes()];
    for (c, code) in codes.iter_mut().enumerate() {
        *code = kind.integer(unit, c) as i16;
    }
}

/// Outputs of rows `rows` of a float weight for the inputs `x`.
pub fn floats(view: &View, rows: std::ops::Range<usize>, x: &[f32], out: &mut [f32]) {
    macro_rules! arms {
        ($($kind:ident),*) => {
            match view.kind() {
                $(Kind::$kind => floats_of(Kind::$kind, view, rows, x, out),)*
                _ => panic!("integers are no floats"),
            }
        };
    }
    arms!(E4m3, Bf16, F16, F32);
}

#[inline(always)]
fn floats_of(kind: Kind, view: &View, rows: std::ops::Range<usize>, x: &[f32], out: &mut [f32]) {
    for (r, out) in rows.zip(out) {
        let mut chains = [0f32; CHAINS];
        for (u, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            let unit = &view.unit(r, u)[..kind.bytes()];
            for (half, x) in x.as_chunks::<CHAINS>().0.iter().enumerate() {
                for j in 0..CHAINS {
                    chains[j] = x[j].mul_add(kind.float(unit, half * CHAINS + j), chains[j]);
                }
            }
        }
        *out = sum(&chains) * view.scale(r, 0);
    }
}
