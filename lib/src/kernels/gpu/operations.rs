//! Products, over experts too, as functions over buffers: structures as the sources have them, grids, shared memory, and checks that everything is there.

use std::ffi::c_void;

use super::product::{BLOCKS, Block, Extents, Parts, Product};
use super::{Buffer, Gpu, Launch};
use crate::error::Result;
use crate::formats::float::Float;

/// Threads of a block of most of the other kernels.
pub(super) const WIDE: usize = 256;
/// Threads of the block that groups rows, and the most experts that it knows: `routes::THREADS` and `routes::EXPERTS`.
const GROUPING: usize = 1024;
const ROUTED: usize = 256;
/// Columns of a scale at most: 131072 products of -128 by -128 no longer fit an int32.
pub const LARGEST_GROUP: usize = 65_536;
/// `FloatType` of kernels/common.cuh.
pub(super) fn type_of(float: Float) -> i32 {
    match float {
        Float::Bf16 => 0,
        Float::F16 => 1,
        Float::F32 => 2,
    }
}

/// `gemm::Arguments`.
#[repr(C)]
struct ProductArguments {
    weight: u64,
    weight_scale: u64,
    input: u64,
    input_scale: u64,
    bias: u64,
    output: u64,
    m: i32,
    n: i32,
    k: i32,
    group: i32,
    scale_type: i32,
    output_type: i32,
    parts: Parts,
}

/// `gemm::Experts`.
#[repr(C)]
struct ExpertArguments {
    tiles: u64,
    used: u64,
    rows: u64,
    swiglu: i32,
    alpha: f32,
    limit: f32,
}

/// Weights [experts, N, K] of linear layers, as a checkpoint has them.
pub struct Weight<'g> {
    /// Codes, rows one behind the other.
    pub codes: Buffer<'g>,
    /// [experts, N, K / group].
    pub scales: Buffer<'g>,
    /// Of the scales; of E8M0 it says nothing.
    pub scale_type: Float,
    /// [experts, N] of the output's type.
    pub bias: Option<Buffer<'g>>,
    /// How many layers; 1 for a single one.
    pub experts: usize,
    /// Outputs.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Columns of a scale.
    pub group: usize,
}

impl Weight<'_> {
    fn extents(&self) -> Extents {
        Extents { n: self.n, k: self.k, group: self.group, scale: self.scale_type }
    }
}

/// Inputs [M, K].
pub struct Inputs<'b, 'g> {
    /// int8 or bf16.
    pub values: &'b Buffer<'g>,
    /// [M] in f32, for int8.
    pub scales: Option<&'b Buffer<'g>>,
    /// How many there are.
    pub rows: usize,
}

/// Which rows go to which expert; made on the GPU by `group_rows`.
pub struct Routes<'g> {
    /// [tiles, 4]: expert, first row, rows, and 0.
    pub tiles: Buffer<'g>,
    /// [1]: how many tiles there are.
    pub used: Buffer<'g>,
    /// [tokens * top_k]: the token of each row.
    pub rows: Buffer<'g>,
    /// [tokens, top_k]: the row of each token at each of its experts.
    pub places: Buffer<'g>,
    /// Room for tiles.
    pub tile_count: usize,
    /// Rows of a tile.
    pub tile: usize,
    /// Tokens, and experts of each.
    pub tokens: (usize, usize),
    /// All experts.
    pub count: usize,
}

/// How the rows of a layer's experts are taken and what becomes of their outputs.
#[derive(Debug, Clone, Copy)]
pub struct Mixture {
    /// Rows are gathered from the tokens' inputs; otherwise each row has its own.
    pub gather: bool,
    /// alpha and limit: outputs alternate between gates and what goes up, and N / 2 come out.
    pub swiglu: Option<(f32, f32)>,
}

