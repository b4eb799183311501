use proptest::prelude::*;

use super::view::{GROUP, ScaleKind, Scales};
use super::*;
use crate::formats::float::Float;

/// A weight with bytes of its own.
struct Owned {
    kind: Kind,
    shape: (usize, usize),
    codes: Vec<u8>,
    step: usize,
    scales: Vec<u8>,
    scale_kind: ScaleKind,
    group: usize,
    /// Whether each unit stands behind its scale: ggml's blocks.
    blocks: bool,
}

impl Owned {
    /// Random codes; a fifth of the int8 ones are -128.
    /// `gap` bytes of something else lie between units, as in ggml's blocks.
    fn random(
        kind: Kind,
        rows: usize,
        units: usize,
        (scale_kind, groups): (ScaleKind, usize),
        gap: usize,
        seed: u64,
    ) -> Self {
        let mut s = seed | 1;
        let mut next = move || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            s
        };
        // The last unit of base 3 may be less.
        let columns = units * kind.unit() - if kind == Kind::Base3 { seed as usize % 5 * GROUP } else { 0 };
        let step = kind.bytes() + if kind.is_float() { 0 } else { gap };
        let mut codes: Vec<u8> = (0..rows * units * step).map(|_| (next() >> 20) as u8).collect();
        if kind == Kind::Int8 {
            codes.iter_mut().for_each(|c| *c = if next() % 5 == 0 { 128 } else { *c });
        }
        if matches!(kind, Kind::Bf16 | Kind::F16 | Kind::F32) {
            // Exponents that no sum of a row overflows with.
            for (i, v) in (0..rows * columns).map(|i| (i, (next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0)) {
                let bytes = match kind {
                    Kind::Bf16 => half::bf16::from_f32(v).to_le_bytes().to_vec(),
                    Kind::F16 => half::f16::from_f32(v * 1e-3).to_le_bytes().to_vec(),
                    _ => v.to_le_bytes().to_vec(),
                };
                codes[i * bytes.len()..(i + 1) * bytes.len()].copy_from_slice(&bytes);
            }
        }
        if kind == Kind::E4m3 {
            codes.iter_mut().for_each(|c| *c = if *c & 0x7f == 0x7f { 0x08 } else { *c });
        }
        let group = if kind.is_float() || groups == 0 { columns } else { GROUP * groups };
        let per_row = columns.div_ceil(group);
        let mut scales = Vec::new();
        for _ in 0..rows * per_row {
            let v = (next() >> 40) as f32 / (1u64 << 24) as f32 - 0.3;
            match scale_kind {
                ScaleKind::E8m0 => {
                    // Rarely one that is much larger than the others, or no number: it leaves nothing of them.
                    let rare = [0, 90, 200, 255][next() as usize % 4];
                    scales.push(if next() % 64 == 0 { rare } else { 118 + (next() % 17) as u8 });
                }
                ScaleKind::Bf16 => scales.extend(half::bf16::from_f32(v).to_le_bytes()),
                ScaleKind::F16 => scales.extend(half::f16::from_f32(v).to_le_bytes()),
                ScaleKind::F32 => scales.extend(v.to_le_bytes()),
            }
        }
        Self { kind, shape: (rows, columns), codes, step, scales, scale_kind, group, blocks: false }
    }

    /// The same in ggml's blocks, with its scales.
    fn random_blocks(kind: Kind, rows: usize, units: usize, seed: u64) -> Self {
        let scale_kind = if kind.step() == 1.0 { ScaleKind::F16 } else { ScaleKind::E8m0 };
        let mut owned = Self::random(kind, rows, units, (scale_kind, 1), 0, seed);
        let blocks = owned.codes.chunks_exact(owned.step).zip(owned.scales.chunks_exact(scale_kind.size()));
        owned.codes = blocks.flat_map(|(c, s)| [s, &c[..kind.bytes()]].concat()).collect();
        (owned.step, owned.blocks) = (scale_kind.size() + kind.bytes(), true);
        owned
    }

