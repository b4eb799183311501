//! Which runtime loads what. The rules are data: each line names a runtime, the layouts that it speaks of, and why.
//! Sources: vLLM 0.33 `model_executor/models/gpt_oss.py`, transformers 5.23 `models/gpt_oss`, llama.cpp's gpt-oss loader.

use crate::checkpoint::source::Checkpoint;
use crate::error::{Error, Result};
use crate::manifest::{Loads, RuntimeReport};
use crate::model::{Class, Fused, Linear, ModelConfig, Proj, linears, mxfp4_specs};

/// How the two classes of weights are stored, as far as runtimes care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertLayout {
    /// OpenAI's blocks and scales.
    Mxfp4,
    /// Fused plain floats.
    Dense,
    /// OpenAI's blocks in some layers, fused floats in others.
    Mixed,
    /// compressed-tensors, a module an expert.
    PerExpert,
    /// A GGUF file.
    Gguf,
}

/// How the other weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MainLayout {
    /// Plain floats.
    Dense,
    /// compressed-tensors.
    CompressedTensors,
}

struct Rule {
    runtime: &'static str,
    experts: ExpertLayout,
    main: MainLayout,
    status: Loads,
    reason: &'static str,
    source: &'static str,
}

use ExpertLayout::{Dense as DenseExperts, Mixed, Mxfp4, PerExpert};
use Loads::{DoesNotLoad, Loads as Good, LoadsWrongly};
use MainLayout::{CompressedTensors as Quantized, Dense};

const fn rule(
    runtime: &'static str,
    experts: ExpertLayout,
    main: MainLayout,
    status: Loads,
    reason: &'static str,
    source: &'static str,
) -> Rule {
    Rule { runtime, experts, main, status, reason, source }
}

// Where a rule was read.
const VLLM: &str = "vLLM 0.33, model_executor/models/gpt_oss.py";
const VLLM_CT: &str = "vLLM 0.33, model_executor/layers/quantization/compressed_tensors";
const TRANSFORMERS: &str = "transformers 5.23, models/gpt_oss/modeling_gpt_oss.py";
const TRANSFORMERS_MXFP4: &str = "transformers 5.23, integrations/mxfp4.py";
const TRANSFORMERS_CT: &str = "transformers 5.23, quantizers/quantizer_compressed_tensors.py";
const TRANSFORMERS_GGUF: &str = "transformers 5.23, integrations/ggml.py";
const LLAMA_GPT_OSS: &str = "llama.cpp, src/models/openai-moe.cpp";
const LLAMA: &str = "llama.cpp, src/llama-model-loader.cpp";

const LOST_NAMES: &str = "per-expert gate/up/down names are unknown to its loader, which drops them without a word";
const KEPT: &str =
    "quant_method is compressed-tensors, so the kept MXFP4 experts are not recognised; see gptoss_kept in config.json";
const MIXED: &str =
    "some layers have MXFP4 experts and others floats; no loader is known to read both in one checkpoint";
const NO_SAFETENSORS: &str = "reads GGUF, not safetensors; a GGUF can be made from it";

