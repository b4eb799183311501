//! OpenAI's own layout of gpt-oss experts: `<proj>_blocks` u8 [E, out, in/32, 16] and `<proj>_scales` u8 [E, out, in/32],
//! gate and up rows interleaved. Source: openai/gpt-oss `gpt_oss/torch/weights.py`.

use std::ops::Range;

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::{Rows, Weight};
use crate::algorithms::rtn::Codes;
use crate::checkpoint::source::{Checkpoint, TensorRef};
use crate::containers::compressed_tensors::{Activations, Scheme, Strategy};
use crate::engine::view::{Kind, ScaleKind, Scales, View};
use crate::error::Result;
use crate::formats::float::Float;
use crate::formats::mxfp4::{BLOCK, BLOCK_BYTES};
use crate::formats::{MXFP4, Params, mx};
use crate::model::{self, Fused, Linear, ModelConfig};
use crate::ops::decode;
use crate::ops::dequantize::Blocks;

/// Key in config.json that says which tensors have another format than `quantization_config` speaks of.
pub const KEPT: &str = "gptoss_kept";

/// Name under [`KEPT`] of the blocks or scales of a layer's experts; `*` is every layer.
pub(crate) fn kept_name(layer: &str, tensor: &str) -> String {
    format!("model.layers.{layer}.mlp.experts.*_{tensor}")
}

/// The module that holds all experts of a layer.
pub(crate) fn experts_module(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.experts")
}

/// Whether a config.json says that the experts of `layer` are MXFP4 blocks.
pub fn says_blocks(config: &Map<String, Value>, layer: usize) -> bool {
    let lists = |list: &Value, name: &str| list.as_array().is_some_and(|l| l.iter().any(|n| n == name));
    let native = config
        .get("quantization_config")
        .is_some_and(|q| q["quant_method"] == "mxfp4" && !lists(&q["modules_to_not_convert"], &experts_module(layer)));
    let kept =
        |kept: &Value| ["*", &layer.to_string()].iter().any(|l| lists(&kept["tensors"], &kept_name(l, "blocks")));
    native || config.get(KEPT).is_some_and(kept)
}

/// Blocks and scales of all experts of a layer, checked against the config.
pub struct Experts<'a> {
    /// u8 [E, out, in/32, 16].
    pub blocks: TensorRef<'a>,
    /// u8 [E, out, in/32].
    pub scales: TensorRef<'a>,
    out: usize,
    groups: usize,
}

impl<'a> Experts<'a> {
    /// The fused weights of `layer`; `None` where the checkpoint has no blocks for them.
    pub fn open(checkpoint: &'a Checkpoint, config: &ModelConfig, fused: Fused, layer: usize) -> Result<Option<Self>> {
        let [blocks_spec, scales_spec] = model::mxfp4_specs(fused, layer, config);
        let Some(blocks) = checkpoint.get(&blocks_spec.name) else { return Ok(None) };
        let Some(scales) = checkpoint.get(&scales_spec.name) else {
            return Err(blocks.error(format!("has no scales: {} is missing", scales_spec.name)));
        };
        let (out, inp) = fused.shape(config);
        if inp % BLOCK != 0 {
            return Err(blocks.error(format!("in_features {inp} is no multiple of the block, {BLOCK}")));
        }
        blocks.expect(&[Dtype::U8], &blocks_spec.shape)?;
        scales.expect(&[Dtype::U8], &scales_spec.shape)?;
        Ok(Some(Self { blocks, scales, out, groups: inp / BLOCK }))
    }

    /// One expert's matrix.
    pub fn expert(&self, expert: usize) -> Blocks<'a> {
        let n = self.out * self.groups;
        Blocks {
            codes: &self.blocks.bytes[expert * n * BLOCK_BYTES..][..n * BLOCK_BYTES],
            scales: &self.scales.bytes[expert * n..][..n],
            rows: self.out,
            groups: self.groups,
        }
    }
}

struct ExpertRows<'a> {
    blocks: Blocks<'a>,
    first: usize,
    step: usize,
    out: usize,
}

/// The [`super::READERS`] entry.
pub fn open<'a>(checkpoint: &'a Checkpoint, config: &ModelConfig, linear: &Linear) -> Result<Option<Weight<'a>>> {
    let Some(fused) = linear.proj.fused() else { return Ok(None) };
    let Some(experts) = Experts::open(checkpoint, config, fused, linear.layer)? else { return Ok(None) };
    let (_, first, step) =
        *fused.parts().iter().find(|p| p.0 == linear.proj).expect("a projection is in its fused tensor");
    let blocks = experts.expert(linear.expert);
    Ok(Some(Box::new(ExpertRows { blocks, first, step, out: blocks.rows / step })))
}

impl Rows for ExpertRows<'_> {
    fn shape(&self) -> (usize, usize) {
        (self.out, self.blocks.groups * BLOCK)
    }

    fn float(&self) -> Float {
        // An E2M1 value under a power of two is exact in BF16, which the other weights have.
        Float::Bf16
    }

    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let groups = columns.len() / BLOCK;
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let at = (self.first + row * self.step) * self.blocks.groups + columns.start / BLOCK;
            let codes = &self.blocks.codes[at * BLOCK_BYTES..][..groups * BLOCK_BYTES];
            decode::decode_row(codes, &self.blocks.scales[at..][..groups], out);
        }
    }

    fn view(&self) -> Option<View<'_>> {
        let Blocks { codes, scales, rows, groups } = self.blocks;
        let scales = Scales { kind: ScaleKind::E8m0, bytes: scales, row: groups, step: 1, group: BLOCK };
        let row = (groups * BLOCK_BYTES, BLOCK_BYTES);
        let view = View::new(Kind::E2m1, (rows, groups * BLOCK), codes, row, Some(scales))?;
        Some(view.lane(self.first, self.step))
    }

    fn stored(&self) -> Option<Scheme> {
        Some(Scheme { weights: MXFP4, strategy: Strategy::Group(BLOCK), activations: Activations::Float })
    }

    fn codes(&self, rows: Range<usize>, out: &mut Codes) {
        out.codes.clear();
        out.params.clear();
        for row in rows {
            let at = (self.first + row * self.step) * self.blocks.groups;
            let bytes = &self.blocks.codes[at * BLOCK_BYTES..(at + self.blocks.groups) * BLOCK_BYTES];
            out.codes.extend(bytes.iter().flat_map(|b| [(b & 15) as i8, (b >> 4) as i8]));
            let scales = &self.blocks.scales[at..at + self.blocks.groups];
            out.params.extend(scales.iter().map(|&e| Params { scale: mx::scale(e), zero_point: 0.0 }));
        }
    }
}
