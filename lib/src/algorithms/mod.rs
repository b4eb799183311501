//! Weights -> codes. Each algorithm is one file that reads like its paper.

pub mod awq;
pub mod descent;
pub mod gptq;
pub mod pt_bitnet;
pub mod rtn;
pub mod scales;
pub mod smoothquant;
pub mod sweep;
pub mod wanda;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The algorithms that choose codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Round to nearest: no data.
    Rtn,
    /// Each column's rounding error is made up for by the columns that follow, as the inputs' second moments say.
    Gptq,
    /// GPTQ on scales that are fitted to the outputs, then codes and scales in turns.
    #[serde(rename = "pt-bitnet")]
    PtBitnet,
    /// Channels that see large inputs are scaled up before rounding, and the norm in front of them down.
    Awq,
}

/// Names that users of other tools know and that this version does not have.
const NOT_YET: [&str; 1] = ["qqq"];

impl std::str::FromStr for Algorithm {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.to_ascii_lowercase().as_str() {
            "rtn" => Ok(Self::Rtn),
            "gptq" => Ok(Self::Gptq),
            "awq" => Ok(Self::Awq),
            "pt-bitnet" | "ptbitnet" | "ternary" => Ok(Self::PtBitnet),
            other if NOT_YET.contains(&other) => Err(Error::Refused(format!(
                "the algorithm {other} is not in this version; it has rtn, which needs no data, gptq, awq and pt-bitnet"
            ))),
            other => Err(Error::Refused(format!(
                "there is no algorithm {other:?}; this version has rtn, gptq, awq and pt-bitnet"
            ))),
        }
    }
}

impl Algorithm {
    /// As it stands in a folder's name.
    pub fn tag(self) -> &'static str {
        match self {
            Self::Rtn => "RTN",
            Self::Gptq => "GPTQ",
            Self::Awq => "AWQ",
            Self::PtBitnet => "PTBITNET",
        }
    }

    /// True where a text must go through the model.
    pub fn needs_text(self) -> bool {
        self != Self::Rtn
    }
}
