//! Which products there are, how K is cut, which blocks they have, what those need, and which of them suits a launch.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Gpu, Launch};
use crate::error::Result;
use crate::formats::float::Float;

/// Columns of a group and of a stage, and warps of a block at most; columns of a part, more or less, and of a group from which on a part lies
/// within it (kernels/gemm.cuh).
const GROUP: usize = 32;
const COLUMNS: usize = 128;
const MOST_WARPS: usize = 8;
const PART: usize = 512;
const LARGE: usize = 1024;
/// Tokens and threads of a block that multiplies by `wgmma`, its stages, and bytes of a token's row in a tile (kernels/wgmma.cuh).
const MANY_TOKENS: usize = 64;
const MANY_THREADS: usize = 256;
const MANY_STAGES: usize = 3;
const TOKEN_BYTES: usize = 128;
/// Rows from which on `wgmma` is taken where there is one: what a block by `mma.sync` would need three of.
const MANY: usize = 33;

/// The blocks that there are kernels for; those of 64 tokens for 9.0a alone.
pub const BLOCKS: [Block; 6] = [
    Block { rows: 16, tokens: 8 },
    Block { rows: 16, tokens: 16 },
    Block { rows: 32, tokens: 8 },
    Block { rows: 32, tokens: 16 },
    Block { rows: 64, tokens: 64 },
    Block { rows: 128, tokens: 64 },
];

/// What the codes of a weight are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codes {
    /// gpt-oss's own, scales E8M0 in groups of 32.
    E2m1,
    /// 4 bits with 8 added.
    Int4,
    /// 8 bits with their sign.
    Int8,
}

impl Codes {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        if self == Self::Int8 { 8 } else { 4 }
    }

    /// Bytes of a row of a stage.
    fn stage_bytes(self) -> usize {
        COLUMNS * self.bits() / 8
    }

    /// Bytes of a scale of type `float`.
    pub fn scale_bytes(self, float: Float) -> usize {
        if self == Self::E2m1 { 1 } else { float.size() }
    }
}

/// Codes by inputs: a family of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Its source, without the ending.
    pub name: &'static str,
    /// Of the weight.
    pub codes: Codes,
    /// Whether inputs are int8 with a scale a token; otherwise they are bf16.
    pub int8: bool,
}

/// All of them.
pub const PRODUCTS: [Product; 5] = [
    Product { name: "w4a8", codes: Codes::Int4, int8: true },
    Product { name: "mxfp4_a8", codes: Codes::E2m1, int8: true },
    Product { name: "w8a8", codes: Codes::Int8, int8: true },
    Product { name: "w4a16", codes: Codes::Int4, int8: false },
    Product { name: "mxfp4_a16", codes: Codes::E2m1, int8: false },
];

/// `gemm::Parts`: how K is cut, and with it the order of the sums. It depends on K and the group alone.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    count: i32,
    columns: i32,
    inside: i32,
    warps: i32,
    rounds: i32,
    scales: i32,
    part_scales: i32,
    stride: i32,
}

impl Parts {
    /// For `k` columns in groups of `group`.
    pub fn of(k: usize, group: usize) -> Self {
        let scales = k / group;
        let (count, columns, inside, part_scales) = if group < LARGE {
            let part_scales = scales.div_ceil((k / PART).clamp(1, scales));
            (k.div_ceil(part_scales * group), part_scales * group, 0, part_scales)
        } else {
            let columns = (group / GROUP).div_ceil(group / PART) * GROUP;
            let inside = group.div_ceil(columns);
            (scales * inside, columns, inside, 0)
        };
        let rounds = count.div_ceil(MOST_WARPS);
        let stride = if inside == 0 { (part_scales + 4).div_ceil(8) * 8 - 4 } else { 0 };
        let [count, columns, inside, warps, rounds, scales, part_scales, stride] =
            [count, columns, inside, count.div_ceil(rounds), rounds, scales, part_scales, stride].map(|n| n as i32);
        Self { count, columns, inside, warps, rounds, scales, part_scales, stride }
    }

    /// Columns of a part: all but the last one of K, or of a large group, have so many.
    pub fn columns(&self) -> usize {
        self.columns as usize
    }

    /// Warps of a block by `mma.sync`.
    fn warps(&self) -> usize {
        self.warps as usize
    }
}

/// What a block of a product has. With int8 inputs the bits of the outputs do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// Rows of the weight.
    pub rows: usize,
    /// Tokens at most.
    pub tokens: usize,
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}x{}", self.rows, self.tokens)
    }
}

impl FromStr for Block {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = BLOCKS.into_iter().find(|b| b.to_string() == text);
        found.ok_or_else(|| format!("wanted one of {}", BLOCKS.map(|b| b.to_string()).join(", ")))
    }
}

