//! A checkpoint that is read: `config.json`, an index, and mapped shards. Nothing is copied; a tensor is a slice of its
//! shard. Everything that a hostile folder can lie about is checked here, so that the loops above need not.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use safetensors::Dtype;
use serde_json::Value;

use super::files::{self, Stamp};
use super::header::{self, TensorInfo};
use super::map::Mapped;
use super::{CONFIG, INDEX, MANIFEST, foreign, gguf};
use crate::error::{Error, Result};
use crate::model::{self, padding::Padding};

/// Name of the weights of a checkpoint in one file.
const SINGLE: &str = "model.safetensors";

/// One mapped shard.
pub struct Shard {
    /// File name inside the checkpoint's folder.
    pub name: String,
    /// Full path.
    pub path: PathBuf,
    /// The mapped file.
    map: Mapped,
    /// Every tensor of the header.
    tensors: BTreeMap<String, TensorInfo>,
}

impl Shard {
    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// A tensor of a [`Checkpoint`].
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Where it lies.
    pub info: &'a TensorInfo,
    /// Its bytes, little-endian.
    pub bytes: &'a [u8],
    /// The shard's path, for errors.
    pub file: &'a Path,
    /// The shard's number in [`Checkpoint::shards`].
    pub shard: usize,
}

impl TensorRef<'_> {
    /// An error about this tensor.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::tensor(self.file, self.name, reason)
    }

    /// Checks type and shape.
    pub fn expect(&self, dtypes: &[Dtype], shape: &[usize]) -> Result<()> {
        if !dtypes.contains(&self.info.dtype) {
            let wanted = dtypes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
            return Err(self.error(format!("has type {}, wanted {wanted}", self.info.dtype)));
        }
        if self.info.shape != shape {
            return Err(self.error(format!("has shape {:?}, config.json implies {shape:?}", self.info.shape)));
        }
        Ok(())
    }
}

/// A folder with a model in safetensors files.
pub struct Checkpoint {
    /// The folder.
    pub dir: PathBuf,
    /// `config.json`, as it stands.
    pub config: serde_json::Map<String, Value>,
    /// Shards in the order of their names.
    pub shards: Vec<Shard>,
    /// Tensor name to shard number.
    index: BTreeMap<String, usize>,
    /// True for a GGUF file: its tensors have the model's names here, where they are the model's.
    gguf: bool,
    /// Wider widths that its linear layers and vectors are read at.
    padding: Option<Padding>,
    /// What is wrong with the index without making the tensors unreadable; `verify check` reports it.
    pub index_findings: Vec<String>,
    /// What another reader would understand otherwise, or a user would not expect: notes of every tool that reads it.
    pub remarks: Vec<String>,
    /// The small files as they were when it was opened.
    small: Vec<(String, Stamp)>,
    /// Names of the tensors that were asked for since [`Self::used_by`] began, while it runs.
    used: Mutex<Option<BTreeSet<String>>>,
}

/// A small file that travels with the weights.
pub struct SideFile {
    /// Its name.
    pub name: String,
    /// Its content.
    pub bytes: Vec<u8>,
    /// Its permissions, where it has any that are to be kept.
    pub mode: Option<u32>,
}

/// Reads a JSON file that must hold an object.
pub fn read_object(path: &Path) -> Result<serde_json::Map<String, Value>> {
    let text = files::read(path)?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::file(path, "is not a JSON object")),
        Err(e) => Err(Error::file(path, format!("is not JSON: {e}"))),
    }
}

