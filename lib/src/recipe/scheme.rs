//! Names of schemes and group sizes, and what they come to on a layer's shape.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LayerRecipe;
use crate::containers::compressed_tensors::{Activations, Scheme, Strategy};
use crate::error::{Error, Result};
use crate::formats::float::Float;
use crate::formats::ggml::Ggml;
use crate::formats::int::IntFormat;
use crate::formats::minifloat::Minifloat;
use crate::formats::ternary::Trits;
use crate::formats::{FP8, NumberFormat, mx, nvfp4};
use crate::model::{Linear, ModelConfig};

/// Rows and columns of a block, as runtimes have kernels for.
const BLOCK: Strategy = Strategy::Block(128, 128);
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
    /// Integers of 4 bits, inputs FP8 a token.
    W4afp8,
    /// FP8 E4M3 a channel, inputs FP8 a token.
    Fp8,
    /// FP8 E4M3 with one scale a tensor, for the weight and for the inputs, which calibration finds.
    Fp8Static,
    /// FP8 E4M3 in blocks of 128 by 128, inputs FP8 in groups of 128.
    Fp8Block,
    /// Small floats under scales of the weights' type, floating inputs.
    Float(Minifloat),
    /// MX blocks; experts of MXFP4 in OpenAI's own layout.
    Mx(Minifloat),
    /// NVFP4, floating inputs.
    Nvfp4,
    /// One of ggml's block types.
    Ggml(Ggml),
    /// -1, 0 and 1, floating inputs.
    Ternary(Trits),
    /// BF16 or FP16.
    Half(Float),
}

/// Names that are no pattern.
const NAMES: [(&str, SchemeName); 28] = [
    ("keep", SchemeName::Keep),
    ("dense", SchemeName::Dense),
    ("w4afp8", SchemeName::W4afp8),
    ("fp8", SchemeName::Fp8),
    ("fp8_static", SchemeName::Fp8Static),
    ("fp8_block", SchemeName::Fp8Block),
    ("fp8a16", SchemeName::Float(Minifloat::E4M3)),
    ("fp8_e5m2", SchemeName::Float(Minifloat::E5M2)),
    ("fp6", SchemeName::Float(Minifloat::E2M3)),
    ("fp6_e3m2", SchemeName::Float(Minifloat::E3M2)),
    ("fp4", SchemeName::Float(Minifloat::E2M1)),
    ("mxfp8", SchemeName::Mx(Minifloat::E4M3)),
    ("mxfp8_e5m2", SchemeName::Mx(Minifloat::E5M2)),
    ("mxfp6", SchemeName::Mx(Minifloat::E2M3)),
    ("mxfp6_e3m2", SchemeName::Mx(Minifloat::E3M2)),
    ("mxfp4", SchemeName::Mx(Minifloat::E2M1)),
    ("nvfp4", SchemeName::Nvfp4),
    ("ternary", SchemeName::Ternary(Trits::Quarters)),
    ("ternary_b3", SchemeName::Ternary(Trits::Fifths)),
    ("bf16", SchemeName::Half(Float::Bf16)),
    ("fp16", SchemeName::Half(Float::F16)),
    ("q4_0", SchemeName::Ggml(Ggml::Q4_0)),
    ("q4_1", SchemeName::Ggml(Ggml::Q4_1)),
    ("q5_0", SchemeName::Ggml(Ggml::Q5_0)),
    ("q5_1", SchemeName::Ggml(Ggml::Q5_1)),
    ("q8_0", SchemeName::Ggml(Ggml::Q8_0)),
    ("tq1_0", SchemeName::Ggml(Ggml::Tq1_0)),
    ("tq2_0", SchemeName::Ggml(Ggml::Tq2_0)),
];

/// Other tools' names for the same.
const ALIASES: [(&str, &str); 6] = [
    ("f16", "fp16"),
    ("fp8_dynamic", "fp8"),
    ("mxfp4a16", "mxfp4"),
    ("mxfp6a16", "mxfp6"),
    ("mxfp8a16", "mxfp8"),
    ("nvfp4a16", "nvfp4"),
];

