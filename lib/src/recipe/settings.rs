//! Settings of the algorithms, with the defaults that users of other tools know.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::containers::vllm::Kind;
use crate::error::{Error, Result};

/// How a group's scale is fitted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Observer {
    /// From the extremes.
    #[default]
    Minmax,
    /// From the extremes, shrunk to where the squared error of rounding is least.
    Mse,
}

impl FromStr for Observer {
    type Err = Error;

    /// llm-compressor's names, with and without its words for how long statistics last: a weight is looked at once.
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "minmax" | "memoryless_minmax" | "static_minmax" => Ok(Self::Minmax),
            "mse" | "memoryless_mse" => Ok(Self::Mse),
            other => Err(Error::Refused(format!("there is no observer {other:?}; this version has minmax and mse"))),
        }
    }
}

/// Why `static_groups` cannot be turned off.
pub const STATIC_GROUPS: &str =
    "static groups cannot be turned off: scales are always fitted once, before the columns are gone through";

/// In which order GPTQ takes columns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ActOrder {
    /// Those with the greatest inputs first; groups stay where they are, so nothing shows on disk.
    #[default]
    Static,
    /// As they stand.
    Off,
}

impl FromStr for ActOrder {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.to_ascii_lowercase().as_str() {
            "static" | "weight" | "true" => Ok(Self::Static),
            "off" | "none" | "false" => Ok(Self::Off),
            "group" | "dynamic" => Err(Error::Refused(format!(
                "the activation order {s} regroups columns and stores where each went (weight_g_idx), which no runtime of gpt-oss reads; static is as good and leaves the groups where they are"
            ))),
            other => {
                Err(Error::Refused(format!("there is no activation order {other:?}; wanted static, weight or off")))
            }
        }
    }
}

/// GPTQ (Frantar et al. 2022, arXiv 2210.17323).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gptq {
    /// Columns between two updates of the rest. Sums here have one order whatever the blocks, so it changes no bit.
    pub block_size: usize,
    /// Added to the diagonal, as a share of its mean.
    pub dampening_frac: f64,
    /// Order of columns.
    pub actorder: ActOrder,
    /// Passes of coordinate descent behind the sweep; 0 is GPTQ as published.
    pub descent: usize,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { block_size: 128, dampening_frac: 0.01, actorder: ActOrder::Static, descent: 2 }
    }
}

/// AWQ (Lin et al. 2023, arXiv 2306.00978).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Awq {
    /// Exponents between 0 and 1 that are tried.
    pub n_grid: usize,
    /// Whether the weights' magnitude counts beside the activations'.
    pub duo_scaling: bool,
}

impl Default for Awq {
    fn default() -> Self {
        Self { n_grid: 20, duo_scaling: true }
    }
}

/// SmoothQuant (Xiao et al. 2022, arXiv 2211.10438).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SmoothQuant {
    /// 0 leaves the activations' range to themselves, 1 moves all of it into the weights.
    pub strength: f64,
}

/// Which numbers may be zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum Mask {
    /// `zeros` of every `of` consecutive columns: 2:4.
    Structured {
        /// How many become zero.
        zeros: usize,
        /// Of how many.
        of: usize,
    },
    /// Anywhere in a row.
    Unstructured,
}

impl FromStr for Mask {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        if s == "unstructured" || s == "0:0" {
            return Ok(Self::Unstructured);
        }
        let parts = s.split_once(':').map(|(n, m)| (n.parse(), m.parse()));
        match parts {
            Some((Ok(zeros), Ok(of))) if 0 < zeros && zeros < of && of <= 64 => Ok(Self::Structured { zeros, of }),
            _ => {
                Err(Error::Refused(format!("{s:?} is no mask; wanted unstructured, or N:M such as 2:4 (M at most 64)")))
            }
        }
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Structured { zeros, of } => write!(f, "{zeros}:{of}"),
            Self::Unstructured => f.write_str("unstructured"),
        }
    }
}

