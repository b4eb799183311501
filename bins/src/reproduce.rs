//! `gptoss-verify reproduce`: a manifest's job once more, in a folder that goes away, and its hashes beside the manifest's.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use gptoss::checkpoint::MANIFEST;
use gptoss::checkpoint::hub::{Located, Wanted, locate};
use gptoss::checkpoint::source::Checkpoint;
use gptoss::kernels::arch;
use gptoss::kernels::build::Request;
use gptoss::kernels::cutlass::Headers;
use gptoss::kernels::store::KernelBuild;
use gptoss::kernels::toolkit::Toolkit;
use gptoss::manifest::{FileRecord, Finding, Job, Manifest, Verdict};
use gptoss::model::ModelConfig;
use gptoss::model::padding::Padding;
use gptoss::pipeline::meter::Meter;
use gptoss::pipeline::{Paths, Resources, dequant, quant};
use gptoss::text::tokenizer::Tokenizer;
use gptoss::text::{Text, TextReport, load};

use crate::{Common, DIFFERENT, changed_file, default_offload, volatile};

/// Flags of `gptoss-verify reproduce`.
#[derive(Debug, clap::Args)]
pub struct ReproduceArgs {
    /// A manifest, or the folder that it lies in; without one, or with -, the one on standard input
    manifest: Option<PathBuf>,
    /// The source that the job read: a folder or a hub id [default: where a manifest from a pipe says it was; one in a folder names no places]
    #[arg(long, value_name = "SRC")]
    source: Option<String>,
    /// The calibration text, where it was a file [default: none is looked for]
    #[arg(long, visible_alias = "calib-jsonl", value_name = "FILE")]
    text: Option<PathBuf>,
    /// Where the output grows and goes away again; it has to hold all of it [default: TMPDIR, or /var/tmp]
    #[arg(long, value_name = "DIR", help_heading = "Resources")]
    work_dir: Option<PathBuf>,
}

