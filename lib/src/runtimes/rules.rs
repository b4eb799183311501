//! The rules themselves: for each runtime the first line whose conditions all hold decides; remarks are added to it.

use super::Condition::{self, EpsIsNot, Experts, GroupsAre, Has, HiddenIsNoMultiple, Main, MainIs};
use super::ExpertLayout::{Dense as DenseExperts, Gguf, Mixed, Mxfp4, PerExpert, VllmFp8, VllmInt};
use super::MainLayout::{CompressedTensors as Coded, Dense};
use super::{Feature, Remark, Rule, Runtime};
use crate::containers::compressed_tensors::Format;
use crate::manifest::Loads::{DoesNotLoad, Loads, LoadsWrongly};
use Runtime::{LlamaCpp, Native, Transformers, Vllm};

// Where a rule was read, or seen.
const VLLM_RUN: &str = "run with vLLM 0.32 on a CPU";
const VLLM: &str = "vLLM 0.33, model_executor/models/gpt_oss.py";
const VLLM_CT: &str = "vLLM 0.33, layers/quantization/compressed_tensors/compressed_tensors.py";
const VLLM_WNA16: &str = "vLLM 0.33, layers/quantization/utils/marlin_utils.py and fused_moe/oracle/int_wna16.py";
const VLLM_QUARK: &str = "vLLM 0.33, layers/quantization/quark/quark_moe.py";
const TRANSFORMERS: &str = "transformers 5.23, models/gpt_oss/modeling_gpt_oss.py";
const TRANSFORMERS_MXFP4: &str = "transformers 5.23, integrations/mxfp4.py";
const TRANSFORMERS_CT: &str = "transformers 5.23, quantizers/quantizer_compressed_tensors.py";
const TRANSFORMERS_GGUF: &str = "transformers 5.23, modeling_gguf_pytorch_utils.py";
const LLAMA: &str = "llama.cpp, src/llama-model-loader.cpp";
const LLAMA_GPT_OSS: &str = "llama.cpp, src/models/openai-moe.cpp";
const OURS: &str = "this project's containers/";

const LOST_NAMES: &str =
    "names of single experts' gate_proj, up_proj and down_proj are unknown to its loader, which drops them";
const OWN_FORMAT: &str = "ternary codes are no format of compressed-tensors";
const NO_EMBEDDING: &str = "its embedding takes no codes";
const EMBEDDING_INSTEAD: &str = "without --embed-tokens";
const TERNARY_INSTEAD: &str = "w2a16, or tq2_0 in a GGUF file for llama.cpp";
const KEPT: &str =
    "quant_method is compressed-tensors, so the kept MXFP4 experts are not recognised; see gptoss_kept in config.json";
const MIXED: &str =
    "some layers have MXFP4 experts and others floats; no loader is known to read both in one checkpoint";
const NO_SAFETENSORS: &str = "reads GGUF, not safetensors";
const FUSED: &str = "its experts are fused; names of single experts are missing or unexpected keys";
const FOR_VLLM: &str = "the experts have names that vLLM alone reads";

const VLLM_INSTEAD: &str =
    "w4a16 or w8a16 experts, symmetric (--container vllm-int), or with --mw keep mxfp4 or fp8 experts";
const TRANSFORMERS_INSTEAD: &str = "--experts mxfp4 --mw keep, or --container dense";
const GGUF_INSTEAD: &str = "--container gguf with schemes such as q4_0, q8_0, mxfp4";

const fn rule(
    runtime: Runtime,
    when: &'static [Condition],
    status: crate::manifest::Loads,
    reason: &'static str,
    source: &'static str,
    instead: &'static str,
) -> Rule {
    Rule { runtime, when, status, reason, source, instead }
}

