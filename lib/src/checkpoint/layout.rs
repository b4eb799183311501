//! Where every byte of an output lies, before the first is written.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::header::{self, TensorSpec};
use super::{GGUF, digest, gguf};

/// A planned tensor: what it is and the group (layer) whose end completes it.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Name, type, shape.
    pub spec: TensorSpec,
    /// Number of the group that writes it.
    pub group: usize,
}

/// Where every byte of the output will lie; made from headers alone.
pub struct Layout {
    /// Every tensor, in the order given.
    pub tensors: Vec<Planned>,
    /// For each tensor: its shard and the offset of its data in the file.
    pub(super) places: Vec<(usize, u64)>,
    pub(super) shards: Vec<ShardLayout>,
}

pub(super) struct ShardLayout {
    pub(super) name: String,
    pub(super) header: Vec<u8>,
    pub(super) len: u64,
    /// Zeros between tensors: start to end.
    pub(super) gaps: Vec<(u64, u64)>,
}

impl Layout {
    /// Fills shards of at most `shard_size` bytes of data (a larger tensor gets its own) in the order of `tensors`.
    pub fn new(tensors: Vec<Planned>, shard_size: u64) -> Self {
        let mut members: Vec<Vec<usize>> = vec![Vec::new()];
        let mut filled = 0u64;
        for (i, t) in tensors.iter().enumerate() {
            let len = t.spec.byte_len() as u64;
            if filled > 0 && filled + len > shard_size {
                members.push(Vec::new());
                filled = 0;
            }
            filled += len;
            members.last_mut().expect("never empty").push(i);
        }
        let mut places = vec![(0, 0); tensors.len()];
        let mut shards = Vec::new();
        for (s, list) in members.iter_mut().enumerate() {
            // Wide types first: readers view the bytes in place and need each tensor aligned to its own type.
            list.sort_by_key(|&i| std::cmp::Reverse(tensors[i].spec.dtype.bitsize()));
            let header = header::encode(&list.iter().map(|&i| &tensors[i].spec).collect::<Vec<_>>());
            let mut at = header.len() as u64;
            for &i in list.iter() {
                places[i] = (s, at);
                at += tensors[i].spec.byte_len() as u64;
            }
            shards.push(ShardLayout { name: String::new(), header, len: at, gaps: Vec::new() });
        }
        let n = shards.len();
        for (s, shard) in shards.iter_mut().enumerate() {
            shard.name = format!("model-{:05}-of-{n:05}.safetensors", s + 1);
        }
        Self { tensors, places, shards }
    }

    /// One GGUF file of `tensors`, which `gguf` describes in the same order.
    pub fn gguf(tensors: Vec<Planned>, metadata: &[(String, gguf::Value)], described: &[gguf::Tensor]) -> Self {
        let (header, starts) = gguf::encode(metadata, described);
        let (mut at, mut gaps) = (header.len() as u64, Vec::new());
        for (t, &start) in tensors.iter().zip(&starts) {
            if at < start {
                gaps.push((at, start));
            }
            at = start + t.spec.byte_len() as u64;
        }
        let places = starts.into_iter().map(|start| (0, start)).collect();
        Self { tensors, places, shards: vec![ShardLayout { name: GGUF.into(), header, len: at, gaps }] }
    }

    /// Bytes of all shards, headers included.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.len).sum()
    }

    /// Number of shards.
    pub fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// A digest of everything that the layout fixes.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for s in &self.shards {
            hash.update(&s.header);
        }
        digest::hex(&hash.finalize())
    }

    /// The index file's content, where there is an index.
    pub(super) fn index(&self) -> Option<Value> {
        if self.shards[0].name == GGUF {
            return None;
        }
        let total: u64 = self.tensors.iter().map(|t| t.spec.byte_len() as u64).sum();
        let map: BTreeMap<&str, &str> = self
            .tensors
            .iter()
            .zip(&self.places)
            .map(|(t, &(s, _))| (t.spec.name.as_str(), self.shards[s].name.as_str()))
            .collect();
        Some(json!({"metadata": {"total_size": total}, "weight_map": map}))
    }
}
