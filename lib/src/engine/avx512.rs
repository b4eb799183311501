//! A few rows of inputs on processors with AVX-512, VNNI and VBMI: what [`avx2::vector`](super::avx2::vector) does, with four
//! groups a register, for codes of 2, 4 and 8 bits. Others, and many inputs, stay with AVX2.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx2;
use super::avx2::codes::DOUBLED;
use super::avx2::scales::four_rows;
use super::inputs::Inputs;
use super::view::{GROUP, Kind, ScaleKind, View};

/// Groups that go together, one a lane of 16 bytes.
const GROUPS: usize = 4;
/// Columns that go together.
const QUAD: usize = GROUPS * GROUP;

/// The units of a row lie one behind the other.
const TOGETHER: u8 = 0;
/// The units of a row lie in ggml's blocks, each behind its scale.
const BLOCKS: u8 = 1;
/// The units of a row lie with something else between them.
const APART: u8 = 2;

/// Whether this processor has what the kernels need.
pub fn is_here() -> bool {
    avx2::is_here()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
}

/// Whether there is a kernel for this kind.
pub fn takes(kind: Kind) -> bool {
    use Kind::*;
    matches!(kind, E2m1 | E2m1Halves | Int4 | Int4Halves | Int8 | Int8Offset | Int2 | Ternary)
}

/// Calls a function with the type that a kind's codes have.
macro_rules! for_kind {
    ($kind:expr, $($call:ident)::+($($argument:expr),*)) => {
        match $kind {
            Kind::E2m1 => $($call)::+::<Nibbles<true, false>>($($argument),*),
            Kind::E2m1Halves => $($call)::+::<Nibbles<true, true>>($($argument),*),
            Kind::Int4 => $($call)::+::<Nibbles<false, false>>($($argument),*),
            Kind::Int4Halves => $($call)::+::<Nibbles<false, true>>($($argument),*),
            Kind::Int8 => $($call)::+::<Bytes<false>>($($argument),*),
            Kind::Int8Offset => $($call)::+::<Bytes<true>>($($argument),*),
            Kind::Int2 | Kind::Ternary => $($call)::+::<Quarters>($($argument),*),
            other => panic!("no kernel for {other:?}"),
        }
    };
}

/// A register.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Register<T, const N: usize>([T; N]);

/// One row of inputs in the order in which a kind's codes meet it.
pub struct Arranged {
    kind: Kind,
    groups: usize,
    /// Codes of each quad of groups.
    codes: Vec<[Register<u8, 64>; 2]>,
    /// The scale of each group of a quad, four times each; times the kind's step.
    scales: Vec<Register<f32, 16>>,
    /// Sum of the codes of each group times the kind's offset, the same way.
    corrections: Vec<Register<i32, 16>>,
}

impl Arranged {
    /// Row `i` of `inputs` for weights of `kind`.
    ///
    /// # Panics
    /// Where there is no kernel for it.
    pub fn new(inputs: &Inputs, i: usize, kind: Kind) -> Self {
        for_kind!(kind, Self::of(inputs, i, kind))
    }

    fn of<C: Codes>(inputs: &Inputs, i: usize, kind: Kind) -> Self {
        let groups = inputs.groups();
        let quads = groups.div_ceil(GROUPS);
        let mut a = Self {
            kind,
            groups,
            codes: vec![[Register([0; 64]); 2]; quads],
            scales: vec![Register([0.0; 16]); quads],
            corrections: vec![Register([0; 16]); quads],
        };
        let x = &inputs.codes[i * inputs.columns..][..inputs.columns];
        for (x, out) in x.chunks(QUAD).zip(&mut a.codes) {
            // What is behind the last column meets zeros.
            let mut whole = [0i8; QUAD];
            whole[..x.len()].copy_from_slice(x);
            let [low, high] = out;
            C::arrange(&whole, [&mut low.0, &mut high.0]);
        }
        for g in 0..groups {
            let at = g % GROUPS * 4..g % GROUPS * 4 + 4;
            a.scales[g / GROUPS].0[at.clone()].fill(inputs.scales[i * groups + g] * kind.step());
            a.corrections[g / GROUPS].0[at].fill(inputs.sums[i * groups + g] * kind.offset(true));
        }
        a
    }
}

