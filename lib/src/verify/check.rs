//! Does a checkpoint contradict its manifest, its config, its index or its own headers?

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;

use crate::checkpoint::source::{Checkpoint, TensorRef, read_config};
use crate::checkpoint::{CONFIG, INDEX, MANIFEST, digest};
use crate::containers::compressed_tensors::config::scheme_of;
use crate::containers::openai::says_blocks;
use crate::containers::{self, dense};
use crate::error::{Error, Result};
use crate::formats::float::Float;
use crate::formats::mxfp4::SCALE_NAN;
use crate::manifest::{FileRecord, Finding, Manifest, Verdict};
use crate::model::{self, Fused, Linear, ModelConfig, Role, Settings};
use crate::pipeline::executor;

/// Gathers what is wrong.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, kind: &str, file: impl ToString, message: impl Into<String>) {
        self.0.push(Finding { kind: kind.into(), file: file.to_string(), message: message.into() });
    }

    /// Notes an error about content; anything else (the disk, permissions) is the caller's to return.
    fn absorb<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        let name =
            |p: &Path| p.file_name().map_or_else(|| p.display().to_string(), |n| n.to_string_lossy().into_owned());
        match result {
            Ok(value) => return Ok(Some(value)),
            Err(Error::BadFile { file, reason }) => self.add("header", name(&file), reason),
            Err(Error::BadTensor { file, tensor, reason }) => {
                self.add("tensor", name(&file), format!("tensor {tensor}: {reason}"))
            }
            Err(Error::MissingTensor { tensor, reason, .. }) => {
                self.add("missing", CONFIG, format!("tensor {tensor} is missing: {reason}"))
            }
            Err(other) => return Err(other),
        }
        Ok(None)
    }
}

/// Checks the checkpoint in `dir` on `threads` threads; `manifest` is the one that was piped in, otherwise the folder's
/// own is used where there is one.
///
/// # Errors
/// Only where `dir` is no checkpoint at all or the disk fails; what is merely wrong is in the verdict.
pub fn check(dir: &Path, manifest: Option<&Manifest>, threads: usize) -> Result<Verdict> {
    read_config(dir)?;
    let own = if manifest.is_none() { Manifest::in_folder(dir)? } else { None };
    let manifest = manifest.or(own.as_ref());
    let mut findings = Findings::default();
    if let Some(manifest) = manifest {
        files(dir, manifest, threads, &mut findings)?;
    }
    let mut tensors = 0;
    if let Some(checkpoint) = findings.absorb(Checkpoint::open(dir))? {
        tensors = checkpoint.names().count() as u64;
        checkpoint.index_findings.iter().for_each(|f| findings.add("index", INDEX, f));
        checkpoint.remarks.iter().for_each(|r| findings.add("ambiguous", "the folder", r));
        total_size(&checkpoint, &mut findings)?;
        let parsed = findings.absorb(ModelConfig::parse(dir, &checkpoint.config))?;
        if let Some(config) = parsed {
            findings.absorb(Settings::parse(dir, &checkpoint.config, &config))?;
            quantization_method(&checkpoint, &mut findings);
            structure(&checkpoint, &config, true, &mut findings)?;
        }
        values(&checkpoint, manifest, threads, &mut findings)?;
        checkpoint.unchanged()?;
    }
    let hashes_checked = manifest.is_some_and(|m| m.output.is_some());
    Ok(Verdict { passed: findings.0.is_empty(), tensors, hashes_checked, findings: findings.0, total_error: None })
}

/// What stands in the way of a runtime, or of this tool's own forward, whatever the values are: the first tensor that is
/// missing or has another shape, a config that no model has, a quantization that nobody here reads. `None` where nothing does.
pub fn obstacle(checkpoint: &Checkpoint) -> Result<Option<String>> {
    let mut findings = Findings::default();
    let dir = &checkpoint.dir;
    if let Some(config) = findings.absorb(ModelConfig::parse(dir, &checkpoint.config))? {
        findings.absorb(Settings::parse(dir, &checkpoint.config, &config))?;
        quantization_method(checkpoint, &mut findings);
        // Announced blocks that are not there are a matter of each runtime's own.
        structure(checkpoint, &config, false, &mut findings)?;
    }
    // Tensors besides are passed over by every reader.
    let counts = |f: &&Finding| f.kind != "extra";
    Ok(findings.0.iter().find(counts).map(|f| format!("{}: {}", f.file, f.message)))
}

/// Methods that this tool reads.
const METHODS: [&str; 3] = ["mxfp4", "compressed-tensors", "quark"];