/// One line a combination; a test holds the table complete.
const RULES: [Rule; 27] = [
    rule("vllm", ExpertLayout::Gguf, Dense, DoesNotLoad, "reads no gpt-oss from GGUF", VLLM),
    rule("transformers", ExpertLayout::Gguf, Dense, DoesNotLoad, "reads no gpt-oss from GGUF", TRANSFORMERS_GGUF),
    rule("llama.cpp", ExpertLayout::Gguf, Dense, Good, "tensors and metadata as its gpt-oss has them", LLAMA_GPT_OSS),
    rule("vllm", Mxfp4, Dense, Good, "the published layout", VLLM),
    rule(
        "transformers",
        Mxfp4,
        Dense,
        Good,
        "the published layout; without a GPU it dequantizes (needs accelerate)",
        TRANSFORMERS_MXFP4,
    ),
    rule("llama.cpp", Mxfp4, Dense, DoesNotLoad, NO_SAFETENSORS, LLAMA),
    rule("vllm", DenseExperts, Dense, Good, "plain floats", VLLM),
    rule("transformers", DenseExperts, Dense, Good, "plain floats", TRANSFORMERS),
    rule("llama.cpp", DenseExperts, Dense, DoesNotLoad, NO_SAFETENSORS, LLAMA),
    rule(
        "vllm",
        DenseExperts,
        Quantized,
        Good,
        "quantized attention beside plain experts (read in its code, not run)",
        VLLM_CT,
    ),
    rule("transformers", DenseExperts, Quantized, Good, "needs the compressed-tensors package", TRANSFORMERS_CT),
    rule("llama.cpp", DenseExperts, Quantized, DoesNotLoad, NO_SAFETENSORS, LLAMA),
    rule("vllm", Mxfp4, Quantized, DoesNotLoad, KEPT, VLLM_CT),
    rule("transformers", Mxfp4, Quantized, LoadsWrongly, KEPT, TRANSFORMERS_CT),
    rule("llama.cpp", Mxfp4, Quantized, DoesNotLoad, NO_SAFETENSORS, LLAMA),
    rule("vllm", Mixed, Dense, DoesNotLoad, MIXED, VLLM),
    rule("transformers", Mixed, Dense, DoesNotLoad, MIXED, TRANSFORMERS_MXFP4),
    rule("llama.cpp", Mixed, Dense, DoesNotLoad, NO_SAFETENSORS, LLAMA),
    rule("vllm", Mixed, Quantized, DoesNotLoad, MIXED, VLLM_CT),
    rule("transformers", Mixed, Quantized, DoesNotLoad, MIXED, TRANSFORMERS_CT),
    rule("llama.cpp", Mixed, Quantized, DoesNotLoad, NO_SAFETENSORS, LLAMA),
    rule("vllm", PerExpert, Dense, LoadsWrongly, LOST_NAMES, VLLM),
    rule(
        "transformers",
        PerExpert,
        Dense,
        LoadsWrongly,
        "its experts are fused; per-expert names are missing or unexpected keys",
        TRANSFORMERS,
    ),
    rule("llama.cpp", PerExpert, Dense, DoesNotLoad, NO_SAFETENSORS, LLAMA),
    rule("vllm", PerExpert, Quantized, LoadsWrongly, LOST_NAMES, VLLM),
    rule(
        "transformers",
        PerExpert,
        Quantized,
        LoadsWrongly,
        "its experts are fused; per-expert names are missing or unexpected keys",
        TRANSFORMERS,
    ),
    rule("llama.cpp", PerExpert, Quantized, DoesNotLoad, NO_SAFETENSORS, LLAMA),
];

/// How a checkpoint, whoever wrote it, stores its weights.
///
/// # Errors
/// [`Error::MissingTensor`] where a layer's experts are in no layout that is known.
pub fn layouts(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<(ExpertLayout, MainLayout)> {
    if checkpoint.is_gguf() {
        return Ok((ExpertLayout::Gguf, Dense));
    }
    let has = |name: &str| checkpoint.get(name).is_some();
    let mut experts = Vec::new();
    for layer in 0..config.layers {
        let [blocks, fused] = [mxfp4_specs(Fused::GateUp, layer, config)[0].name.clone(), Fused::GateUp.name(layer)];
        let module = Linear { proj: Proj::Gate, layer, expert: 0 }.module();
        let one = ["weight", "weight_packed"].iter().any(|w| has(&format!("{module}.{w}")));
        experts.push(match (has(&blocks), has(&fused), one) {
            (true, ..) => Mxfp4,
            (_, true, _) => DenseExperts,
            (_, _, true) => PerExpert,
            _ => {
                return Err(Error::MissingTensor {
                    dir: checkpoint.dir.clone(),
                    tensor: blocks,
                    reason: "the experts are in no layout that is known".into(),
                });
            }
        });
    }
    let experts = match experts.first() {
        _ if experts.contains(&PerExpert) => PerExpert,
        Some(&first) if experts.iter().all(|e| *e == first) => first,
        _ => Mixed,
    };
    let quantized =
        linears(config).filter(|l| l.proj.class() == Class::Main).any(|l| has(&format!("{}.weight_scale", l.module())));
    Ok((experts, if quantized { Quantized } else { Dense }))
}

/// What each runtime does with a checkpoint of this layout.
pub fn report(experts: ExpertLayout, main: MainLayout) -> Vec<RuntimeReport> {
    RULES
        .iter()
        .filter(|r| r.experts == experts && r.main == main)
        .map(|r| RuntimeReport {
            runtime: r.runtime.into(),
            status: r.status,
            reason: r.reason.into(),
            source: r.source.into(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_has_one_rule_a_runtime() {
        for experts in [Mxfp4, DenseExperts, Mixed, PerExpert, ExpertLayout::Gguf] {
            for main in [Dense, Quantized] {
                // A GGUF file is one thing.
                if (experts, main) == (ExpertLayout::Gguf, Quantized) {
                    continue;
                }
                let runtimes: Vec<String> = report(experts, main).into_iter().map(|r| r.runtime).collect();
                assert_eq!(runtimes, ["vllm", "transformers", "llama.cpp"], "{experts:?} {main:?}");
            }
        }
    }
}