    fn view(&self) -> View<'_> {
        let (size, row) = (self.scale_kind.size(), self.shape.1.div_ceil(self.kind.unit()) * self.step);
        let (kind, group) = (self.scale_kind, self.group);
        let scales = match self.blocks {
            true => Scales { kind, bytes: &self.codes, row, step: self.step, group },
            false => Scales { kind, bytes: &self.scales, row: self.shape.1.div_ceil(group) * size, step: size, group },
        };
        let codes = &self.codes[if self.blocks { size } else { 0 }..];
        View::new(self.kind, self.shape, codes, (row, self.step), Some(scales)).unwrap()
    }
}

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    let next = || {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Large ones below 0, so that int8 tokens have -128.
        let v = (s >> 8) as f32 / (1 << 23) as f32 - 1.0;
        if s.is_multiple_of(37) { -127.5 } else { v }
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn reference(view: &View, x: &[f32], activations: Activations, bias: Option<&[f32]>) -> Vec<f32> {
    let (rows, columns) = view.shape();
    let inputs = (!view.kind().is_float()).then(|| Inputs::new(x, columns, activations));
    let mut out = Vec::new();
    for (i, x) in x.chunks_exact(columns).enumerate() {
        let mut x = x.to_vec();
        activations.quantize_token(&mut x, 1.0);
        for r in 0..rows {
            let sum = match &inputs {
                Some(inputs) => super::reference::integers(view, r, inputs, i),
                None => super::reference::floats(view, r, &x),
            };
            out.push(bias.map_or(sum, |b| sum + b[r]));
        }
    }
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    // No number is like another: processors may differ in the payload.
    values.iter().map(|v| if v.is_nan() { u32::MAX } else { v.to_bits() }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_kernel_is_the_reference_bit_for_bit(
        kind in prop::sample::select(Kind::ALL.to_vec()),
        rows in 1usize..40,
        units in 1usize..20,
        scales in (prop::sample::select(vec![ScaleKind::E8m0, ScaleKind::Bf16, ScaleKind::F16, ScaleKind::F32]), 0usize..4),
        n in prop_oneof![1usize..8, Just(70)],
        activations in prop::sample::select(vec![Activations::Float, Activations::DynamicTokenInt8]),
        (lane, blocks) in any::<(bool, bool)>(),
        seed: u64,
    ) {
        let weight = match blocks && !kind.is_float() && kind.unit() == GROUP {
            true => Owned::random_blocks(kind, rows, units, seed),
            false => Owned::random(kind, rows, units, scales, seed as usize / 7 % 3, seed),
        };
        let whole = weight.view();
        let view = if lane && rows > 1 { whole.lane(1, 2) } else { whole };
        let (out, columns) = view.shape();
        let x = values(n * columns, seed as u32);
        let bias = (seed % 2 == 0).then(|| values(out, 7));
        let want = bits(&reference(&view, &x, activations, bias.as_deref()));
        for (path, threads) in Path::here().flat_map(|p| [(p, 1), (p, 3)]) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let source = Source::new(&x, columns, (activations, 1.0));
            // Backwards, as experts pick their rows.
            let picked: Vec<usize> = (0..n).rev().collect();
            let inputs = source.ready_for(&picked, kind, path);
            let mut have = vec![f32::NAN; n * out];
            let task = Task { view, bias: bias.as_deref(), inputs: &inputs, out: &mut have };
            pool.install(|| multiply(vec![task]));
            let have: Vec<f32> = have.chunks_exact(out).rev().flatten().copied().collect();
            prop_assert_eq!(bits(&have), want.clone(), "{:?}, {} threads", path, threads);
        }
    }
}

/// Every way of codes to lie, with every remainder of what kernels take together, on every path.
#[test]
fn every_layout_and_every_remainder_is_the_reference() {
    // One behind the other, with a gap, or, for `None`, in ggml's blocks.
    for gap in [Some(0), Some(2), None] {
        for kind in Kind::ALL.into_iter().filter(|k| !k.is_float() && (gap.is_some() || k.unit() == GROUP)) {
            for groups in [1usize, 2, 3, 4, 5, 15, 16, 17, 33] {
                for (rows, lane) in [1, 3, 4, 5, 9].into_iter().flat_map(|rows| [(rows, false), (rows, true)]) {
                    let (units, seed) = (groups.div_ceil(kind.unit() / GROUP), (groups * 64 + rows) as u64);
                    let weight = match gap {
                        None => Owned::random_blocks(kind, rows * 2, units, seed),
                        Some(gap) => Owned::random(kind, rows * 2, units, (ScaleKind::Bf16, groups % 3), gap, seed),
                    };
                    let view = if lane { weight.view().lane(1, 2) } else { weight.view() };
                    assert_eq!((view.step() == kind.bytes(), weight.blocks), (gap == Some(0), gap.is_none()));
                    let (out, columns) = view.shape();
                    for n in [1, 4] {
                        let x = values(n * columns, seed as u32);
                        let want = bits(&reference(&view, &x, Activations::Float, None));
                        assert!(want.iter().any(|&w| w != 0 && w != u32::MAX), "something to compare");
                        let source = Source::new(&x, columns, (Activations::Float, 1.0));
                        for path in Path::here() {
                            let inputs = source.ready_for(&(0..n).collect::<Vec<_>>(), kind, path);
                            let mut have = vec![f32::NAN; n * out];
                            multiply(vec![Task { view, bias: None, inputs: &inputs, out: &mut have }]);
                            assert_eq!(bits(&have), want, "{path:?} {kind:?} {groups} {rows} {n} {gap:?} {lane}");
                        }
                    }
                }
            }
        }
    }
}

/// Weights that are large enough for more than one thread.
#[test]
fn threads_do_not_show() {
    for kind in Kind::ALL.into_iter().filter(|k| !k.is_float()) {
        let weight = Owned::random(kind, 600, 720usize.div_ceil(kind.bytes()), (ScaleKind::Bf16, 1), 0, 9);
        let view = weight.view();
        let (out, columns) = view.shape();
        assert!(out * view.row_bytes() > LEAST);
        let x = values(columns, 3);
        let want = bits(&reference(&view, &x, Activations::Float, None));
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let inputs = Source::new(&x, columns, (Activations::Float, 1.0)).ready(&[0], kind);
            let mut have = vec![f32::NAN; out];
            pool.install(|| multiply(vec![Task { view, bias: None, inputs: &inputs, out: &mut have }]));
            assert_eq!(bits(&have), want, "{kind:?}, {threads} threads");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn exact_rows_are_the_product_with_the_values_bit_for_bit(
        kind in prop::sample::select(Kind::ALL.to_vec()),
        rows in 1usize..70,
        units in 1usize..20,
        (float, scale) in prop::sample::select(vec![
            (Float::F32, ScaleKind::F32), (Float::F32, ScaleKind::F16), (Float::Bf16, ScaleKind::Bf16),
            (Float::Bf16, ScaleKind::E8m0), (Float::F16, ScaleKind::F16),
        ]),
        groups in 0usize..4,
        (lane, blocks) in any::<(bool, bool)>(),
        seed: u64,
    ) {
        let float = if blocks { Float::F32 } else { float };
        let weight = match blocks && kind.unit() == GROUP && !kind.is_float() {
            true => Owned::random_blocks(kind, rows, units, seed),
            false => Owned::random(kind, rows, units, (scale, groups), seed as usize / 7 % 3, seed),
        };
        let whole = weight.view();
        let view = if lane && rows > 1 { whole.lane(1, 2) } else { whole };
        let (out, columns) = view.shape();
        let (x, bias) = (values(columns, seed as u32), (seed % 2 == 0).then(|| values(out, 7)));
        let mut have = vec![f32::NAN; out];
        if exact::row(&view, float, &x, bias.as_deref(), &mut have) {
            let value = |r: usize, c: usize| {
                let integer = kind.integer(view.unit(r, c / kind.unit()), c % kind.unit()) as f32;
                float.round(integer * (kind.step() * view.scale(r, c)))
            };
            for (r, have) in have.iter().enumerate() {
                let w: Vec<f32> = (0..columns).map(|c| value(r, c)).collect();
                let want = crate::ops::matmul::reference(&x, &w, bias.as_ref().map(|b| b[r]));
                prop_assert_eq!(bits(&[*have]), bits(&[want]), "row {}: {} {}", r, have, want);
            }
        } else {
            #[cfg(target_arch = "x86_64")]
            prop_assert!(kind.is_float() || !avx2::is_here());
        }
    }
}

#[test]
fn the_worst_codes_do_not_saturate() {
    // Every product as large as it can be, of both signs, in the longest group sums.
    for kind in Kind::ALL.into_iter().filter(|k| !k.is_float()) {
        for byte in [0x00u8, 0x77, 0xff, 0x80, 0x7f, 0xaa] {
            if matches!(kind, Kind::Ternary | Kind::Tq2 | Kind::Base3) {
                continue; // No code is larger than 1; random ones were tested above.
            }
            let units = 4;
            let columns = units * kind.unit();
            let codes = vec![byte; 8 * units * kind.bytes()];
            let ones = 1f32.to_le_bytes().repeat(8);
            let scales = Scales { kind: ScaleKind::F32, bytes: &ones, row: 4, step: 4, group: columns };
            let (row, step) = (units * kind.bytes(), kind.bytes());
            let view = View::new(kind, (8, columns), &codes, (row, step), Some(scales)).unwrap();
            for (n, sign) in [(1, -1.0), (1, 1.0), (9, -1.0), (9, 1.0)] {
                let x = vec![sign * 3f32; n * columns];
                let want = reference(&view, &x, Activations::DynamicTokenInt8, None);
                let source = Source::new(&x, columns, (Activations::DynamicTokenInt8, 1.0));
                for path in Path::here() {
                    let inputs = source.ready_for(&(0..n).collect::<Vec<_>>(), kind, path);
                    let mut have = vec![0f32; n * 8];
                    multiply(vec![Task { view, bias: None, inputs: &inputs, out: &mut have }]);
                    assert_eq!(bits(&have), bits(&want), "{path:?} {kind:?} {byte:#x} {n} {sign}");
                }
            }
        }
    }
}

#[test]
fn what_kernels_cannot_take_is_no_view() {
    let bytes = [0u8; 4096];
    let scales = |group| Some(Scales { kind: ScaleKind::F32, bytes: &bytes, row: 64, step: 4, group });
    let view = |kind, columns, scales| View::new(kind, (2, columns), &bytes, (512, 16.max(Kind::bytes(kind))), scales);
    assert!(view(Kind::Int4, 64, scales(32)).is_some());
    assert!(view(Kind::Int4, 48, scales(16)).is_none(), "half a group");
    assert!(view(Kind::Int4, 64, scales(16)).is_none(), "scales change inside a group");
    assert!(view(Kind::Int4, 64, None).is_none(), "no scales");
    assert!(view(Kind::E4m3, 64, scales(32)).is_none(), "scales change inside a chain");
    assert!(view(Kind::E4m3, 64, scales(64)).is_some());
    assert!(view(Kind::Tq2, 128, scales(128)).is_none(), "half a block");
}

/// NaN survives what clamps: an infinite scale would become a plausible number in SwiGLU.
#[test]
fn a_scale_that_is_no_number_gives_none() {
    let codes = vec![0x22u8; 8 * 16 * 16];
    let mut scales = vec![127u8; 8 * 16];
    scales[3 * 16 + 5] = 255;
    let scales = Scales { kind: ScaleKind::E8m0, bytes: &scales, row: 16, step: 1, group: 32 };
    let view = View::new(Kind::E2m1, (8, 512), &codes, (256, 16), Some(scales)).unwrap();
    for n in [1, 9] {
        let x = vec![1f32; n * 512];
        let inputs = Source::new(&x, 512, (Activations::Float, 1.0)).ready(&(0..n).collect::<Vec<_>>(), Kind::E2m1);
        let mut out = vec![0f32; n * 8];
        multiply(vec![Task { view, bias: None, inputs: &inputs, out: &mut out }]);
        assert!(out.iter().enumerate().all(|(i, o)| o.is_nan() == (i % 8 == 3)), "{out:?}");
    }
}