impl Product {
    /// `output` [rows, N] = inputs W^T + bias, or of a [`Mixture`] each row by its expert's weight.
    ///
    /// # Panics
    /// Where something is shorter than the shapes say.
    pub fn launch(
        &self,
        gpu: &Gpu,
        w: &Weight,
        inputs: &Inputs,
        output: (&Buffer, Float),
        block: Block,
        experts: Option<(Grouped, Mixture)>,
    ) -> Result<()> {
        let experts = experts.map(|(grouped, mixture)| (grouped.0, mixture));
        let rows = experts.map_or(inputs.rows, |(r, _)| r.tokens.0 * r.tokens.1);
        let wide = if experts.is_some_and(|(_, m)| m.swiglu.is_some()) { w.n / 2 } else { w.n };
        let groups = w.k / w.group;
        assert!(w.k.is_multiple_of(w.group) && w.group.is_multiple_of(32), "groups are whole");
        assert!(w.group <= LARGEST_GROUP, "the sum of a group fits 32 bits");
        assert!(BLOCKS.contains(&block), "a block is one of the kernels'");
        assert!(w.codes.bytes() >= w.experts * w.n * w.k * self.codes.bits() / 8, "codes are all there");
        assert!(w.scales.bytes() >= w.experts * w.n * groups * self.codes.scale_bytes(w.scale_type), "scales too");
        assert!(w.bias.as_ref().is_none_or(|b| b.bytes() >= w.experts * w.n * output.1.size()), "biases too");
        assert!(inputs.values.bytes() >= inputs.rows * w.k * if self.int8 { 1 } else { 2 }, "inputs too");
        assert!(!self.int8 || inputs.scales.is_some_and(|s| s.bytes() >= 4 * inputs.rows), "their scales too");
        assert!(output.0.bytes() >= rows * wide * output.1.size(), "the output has room");
        let tiles = experts.map_or(rows.div_ceil(block.tokens), |(r, _)| r.tile_count);
        let parts = Parts::of(w.k, w.group);
        let mut arguments = ProductArguments {
            weight: w.codes.address(),
            weight_scale: w.scales.address(),
            input: inputs.values.address(),
            input_scale: inputs.scales.map_or(0, Buffer::address),
            bias: w.bias.as_ref().map_or(0, Buffer::address),
            output: output.0.address(),
            m: rows as i32,
            n: w.n as i32,
            k: w.k as i32,
            group: w.group as i32,
            scale_type: type_of(w.scale_type),
            output_type: type_of(output.1),
            parts,
        };
        let grid = [tiles, w.n.div_ceil(block.rows), 1];
        let launch = Launch {
            // Weights are asked for before the inputs are there.
            early: [Some(&w.codes), Some(&w.scales), w.bias.as_ref()].into_iter().flatten().all(Buffer::is_settled),
            ..self.shape(block, w.extents(), grid, experts.is_some())
        };
        output.0.written();
        let first = (&raw mut arguments).cast::<c_void>();
        let Some((routes, mixture)) = experts else {
            assert_eq!(w.experts, 1, "a single layer");
            // SAFETY: the structure is the kernel's, and lengths were checked above.
            return unsafe { gpu.launch(&launch, &mut [first]) };
        };
        assert!(
            routes.tile == block.tokens && routes.count == w.experts,
            "rows were grouped for these tiles and weights"
        );
        assert!(
            if mixture.gather { inputs.rows == routes.tokens.0 } else { inputs.rows == rows },
            "each row has an input"
        );
        let (alpha, limit) = mixture.swiglu.unwrap_or_default();
        let mut second = ExpertArguments {
            tiles: routes.tiles.address(),
            used: routes.used.address(),
            rows: if mixture.gather { routes.rows.address() } else { 0 },
            swiglu: i32::from(mixture.swiglu.is_some()),
            alpha,
            limit,
        };
        // SAFETY: as above; what `group_rows` wrote stays within its own buffers.
        unsafe { gpu.launch(&launch, &mut [first, (&raw mut second).cast()]) }
    }
}

/// `routes::Arguments`.
#[repr(C)]
struct RouteArguments {
    experts: u64,
    used: u64,
    rows: u64,
    places: u64,
    tiles: u64,
    tokens: i32,
    top_k: i32,
    count: i32,
    tile: i32,
    tile_count: i32,
}