fn quantization_method(checkpoint: &Checkpoint, findings: &mut Findings) {
    let Some(said) = checkpoint.config.get("quantization_config").filter(|q| !q.is_null()) else { return };
    let method = said.get("quant_method").and_then(serde_json::Value::as_str).unwrap_or("none");
    if !METHODS.contains(&method) {
        let known = METHODS.join(", ");
        findings.add("config", CONFIG, format!("quantization_config has the quant_method {method}; known are {known}"));
    }
}

/// Every file of the manifest's output: there, of that size, with that hash; and no shard besides.
fn files(dir: &Path, manifest: &Manifest, threads: usize, findings: &mut Findings) -> Result<()> {
    let Some(output) = &manifest.output else {
        findings.add("manifest", MANIFEST, format!("was written by {} and names no output", manifest.tool.name));
        return Ok(());
    };
    let plain = |f: &FileRecord| !f.name.contains('/') && f.name != "..";
    for bad in output.files.iter().filter(|f| !plain(f)) {
        findings.add("manifest", MANIFEST, format!("names {:?}, which is no plain file name", bad.name));
    }
    let listed: Vec<&FileRecord> = output.files.iter().filter(|f| plain(f)).collect();
    let found = executor::map(&listed, threads, |want| match dir.join(&want.name).metadata() {
        Ok(m) if m.len() != want.bytes => {
            Ok(Some(("size", format!("has {} bytes, the manifest says {}", m.len(), want.bytes))))
        }
        Ok(_) => {
            let have = digest::record(dir, &want.name)?;
            let differs = have.sha256 != want.sha256;
            Ok(differs.then(|| ("hash", format!("has SHA-256 {}, the manifest says {}", have.sha256, want.sha256))))
        }
        Err(_) => Ok(Some(("missing", "is in the manifest but not in the folder".into()))),
    })?;
    for (want, finding) in listed.iter().zip(found) {
        if let Some((kind, message)) = finding {
            findings.add(kind, &want.name, message);
        }
    }
    let names: BTreeSet<&str> = listed.iter().map(|f| f.name.as_str()).collect();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name().to_string_lossy().into_owned();
        if (name.ends_with(".safetensors") || name.ends_with(".gguf")) && !names.contains(name.as_str()) {
            findings.add("extra", &name, "is in the folder but not in the manifest");
        }
    }
    Ok(())
}

fn total_size(checkpoint: &Checkpoint, findings: &mut Findings) -> Result<()> {
    let path = checkpoint.dir.join(INDEX);
    if !crate::checkpoint::files::is_there(&path)? {
        return Ok(());
    }
    let index = crate::checkpoint::source::read_object(&path)?;
    let have: u64 = checkpoint.names().filter_map(|n| checkpoint.get(n)).map(|t| t.bytes.len() as u64).sum();
    if let Some(said) = index.get("metadata").and_then(|m| m.get("total_size")).and_then(serde_json::Value::as_u64)
        && said != have
    {
        findings.add("index", INDEX, format!("says total_size {said}, the tensors have {have} bytes"));
    }
    Ok(())
}

/// Every tensor that the config implies is there with its type and shape, and no other.
/// `announced`: and the blocks that config.json announces.
fn structure(checkpoint: &Checkpoint, config: &ModelConfig, announced: bool, findings: &mut Findings) -> Result<()> {
    for slot in model::slots(config) {
        match slot.role {
            Role::Experts(fused, layer) => {
                if announced {
                    says_mxfp4(checkpoint, config, fused, layer, findings);
                }
                for expert in 0..config.experts {
                    for &(proj, _, _) in fused.parts() {
                        linear(checkpoint, config, &Linear { proj, layer, expert }, findings)?;
                    }
                    if findings.0.len() > 1000 {
                        return Ok(());
                    }
                }
            }
            Role::Weight(l) => linear(checkpoint, config, &l, findings)?,
            Role::ExpertBias(fused, layer) => {
                findings.absorb(containers::expert_biases(checkpoint, config, fused, layer))?;
            }
            Role::Plain => {
                let checked = checkpoint.tensor(&slot.name).and_then(|t| t.expect(&dense::FLOATS, &slot.shape));
                findings.absorb(checked)?;
            }
        }
    }
    findings.absorb(containers::refuse_twice(checkpoint, config))?;
    for name in containers::foreign_tensors(checkpoint, config) {
        findings.add("extra", shard_of(checkpoint, name), format!("tensor {name} is no part of this model"));
    }
    Ok(())
}

fn shard_of(checkpoint: &Checkpoint, tensor: &str) -> String {
    checkpoint.get(tensor).map(|t| checkpoint.shards[t.shard].name.clone()).unwrap_or_default()
}