impl Block {
    /// Whether it multiplies by `wgmma`, which 9.0a has, and not by `mma.sync`. Of bf16 inputs tensor cores add in an order of their own,
    /// so it is part of what fixes the bits.
    pub fn is_wgmma(&self) -> bool {
        self.tokens == MANY_TOKENS
    }

    /// Those that run on a GPU.
    pub fn of(gpu: &Gpu) -> impl Iterator<Item = Self> {
        let wgmma = gpu.has_wgmma();
        BLOCKS.into_iter().filter(move |block| wgmma || !block.is_wgmma())
    }
}

/// N, K and the columns of a scale of a layer, and the type of its scales.
#[derive(Debug, Clone, Copy)]
pub struct Extents {
    /// Outputs.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Columns of a scale.
    pub group: usize,
    /// Of the scales; of E8M0 it says nothing.
    pub scale: Float,
}

impl Product {
    /// Bytes of shared memory of a block: `gemm::shared_bytes`, or `gemm::many_shared_bytes`.
    pub fn shared_bytes(&self, block: Block, k: usize, group: usize, scale: Float) -> usize {
        let (parts, Block { rows, tokens }) = (Parts::of(k, group), block);
        let sums = 4 * tokens * (rows + 4);
        let part_scales = 4 * rows * parts.stride as usize;
        let a_row = parts.scales as usize * self.codes.scale_bytes(scale);
        let a_row = if a_row.is_multiple_of(16) { a_row + 16 } else { a_row };
        let stored = if parts.inside == 0 { (rows * a_row).next_multiple_of(16) + 16 } else { 0 };
        if block.is_wgmma() {
            let teams = MANY_THREADS / (2 * rows);
            let stage = rows * self.codes.stage_bytes() + tokens * TOKEN_BYTES * if self.int8 { 1 } else { 2 };
            let kept = if parts.inside == 0 { sums } else { 2 * sums };
            return teams * (MANY_STAGES * stage + part_scales) + 12 * tokens + 16 + stored + kept;
        }
        let stages = if rows == 16 { 5 } else { 3 };
        let a_warp = stages * rows * self.codes.stage_bytes() + sums.max(part_scales);
        let kept = match (parts.rounds, parts.inside) {
            (1, _) => 0,
            (_, 0) => 1,
            _ => 2,
        };
        parts.warps() * a_warp + stored + kept * sums
    }

    /// What suits `rows` rows (of each expert, on average, where there are several `layers`). `None` where no block fits the shared memory.
    ///
    /// - Many rows, where there is `wgmma` and blocks for a fourth of the multiprocessors at least: 64 tokens, and 64 rows of the weight where each block has a
    ///   multiprocessor of its own, for then twice as many of them work; else 128, which read the tokens half as often.
    /// - Otherwise as many tokens as hold them, and few rows of the weight where all blocks are on the GPU at once. A second wave of blocks
    ///   with few rows costs more than it gains (kernels/results: 4096 x 4096 at M = 16 and 32).
    pub fn block(&self, gpu: &Gpu, rows: usize, layers: usize, w: Extents) -> Result<Option<Block>> {
        let fits = |b: &Block| self.shared_bytes(*b, w.k, w.group, w.scale) <= gpu.shared_bytes;
        let found = |rows, tokens| Block::of(gpu).find(|b| b.rows == rows && b.tokens == tokens).filter(fits);
        let blocks = |b: Block| rows.div_ceil(b.tokens).max(1) * layers * w.n.div_ceil(b.rows);
        let all = gpu.multiprocessors as usize;
        if let Some(small) = found(64, MANY_TOKENS).filter(|&b| rows >= MANY && 4 * blocks(b) >= all) {
            let large = found(128, MANY_TOKENS).filter(|_| blocks(small) > all);
            return Ok(large.or(Some(small)));
        }
        let tokens = if rows <= 8 { 8 } else { 16 };
        let (few, many) = (found(16, tokens), found(32, tokens));
        if let Some(block) = few {
            let grid = [rows.div_ceil(tokens).max(1) * layers, w.n.div_ceil(block.rows), 1];
            let launch = self.shape(block, w, grid, layers > 1);
            if blocks(block) <= gpu.blocks_at_once(&launch)? || many.is_none() {
                return Ok(few);
            }
        }
        Ok(many.or_else(|| found(16, 8)))
    }

    /// The launch of a block over a grid.
    pub(super) fn shape(&self, block: Block, w: Extents, grid: [usize; 3], experts: bool) -> Launch {
        let infix = if experts { "_experts" } else { "" };
        Launch {
            source: self.name,
            kernel: format!("{}{infix}_{block}", self.name),
            grid,
            threads: if block.is_wgmma() { MANY_THREADS } else { 32 * Parts::of(w.k, w.group).warps() },
            shared: self.shared_bytes(block, w.k, w.group, w.scale),
            early: true,
        }
    }
}
