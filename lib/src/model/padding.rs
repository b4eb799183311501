//! A wider model that computes the same function: hidden and intermediate width grow by zero rows and columns, so that
//! group sizes and kernels that do not divide 2880 have something to divide.
//!
//! RMSNorm divides by the wider width, so its weight becomes w * sqrt(H / H') and its eps becomes eps * H / H'; a gate row of
//! zeros makes 0, and so does its product with anything. All but the norms' weights is exact.

use serde_json::{Map, Value};

use super::ModelConfig;
use crate::error::{Error, Result};
use crate::formats::mxfp4::BLOCK;

/// From which widths to which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Padding {
    /// hidden_size, before and after.
    pub hidden: (usize, usize),
    /// intermediate_size, before and after.
    pub intermediate: (usize, usize),
}

/// What becomes of a tensor that is no linear layer's weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vector {
    /// It has no padded width.
    Same,
    /// Zeros behind it.
    Zeros,
    /// A norm's weight: scaled, with zeros behind it.
    Norm,
}

impl Padding {
    /// To the next multiples of `n`; `None` where both widths are that already.
    ///
    /// # Errors
    /// [`Error::Refused`] where `n` cuts MXFP4's blocks.
    pub fn to_multiple(config: &ModelConfig, n: usize) -> Result<Option<Self>> {
        if n == 0 || !n.is_multiple_of(BLOCK) || n > 1 << 16 {
            return Err(Error::Refused(format!(
                "--pad-to {n}: wanted a multiple of {BLOCK} up to 65536, such as 128 or 256"
            )));
        }
        let wider = |width: usize| (width, width.next_multiple_of(n));
        Ok(Self { hidden: wider(config.hidden), intermediate: wider(config.intermediate) }.or_none())
    }

    /// From the widths of one config to those of another, which may not be smaller.
    pub fn between(narrow: &ModelConfig, wide: &ModelConfig) -> Option<Self> {
        let padding =
            Self { hidden: (narrow.hidden, wide.hidden), intermediate: (narrow.intermediate, wide.intermediate) };
        let grows = |(a, b): (usize, usize)| a <= b;
        if grows(padding.hidden) && grows(padding.intermediate) { padding.or_none() } else { None }
    }

    fn or_none(self) -> Option<Self> {
        let same = |(a, b): (usize, usize)| a == b;
        (!(same(self.hidden) && same(self.intermediate))).then_some(self)
    }

    /// Writes the new widths, and the eps that goes with them, into a config.json.
    pub fn apply(&self, config: &mut Map<String, Value>) {
        config.insert("hidden_size".into(), self.hidden.1.into());
        config.insert("intermediate_size".into(), self.intermediate.1.into());
        if self.hidden.0 != self.hidden.1 {
            let eps = crate::runtimes::eps(config);
            config.insert("rms_norm_eps".into(), (eps * self.hidden.0 as f64 / self.hidden.1 as f64).into());
        }
    }

    /// The config before.
    pub fn narrow(&self, wide: &ModelConfig) -> ModelConfig {
        ModelConfig { hidden: self.hidden.0, intermediate: self.intermediate.0, ..wide.clone() }
    }

    /// What becomes of the tensor `name`.
    pub fn vector(&self, name: &str) -> Vector {
        if self.hidden.0 == self.hidden.1 {
            Vector::Same
        } else if name.ends_with("norm.weight") {
            Vector::Norm
        } else if name.ends_with(".o_proj.bias") {
            Vector::Zeros
        } else {
            Vector::Same
        }
    }

    /// The factor of norms' weights.
    pub fn norm_factor(&self) -> f64 {
        (self.hidden.0 as f64 / self.hidden.1 as f64).sqrt()
    }
}
