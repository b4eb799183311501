//! The kernels that are no products, as functions over buffers: rounding of inputs, norms, dequantization, fake quantization, masks. Structures are as the
//! sources have them, and everything is checked to be there.

use super::operations::{WIDE, type_of, wide};
use super::{Buffer, Gpu, Launch};
use crate::error::Result;
use crate::formats::NumberFormat;
use crate::formats::float::Float;
use crate::formats::minifloat::Minifloat;

/// Rows of a tile that is turned, and columns: a group of MXFP4.
const TURNED: (usize, usize) = (64, 32);
/// Threads of a block that rounds inputs.
const ROUNDING: usize = 512;

/// `activations::Arguments`.
#[repr(C)]
struct ActivationArguments {
    input: u64,
    codes: u64,
    scales: u64,
    m: i32,
    k: i32,
    input_type: i32,
    fp8: i32,
}

impl ActivationArguments {
    /// Checked; `codes` and `scales` are noted as written.
    fn new(input: (&Buffer, Float), codes: &Buffer, scales: &Buffer, (m, k): (usize, usize), fp8: bool) -> Self {
        assert!(k.is_multiple_of(8) && input.0.bytes() >= m * k * input.1.size(), "inputs are all there");
        assert!(codes.bytes() >= m * k && scales.bytes() >= 4 * m, "results have room");
        [codes, scales].into_iter().for_each(Buffer::written);
        Self {
            input: input.0.address(),
            codes: codes.address(),
            scales: scales.address(),
            m: m as i32,
            k: k as i32,
            input_type: type_of(input.1),
            fp8: i32::from(fp8),
        }
    }
}

/// Inputs [m, k] to int8, or to E4M3 where `fp8`, one scale a token.
pub fn quantize_activations(
    gpu: &Gpu,
    input: (&Buffer, Float),
    codes: &Buffer,
    scales: &Buffer,
    (m, k): (usize, usize),
    fp8: bool,
) -> Result<()> {
    let mut arguments = ActivationArguments::new(input, codes, scales, (m, k), fp8);
    let launch = Launch { threads: ROUNDING, ..wide("quantize_activations", [m, 1, 1], ROUNDING / 32 * 4) };
    // SAFETY: the structure is the kernel's, and lengths were checked above.
    unsafe { gpu.launch(&launch, &mut [(&raw mut arguments).cast()]) }
}

/// `activations::Norm`.
#[repr(C)]
struct NormArguments {
    weight: u64,
    output: u64,
    weight_type: i32,
    epsilon: f32,
}

/// RMSNorm of inputs [m, k] by `weight` [k]: the numbers, of the inputs' type, into `output`, and those rounded as [`quantize_activations`] does.
///
/// Each is `round(weight * (x / sqrt(mean of squares + epsilon)))`, in f32 until then; kernels/activations.cuh states the order of the sum.
pub fn normalize_activations(
    gpu: &Gpu,
    input: (&Buffer, Float),
    (weight, weight_type, epsilon): (&Buffer, Float, f32),
    (output, codes, scales): (&Buffer, &Buffer, &Buffer),
    (m, k): (usize, usize),
    fp8: bool,
) -> Result<()> {
    assert!(weight.bytes() >= k * weight_type.size(), "the weight is all there");
    assert!(output.bytes() >= m * k * input.1.size(), "the numbers have room");
    let mut arguments = ActivationArguments::new(input, codes, scales, (m, k), fp8);
    let mut norm = NormArguments {
        weight: weight.address(),
        output: output.address(),
        weight_type: type_of(weight_type),
        epsilon,
    };
    let launch = Launch { threads: ROUNDING, ..wide("normalize_activations", [m, 1, 1], ROUNDING / 32 * 4) };
    output.written();
    // SAFETY: the structures are the kernel's, and lengths were checked above.
    unsafe { gpu.launch(&launch, &mut [(&raw mut arguments).cast(), (&raw mut norm).cast()]) }
}

/// `mxfp4::Arguments`.
#[repr(C)]
struct Mxfp4Arguments {
    codes: u64,
    scales: u64,
    output: u64,
    n: i32,
    k: i32,
    output_type: i32,
}

/// MXFP4 [n, k] to floats [n, k], or [k, n] where `turned`.
pub fn dequantize_mxfp4(
    gpu: &Gpu,
    (codes, scales): (&Buffer, &Buffer),
    output: (&Buffer, Float),
    (n, k): (usize, usize),
    turned: bool,
) -> Result<()> {
    assert!(k.is_multiple_of(32) && codes.bytes() >= n * k / 2 && scales.bytes() >= n * k / 32, "codes are all there");
    assert!(output.0.bytes() >= n * k * output.1.size(), "the output has room");
    let mut arguments = Mxfp4Arguments {
        codes: codes.address(),
        scales: scales.address(),
        output: output.0.address(),
        n: n as i32,
        k: k as i32,
        output_type: type_of(output.1),
    };
    let mut launch = wide("dequantize_mxfp4", [(n * k / 8).div_ceil(WIDE), 1, 1], 0);
    output.0.written();
    if turned {
        let (rows, group) = TURNED;
        launch.kernel = "dequantize_mxfp4_turned".into();
        (launch.grid, launch.shared) = ([n.div_ceil(rows), k / group, 1], group * (rows + 1) * 4);
    }
    // SAFETY: the structure is the kernel's, and lengths were checked above.
    unsafe { gpu.launch(&launch, &mut [(&raw mut arguments).cast()]) }
}