/// Ordered: of a runtime's rules the first that holds decides, and its last one always does.
pub(super) static RULES: &[Rule] = &[
    rule(Vllm, &[Experts(Gguf)], DoesNotLoad, "has no GGUF names for gpt-oss", VLLM, VLLM_INSTEAD),
    rule(Vllm, &[Experts(Mixed)], DoesNotLoad, MIXED, VLLM, "the same scheme for the experts of every layer"),
    rule(
        Vllm,
        &[Experts(Mxfp4), Main(Coded)],
        DoesNotLoad,
        KEPT,
        VLLM_CT,
        "--mw keep, or the other weights of a BF16 checkpoint (gptoss-dequant first)",
    ),
    rule(
        Vllm,
        &[Has(Feature::AnnouncedBlocks)],
        DoesNotLoad,
        "config.json announces MXFP4 experts, and it looks for blocks that are not there",
        VLLM,
        "quantization_config taken out of config.json (gptoss-dequant does that)",
    ),
    rule(
        Vllm,
        &[Experts(PerExpert), Has(Feature::Fp8Modules)],
        DoesNotLoad,
        "its loader stops at the names of single FP8 experts",
        VLLM_RUN,
        VLLM_INSTEAD,
    ),
    rule(Vllm, &[Experts(PerExpert)], LoadsWrongly, LOST_NAMES, VLLM_RUN, VLLM_INSTEAD),
    rule(
        Vllm,
        &[Has(Feature::CodedRouter)],
        LoadsWrongly,
        "it builds the router without a scheme, and the codes are never loaded",
        VLLM,
        "the router left as it is",
    ),
    rule(
        Vllm,
        &[Experts(VllmInt), HiddenIsNoMultiple(128)],
        LoadsWrongly,
        "its Marlin kernel wants a hidden size that 128 divides; the Triton kernel that is left drops the experts' biases",
        VLLM_WNA16,
        "--pad-to 128",
    ),
    rule(
        Vllm,
        &[Has(Feature::CodedEmbedding)],
        LoadsWrongly,
        "its embedding takes no codes: they are dropped, and the embedding is never set",
        VLLM_RUN,
        EMBEDDING_INSTEAD,
    ),
    rule(
        Vllm,
        &[Has(Feature::CodedHead)],
        DoesNotLoad,
        "it has no parameter lm_head.weight_packed",
        VLLM_RUN,
        "without --lm-head",
    ),
    rule(
        Vllm,
        &[Has(Feature::Fp8InGroups)],
        DoesNotLoad,
        "FP8 weights beside floating inputs have a scale a tensor, a channel or a block there, not a group",
        VLLM_RUN,
        "--mw-group-size channel",
    ),
    rule(
        Vllm,
        &[Has(Feature::Int4Fp8)],
        DoesNotLoad,
        "int4 weights beside FP8 inputs are for Hopper alone, in another layout",
        VLLM_CT,
        "w4a16, fp8 or w8a8 for the other weights",
    ),
    rule(
        Vllm,
        &[Has(Feature::UnequalQkv)],
        DoesNotLoad,
        "it fuses q, k and v of a layer, which must have one scheme",
        VLLM_CT,
        "one scheme for q_proj, k_proj and v_proj of a layer",
    ),
    rule(Vllm, &[MainIs(Format::Ternary)], DoesNotLoad, OWN_FORMAT, VLLM_CT, TERNARY_INSTEAD),
    rule(Vllm, &[MainIs(Format::TernaryBase3)], DoesNotLoad, OWN_FORMAT, VLLM_CT, TERNARY_INSTEAD),
    rule(
        Vllm,
        &[MainIs(Format::Mxfp6)],
        DoesNotLoad,
        "has no scheme for mxfp6-pack-quantized",
        VLLM_CT,
        "mxfp8, fp8 or w8a16 for the other weights",
    ),
    rule(
        Vllm,
        &[Experts(VllmFp8), Main(Coded)],
        DoesNotLoad,
        "one quant_method holds for all of a checkpoint",
        VLLM_QUARK,
        "--mw keep",
    ),
    rule(
        Vllm,
        &[Experts(VllmInt)],
        Loads,
        "integer experts; its Marlin kernel for GPUs was read in its code, not run",
        VLLM_RUN,
        "",
    ),
    rule(Vllm, &[Experts(VllmFp8)], Loads, "FP8 experts", VLLM_RUN, ""),
    rule(Vllm, &[Experts(Mxfp4)], Loads, "the published layout", VLLM_RUN, ""),
    rule(Vllm, &[Main(Dense)], Loads, "plain floats", VLLM_RUN, ""),
    rule(Vllm, &[], Loads, "quantized attention beside plain experts", VLLM_RUN, ""),
    rule(
        Transformers,
        &[Experts(Gguf)],
        DoesNotLoad,
        "tried with gguf 0.19 and numpy 2.4: it stops while it reads the metadata",
        TRANSFORMERS_GGUF,
        TRANSFORMERS_INSTEAD,
    ),
    rule(
        Transformers,
        &[Experts(Mixed)],
        DoesNotLoad,
        MIXED,
        TRANSFORMERS_MXFP4,
        "the same scheme for the experts of every layer",
    ),
    rule(Transformers, &[Experts(VllmInt)], DoesNotLoad, FOR_VLLM, TRANSFORMERS, TRANSFORMERS_INSTEAD),
    rule(Transformers, &[Experts(VllmFp8)], DoesNotLoad, FOR_VLLM, TRANSFORMERS, TRANSFORMERS_INSTEAD),
    rule(
        Transformers,
        &[Experts(Mxfp4), Main(Coded)],
        LoadsWrongly,
        KEPT,
        TRANSFORMERS_CT,
        "--mw keep, or the other weights of a BF16 checkpoint (gptoss-dequant first)",
    ),
    rule(Transformers, &[Experts(PerExpert)], LoadsWrongly, FUSED, TRANSFORMERS, TRANSFORMERS_INSTEAD),
    rule(
        Transformers,
        &[Experts(Mxfp4)],
        Loads,
        "the published layout; without a GPU it dequantizes (needs accelerate)",
        TRANSFORMERS_MXFP4,
        "",
    ),
    rule(
        Transformers,
        &[Has(Feature::CodedRouter)],
        LoadsWrongly,
        "its router is no linear layer, and takes no codes",
        TRANSFORMERS,
        "the router left as it is",
    ),
    rule(Transformers, &[Has(Feature::CodedEmbedding)], DoesNotLoad, NO_EMBEDDING, TRANSFORMERS_CT, EMBEDDING_INSTEAD),
    rule(Transformers, &[MainIs(Format::Ternary)], DoesNotLoad, OWN_FORMAT, TRANSFORMERS_CT, TERNARY_INSTEAD),
    rule(Transformers, &[MainIs(Format::TernaryBase3)], DoesNotLoad, OWN_FORMAT, TRANSFORMERS_CT, TERNARY_INSTEAD),
    rule(
        Transformers,
        &[Experts(DenseExperts), Main(Coded)],
        Loads,
        "needs the compressed-tensors package",
        TRANSFORMERS_CT,
        "",
    ),
    rule(Transformers, &[], Loads, "plain floats", TRANSFORMERS, ""),
    rule(LlamaCpp, &[Experts(Gguf)], Loads, "tensors and metadata as its gpt-oss has them", LLAMA_GPT_OSS, ""),
    rule(LlamaCpp, &[], DoesNotLoad, NO_SAFETENSORS, LLAMA, GGUF_INSTEAD),
    rule(Native, &[], Loads, "gptoss-run reads whatever gptoss-quant writes", OURS, ""),
];

/// What a runtime does beside loading it.
pub(super) static REMARKS: &[Remark] = &[
    Remark {
        runtime: Vllm,
        when: &[EpsIsNot(1e-5)],
        text: "its norms take an eps of 1e-5 whatever rms_norm_eps says (on a small padded model log-probabilities move by 2.3e-5 in the mean, 0.016 at most)",
    },
    Remark {
        runtime: Vllm,
        when: &[Experts(VllmInt), GroupsAre(32)],
        text: "on Blackwell it takes int4 groups of 32 to a kernel without biases: groups of 64 or 128 go everywhere",
    },
];