/// A kind's codes, four groups at a time.
trait Codes {
    /// Bytes of a group's codes.
    const BYTES: usize;

    /// The scale that stands in front of them in ggml's blocks, where that has such.
    const SCALE: Option<ScaleKind>;

    /// Bytes of that.
    const LEAD: usize = match Self::SCALE {
        Some(kind) => kind.size(),
        None => 0,
    };

    /// Lays out the inputs of four groups in the order in which [`Self::dots`] meets them.
    fn arrange(x: &[i8; QUAD], out: [&mut [u8; 64]; 2]);

    /// The sums of the products of each group's codes, in four parts, with
    /// [`Kind::offset`](super::view::Kind::offset) still in the codes; where they lie in `BLOCKS`, their scales, as they are
    /// stored: byte by byte, or in two bytes each.
    ///
    /// # Safety
    /// [`is_here`]. `codes` has four units, each `step` bytes behind the one before, and `x` 128 bytes; of `BLOCKS` the first
    /// scale is in front of `codes`, and `step` is the block's length.
    unsafe fn dots<const LAYOUT: u8>(codes: *const u8, step: usize, x: *const u8) -> (__m512i, u64);
}

/// 4 bits: E2M1 where `TABLE`, integers otherwise; ggml's order where `HALVES`.
struct Nibbles<const TABLE: bool, const HALVES: bool>;

impl<const TABLE: bool, const HALVES: bool> Nibbles<TABLE, HALVES> {
    const BLOCK: usize = Self::LEAD + Self::BYTES;
    /// Where in four blocks the codes of the first three lie.
    const CODES: [u8; 64] = {
        let mut at = [0; 64];
        let mut i = 0;
        while i < 3 * Self::BYTES {
            at[i] = (Self::LEAD + i / Self::BYTES * Self::BLOCK + i % Self::BYTES) as u8;
            i += 1;
        }
        at
    };
    /// Where the scales lie.
    const SCALES: [u8; 64] = {
        let mut at = [0; 64];
        let mut i = 0;
        while i < GROUPS * Self::LEAD {
            at[i] = (i / Self::LEAD * Self::BLOCK + i % Self::LEAD) as u8;
            i += 1;
        }
        at
    };

    /// The codes of four units, one a lane, and the scales of blocks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn load<const LAYOUT: u8>(codes: *const u8, step: usize) -> (__m512i, u64) {
        // SAFETY: the caller's.
        unsafe {
            if LAYOUT == TOGETHER {
                return (load(codes), 0);
            }
            if LAYOUT == BLOCKS {
                let first = codes.wrapping_sub(Self::LEAD);
                // The first 64 bytes of four blocks, and the codes of the fourth.
                let (early, last) = (load(first), _mm_loadu_si128(codes.add(3 * Self::BLOCK).cast()));
                let three = _mm512_permutexvar_epi8(load(Self::CODES.as_ptr()), early);
                let scales = _mm512_permutexvar_epi8(load(Self::SCALES.as_ptr()), early);
                let scales = _mm_cvtsi128_si64(_mm512_castsi512_si128(scales)) as u64;
                return (_mm512_inserti32x4::<3>(three, last), scales);
            }
            let unit = |i: usize| _mm_loadu_si128(codes.add(i * step).cast());
            let all = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(unit(0)), unit(1));
            (_mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(all, unit(2)), unit(3)), 0)
        }
    }
}

impl<const TABLE: bool, const HALVES: bool> Codes for Nibbles<TABLE, HALVES> {
    const BYTES: usize = 16;
    const SCALE: Option<ScaleKind> = Some(if TABLE { ScaleKind::E8m0 } else { ScaleKind::F16 });