/// `fake::Arguments`.
#[repr(C)]
struct FakeArguments {
    input: u64,
    output: u64,
    codes: u64,
    scales: u64,
    zero_points: u64,
    rows: i32,
    k: i32,
    group: i32,
    float: i32,
    kind: i32,
    bits: i32,
    symmetric: i32,
    fraction: i32,
    bias: i32,
    most: f32,
    global: f32,
    given: i32,
}

/// What [`fake_quantize`] writes; scales and zero points are read where they are given.
pub struct Rounded<'b, 'g> {
    /// Values [rows, k] of the weights' type.
    pub values: &'b Buffer<'g>,
    /// [rows, k], int8.
    pub codes: &'b Buffer<'g>,
    /// [rows, k / group], f32.
    pub scales: &'b Buffer<'g>,
    /// The same.
    pub zero_points: &'b Buffer<'g>,
}

/// Whether [`fake_quantize`] knows a format: all but ggml's block types and plain floats.
pub fn can_fake(format: NumberFormat) -> bool {
    !matches!(format, NumberFormat::Ggml(_) | NumberFormat::Half(_))
}

/// Weights [rows, k] in groups rounded to a format and back; `global` is NVFP4's.
///
/// # Panics
/// For formats that it does not know ([`can_fake`]), and where something is too short.
pub fn fake_quantize(
    gpu: &Gpu,
    format: NumberFormat,
    input: (&Buffer, Float),
    out: &Rounded,
    (rows, k, group): (usize, usize, usize),
    global: f32,
    given: bool,
) -> Result<()> {
    assert!(can_fake(format) && k.is_multiple_of(group), "a format with codes, in whole groups");
    let (numbers, groups) = (rows * k, rows * (k / group));
    assert!(input.0.bytes() >= numbers * input.1.size() && out.values.bytes() >= numbers * input.1.size(), "all there");
    assert!(out.codes.bytes() >= numbers && out.scales.bytes().min(out.zero_points.bytes()) >= 4 * groups, "all there");
    let (kind, table) = match format {
        NumberFormat::Int(_) => (0, None),
        NumberFormat::Float(table) => (1, Some(table)),
        NumberFormat::Mx(table) => (2, Some(table)),
        NumberFormat::Nvfp4 => (3, Some(Minifloat::E2M1)),
        _ => (4, None),
    };
    let mut arguments = FakeArguments {
        input: input.0.address(),
        output: out.values.address(),
        codes: out.codes.address(),
        scales: out.scales.address(),
        zero_points: out.zero_points.address(),
        rows: rows as i32,
        k: k as i32,
        group: group as i32,
        float: type_of(input.1),
        kind,
        bits: i32::from(format.bits()),
        symmetric: i32::from(format.symmetric()),
        fraction: table.map_or(0, |t| t.fraction() as i32),
        bias: table.map_or(0, |t| t.bias() as i32),
        most: table.map_or(0.0, Minifloat::max),
        global,
        given: i32::from(given),
    };
    let threads = 128;
    let grid = [groups.div_ceil(threads / 32), 1, 1];
    let launch = Launch { threads, ..wide("fake_quantize", grid, 0) };
    [out.values, out.codes, out.scales, out.zero_points].into_iter().for_each(Buffer::written);
    // SAFETY: the structure is the kernel's, and lengths were checked above.
    unsafe { gpu.launch(&launch, &mut [(&raw mut arguments).cast()]) }
}

/// `mask::Arguments`.
#[repr(C)]
struct MaskArguments {
    input: u64,
    output: u64,
    zeros: u64,
    squares: u64,
    rows: i32,
    k: i32,
    float: i32,
}

/// Two zeros in every four numbers of `input` [rows, k]; `zeros` [rows, k] says where. `squares` [k]: the inputs' squares, summed.
pub fn mask_2_4(
    gpu: &Gpu,
    input: (&Buffer, Float),
    squares: Option<&Buffer>,
    (output, zeros): (&Buffer, &Buffer),
    (rows, k): (usize, usize),
) -> Result<()> {
    assert!(k.is_multiple_of(4) && input.0.bytes().min(output.bytes()) >= rows * k * input.1.size(), "all there");
    assert!(zeros.bytes() >= rows * k && squares.is_none_or(|s| s.bytes() >= 4 * k), "all there");
    let mut arguments = MaskArguments {
        input: input.0.address(),
        output: output.address(),
        zeros: zeros.address(),
        squares: squares.map_or(0, Buffer::address),
        rows: rows as i32,
        k: k as i32,
        float: type_of(input.1),
    };
    let launch = wide("mask_2_4", [(rows * k / 4).div_ceil(WIDE), 1, 1], 0);
    [output, zeros].into_iter().for_each(Buffer::written);
    // SAFETY: the structure is the kernel's, and lengths were checked above.
    unsafe { gpu.launch(&launch, &mut [(&raw mut arguments).cast()]) }
}
