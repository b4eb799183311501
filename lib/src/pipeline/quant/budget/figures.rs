//! The file of what was measured: written layer by layer, read by runs that go on and runs for other sizes.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Place;
use crate::calibrate::sensitivity::LayerErrors;
use crate::checkpoint::files;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::recipe::SchemeName;

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    pub(super) schema: String,
    /// A hash of all that the figures depend on.
    pub(super) job: String,
    /// Schemes tried on experts.
    pub(super) experts: Vec<SchemeName>,
    /// Schemes tried on attentions.
    pub(super) attention: Vec<SchemeName>,
    /// Tokens of the text that it was tried on.
    pub(super) tokens: u64,
    pub(super) layers: Vec<LayerErrors>,
}

impl Sensitivity {
    /// What each rung costs in a place.
    pub(super) fn errors(&self, place: &Place, rungs: usize) -> Vec<f64> {
        let layer = &self.layers[place.layer];
        let mut errors = match (place.ladder, place.expert) {
            (1, _) => layer.attention.clone(),
            (_, Some(expert)) => layer.experts[expert].clone(),
            (_, None) => (0..layer.experts[0].len()).map(|r| layer.experts.iter().map(|e| e[r]).sum()).collect(),
        };
        // What is kept loses nothing, and a ladder of one was not tried.
        errors.resize(rungs, 0.0);
        errors
    }

    /// Whether the figures are those of a model of this shape with so many trials of experts and attentions, and figures at
    /// all.
    pub(super) fn check(&self, trials: (usize, usize), config: &ModelConfig) -> std::result::Result<(), String> {
        let figures = |list: &[f64], n: usize| match list.iter().find(|e| !(e.is_finite() && **e >= 0.0)) {
            Some(bad) => Err(format!("a measured error is {bad}: weights or text overflow, or somebody wrote it")),
            None if list.len() != n => Err(format!("holds {} errors of a place, wanted {n}; remove it", list.len())),
            None => Ok(()),
        };
        if self.layers.len() > config.layers || self.layers.iter().any(|l| l.experts.len() != config.experts) {
            return Err("holds errors of a model of another shape; remove it".into());
        }
        for layer in &self.layers {
            figures(&layer.attention, trials.1)?;
            layer.experts.iter().try_for_each(|e| figures(e, trials.0))?;
        }
        Ok(())
    }

    pub(super) fn read(file: &Path) -> Result<Option<Self>> {
        let Some(text) = files::read_text_if_there(file)? else { return Ok(None) };
        let bad = |e: serde_json::Error| Error::file(file, format!("is no list of measured errors: {e}; remove it"));
        serde_json::from_str(&text).map(Some).map_err(bad)
    }

    pub(super) fn write(&self, file: &Path) -> Result<()> {
        let error = |e| Error::io("write measured errors to", file)(e);
        let text = serde_json::to_string_pretty(self).expect("finite numbers and names");
        std::fs::create_dir_all(folder_of(file)).map_err(error)?;
        files::replace(file, text.as_bytes())
    }
}

/// Where a file lies.
pub(super) fn folder_of(file: &Path) -> PathBuf {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf()
}