    fn arrange(x: &[i8; QUAD], [low, high]: [&mut [u8; 64]; 2]) {
        for i in 0..64 {
            let group = &x[i / 16 * GROUP..][..GROUP];
            let at = if HALVES { [i % 16, i % 16 + 16] } else { [i % 16 * 2, i % 16 * 2 + 1] };
            (low[i], high[i]) = (group[at[0]] as u8, group[at[1]] as u8);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    unsafe fn dots<const LAYOUT: u8>(codes: *const u8, step: usize, x: *const u8) -> (__m512i, u64) {
        // SAFETY: the caller's.
        unsafe {
            let (codes, scales) = Self::load::<LAYOUT>(codes, step);
            let shifted = _mm512_srli_epi16::<4>(codes);
            let (low, high) = if TABLE {
                // Six bits of each index count, and the table is there for each value of the upper two.
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(DOUBLED.as_ptr().cast()));
                (_mm512_permutexvar_epi8(codes, table), _mm512_permutexvar_epi8(shifted, table))
            } else {
                let mask = _mm512_set1_epi8(15);
                (_mm512_and_si512(codes, mask), _mm512_and_si512(shifted, mask))
            };
            let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, load(x));
            (_mm512_dpbusd_epi32(sums, high, load(x.add(64))), scales)
        }
    }
}

/// 8 bits, with 128 added where `OFFSET`.
struct Bytes<const OFFSET: bool>;

impl<const OFFSET: bool> Codes for Bytes<OFFSET> {
    const BYTES: usize = 32;
    const SCALE: Option<ScaleKind> = Some(ScaleKind::F16);

    fn arrange(x: &[i8; QUAD], [low, high]: [&mut [u8; 64]; 2]) {
        let (first, last) = x.split_at(64);
        low.iter_mut().chain(high).zip(first.iter().chain(last)).for_each(|(o, x)| *o = *x as u8);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    unsafe fn dots<const LAYOUT: u8>(codes: *const u8, step: usize, x: *const u8) -> (__m512i, u64) {
        // SAFETY: the caller's.
        unsafe {
            let two = |first: *const u8, x| {
                let codes = match LAYOUT {
                    TOGETHER => load(first),
                    _ => {
                        let half = _mm512_castsi256_si512(_mm256_loadu_si256(first.cast()));
                        _mm512_inserti64x4::<1>(half, _mm256_loadu_si256(first.add(step).cast()))
                    }
                };
                let codes = if OFFSET { codes } else { _mm512_xor_si512(codes, _mm512_set1_epi8(-128)) };
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, load(x))
            };
            // A group has two lanes of its half.
            let (a, b) = (two(codes, x), two(codes.add(2 * step), x.add(64)));
            let sums = _mm512_add_epi32(
                _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
            );
            if LAYOUT != BLOCKS {
                return (sums, 0);
            }
            let scale = |group: usize| codes.add(group * step).wrapping_sub(2).cast::<i16>().read_unaligned();
            let scales = _mm_cvtsi32_si128(i32::from(scale(0)));
            let scales = _mm_insert_epi16::<1>(scales, i32::from(scale(1)));
            let scales = _mm_insert_epi16::<2>(scales, i32::from(scale(2)));
            (sums, _mm_cvtsi128_si64(_mm_insert_epi16::<3>(scales, i32::from(scale(3)))) as u64)
        }
    }
}

/// 2 bits, four columns a byte.
struct Quarters;

impl Codes for Quarters {
    const BYTES: usize = 8;
    const SCALE: Option<ScaleKind> = None;

