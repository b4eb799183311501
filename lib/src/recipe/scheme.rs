//! Names of schemes and group sizes, and what they come to on a layer's shape.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LayerRecipe;
use crate::containers::compressed_tensors::{Activations, Scheme, Strategy};
use crate::error::{Error, Result};
use crate::formats::int::IntFormat;
use crate::formats::{NumberFormat, mxfp4};
use crate::model::{Linear, ModelConfig};

/// The group sizes that `auto` tries, best first.
const AUTO_GROUPS: [usize; 3] = [128, 64, 32];

/// How weights are stored and what happens to inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum SchemeName {
    /// As it is in the source, bit for bit.
    Keep,
    /// Floats of the source's type: for weights that only lose some of their numbers.
    Dense,
    /// Integers.
    Int {
        /// Of a weight, 2 to 8.
        bits: u8,
        /// True where each token's inputs are rounded to int8.
        int8_activations: bool,
    },
    /// FP8 E4M3 a channel, inputs FP8 a token.
    Fp8,
    /// MXFP4; experts in OpenAI's own layout.
    Mxfp4,
}

/// Schemes that users of other tools know and that this version does not have.
const NOT_YET: [&str; 6] = ["fp8_block", "mxfp6", "mxfp8", "nvfp4", "nvfp4a16", "w4afp8"];

/// The schemes of this version, for messages.
pub const SCHEMES: &str = "w2a16 to w8a16, w4a8, w8a8, fp8, mxfp4, dense and keep";

impl FromStr for SchemeName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let lower = s.to_ascii_lowercase();
        match lower.as_str() {
            "keep" => return Ok(Self::Keep),
            "dense" => return Ok(Self::Dense),
            "fp8" | "fp8_dynamic" => return Ok(Self::Fp8),
            "mxfp4" | "mxfp4a16" => return Ok(Self::Mxfp4),
            _ => {}
        }
        if let Some((bits, activations)) = lower.strip_prefix('w').and_then(|r| r.split_once('a'))
            && let (Ok(bits @ 2..=8), "8" | "16") = (bits.parse(), activations)
        {
            return Ok(Self::Int { bits, int8_activations: activations == "8" });
        }
        if NOT_YET.contains(&lower.as_str()) {
            return Err(Error::Refused(format!("the scheme {lower} is not in this version; it has {SCHEMES}")));
        }
        Err(Error::Refused(format!("there is no scheme {s:?}; this version has {SCHEMES}")))
    }
}

impl fmt::Display for SchemeName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Keep => f.write_str("keep"),
            Self::Dense => f.write_str("dense"),
            Self::Int { bits, int8_activations } => write!(f, "w{bits}a{}", if *int8_activations { 8 } else { 16 }),
            Self::Fp8 => f.write_str("fp8"),
            Self::Mxfp4 => f.write_str("mxfp4"),
        }
    }
}

impl TryFrom<String> for SchemeName {
    type Error = Error;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<SchemeName> for String {
    fn from(s: SchemeName) -> Self {
        s.to_string()
    }
}

impl SchemeName {
    /// Integer weights, floating inputs.
    pub const fn weight_only(bits: u8) -> Self {
        Self::Int { bits, int8_activations: false }
    }

    /// The group size of schemes that have no choice.
    pub fn own_group_size(self) -> Option<GroupSize> {
        match self {
            Self::Keep | Self::Dense => Some(GroupSize::Auto),
            Self::Fp8 | Self::Int { bits: 8, int8_activations: true } => Some(GroupSize::Channel),
            Self::Mxfp4 => Some(GroupSize::Size(mxfp4::BLOCK)),
            Self::Int { .. } => None,
        }
    }

    /// Bits of an integer weight.
    pub fn int_bits(self) -> Option<u8> {
        match self {
            Self::Int { bits, .. } => Some(bits),
            _ => None,
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

impl LayerRecipe {
    /// True where numbers become codes.
    pub fn is_rounded(&self) -> bool {
        !matches!(self.scheme, SchemeName::Keep | SchemeName::Dense)
    }

    /// The scheme of `linear`; `None` for [`SchemeName::Keep`] and [`SchemeName::Dense`].
    ///
    /// # Errors
    /// [`Error::Refused`] where the group size does not divide in_features; names the layer and what would.
    pub fn resolve(&self, linear: &Linear, config: &ModelConfig) -> Result<Option<Scheme>> {
        let (_, inp) = linear.shape(config);
        let scheme = |weights, strategy, activations| Ok(Some(Scheme { weights, strategy, activations }));
        match self.scheme {
            SchemeName::Keep | SchemeName::Dense => Ok(None),
            SchemeName::Fp8 => scheme(NumberFormat::Fp8, Strategy::Channel, Activations::DynamicTokenFp8),
            SchemeName::Mxfp4 if inp % mxfp4::BLOCK != 0 => Err(Error::Refused(format!(
                "in_features {inp} of {} is no multiple of MXFP4's block, {}",
                linear.module(),
                mxfp4::BLOCK
            ))),
            SchemeName::Mxfp4 => scheme(NumberFormat::Mxfp4, Strategy::Group(mxfp4::BLOCK), Activations::Float),
            SchemeName::Int { bits, int8_activations } => {
                let weights = NumberFormat::Int(IntFormat { num_bits: bits, symmetric: self.symmetric });
                let activations = if int8_activations { Activations::DynamicTokenInt8 } else { Activations::Float };
                // int8 by int8 is by channel, whatever the group size: a group is for where groups exist.
                let strategy =
                    if int8_activations && bits == 8 { Strategy::Channel } else { self.strategy(linear, inp)? };
                scheme(weights, strategy, activations)
            }
        }
    }

    fn strategy(&self, linear: &Linear, inp: usize) -> Result<Strategy> {
        let fitting = || AUTO_GROUPS.into_iter().filter(|&n| inp.is_multiple_of(n));
        match self.group_size {
            GroupSize::Channel => Ok(Strategy::Channel),
            GroupSize::Size(n) if inp.is_multiple_of(n) => Ok(Strategy::Group(n)),
            GroupSize::Auto => fitting().next().map(Strategy::Group).ok_or_else(|| {
                Error::Refused(format!(
                    "none of the group sizes 128, 64, 32 divides in_features {inp} of {}; use --group-size channel",
                    linear.module()
                ))
            }),
            GroupSize::Size(n) => {
                let fits: Vec<String> = fitting().map(|g| g.to_string()).collect();
                let offer =
                    if fits.is_empty() { "channel".into() } else { format!("auto (or one of {})", fits.join(", ")) };
                Err(Error::Refused(format!(
                    "group_size {n} does not divide in_features {inp} of {}; use --group-size {offer}",
                    linear.module()
                )))
            }
        }
    }
}