/// All schemes, for messages.
pub const SCHEMES: &str = "w2a16 to w8a16, w4a8, w8a8, w4afp8, fp8, fp8_static, fp8_block, fp8a16, fp8_e5m2, fp6, fp6_e3m2, \
fp4, mxfp8, mxfp8_e5m2, mxfp6, mxfp6_e3m2, mxfp4, nvfp4, ternary, ternary_b3, q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0, tq2_0, bf16, fp16, dense and keep";

impl FromStr for SchemeName {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let lower = s.to_ascii_lowercase();
        let name = ALIASES.iter().find(|a| a.0 == lower).map_or(&lower[..], |a| a.1);
        if let Some((_, scheme)) = NAMES.iter().find(|n| n.0 == name) {
            return Ok(*scheme);
        }
        if let Some((bits, activations)) = lower.strip_prefix('w').and_then(|r| r.split_once('a'))
            && let (Ok(bits @ 2..=8), "8" | "16") = (bits.parse(), activations)
        {
            return Ok(Self::Int { bits, int8_activations: activations == "8" });
        }
        Err(Error::Refused(format!("there is no scheme {s:?}; there are {SCHEMES}")))
    }
}

impl fmt::Display for SchemeName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match (self, NAMES.iter().find(|n| n.1 == *self)) {
            (Self::Int { bits, int8_activations }, _) => {
                write!(f, "w{bits}a{}", if *int8_activations { 8 } else { 16 })
            }
            (_, Some((name, _))) => f.write_str(name),
            (_, None) => unreachable!("a test holds the names complete"),
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
            Self::Half(_) => Some(GroupSize::Channel),
            Self::Fp8Static => Some(GroupSize::Tensor),
            Self::Fp8Block => Some(GroupSize::Block),
            Self::Mx(_) => Some(GroupSize::Size(mx::BLOCK)),
            Self::Nvfp4 => Some(GroupSize::Size(nvfp4::GROUP)),
            Self::Ggml(ty) => Some(GroupSize::Size(ty.group())),
            Self::Int { .. } | Self::W4afp8 | Self::Float(_) | Self::Ternary(_) => None,
        }
    }

    /// Whether the runtime rounds inputs.
    pub fn rounds_inputs(self) -> bool {
        match self {
            Self::Int { int8_activations, .. } => int8_activations,
            Self::W4afp8 | Self::Fp8 | Self::Fp8Static | Self::Fp8Block => true,
            Self::Keep
            | Self::Dense
            | Self::Float(_)
            | Self::Mx(_)
            | Self::Nvfp4
            | Self::Ggml(_)
            | Self::Ternary(_)
            | Self::Half(_) => false,
        }
    }

    /// Whether codes are -1, 0 and 1.
    pub fn is_ternary(self) -> bool {
        matches!(self, Self::Ternary(_) | Self::Ggml(Ggml::Tq1_0 | Ggml::Tq2_0))
    }

    /// Whether zero points can be stored.
    pub fn may_be_asymmetric(self) -> bool {
        matches!(self, Self::Keep | Self::Dense | Self::Int { .. })
    }

    /// Bits of an integer weight.
    pub fn int_bits(self) -> Option<u8> {
        match self {
            Self::Int { bits, .. } => Some(bits),
            Self::W4afp8 => Some(4),
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
    /// All columns of all rows.
    Tensor,
    /// 128, and as many rows.
    Block,
    /// This many.
    Size(usize),
}

impl FromStr for GroupSize {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "channel" | "-1" => Ok(Self::Channel),
            "tensor" => Ok(Self::Tensor),
            "block" => Ok(Self::Block),
            n => match n.parse() {
                Ok(n) if n > 0 => Ok(Self::Size(n)),
                _ => Err(Error::Refused(format!(
                    "{s:?} is no group size; wanted auto, channel, tensor, block, or a number such as 64"
                ))),
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
        let blocks = |weights: NumberFormat, group: usize| {
            if !inp.is_multiple_of(group) {
                return Err(Error::Refused(format!(
                    "in_features {inp} of {} is no multiple of {}'s block, {group}; use --pad-to {group}",
                    linear.module(),
                    weights.name()
                )));
            }
            scheme(weights, Strategy::Group(group), Activations::Float)
        };
        let int = |num_bits| NumberFormat::Int(IntFormat { num_bits, symmetric: self.symmetric });
        match self.scheme {
            SchemeName::Keep | SchemeName::Dense => Ok(None),
            SchemeName::Fp8 => scheme(FP8, Strategy::Channel, Activations::DynamicTokenFp8),
            SchemeName::Fp8Static => scheme(FP8, Strategy::Tensor, Activations::StaticFp8),
            SchemeName::Fp8Block => scheme(FP8, BLOCK, Activations::DynamicGroupFp8),
            SchemeName::Float(table) => {
                scheme(NumberFormat::Float(table), self.strategy(linear, inp)?, Activations::Float)
            }
            SchemeName::Ternary(trits) => match self.strategy(linear, inp)? {
                s @ (Strategy::Group(_) | Strategy::Channel) => {
                    scheme(NumberFormat::Ternary(trits), s, Activations::Float)
                }
                _ => Err(Error::Refused(format!(
                    "ternary scales belong to a group or a channel; {} has another --group-size",
                    linear.module()
                ))),
            },
            SchemeName::Mx(table) => blocks(NumberFormat::Mx(table), mx::BLOCK),
            SchemeName::Nvfp4 => blocks(NumberFormat::Nvfp4, nvfp4::GROUP),
            SchemeName::Half(float) => scheme(NumberFormat::Half(float), Strategy::Channel, Activations::Float),
            SchemeName::Ggml(ty) => blocks(NumberFormat::Ggml(ty), ty.group()),
            SchemeName::W4afp8 => scheme(int(4), self.strategy(linear, inp)?, Activations::DynamicTokenFp8),
            SchemeName::Int { bits, int8_activations } => {
                let activations = if int8_activations { Activations::DynamicTokenInt8 } else { Activations::Float };
                // int8 by int8 is by channel, whatever the group size: a group is for where groups exist.
                let strategy =
                    if int8_activations && bits == 8 { Strategy::Channel } else { self.strategy(linear, inp)? };
                scheme(int(bits), strategy, activations)
            }
        }
    }

    fn strategy(&self, linear: &Linear, inp: usize) -> Result<Strategy> {
        let fitting = || AUTO_GROUPS.into_iter().filter(|&n| inp.is_multiple_of(n));
        match self.group_size {
            GroupSize::Channel => Ok(Strategy::Channel),
            GroupSize::Tensor => Ok(Strategy::Tensor),
            GroupSize::Block => Ok(BLOCK),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scheme_has_its_name() {
        for (name, scheme) in NAMES {
            assert_eq!((name.parse::<SchemeName>().unwrap(), scheme.to_string()), (scheme, name.to_owned()));
            assert!(SCHEMES.contains(name), "{name}");
        }
        for table in Minifloat::ALL {
            assert!(NAMES.iter().any(|n| n.1 == SchemeName::Float(table)), "{table:?}");
            assert!(NAMES.iter().any(|n| n.1 == SchemeName::Mx(table)), "{table:?}");
        }
        for (alias, name) in ALIASES {
            assert_eq!(alias.to_uppercase().parse::<SchemeName>().unwrap(), name.parse().unwrap());
        }
        assert_eq!("W4A16".parse::<SchemeName>().unwrap(), SchemeName::weight_only(4));
        assert!("w9a16".parse::<SchemeName>().unwrap_err().to_string().contains("there is no scheme \"w9a16\""));
    }
}