    fn arrange(x: &[i8; QUAD], [low, high]: [&mut [u8; 64]; 2]) {
        for i in 0..64 {
            // A lane's first half has columns 4 i, or 4 i + 2, its last half those behind them.
            let column = i / 16 * GROUP + i % 8 * 4 + i % 16 / 8;
            (low[i], high[i]) = (x[column] as u8, x[column + 2] as u8);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    unsafe fn dots<const LAYOUT: u8>(codes: *const u8, step: usize, x: *const u8) -> (__m512i, u64) {
        // SAFETY: the caller's.
        unsafe {
            let eight = |i: usize| codes.add(i * step).cast::<i64>().read_unaligned();
            let four = match LAYOUT {
                TOGETHER => _mm256_loadu_si256(codes.cast()),
                _ => _mm256_set_epi64x(eight(3), eight(2), eight(1), eight(0)),
            };
            // Both halves of a lane have the group's codes, the last one moved by a column.
            let twice =
                _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), _mm512_castsi256_si512(four));
            let moved = _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2));
            let mask = _mm512_set1_epi8(3);
            let (low, high) = (_mm512_and_si512(moved, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(moved), mask));
            let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, load(x));
            (_mm512_dpbusd_epi32(sums, high, load(x.add(64))), 0)
        }
    }
}

/// 64 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const u8) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

