//! `gptoss-verify quality`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use gptoss::checkpoint::hub::{Located, Wanted, locate};
use gptoss::device::cpu::Cpu;
use gptoss::engine::Numerics;
use gptoss::evaluate::Room;
use gptoss::manifest::{Job, Manifest};
use gptoss::model::Model;
use gptoss::pipeline::meter::Meter;
use gptoss::text::dataset::Split;
use gptoss::text::load;
use gptoss::text::tokenizer::Tokenizer;
use gptoss::verify::quality::quality;

use crate::text::TextArgs;
use crate::{Common, default_offload, parse_numerics, volatile};

/// Flags of `gptoss-verify quality`.
#[derive(Debug, clap::Args)]
pub struct QualityArgs {
    /// The checkpoint to judge: a folder or a hub id; without one, the output of the manifest on standard input
    dir: Option<String>,
    /// The checkpoint that it was made from, for KL divergence and agreement [default: with a manifest, its source]
    #[arg(long, value_name = "SRC")]
    against: Option<String>,
    /// What the checkpoint computes with: exact (values and inputs in f32), or engine (stored codes, inputs in int8), which
    /// also measures what that changes; the source is always exact
    #[arg(long, value_name = "NAME", value_parser = parse_numerics, default_value = "exact")]
    numerics: Numerics,
    #[command(flatten)]
    text: TextArgs,
    /// Where hidden states go that do not fit in --max-memory [default: TMPDIR, or /var/tmp]
    #[arg(long, value_name = "DIR", help_heading = "Resources")]
    offload_folder: Option<PathBuf>,
}

impl QualityArgs {
    /// Measures and prints.
    pub fn run(&self, common: &Common) -> Result<ExitCode> {
        let request = self.text.request(None, Split::Test)?;
        let (resources, meter) = (common.resources(), Meter::start());
        let (model_at, source_at) = self.places(&resources.progress)?;
        let model = Model::open(&model_at.dir)?;
        let reference = source_at.as_ref().map(|s| Model::open(&s.dir)).transpose()?;
        let tokenizer = Tokenizer::open(&model_at.dir, model.config.vocab)?;
        let text = load(&request, &tokenizer, &model_at.dir, &resources.progress)?;
        text.notes.iter().for_each(|n| resources.progress.note(n));

        let device = Cpu::new(resources.threads)?;
        let offload = self.offload_folder.clone().unwrap_or_else(default_offload);
        let room = Room { memory: resources.max_memory, offload: &offload, progress: &resources.progress };
        let report = device.enter(|| quality(&device, self.numerics, &model, reference.as_ref(), &text, &room))?;

        std::iter::once(&model).chain(&reference).try_for_each(|m| m.checkpoint.unchanged())?;
        let job = Job::Quality { against: reference.is_some() };
        let mut manifest = Manifest::new("gptoss-verify", job).with(self.numerics);
        manifest.source = source_at.as_ref().map(|s| crate::file_set(&s.dir, resources.threads)).transpose()?;
        manifest.output = Some(crate::file_set(&model_at.dir, resources.threads)?);
        manifest.quality = Some(report);
        manifest.notes = model.checkpoint.remarks.clone();
        manifest.notes.extend(text.notes);
        let judged = source_at.as_ref().unwrap_or(&model_at);
        let mut run = volatile(judged, Some(&model_at.dir), meter.read(), resources.threads, 0);
        if source_at.is_none() {
            run.source_path = None;
        }
        manifest.volatile = Some(run);
        common.emit(&manifest)?;
        Ok(ExitCode::SUCCESS)
    }

    /// The checkpoint, and its source where one is wanted.
    fn places(&self, progress: &gptoss::pipeline::progress::Progress) -> Result<(Located, Option<Located>)> {
        let find = |text: &String| locate(text, Wanted::Everything, progress);
        let named = self.against.as_ref().map(find).transpose()?;
        if let Some(dir) = self.dir.as_ref().filter(|d| *d != "-") {
            return Ok((find(dir)?, named));
        }
        if std::io::stdin().is_terminal() {
            bail!("give the checkpoint's folder, or pipe the manifest of the tool that made it into this one");
        }
        let manifest = Manifest::from_stdin()?;
        let here = |dir: PathBuf| Located { dir, hub: None };
        let source = manifest.volatile.as_ref().and_then(|v| v.source_path.clone()).map(PathBuf::from);
        let source = named.or_else(|| source.filter(|s| s.is_dir()).map(here));
        Ok((here(manifest.output_path()?.to_path_buf()), source))
    }
}