/// One linear layer: opens in some container, and in the one that the config names.
fn linear(checkpoint: &Checkpoint, config: &ModelConfig, linear: &Linear, findings: &mut Findings) -> Result<()> {
    let module = linear.module();
    findings.absorb(containers::open(checkpoint, config, linear))?;
    let stored = checkpoint.get(&format!("{module}.weight_scale")).is_some();
    let said = findings.absorb(scheme_of(checkpoint, &module))?.flatten().is_some();
    // A fused expert has no module of its own name; what config.json says of it is checked a layer at a time.
    let fused = linear.proj.fused().is_some() && checkpoint.get(&format!("{module}.weight")).is_none();
    if said && !stored && !fused {
        findings.add("config", CONFIG, format!("says that {module} is quantized, but it has no weight_scale"));
    }
    Ok(())
}

/// Blocks must be announced, or no reader looks for them.
fn says_mxfp4(checkpoint: &Checkpoint, config: &ModelConfig, fused: Fused, layer: usize, findings: &mut Findings) {
    let blocks = &model::mxfp4_specs(fused, layer, config)[0].name;
    let said = says_blocks(&checkpoint.config, layer);
    let stored = checkpoint.get(blocks).is_some();
    if stored != said {
        let (has, says) = if stored { ("holds", "does not say so") } else { ("does not hold", "says mxfp4") };
        findings.add("config", CONFIG, format!("the checkpoint {has} {blocks}, and config.json {says}"));
    }
}

/// NaN, infinity, and scales that are no scales.
fn values(checkpoint: &Checkpoint, manifest: Option<&Manifest>, threads: usize, findings: &mut Findings) -> Result<()> {
    let names: Vec<&str> = checkpoint.names().collect();
    let bad = executor::map(&names, threads, |name| Ok(scan(&checkpoint.tensor(name)?)))?;
    // A conversion to FP16 that overflowed said so: those infinities contradict nothing.
    let mut stated = manifest.and_then(|m| m.conversion).map_or(0, |c| c.overflows);
    let mut unstated: BTreeMap<&str, String> = BTreeMap::new();
    for (name, scan) in names.iter().zip(bad) {
        let Scan { infinities, other } = scan;
        if infinities > stated {
            unstated.insert(name, format!("holds {infinities} infinities"));
        }
        stated = stated.saturating_sub(infinities);
        if let Some(other) = other {
            unstated.insert(name, other);
        }
    }
    for (name, message) in unstated {
        findings.add("value", shard_of(checkpoint, name), format!("tensor {name}: {message}"));
    }
    Ok(())
}

struct Scan {
    infinities: u64,
    other: Option<String>,
}

/// What is wrong with the numbers of a tensor whose type has a byte for each.
fn bytes_that_are_nan(tensor: &TensorRef) -> Option<String> {
    let is_scale = tensor.name.ends_with("_scales") || tensor.name.ends_with(".weight_scale");
    match tensor.info.dtype {
        Dtype::U8 if is_scale && tensor.bytes.contains(&SCALE_NAN) => {
            Some("holds the scale byte 255, which is NaN".into())
        }
        // One fold over all of them vectorizes.
        Dtype::F8_E4M3 if tensor.bytes.iter().fold(false, |nan, b| nan | (b & 0x7f == 0x7f)) => {
            Some("holds an FP8 code that is NaN".into())
        }
        _ => None,
    }
}

fn scan(tensor: &TensorRef) -> Scan {
    let clean = Scan { infinities: 0, other: None };
    if let Some(ty) = tensor.info.blocks {
        let bad = tensor.bytes.chunks_exact(ty.bytes()).filter(|b| !ty.is_sound(b)).count();
        let other = (bad > 0).then(|| format!("holds {bad} blocks whose scale is NaN or infinite"));
        return Scan { other, ..clean };
    }
    let Some(float) = Float::of(tensor.info.dtype) else {
        return Scan { other: bytes_that_are_nan(tensor), ..clean };
    };
    let is_scale = tensor.name.ends_with(".weight_scale");
    if float.first_non_finite(tensor.bytes).is_none() && !is_scale {
        return clean;
    }
    let mut values = vec![0f32; 4096];
    let (mut infinities, mut nans, mut unusable) = (0, 0u64, 0u64);
    for chunk in tensor.bytes.chunks(4096 * float.size()) {
        let values = &mut values[..chunk.len() / float.size()];
        float.read(chunk, values);
        infinities += values.iter().filter(|v| v.is_infinite()).count() as u64;
        nans += values.iter().filter(|v| v.is_nan()).count() as u64;
        unusable += values.iter().filter(|v| is_scale && **v <= 0.0).count() as u64;
    }
    let other = match (nans, unusable) {
        (0, 0) => None,
        (0, n) => Some(format!("holds {n} scales that are not positive")),
        (n, _) => Some(format!("holds {n} NaN")),
    };
    Scan { infinities, other }
}