/// `out`[i][r] = row `rows.start + r` of the weight times inputs i.
///
/// # Panics
/// Where the processor lacks what [`is_here`] asks for, or shapes do not fit.
pub fn integers(view: &View, rows: Range<usize>, inputs: &[Arranged], out: &mut [&mut [f32]]) {
    assert!(is_here(), "the caller has asked for this processor");
    assert!(rows.end <= view.shape().0 && inputs.len() == out.len(), "rows of the weight, one output an input");
    assert!(inputs.iter().all(|a| a.kind == view.kind() && a.groups == view.groups()));
    // SAFETY: the features are there, and shapes were checked here and where views are made.
    unsafe { for_kind!(view.kind(), in_layout(view, rows, inputs, out)) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn in_layout<C: Codes>(view: &View, rows: Range<usize>, inputs: &[Arranged], out: &mut [&mut [f32]]) {
    // SAFETY: the caller's, and what each expects is looked at here.
    unsafe {
        if view.step() == C::BYTES {
            fours::<C, TOGETHER>(view, rows, inputs, out)
        } else if C::SCALE.is_some_and(|kind| view.in_blocks(kind)) {
            fours::<C, BLOCKS>(view, rows, inputs, out)
        } else {
            fours::<C, APART>(view, rows, inputs, out)
        }
    }
}

/// What is kept of four rows: by quad, then by row.
struct Scratch {
    /// Sums as [`Codes::dots`] gives them.
    parts: Vec<[__m512i; 4]>,
    /// Scales as they are stored.
    stored: Vec<[u64; 4]>,
    /// Scales [groups, 4].
    scales: Vec<f32>,
}

/// Lines of rows that are asked for, one after the other. They need not be there.
struct Ahead {
    /// How many are left.
    lines: usize,
    at: *const u8,
    /// Where the row ends.
    end: *const u8,
    /// From there to the next row.
    gap: usize,
    /// From a row's beginning to the next one's.
    row: usize,
}

impl Ahead {
    /// `lines` of the rows of `view` that begin at `first`.
    fn new(view: &View, first: *const u8, lines: usize) -> Self {
        let bytes = view.groups() * view.step();
        let gap = view.row() - bytes.min(view.row());
        // Rows that lie together are one.
        let (bytes, gap) = if gap < 64 { (usize::MAX / 4, 0) } else { (bytes, gap) };
        Self { lines, at: first, end: first.wrapping_add(bytes), gap, row: view.row() }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn ask(&mut self) {
        if self.lines == 0 {
            return;
        }
        self.lines -= 1;
        _mm_prefetch::<_MM_HINT_T0>(self.at.cast());
        self.at = self.at.wrapping_add(64);
        if self.at >= self.end {
            self.at = self.end.wrapping_add(self.gap);
            self.end = self.end.wrapping_add(self.row);
        }
    }
}

/// Rows go one after the other, and the next four are asked for meanwhile, evenly over all that is done with the first
/// inputs: asked for in a heap, lines would wait for each other, and the memory for the next heap.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn fours<C: Codes, const LAYOUT: u8>(
    view: &View,
    rows: Range<usize>,
    inputs: &[Arranged],
    out: &mut [&mut [f32]],
) {
    let quads = view.groups().div_ceil(GROUPS);
    let mut scratch = Scratch {
        parts: vec![[_mm512_setzero_si512(); 4]; quads],
        stored: vec![[0; 4]; if LAYOUT == BLOCKS { quads } else { 0 }],
        scales: vec![0f32; if LAYOUT == BLOCKS { 0 } else { quads * 16 }],
    };
    let lines = (4 * view.groups() * view.step()).div_ceil(64);
    let in_sums = (lines - lines.min(4 * (view.groups() / 16) * asks::<C>())).div_ceil(quads);
    for first in rows.clone().step_by(4) {
        // A last row stands in for those that are missing.
        let four = std::array::from_fn(|i| (first + i).min(rows.end - 1));
        let mut ahead = Ahead::new(view, view.row_start(first).wrapping_add(4 * view.row()), lines);
        for (i, (a, out)) in inputs.iter().zip(out.iter_mut()).enumerate() {
            // SAFETY: the caller's; these are rows of the view.
            let sums = unsafe {
                for (r, row) in four.into_iter().enumerate() {
                    row_parts::<C, LAYOUT>(view, row, a, &mut scratch, r, &mut ahead);
                }
                if i == 0 && LAYOUT != BLOCKS {
                    four_rows(view, four, &mut scratch.scales);
                }
                sums::<C, LAYOUT>(&scratch, a, &mut ahead, in_sums)
            };
            let at = first - rows.start;
            let n = out.len().min(at + 4) - at;
            out[at..at + n].copy_from_slice(&sums[..n]);
        }
    }
}

/// The dots of a row, as row `r` of the scratch.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn row_parts<C: Codes, const LAYOUT: u8>(
    view: &View,
    row: usize,
    a: &Arranged,
    to: &mut Scratch,
    r: usize,
    ahead: &mut Ahead,
) {
    let step = match LAYOUT {
        TOGETHER => C::BYTES,
        BLOCKS => C::LEAD + C::BYTES,
        _ => view.step(),
    };
    let whole = view.groups() / GROUPS;
    let start = if LAYOUT == BLOCKS { view.block_start(row).wrapping_add(C::LEAD) } else { view.row_start(row) };
    let x = a.codes.as_ptr().cast::<u8>();
    let parts = to.parts.as_mut_ptr().cast::<__m512i>().wrapping_add(r);
    let stored = to.stored.as_mut_ptr().cast::<u64>().wrapping_add(r);
    let put = |quad: usize, codes, step| {
        // SAFETY: four units of the row, or of its copy; inputs and scratch have every quad.
        unsafe {
            let (sums, scales) = C::dots::<LAYOUT>(codes, step, x.add(quad * QUAD));
            parts.add(4 * quad).write(sums);
            if LAYOUT == BLOCKS {
                stored.add(4 * quad).write(scales);
            }
        }
    };
    // Four quads a turn, so that less is done beside them.
    for quad in (0..whole / 4 * 4).step_by(4) {
        let at = start.wrapping_add(quad * GROUPS * step);
        for i in 0..4 {
            for _ in i * asks::<C>() / 4..(i + 1) * asks::<C>() / 4 {
                ahead.ask();
            }
            put(quad + i, at.wrapping_add(i * GROUPS * step), step);
        }
    }
    for quad in whole / 4 * 4..whole {
        put(quad, start.wrapping_add(quad * GROUPS * step), step);
    }
    let left = view.groups() % GROUPS;
    if left > 0 {
        // The last groups; what is behind them meets inputs of 0. A byte of 0 is the scale 2^-127, and numbers that small are
        // slow; 127 is 1.
        let mut units = [if LAYOUT == BLOCKS && C::SCALE == Some(ScaleKind::E8m0) { 127u8 } else { 0 }; 192];
        let lead = if LAYOUT == BLOCKS { C::LEAD } else { 0 };
        for group in 0..left {
            let from = start.wrapping_add((whole * GROUPS + group) * step).wrapping_sub(lead);
            // SAFETY: a unit of the row, behind its scale where it has one.
            let unit = unsafe { std::slice::from_raw_parts(from, lead + C::BYTES) };
            units[group * (lead + C::BYTES)..][..lead + C::BYTES].copy_from_slice(unit);
        }
        put(whole, units.as_ptr().wrapping_add(lead), lead + C::BYTES);
    }
}

/// Lines that are asked for with four quads of codes; the rest with the sums.
const fn asks<C: Codes>() -> usize {
    3 * GROUPS * C::BYTES / 64
}

/// What the parts of four rows come to. With each quad so many lines are asked for.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn sums<C: Codes, const LAYOUT: u8>(
    scratch: &Scratch,
    a: &Arranged,
    ahead: &mut Ahead,
    lines_a_quad: usize,
) -> [f32; 4] {
    let mut chains = _mm256_setzero_ps();
    for (quad, &[r0, r1, r2, r3]) in scratch.parts.iter().enumerate() {
        for _ in 0..lines_a_quad {
            ahead.ask();
        }
        // The four parts of four rows: two steps of a transposition, each with the sum of what it brings side by side.
        let add = |a, b| _mm512_add_epi32(a, b);
        let pair = |a, b| add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low, high) = (pair(r0, r1), pair(r2, r3));
        let sums = add(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
        // SAFETY: all have every quad.
        unsafe {
            let own = match LAYOUT {
                BLOCKS => numbers::<C>(scratch.stored.get_unchecked(quad)),
                _ => _mm512_loadu_ps(scratch.scales.as_ptr().add(16 * quad)),
            };
            let corrections = _mm512_load_si512(a.corrections.as_ptr().add(quad).cast());
            let of_inputs = _mm512_load_ps(a.scales.as_ptr().add(quad).cast());
            let sums = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, corrections));
            let scales = _mm512_mul_ps(own, of_inputs);
            // Two groups go to the two chains before the next two.
            chains = _mm256_fmadd_ps(_mm512_castps512_ps256(sums), _mm512_castps512_ps256(scales), chains);
            let (sums, scales) = (_mm512_extractf32x8_ps::<1>(sums), _mm512_extractf32x8_ps::<1>(scales));
            chains = _mm256_fmadd_ps(sums, scales, chains);
        }
    }
    let sums = _mm_add_ps(_mm256_castps256_ps128(chains), _mm256_extractf128_ps::<1>(chains));
    let mut out = [0f32; 4];
    // SAFETY: four numbers.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// The scales of four groups of four rows, group by group.
#[inline]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vbmi")]
fn numbers<C: Codes>(stored: &[u64; 4]) -> __m512 {
    // SAFETY: four numbers of 64 bits.
    let rows = unsafe { _mm256_loadu_si256(stored.as_ptr().cast()) };
    if C::SCALE == Some(ScaleKind::E8m0) {
        let places = _mm256_setr_epi8(
            0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        );
        let bytes = _mm256_castsi256_si128(_mm256_permutexvar_epi8(places, rows));
        return power(_mm512_cvtepu8_epi32(bytes));
    }
    let places = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_cvtph_ps(_mm256_permutexvar_epi16(places, rows))
}

/// 2^(e - 127).
#[inline]
#[target_feature(enable = "avx512f")]
fn power(exponents: __m512i) -> __m512 {
    // A byte of 0 stands for 2^-127, which has no bit of the exponent set, and 255 is no number.
    let last = _mm512_set1_epi32(1 << 22);
    let bits = _mm512_max_epi32(_mm512_slli_epi32::<23>(exponents), last);
    let infinite = _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(0x7f80_0000));
    _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, infinite, bits, last))
}