impl TryFrom<String> for Mask {
    type Error = Error;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Mask> for String {
    fn from(s: Mask) -> Self {
        s.to_string()
    }
}

impl Mask {
    /// As it stands in a folder's name.
    pub fn tag(self) -> String {
        match self {
            Self::Structured { zeros, of } => format!("{zeros}of{of}"),
            Self::Unstructured => "sparse".into(),
        }
    }
}

/// Who chooses the zeros.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pruner {
    /// Frantar and Alistarh 2023, arXiv 2301.00774.
    #[default]
    Sparsegpt,
    /// Sun et al. 2023, arXiv 2306.11695: |w| times the root of the mean square of its input; nothing else changes.
    Wanda,
}

/// Zeros that are made before rounding and kept through it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sparsity {
    /// Who chooses.
    pub algorithm: Pruner,
    /// Where.
    pub mask: Mask,
    /// Share of zeros; follows from a structured mask.
    pub sparsity: f64,
    /// Columns among which an unstructured mask is chosen.
    pub block_size: usize,
    /// Added to the diagonal, as a share of its mean.
    pub dampening_frac: f64,
    /// Patterns of modules; every module where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    /// Patterns of modules that keep all their numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
}

/// What happens to experts that the router sends few tokens to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FewTokens {
    /// They are rounded to nearest.
    Rtn,
    /// Their statistics are over all tokens.
    AllExperts,
    /// Their statistics are over all tokens, each weighted by the router's probability for the expert.
    #[default]
    Weighted,
}

/// What the rounded weights are written as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Container {
    /// compressed-tensors; experts that all are MXFP4 in OpenAI's own layout.
    #[default]
    CompressedTensors,
    /// OpenAI's MXFP4 in place: experts as blocks and scales, the other weights as they are.
    Openai,
    /// The floats that the codes stand for, under the names of an unquantized checkpoint: as large as one, and loaded by
    /// whatever loads one.
    Dense,
    /// One GGUF file with the tokenizer in it, for llama.cpp.
    Gguf,
    /// Integer experts under the names that vLLM's gpt-oss reads, the other weights as compressed-tensors.
    VllmInt,
    /// FP8 experts under the names that vLLM's gpt-oss reads, the other weights as they are.
    VllmFp8,
}

/// Names on the command line, with what they stand for.
const CONTAINERS: [(&str, Container); 6] = [
    ("compressed-tensors", Container::CompressedTensors),
    ("openai", Container::Openai),
    ("dense", Container::Dense),
    ("gguf", Container::Gguf),
    ("vllm-int", Container::VllmInt),
    ("vllm-fp8", Container::VllmFp8),
];

impl Container {
    /// As the command line spells it.
    pub fn name(self) -> &'static str {
        CONTAINERS.iter().find(|c| c.1 == self).map_or("", |c| c.0)
    }

    /// The kind of vLLM's own names, where it is one.
    pub fn vllm(self) -> Option<Kind> {
        match self {
            Self::VllmInt => Some(Kind::Int),
            Self::VllmFp8 => Some(Kind::Fp8),
            _ => None,
        }
    }

    /// Whether main weights that are rounded are stored as compressed-tensors' codes.
    pub fn is_coded(self) -> bool {
        !matches!(self, Self::Dense | Self::Gguf)
    }
}

impl FromStr for Container {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let names: Vec<&str> = CONTAINERS.iter().map(|c| c.0).collect();
        CONTAINERS
            .iter()
            .find(|c| c.0 == s)
            .map(|c| c.1)
            .ok_or_else(|| Error::Refused(format!("there is no container {s:?}; there are {}", names.join(", "))))
    }
}

/// How statistics are gathered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Whether a layer's inputs have gone through the quantized layers before it.
    pub sequential_update: bool,
    /// For experts below the threshold.
    pub few_tokens: FewTokens,
    /// Share of all tokens; 1 takes every expert for one with few.
    pub few_tokens_threshold: f64,
    /// Whether a token counts by the router's weight for the expert.
    pub router_weighted: bool,
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            sequential_update: true,
            few_tokens: FewTokens::default(),
            few_tokens_threshold: 0.005,
            router_weighted: false,
        }
    }
}

/// Whether kernels for W4A8 count as installed; settled in the plan, so that the bits follow from the recipe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// They are.
    Present,
    /// They are not.
    #[default]
    Absent,
}