/// Reads `dir/config.json`, with a message that says what a checkpoint is where there is none.
pub fn read_config(dir: &Path) -> Result<serde_json::Map<String, Value>> {
    if dir.is_file() {
        return Err(Error::file(
            dir,
            "is a file; give a checkpoint's folder (a config.json alone is enough for --dry-run)",
        ));
    }
    if !dir.is_dir() {
        return Err(Error::file(
            dir,
            "is no folder; give a checkpoint's folder or a hub id such as openai/gpt-oss-20b",
        ));
    }
    let path = dir.join(CONFIG);
    if files::is_there(&path)? {
        return read_object(&path);
    }
    match gguf_files(dir)?.first() {
        Some(file) => model::gguf::config(file, &gguf::parse(file, &Mapped::open(file)?)?.0),
        None => Err(foreign::no_config(dir)?),
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`.
    ///
    /// # Errors
    /// Where a file is missing, truncated or contradicts itself; names the file and, where there is one, the tensor.
    pub fn open(dir: &Path) -> Result<Self> {
        // Their stamps are taken before they are read, so that a change in between is seen. What is wrong with the folder
        // itself is said first.
        let small = small_files(dir);
        let config = read_config(dir)?;
        let small = small?;
        let parts = gguf_files(dir)?;
        if !parts.is_empty() {
            return Self::open_gguf(dir, config, &parts, small);
        }
        let listed = listed_shards(dir)?;
        let names: BTreeSet<&String> = listed.values().collect();
        let mut shards = Vec::new();
        for name in names {
            shards.push(open_shard(dir, name)?);
        }
        if listed.is_empty() {
            shards.push(open_shard(dir, SINGLE)?);
        }
        let Joined { index, findings: index_findings, mut remarks } = join(dir, &listed, &shards)?;
        if !listed.is_empty() && !listed.values().any(|s| s == SINGLE) && files::is_there(&dir.join(SINGLE))? {
            remarks.push(format!(
                "both {INDEX} and {SINGLE} are there: the index was taken and {SINGLE} was not read, as vLLM does; transformers \
                 would take {SINGLE}, so remove the one that is stale"
            ));
        }
        remarks.extend(links_out(dir, &small)?);
        let dir = dir.to_path_buf();
        let mut opened = Self {
            dir,
            config,
            shards,
            index,
            gguf: false,
            padding: None,
            index_findings,
            remarks,
            small,
            used: Mutex::default(),
        };
        model::contradictions::settle(&mut opened);
        Ok(opened)
    }

    /// Opens one GGUF file, or all parts of a split one.
    fn open_gguf(
        dir: &Path,
        config: serde_json::Map<String, Value>,
        parts: &[PathBuf],
        small: Vec<(String, Stamp)>,
    ) -> Result<Self> {
        let (mut shards, mut index) = (Vec::new(), BTreeMap::new());
        for (number, path) in parts.iter().enumerate() {
            let map = Mapped::open(path)?;
            let (metadata, listed) = gguf::parse(path, &map)?;
            gguf::check_part(path, &metadata, number, parts.len())?;
            let mut tensors = BTreeMap::new();
            for (name, info) in listed {
                let name = model::gguf::to_model(&name).unwrap_or(name);
                if index.insert(name.clone(), number).is_some() {
                    return Err(Error::file(path, format!("has a second tensor {name}")));
                }
                tensors.insert(name, info);
            }
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            shards.push(Shard { name, path: path.clone(), map, tensors });
        }
        let remarks = links_out(dir, &small)?;
        let dir = dir.to_path_buf();
        let index_findings = Vec::new();
        Ok(Self {
            dir,
            config,
            shards,
            index,
            gguf: true,
            padding: None,
            index_findings,
            remarks,
            small,
            used: Mutex::default(),
        })
    }

    /// From here on it is read as the wider model that `padding` makes of it. Its tensors stay what they are; what
    /// [`crate::containers`] gives of them, and the config, is padded.
    pub fn pad(&mut self, padding: Padding) {
        padding.apply(&mut self.config);
        self.padding = Some(padding);
    }

    /// What [`Self::pad`] was given.
    pub fn padding(&self) -> Option<Padding> {
        self.padding
    }

    /// Whether it is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        self.gguf
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorRef<'_>> {
        let (name, &shard) = self.index.get_key_value(name)?;
        let s = &self.shards[shard];
        let info = &s.tensors[name.as_str()];
        if let Some(used) = &mut *self.used.lock().expect("no thread panics while it holds this") {
            used.insert(name.clone());
        }
        Some(TensorRef { name, info, bytes: &s.map[info.start..info.end], file: &s.path, shard })
    }

    /// What `f` gives, and the names of the tensors that were asked for meanwhile and are there.
    pub fn used_by<T>(&self, f: impl FnOnce() -> T) -> (T, BTreeSet<String>) {
        let names = || self.used.lock().expect("no thread panics while it holds this");
        *names() = Some(BTreeSet::new());
        let given = f();
        let used = names().take().unwrap_or_default();
        (given, used)
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where there is none.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        self.get(name).ok_or_else(|| Error::MissingTensor {
            dir: self.dir.clone(),
            tensor: name.to_owned(),
            reason: format!("config.json implies it{}", self.hint(name)),
        })
    }

    /// What a missing tensor may be called here, as the end of a sentence; empty where nothing looks like it.
    pub fn hint(&self, missing: &str) -> String {
        foreign::hint(missing, self.names()).map(|h| format!("; {h}")).unwrap_or_default()
    }

    /// Lets the pages of all shards go that this process has read. They stay in the system's cache while there is room;
    /// what is read again comes back.
    pub fn release(&self) {
        self.shards.iter().for_each(|shard| shard.map.release());
    }

    /// Every tensor's name, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> + Clone {
        self.index.keys().map(String::as_str)
    }

    /// The files beside config, index, shards and manifest that a copy of the model needs: tokenizer, generation
    /// config, chat template, licence.
    pub fn side_files(&self) -> impl Iterator<Item = &str> {
        self.small_files().filter(|name| is_side_file(name))
    }

    /// Config, index, where they are there, and [`Self::side_files`].
    pub fn small_files(&self) -> impl Iterator<Item = &str> {
        self.small.iter().map(|s| s.0.as_str())
    }

    /// Reads the side files, with their permissions.
    pub fn read_side_files(&self) -> Result<Vec<SideFile>> {
        let read = |name: &str| {
            let path = self.dir.join(name);
            let mode = std::fs::metadata(&path).map_err(Error::io("look at", &path))?.mode() & 0o777;
            Ok(SideFile { name: name.to_owned(), bytes: files::read(&path)?, mode: Some(mode) })
        };
        self.side_files().map(read).collect()
    }

    /// Stamps of every file, shards first: what they are known by.
    pub fn stamps(&self) -> impl Iterator<Item = (&str, Stamp)> {
        let shards = self.shards.iter().map(|s| (s.name.as_str(), s.map.stamp()));
        shards.chain(self.small.iter().map(|(name, stamp)| (name.as_str(), *stamp)))
    }

    /// Checks that no file was written or replaced since the checkpoint was opened: what was read is what is there, and the
    /// hashes are those of what was read.
    pub fn unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(|s| s.map.unchanged())?;
        self.small.iter().try_for_each(|(name, stamp)| stamp.check(&self.dir.join(name)))
    }
}

/// Config, index and side files of `dir`, with their stamps.
///
/// # Errors
/// Where one of them cannot be read: a link to nothing, a device, a Git LFS pointer. A copy without it would be another model.
fn small_files(dir: &Path) -> Result<Vec<(String, Stamp)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !is_side_file(&name) && ![CONFIG, INDEX].contains(&&*name) {
            continue;
        }
        let path = entry.path();
        // This follows links: a hub cache's snapshot is made of them.
        let how = if path.is_symlink() { "follow the link" } else { "look at" };
        let meta = std::fs::metadata(&path).map_err(Error::io(how, &path))?;
        if meta.is_dir() {
            continue;
        }
        files::refuse_large(&path, meta.len())?;
        let file = files::open(&path)?;
        let mut start = Vec::new();
        file.take(1024).read_to_end(&mut start).map_err(Error::io("read", &path))?;
        files::refuse_lfs(&path, &start)?;
        found.push((name, Stamp::of(&meta)));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// A remark for each side file that is a link out of the checkpoint: an output has the file itself.
fn links_out(dir: &Path, small: &[(String, Stamp)]) -> Result<Vec<String>> {
    let whole = dir.canonicalize().map_err(Error::io("resolve", dir))?;
    // In a hub's cache all are links from snapshots/REVISION to blobs/.
    let home = match whole.parent() {
        Some(up) if up.file_name().is_some_and(|n| n == "snapshots") => up.parent().unwrap_or(&whole).to_path_buf(),
        _ => whole,
    };
    let mut remarks = Vec::new();
    for (name, _) in small.iter().filter(|(name, _)| is_side_file(name)) {
        let path = dir.join(name);
        if path.is_symlink() {
            let target = path.canonicalize().map_err(Error::io("follow the link", &path))?;
            if !target.starts_with(&home) {
                let target = target.display();
                remarks.push(format!(
                    "{name} is a link out of the source, to {target}: its content is taken, not the link"
                ));
            }
        }
    }
    Ok(remarks)
}

/// True for files that travel with the model unchanged.
pub fn is_side_file(name: &str) -> bool {
    const STARTS: [&str; 12] = [
        "tokenizer",
        "special_tokens_map",
        "added_tokens",
        "vocab",
        "merges",
        "generation_config",
        "chat_template",
        "LICENSE",
        "LICENCE",
        "NOTICE",
        "COPYING",
        "USAGE_POLICY",
    ];
    let tables = [CONFIG, INDEX, MANIFEST];
    !tables.contains(&name) && STARTS.iter().any(|s| name.starts_with(s))
}

/// Whether `dir` holds weights, in whatever files.
pub fn has_weights(dir: &Path) -> Result<bool> {
    Ok(dir.is_dir() && (is_safetensors(dir)? || !gguf_files(dir)?.is_empty()))
}

fn is_safetensors(dir: &Path) -> Result<bool> {
    Ok(files::is_there(&dir.join(INDEX))? || files::is_there(&dir.join(SINGLE))?)
}

/// The GGUF file in `dir`, or the parts of a split one in order, where that is what holds the weights.
fn gguf_files(dir: &Path) -> Result<Vec<PathBuf>> {
    if is_safetensors(dir)? {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path.extension().is_some_and(|e| e == "gguf") {
            found.push(path);
        }
    }
    found.sort();
    gguf::parts(dir, found)
}

/// Tensor to shard, from the index; empty where there is none and `model.safetensors` is the whole model.
fn listed_shards(dir: &Path) -> Result<BTreeMap<String, String>> {
    let path = dir.join(INDEX);
    if !files::is_there(&path)? {
        if !files::is_there(&dir.join(SINGLE))? {
            return Err(foreign::no_weights(dir)?);
        }
        return Ok(BTreeMap::new());
    }
    let mut index = read_object(&path)?;
    let Some(Value::Object(map)) = index.remove("weight_map") else {
        return Err(Error::file(path, "has no object `weight_map`"));
    };
    if map.is_empty() {
        return Err(Error::file(path, "`weight_map` is empty"));
    }
    map.into_iter()
        .map(|(tensor, shard)| match shard {
            Value::String(s) if is_plain_shard_name(&s) => Ok((tensor, s)),
            Value::String(s) => Err(Error::tensor(
                &path,
                &tensor,
                format!("lies in {s:?}, which is no plain *.safetensors name in this folder"),
            )),
            other => Err(Error::tensor(&path, &tensor, format!("names its shard by {other}, wanted a string"))),
        })
        .collect()
}

/// A shard must be a file right in the folder: an index is data from outside and may not lead elsewhere.
fn is_plain_shard_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0']) && !name.starts_with('.')
}

fn open_shard(dir: &Path, name: &str) -> Result<Shard> {
    let path = dir.join(name);
    if !files::is_there(&path)? {
        return Err(Error::file(path, format!("is missing, but {INDEX} names it: incomplete download?")));
    }
    let map = Mapped::open(&path)?;
    let tensors = header::parse(&path, &map)?;
    Ok(Shard { name: name.to_owned(), path, map, tensors })
}

struct Joined {
    /// Tensor to shard number.
    index: BTreeMap<String, usize>,
    findings: Vec<String>,
    remarks: Vec<String>,
}

/// Joins index and headers: each listed tensor must be where the index says. Of two copies the index says which counts.
fn join(dir: &Path, listed: &BTreeMap<String, String>, shards: &[Shard]) -> Result<Joined> {
    let mut index: BTreeMap<String, usize> = BTreeMap::new();
    let (mut findings, mut remarks) = (Vec::new(), Vec::new());
    for (number, shard) in shards.iter().enumerate() {
        for name in shard.tensors.keys() {
            let Some(first) = index.insert(name.clone(), number) else { continue };
            let (one, other) = (&shards[first].name, &shard.name);
            let named = listed.get(name);
            match named {
                Some(n) if n == one => drop(index.insert(name.clone(), first)),
                Some(n) if n == other => {}
                _ => {
                    let reason = format!("stands in {one} and in {other}, and {INDEX} names neither of the two");
                    return Err(Error::tensor(&shard.path, name, reason));
                }
            }
            let named = &listed[name];
            remarks.push(format!(
                "{name} stands in {one} and in {other}: the copy in {named} was taken, which {INDEX} names; transformers would \
                 take the one in the last shard"
            ));
        }
    }
    for (tensor, shard) in listed {
        match index.get(tensor) {
            Some(&n) if shards[n].name == *shard => {}
            Some(&n) => {
                let found = &shards[n].name;
                return Err(Error::tensor(
                    &dir.join(INDEX),
                    tensor,
                    format!("is said to lie in {shard}, but lies in {found}"),
                ));
            }
            None => {
                return Err(Error::tensor(
                    &dir.join(shard),
                    tensor,
                    format!("is not in the file, but {INDEX} says so"),
                ));
            }
        }
    }
    if !listed.is_empty() {
        findings.extend(
            index.keys().filter(|n| !listed.contains_key(*n)).map(|n| format!("{n} is in a shard but not in {INDEX}")),
        );
    }
    Ok(Joined { index, findings, remarks })
}
