//! What the command lines share: exit codes, sizes, where manifests come from and go to.

pub mod device;
pub mod gemm;
pub mod kernels;
pub mod plot;
pub mod quality;
pub mod recipe;
pub mod report;
pub mod reproduce;
pub mod text;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::ValueEnum;
use gptoss::checkpoint::digest::record;
use gptoss::checkpoint::hub::{self, Located, Wanted};
use gptoss::checkpoint::source::Checkpoint;
use gptoss::engine::Numerics;
use gptoss::manifest::{FileSet, Manifest, Volatile};
use gptoss::model::Model;
use gptoss::pipeline::executor::map;
use gptoss::pipeline::meter::Reading;
use gptoss::pipeline::progress::Progress;
use gptoss::pipeline::{Resources, layout_name};

/// A check found a difference.
pub const DIFFERENT: u8 = 1;
/// An error: wrong flags, unreadable input, a full disk.
pub const FAILED: u8 = 2;

/// What goes to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table on a terminal, the manifest otherwise.
    Auto,
    /// The manifest.
    Json,
    /// A table for people.
    Table,
}

/// Flags that every tool has.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// Worker threads [default: all processors]
    #[arg(long, value_name = "N", value_parser = parse_threads, global = true, help_heading = "Resources")]
    threads: Option<usize>,
    /// Most working memory; changes the speed, never the output
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size, global = true, help_heading = "Resources")]
    max_memory: u64,
    /// No progress and no notes on standard error
    #[arg(long, short, global = true)]
    quiet: bool,
    /// What goes to standard output
    #[arg(long, value_enum, default_value = "auto", global = true)]
    format: Format,
}

impl Common {
    /// Threads, memory, progress.
    pub fn resources(&self) -> Resources {
        let all = || std::thread::available_parallelism().map_or(1, Into::into);
        let threads = self.threads.unwrap_or_else(all);
        Resources {
            threads,
            max_memory: self.max_memory,
            offload: None,
            offload_hessians: false,
            progress: Progress::new(self.quiet),
        }
    }

    /// Whether standard output gets a table.
    pub fn is_table(&self) -> bool {
        match self.format {
            Format::Auto => std::io::stdout().is_terminal(),
            Format::Json => false,
            Format::Table => true,
        }
    }

    /// Writes the manifest, or a table of it, to standard output. A reader that has gone away is no error.
    pub fn emit(&self, manifest: &Manifest) -> Result<()> {
        let text =
            if self.is_table() { report::table(manifest) } else { serde_json::to_string_pretty(manifest)? + "\n" };
        write_out(&text)
    }
}

/// Writes to standard output; a broken pipe is no error.
pub fn write_out(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// Asks whether to do `what`; where there is nobody to ask it is an error that says how to answer.
pub fn agreed(what: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        anyhow::bail!("there is nobody to ask whether to {what}: give --yes");
    }
    write!(std::io::stderr(), "{what}? [y/N] ")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Runs a tool: its error goes to standard error and makes exit code 2.
pub fn run(tool: &str, body: impl FnOnce() -> Result<ExitCode>) -> ExitCode {
    gptoss::checkpoint::files::limits_are_errors();
    // A result that pages of a file are missing from is none, whatever was made of it.
    match body().and_then(|code| Ok(gptoss::checkpoint::map::intact().map(|()| code)?)) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{tool}: error: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

/// Parses the name of numerics.
pub fn parse_numerics(text: &str) -> Result<Numerics, String> {
    Numerics::ALL.into_iter().find(|n| n.name() == text).ok_or_else(|| "wanted engine or exact".into())
}

/// Says which layers the engine has no kernels for.
pub fn note_kernels(model: &Model, numerics: Numerics, progress: &Progress) -> Result<()> {
    let without = if numerics == Numerics::Engine { model.without_kernel()? } else { Vec::new() };
    if let Some(first) = without.first() {
        progress.note(&format!(
            "{} linear layers, such as {}, are stored in a way that the engine has no kernel for: their values are computed \
             with, which is slower",
            without.len(),
            first.module()
        ));
    }
    Ok(())
}

/// Parses a number of threads.
pub fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=4096) => Ok(n),
        _ => Err("wanted a number from 1 to 4096".into()),
    }
}

