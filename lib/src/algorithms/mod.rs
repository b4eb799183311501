//! Weights -> codes. Each algorithm is one file that reads like its paper.

pub mod rtn;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The algorithms that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Round to nearest: no data.
    Rtn,
}

/// Names that users of other tools know and that this version does not have.
const NOT_YET: [&str; 8] = ["gptq", "awq", "smoothquant", "sparsegpt", "wanda", "qqq", "ternary", "pt-bitnet"];

impl std::str::FromStr for Algorithm {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.to_ascii_lowercase().as_str() {
            "rtn" => Ok(Self::Rtn),
            other if NOT_YET.contains(&other) => Err(Error::Refused(format!(
                "the algorithm {other} is not in this version; it has rtn, which needs no data"
            ))),
            other => Err(Error::Refused(format!("there is no algorithm {other:?}; this version has rtn"))),
        }
    }
}

impl Algorithm {
    /// As it stands in a folder's name.
    pub fn tag(self) -> &'static str {
        match self {
            Self::Rtn => "RTN",
        }
    }
}
