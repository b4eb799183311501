//! What the user asks for, and its resolution against a model's shapes.

pub mod pattern;

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::algorithms::Algorithm;
use crate::containers::compressed_tensors::{Activations, Scheme, Strategy};
use crate::error::{Error, Result};
use crate::formats::NumberFormat;
use crate::formats::int::IntFormat;
use crate::model::{Class, Linear, ModelConfig};

/// Modules that stay as they are unless a recipe says otherwise.
pub const DEFAULT_IGNORE: [&str; 3] = ["embed_tokens", "mlp.router", "lm_head"];

/// The group sizes that `auto` tries, best first.
const AUTO_GROUPS: [usize; 3] = [128, 64, 32];

/// How a class of layers is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SchemeName {
    /// As it is in the source, bit for bit.
    Keep,
    /// int4 weights, 16-bit activations.
    W4A16,
    /// int8 weights, 16-bit activations.
    W8A16,
    /// int8 weights a channel, int8 activations a token.
    W8A8,
}

/// Schemes that users of other tools know and that this version does not have.
const NOT_YET: [&str; 9] = ["w4a8", "fp8", "fp8_dynamic", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "w2a16", "w3a16"];

impl FromStr for SchemeName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.to_ascii_lowercase().as_str() {
            "keep" => Ok(Self::Keep),
            "w4a16" => Ok(Self::W4A16),
            "w8a16" => Ok(Self::W8A16),
            "w8a8" => Ok(Self::W8A8),
            other if NOT_YET.contains(&other) => Err(Error::Refused(format!(
                "the scheme {other} is not in this version; it has w4a16, w8a16, w8a8 and keep"
            ))),
            other => Err(Error::Refused(format!(
                "there is no scheme {other:?}; this version has w4a16, w8a16, w8a8 and keep"
            ))),
        }
    }
}

impl SchemeName {
    /// As it stands on the command line and in a folder's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::W4A16 => "w4a16",
            Self::W8A16 => "w8a16",
            Self::W8A8 => "w8a8",
        }
    }

    /// Bits of a weight; `None` for [`Self::Keep`].
    pub fn weight_bits(self) -> Option<u8> {
        match self {
            Self::Keep => None,
            Self::W4A16 => Some(4),
            Self::W8A16 | Self::W8A8 => Some(8),
        }
    }
}

/// Columns that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum GroupSize {
    /// The largest of 128, 64, 32 that divides the layer's in_features.
    Auto,
    /// The whole row.
    Channel,
    /// This many.
    Size(usize),
}

impl FromStr for GroupSize {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "channel" | "-1" => Ok(Self::Channel),
            n => match n.parse() {
                Ok(n) if n > 0 => Ok(Self::Size(n)),
                _ => {
                    Err(Error::Refused(format!("{s:?} is no group size; wanted auto, channel, or a number such as 64")))
                }
            },
        }
    }
}

/// Settings of one class of layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClassRecipe {
    /// Weights -> codes.
    pub algorithm: Algorithm,
    /// Storage.
    pub scheme: SchemeName,
    /// True for zero points of 0.
    pub symmetric: bool,
    /// Sharing of scales; w8a8 is by channel whatever stands here.
    pub group_size: GroupSize,
}

/// A whole recipe. Together with the source's bytes and the version it fixes every bit of the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// gate, up, down of every expert.
    pub experts: ClassRecipe,
    /// The other linear layers.
    pub mw: ClassRecipe,
    /// Patterns of modules that stay as they are.
    pub ignore: Vec<String>,
    /// Most bytes of data in a shard.
    pub shard_size: u64,
}

impl Recipe {
    /// The settings for a class.
    pub fn class(&self, class: Class) -> &ClassRecipe {
        match class {
            Class::Experts => &self.experts,
            Class::Main => &self.mw,
        }
    }

    /// The default name of the output: model, algorithms, schemes.
    pub fn output_name(&self, model: &str) -> String {
        let tag = |c: &ClassRecipe| if c.scheme == SchemeName::Keep { "KEEP" } else { c.algorithm.tag() };
        let (e, m) = (&self.experts, &self.mw);
        format!("{model}-{}-{}-experts-{}-mw-{}", tag(e), tag(m), e.scheme.name(), m.scheme.name())
    }
}

impl ClassRecipe {
    /// The scheme of `linear`; `None` for [`SchemeName::Keep`].
    ///
    /// # Errors
    /// [`Error::Refused`] where the group size does not divide in_features; names the layer and what would.
    pub fn resolve(&self, linear: &Linear, config: &ModelConfig) -> Result<Option<Scheme>> {
        let Some(num_bits) = self.scheme.weight_bits() else { return Ok(None) };
        let weights = NumberFormat::Int(IntFormat { num_bits, symmetric: self.symmetric });
        if self.scheme == SchemeName::W8A8 {
            let (strategy, activations) = (Strategy::Channel, Activations::DynamicTokenInt8);
            return Ok(Some(Scheme { weights, strategy, activations }));
        }
        let (_, inp) = linear.shape(config);
        let strategy = match self.group_size {
            GroupSize::Channel => Strategy::Channel,
            GroupSize::Size(n) if inp % n == 0 => Strategy::Group(n),
            GroupSize::Auto => match AUTO_GROUPS.into_iter().find(|n| inp % n == 0) {
                Some(n) => Strategy::Group(n),
                None => {
                    return Err(Error::Refused(format!(
                        "none of the group sizes 128, 64, 32 divides in_features {inp} of {}; use --group-size channel",
                        linear.module()
                    )));
                }
            },
            GroupSize::Size(n) => {
                let fits: Vec<String> =
                    AUTO_GROUPS.into_iter().filter(|g| inp % g == 0).map(|g| g.to_string()).collect();
                let offer =
                    if fits.is_empty() { "channel".into() } else { format!("auto (or one of {})", fits.join(", ")) };
                return Err(Error::Refused(format!(
                    "group_size {n} does not divide in_features {inp} of {}; use --group-size {offer}",
                    linear.module()
                )));
            }
        };
        Ok(Some(Scheme { weights, strategy, activations: Activations::Float }))
    }
}