/// Parses `5GB`, `512MiB`, `2G` (binary, like GiB) or a plain number of bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024f64,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        _ => return Err(format!("{unit:?} is no unit; wanted for example 5GB, 512MiB or 2G")),
    };
    let bytes = number.parse::<f64>().map_err(|_| "wanted a size such as 5GB, 512MiB or 2G".to_owned())? * scale;
    if (1.0..=1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err("wanted a size between one byte and 10^18".into())
    }
}

/// The source: the flag's path or hub id, or the output of the manifest that comes through standard input (no flag and
/// a pipe, or `-`).
pub fn source(flag: Option<&str>, name: &str, wanted: Wanted, progress: &Progress) -> Result<Located> {
    match flag {
        Some(text) if text != "-" => Ok(hub::locate(text, wanted, progress)?),
        None if std::io::stdin().is_terminal() => {
            anyhow::bail!("give {name} DIR or a hub id, or pipe the manifest of the tool before into this one")
        }
        _ => {
            let manifest = Manifest::from_stdin().with_context(|| format!("no {name} was given"))?;
            Ok(Located { dir: manifest.output_path()?.to_path_buf(), hub: None })
        }
    }
}

/// Where hidden states go that memory does not hold: a folder on a disk, for /tmp is memory on many systems.
pub fn default_offload() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(dir) if !dir.is_empty() => dir.into(),
        _ if Path::new("/var/tmp").is_dir() => "/var/tmp".into(),
        _ => std::env::temp_dir(),
    }
}

/// A folder's files as its manifest has them; where it has none, its model's files, hashed here.
pub fn file_set(dir: &Path, threads: usize) -> Result<FileSet> {
    if let Some(set) = Manifest::in_folder(dir)?.and_then(|m| m.output) {
        return Ok(set);
    }
    let checkpoint = Checkpoint::open(dir)?;
    let mut names: Vec<String> = checkpoint.shards.iter().map(|s| s.name.clone()).collect();
    names.extend(checkpoint.small_files().map(str::to_owned));
    names.sort();
    let files = map(&names, threads, |name| record(dir, name))?;
    Ok(FileSet::new(layout_name(&checkpoint), files))
}

/// The first file of `files` that is not in `dir` as it was.
pub fn changed_file(dir: &Path, files: &FileSet, threads: usize) -> Result<Option<String>> {
    let changed = map(&files.files, threads, |was| {
        // A manifest is data from outside, and may not lead elsewhere.
        was.require_plain_name()?;
        let same = match std::fs::metadata(dir.join(&was.name)) {
            Ok(m) if m.len() == was.bytes => record(dir, &was.name)?.sha256 == was.sha256,
            _ => false,
        };
        Ok((!same).then(|| was.name.clone()))
    })?;
    Ok(changed.into_iter().flatten().next())
}

/// The part of a manifest that differs from run to run.
pub fn volatile(source: &Located, dst: Option<&Path>, reading: Reading, threads: usize, resumed: usize) -> Volatile {
    let full = |p: &Path| std::path::absolute(p).unwrap_or_else(|_| p.to_path_buf()).display().to_string();
    Volatile {
        source_path: Some(full(&source.dir)),
        source_hub: source.hub.clone(),
        output_path: dst.map(full),
        seconds: reading.seconds,
        peak_resident_bytes: reading.peak_resident,
        peak_anonymous_bytes: reading.peak_anonymous,
        threads,
        resumed_groups: resumed,
        bench: Vec::new(),
        gemm: Vec::new(),
        settings: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("1.5MiB"), Ok(3 << 19));
        assert_eq!(parse_size("77"), Ok(77));
        for bad in ["", "GB", "5 parsecs", "-1", "0", "1e30"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
