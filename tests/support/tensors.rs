//! A checkpoint's tensors, apart from how they lie in files.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Shard, files};

/// Tensors of a checkpoint: type, shape, bytes.
pub type Tensors = BTreeMap<String, (Value, Value, Vec<u8>)>;

/// Those of a folder.
pub fn read(dir: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for name in files(dir).into_keys().filter(|n| n.ends_with(".safetensors")) {
        let mut shard = Shard::read(&dir.join(name));
        let names: Vec<String> = shard.header.keys().filter(|k| *k != "__metadata__").cloned().collect();
        for name in names {
            let bytes = shard.tensor(&name).to_vec();
            let info = &shard.header[&name];
            tensors.insert(name, (info["dtype"].clone(), info["shape"].clone(), bytes));
        }
    }
    tensors
}

/// Writes `tensors` in these shards, with an index, beside the small files of `from`.
pub fn write(tensors: &Tensors, shards: &[Vec<&String>], from: &Path, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    for (name, bytes) in files(from) {
        if !name.ends_with(".safetensors") && !name.ends_with("index.json") && name != "gptoss-manifest.json" {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }
    let mut map = Map::new();
    for (i, names) in shards.iter().enumerate() {
        let file = format!("model-{i:05}-of-{:05}.safetensors", shards.len() - 1);
        let mut shard = Shard { header: Map::new(), data: Vec::new() };
        for &name in names {
            let (dtype, shape, bytes) = &tensors[name];
            let start = shard.data.len();
            shard.data.extend_from_slice(bytes);
            let offsets = [start, shard.data.len()];
            shard.header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
            map.insert(name.clone(), file.clone().into());
        }
        shard.write(&dir.join(file));
    }
    let total: usize = tensors.values().map(|t| t.2.len()).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