impl ReproduceArgs {
    /// Does the job again, and says whether its files have the hashes of the manifest.
    pub fn run(&self, common: &Common) -> Result<ExitCode> {
        let (mut resources, meter) = (common.resources(), Meter::start());
        let (was, origin) = self.manifest()?;
        if was.plan.is_some() {
            bail!("{origin}: is a plan (--dry-run), not a job that was done");
        }
        let parent = self.work_dir.clone().unwrap_or_else(default_offload);
        let work = tempfile::Builder::new().prefix("gptoss-reproduce-").tempdir_in(&parent);
        let work = work.with_context(|| format!("cannot create a folder in {}", parent.display()))?;
        resources.offload = Some(work.path().to_path_buf());

        let mut manifest = Manifest::new("gptoss-verify", Job::Reproduce { job: Box::new(was.job.clone()) });
        if was.tool.version != manifest.tool.version {
            manifest.notes.push(format!(
                "it was made by version {}, and done again by version {}",
                was.tool.version, manifest.tool.version
            ));
        }
        let (files, again) = match &was.job {
            Job::InstallKernels => {
                let build = was.kernels.as_ref().with_context(|| format!("{origin}: has no list of kernels"))?;
                let again = kernels(build, &resources, work.path())?;
                if again.id != build.id {
                    manifest.notes.push(format!(
                        "it was made of other sources, or with another compiler or CUTLASS: nvcc {} then, {} now",
                        build.nvcc, again.nvcc
                    ));
                }
                (build.files.clone(), again.files)
            }
            Job::Dequantize { .. } | Job::Quantize { .. } => {
                let output = was.output.clone().with_context(|| format!("{origin}: has no list of output files"))?;
                let source = self.source(&was, &origin, &resources)?;
                let again = self.checkpoint(&was, &source, &resources, &work.path().join("out"))?;
                manifest.source = was.source.clone();
                (output.files, again)
            }
            _ => bail!(
                "{origin}: its job made no files; wanted one of gptoss-dequant, gptoss-quant or gptoss-kernel-install"
            ),
        };
        let findings = differences(&files, &again);
        let code = if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) };
        manifest.verdict = Some(Verdict {
            passed: findings.is_empty(),
            tensors: files.len() as u64,
            hashes_checked: true,
            findings,
            total_error: None,
        });
        let here = Located { dir: parent, hub: None };
        let mut run = volatile(&here, None, meter.read(), resources.threads, 0);
        run.source_path = None;
        manifest.volatile = Some(run);
        common.emit(&manifest)?;
        Ok(code)
    }

    fn manifest(&self) -> Result<(Manifest, String)> {
        let Some(path) = self.manifest.as_ref().filter(|p| p.as_os_str() != "-") else {
            if std::io::stdin().is_terminal() {
                bail!("give a manifest or the folder that it lies in, or pipe one into this tool");
            }
            return Ok((Manifest::from_stdin()?, "standard input".into()));
        };
        let inside =
            [path.join(MANIFEST), path.join(gptoss::kernels::store::MANIFEST)].into_iter().find(|p| p.is_file());
        let path = inside.as_ref().unwrap_or(path);
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {origin}"))?;
        Ok((Manifest::parse(&text, &origin)?, origin))
    }

    /// The source with the bytes that the manifest says it had.
    fn source(&self, was: &Manifest, origin: &str, resources: &Resources) -> Result<PathBuf> {
        let run = was.volatile.as_ref();
        let hub = run.and_then(|v| v.source_hub.clone());
        let known = run.and_then(|v| v.source_path.clone()).filter(|p| Path::new(p).is_dir()).or(hub);
        let Some(wanted) = self.source.clone().or(known) else {
            bail!("{origin}: does not say where its source is, or it is there no more; give --source DIR or a hub id");
        };
        let dir = locate(&wanted, Wanted::Everything, &resources.progress)?.dir;
        let files = was.source.as_ref().with_context(|| format!("{origin}: has no list of source files"))?;
        if let Some(name) = changed_file(&dir, files, resources.threads)? {
            bail!("{}: {name} is missing or not what the job read; --source names another folder", dir.display());
        }
        Ok(dir)
    }

    /// Runs the job of a checkpoint into `dst`.
    fn checkpoint(&self, was: &Manifest, src: &Path, resources: &Resources, dst: &Path) -> Result<Vec<FileRecord>> {
        let paths = Paths { src: src.to_path_buf(), dst: dst.to_path_buf(), force: false, drop_unknown: true };
        let mut checkpoint = Checkpoint::open(src)?;
        let made = match &was.job {
            Job::Dequantize { dtype, shard_size } => {
                let options = dequant::Options { dtype: *dtype, shard_size: *shard_size };
                dequant::Plan::new(&checkpoint, options)?.run(&paths, resources)?.0
            }
            Job::Quantize { recipe } => {
                let config = ModelConfig::parse(src, &checkpoint.config)?;
                let padding = recipe.pad_to.map(|n| Padding::to_multiple(&config, n)).transpose()?.flatten();
                if let Some(padding) = padding {
                    checkpoint.pad(padding);
                }
                let plan = quant::Plan::new(src, &checkpoint.config, recipe.clone(), Some(&checkpoint))?;
                let text =
                    was.calibration.as_ref().map(|report| self.text(report, src, &config, resources)).transpose()?;
                plan.run(&paths, resources, text.as_ref())?.0
            }
            _ => unreachable!("the caller takes these two alone"),
        };
        Ok(made.output.map(|set| set.files).unwrap_or_default())
    }

    /// The text that the job was calibrated on.
    fn text(&self, report: &TextReport, dir: &Path, config: &ModelConfig, resources: &Resources) -> Result<Text> {
        let request = report.request(self.text.as_deref())?;
        let text = load(&request, &Tokenizer::open(dir, config.vocab)?, dir, &resources.progress)?;
        if text.report != *report {
            bail!("the text is not the one that the job was calibrated on: {:?}, wanted {:?}", text.report, report);
        }
        Ok(text)
    }
}

/// The same kernels once more, with the compiler that is here, and with CUTLASS where that build had it.
fn kernels(build: &KernelBuild, resources: &Resources, work: &Path) -> Result<KernelBuild> {
    let toolkit = Toolkit::find(None)?;
    let cutlass = build.cutlass.as_ref().map(|_| Headers::find(None, &toolkit)).transpose()?.flatten();
    let targets = arch::parse_list(&build.targets.join(";"), "the manifest")?;
    Ok(Request { toolkit, cutlass, targets }.install(work, resources.threads, &resources.progress)?.build)
}

/// Files that are not the same.
fn differences(was: &[FileRecord], again: &[FileRecord]) -> Vec<Finding> {
    let finding = |kind: &str, file: &str, message: String| Finding { kind: kind.into(), file: file.into(), message };
    let mut findings: Vec<Finding> = Vec::new();
    for file in was {
        match again.iter().find(|f| f.name == file.name) {
            Some(new) if new.sha256 == file.sha256 => {}
            Some(new) => {
                findings.push(finding("hash", &file.name, format!("SHA-256 {}, wanted {}", new.sha256, file.sha256)))
            }
            None => findings.push(finding("missing", &file.name, "was not made this time".into())),
        }
    }
    let more = again.iter().filter(|f| !was.iter().any(|w| w.name == f.name));
    findings.extend(more.map(|f| finding("extra", &f.name, "was made this time only".into())));
    findings
}