impl<'g> Routes<'g> {
    /// Room for `tokens` tokens with `top_k` of `count` experts each, in tiles of `tile` rows.
    ///
    /// # Panics
    /// For more experts than a block has threads.
    pub fn new(gpu: &'g Gpu, tokens: (usize, usize), count: usize, tile: usize) -> Result<Self> {
        assert!(count <= ROUTED, "a thread an expert");
        let rows = tokens.0 * tokens.1;
        // Every expert may have a tile that is not full.
        let tile_count = rows / tile + count.min(rows);
        Ok(Self {
            tiles: gpu.room(16 * tile_count)?,
            used: gpu.room(4)?,
            rows: gpu.room(4 * rows)?,
            places: gpu.room(4 * rows)?,
            tile_count,
            tile,
            tokens,
            count,
        })
    }

    /// Groups the rows of `experts` [tokens, top_k] (i32, ascending in each token, each below the number of experts).
    pub fn group(&self, gpu: &Gpu, experts: &Buffer) -> Result<Grouped<'_, 'g>> {
        assert!(experts.bytes() >= 4 * self.tokens.0 * self.tokens.1, "each token has its experts");
        let mut arguments = RouteArguments {
            experts: experts.address(),
            used: self.used.address(),
            rows: self.rows.address(),
            places: self.places.address(),
            tiles: self.tiles.address(),
            tokens: self.tokens.0 as i32,
            top_k: self.tokens.1 as i32,
            count: self.count as i32,
            tile: self.tile as i32,
            tile_count: self.tile_count as i32,
        };
        let shared = (GROUPING / 32 + 2) * ROUTED * 4;
        let launch = Launch { threads: GROUPING, ..wide("group_rows", [1, 1, 1], shared) };
        [&self.tiles, &self.used, &self.rows, &self.places].into_iter().for_each(Buffer::written);
        // SAFETY: the structure is the kernel's, and its buffers were made for these numbers.
        unsafe { gpu.launch(&launch, &mut [(&raw mut arguments).cast()]) }?;
        Ok(Grouped(self))
    }
}

/// Rows that were grouped: only [`Routes::group`] makes it, so nobody follows places that no kernel has written.
#[derive(Clone, Copy)]
pub struct Grouped<'r, 'g>(&'r Routes<'g>);

/// A launch of a kernel whose blocks have 256 threads.
pub(super) fn wide(source: &'static str, grid: [usize; 3], shared: usize) -> Launch {
    Launch { source, kernel: source.into(), grid, threads: WIDE, shared, early: true }
}

/// `combine::Arguments`.
#[repr(C)]
struct CombineArguments {
    input: u64,
    places: u64,
    weights: u64,
    output: u64,
    k: i32,
    top_k: i32,
    float: i32,
}

/// `output` [tokens, k]: the weighted sums of `input` [rows, k]; `weights` [tokens, top_k] in f32.
pub fn combine_experts(
    gpu: &Gpu,
    Grouped(routes): Grouped,
    input: &Buffer,
    weights: &Buffer,
    output: &Buffer,
    (k, float): (usize, Float),
) -> Result<()> {
    let (tokens, top_k) = routes.tokens;
    assert!(input.bytes() >= tokens * top_k * k * float.size(), "rows are all there");
    assert!(weights.bytes() >= 4 * tokens * top_k && output.bytes() >= tokens * k * float.size(), "the rest too");
    let mut arguments = CombineArguments {
        input: input.address(),
        places: routes.places.address(),
        weights: weights.address(),
        output: output.address(),
        k: k as i32,
        top_k: top_k as i32,
        float: type_of(float),
    };
    let launch = wide("combine_experts", [tokens, k.div_ceil(WIDE), 1], 0);
    output.written();
    // SAFETY: the structure is the kernel's, and lengths were checked above.
    unsafe { gpu.launch(&launch, &mut [(&raw mut arguments).cast()]) }
}
