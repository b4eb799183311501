//! Which runtime loads what. The rules are data: each line names a runtime, the layouts that it speaks of, and why.
//! Sources: vLLM 0.33 `model_executor/models/gpt_oss.py`, transformers 5.23 `models/gpt_oss`, llama.cpp's gpt-oss loader.

use crate::manifest::{Loads, RuntimeReport};

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
) -> Rule {
    Rule { runtime, experts, main, status, reason }
}

const LOST_NAMES: &str = "per-expert gate/up/down names are unknown to its loader, which drops them without a word";
const KEPT: &str =
    "quant_method is compressed-tensors, so the kept MXFP4 experts are not recognised; see gptoss_kept in config.json";
const MIXED: &str =
    "some layers have MXFP4 experts and others floats; no loader is known to read both in one checkpoint";
const NO_SAFETENSORS: &str = "reads GGUF, not safetensors; a GGUF can be made from it";

/// One line a combination; a test holds the table complete.
const RULES: [Rule; 24] = [
    rule("vllm", Mxfp4, Dense, Good, "the published layout"),
    rule("transformers", Mxfp4, Dense, Good, "the published layout; without a GPU it dequantizes (needs accelerate)"),
    rule("llama.cpp", Mxfp4, Dense, DoesNotLoad, NO_SAFETENSORS),
    rule("vllm", DenseExperts, Dense, Good, "plain floats"),
    rule("transformers", DenseExperts, Dense, Good, "plain floats"),
    rule("llama.cpp", DenseExperts, Dense, DoesNotLoad, NO_SAFETENSORS),
    rule("vllm", DenseExperts, Quantized, Good, "quantized attention beside plain experts (read in its code, not run)"),
    rule("transformers", DenseExperts, Quantized, Good, "needs the compressed-tensors package"),
    rule("llama.cpp", DenseExperts, Quantized, DoesNotLoad, NO_SAFETENSORS),
    rule("vllm", Mxfp4, Quantized, DoesNotLoad, KEPT),
    rule("transformers", Mxfp4, Quantized, LoadsWrongly, KEPT),
    rule("llama.cpp", Mxfp4, Quantized, DoesNotLoad, NO_SAFETENSORS),
    rule("vllm", Mixed, Dense, DoesNotLoad, MIXED),
    rule("transformers", Mixed, Dense, DoesNotLoad, MIXED),
    rule("llama.cpp", Mixed, Dense, DoesNotLoad, NO_SAFETENSORS),
    rule("vllm", Mixed, Quantized, DoesNotLoad, MIXED),
    rule("transformers", Mixed, Quantized, DoesNotLoad, MIXED),
    rule("llama.cpp", Mixed, Quantized, DoesNotLoad, NO_SAFETENSORS),
    rule("vllm", PerExpert, Dense, LoadsWrongly, LOST_NAMES),
    rule(
        "transformers",
        PerExpert,
        Dense,
        LoadsWrongly,
        "its experts are fused; per-expert names are missing or unexpected keys",
    ),
    rule("llama.cpp", PerExpert, Dense, DoesNotLoad, NO_SAFETENSORS),
    rule("vllm", PerExpert, Quantized, LoadsWrongly, LOST_NAMES),
    rule(
        "transformers",
        PerExpert,
        Quantized,
        LoadsWrongly,
        "its experts are fused; per-expert names are missing or unexpected keys",
    ),
    rule("llama.cpp", PerExpert, Quantized, DoesNotLoad, NO_SAFETENSORS),
];

/// What each runtime does with a checkpoint of this layout.
pub fn report(experts: ExpertLayout, main: MainLayout) -> Vec<RuntimeReport> {
    RULES
        .iter()
        .filter(|r| r.experts == experts && r.main == main)
        .map(|r| RuntimeReport { runtime: r.runtime.into(), status: r.status, reason: r.reason.into() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_has_one_rule_a_runtime() {
        for experts in [Mxfp4, DenseExperts, Mixed, PerExpert] {
            for main in [Dense, Quantized] {
                let runtimes: Vec<String> = report(experts, main).into_iter().map(|r| r.runtime).collect();
                assert_eq!(runtimes, ["vllm", "transformers", "llama.cpp"], "{experts:?} {main:?}");
            }
        }
    }
}
