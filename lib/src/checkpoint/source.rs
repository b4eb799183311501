//! A checkpoint that is read: `config.json`, an index, and mapped shards. Nothing is copied; a tensor is a slice of its
//! shard. Everything that a hostile folder can lie about is checked here, so that the loops above need not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::Dtype;
use serde_json::Value;

use super::header::{self, TensorInfo};
use super::{CONFIG, INDEX, MANIFEST, digest, gguf};
use crate::error::{Error, Result};
use crate::model::{self, padding::Padding};

/// One mapped shard.
pub struct Shard {
    /// File name inside the checkpoint's folder.
    pub name: String,
    /// Full path.
    pub path: PathBuf,
    /// The mapped file.
    map: Mmap,
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
}

/// Reads a JSON file that must hold an object.
pub fn read_object(path: &Path) -> Result<serde_json::Map<String, Value>> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
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
    if path.exists() {
        return read_object(&path);
    }
    match gguf_file(dir)? {
        Some(file) => model::gguf::config(&file, &gguf::parse(&file, &digest::map(&file)?)?.0),
        None => Err(Error::file(dir, "has no config.json, so it is no checkpoint")),
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`.
    ///
    /// # Errors
    /// Where a file is missing, truncated or contradicts itself; names the file and, where there is one, the tensor.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = read_config(dir)?;
        if let Some(path) = gguf_file(dir)? {
            return Self::open_gguf(dir, config, path);
        }
        let listed = listed_shards(dir)?;
        let names: BTreeSet<&String> = listed.values().collect();
        let mut shards = Vec::new();
        for name in names {
            shards.push(open_shard(dir, name)?);
        }
        if listed.is_empty() {
            shards.push(open_shard(dir, "model.safetensors")?);
        }
        let (index, index_findings) = join(dir, &listed, &shards)?;
        Ok(Self { dir: dir.to_path_buf(), config, shards, index, gguf: false, padding: None, index_findings })
    }

    fn open_gguf(dir: &Path, config: serde_json::Map<String, Value>, path: PathBuf) -> Result<Self> {
        let map = digest::map(&path)?;
        let (_, tensors) = gguf::parse(&path, &map)?;
        let named = |(name, info): (String, TensorInfo)| (model::gguf::to_model(&name).unwrap_or(name), info);
        let count = tensors.len();
        let tensors: BTreeMap<String, TensorInfo> = tensors.into_iter().map(named).collect();
        if tensors.len() != count {
            return Err(Error::file(path, "has two names for one of the model's tensors"));
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let index = tensors.keys().map(|t| (t.clone(), 0)).collect();
        let shards = vec![Shard { name, path, map, tensors }];
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            shards,
            index,
            gguf: true,
            padding: None,
            index_findings: Vec::new(),
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
        Some(TensorRef { name, info, bytes: &s.map[info.start..info.end], file: &s.path, shard })
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where there is none.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        self.get(name).ok_or_else(|| Error::MissingTensor {
            dir: self.dir.clone(),
            tensor: name.to_owned(),
            reason: "config.json implies it".into(),
        })
    }

    /// Lets the pages of all shards go that this process has read. They stay in the system's cache while there is room;
    /// what is read again comes back.
    pub fn release(&self) {
        for shard in &self.shards {
            // SAFETY: the map is read-only and of a file, so dropped pages are read again with the same content.
            // A refusal changes nothing but how much memory this process seems to have.
            let _ = unsafe { shard.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }

    /// Every tensor's name, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The files beside config, index, shards and manifest that a copy of the model needs: tokenizer, generation
    /// config, chat template, licence.
    pub fn side_files(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(Error::io("list", &self.dir))? {
            let entry = entry.map_err(Error::io("list", &self.dir))?;
            // `metadata` follows links: a hub cache's snapshot is made of them.
            let is_file = std::fs::metadata(entry.path()).is_ok_and(|m| m.is_file());
            if let (true, Ok(name)) = (is_file, entry.file_name().into_string())
                && is_side_file(&name)
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
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
    Ok(dir.is_dir() && (is_safetensors(dir) || gguf_file(dir)?.is_some()))
}

fn is_safetensors(dir: &Path) -> bool {
    [INDEX, "model.safetensors"].iter().any(|name| dir.join(name).exists())
}

/// The GGUF file in `dir`, where that is what holds the weights.
fn gguf_file(dir: &Path) -> Result<Option<PathBuf>> {
    if is_safetensors(dir) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path.extension().is_some_and(|e| e == "gguf") {
            found.push(path);
        }
    }
    found.sort();
    match found.len() {
        0 | 1 => Ok(found.pop()),
        n => Err(Error::file(dir, format!("holds {n} GGUF files; keep the one that is meant in a folder of its own"))),
    }
}

/// Tensor to shard, from the index; empty where there is none and `model.safetensors` is the whole model.
fn listed_shards(dir: &Path) -> Result<BTreeMap<String, String>> {
    let path = dir.join(INDEX);
    if !path.exists() {
        if !dir.join("model.safetensors").exists() {
            return Err(Error::file(
                dir,
                format!("has neither {INDEX} nor model.safetensors: the weights are missing"),
            ));
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
    if !path.exists() {
        return Err(Error::file(path, format!("is missing, but {INDEX} names it: incomplete download?")));
    }
    let map = digest::map(&path)?;
    let tensors = header::parse(&path, &map)?;
    Ok(Shard { name: name.to_owned(), path, map, tensors })
}

type Joined = (BTreeMap<String, usize>, Vec<String>);

/// Joins index and headers: each listed tensor must be where the index says.
fn join(dir: &Path, listed: &BTreeMap<String, String>, shards: &[Shard]) -> Result<Joined> {
    let mut index = BTreeMap::new();
    let mut findings = Vec::new();
    for (number, shard) in shards.iter().enumerate() {
        for name in shard.tensors.keys() {
            if let Some(first) = index.insert(name.clone(), number) {
                let first: &Shard = &shards[first];
                return Err(Error::tensor(&shard.path, name, format!("stands in {} as well", first.name)));
            }
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
    Ok((index, findings))
}
