//! Checkpoints on disk: a [`source`] is mapped shards with tensors by name, a [`sink`] writes shards header first and
//! gives them their final name only when all of them are complete. [`hub`] turns a hub id into a local folder.

pub mod destination;
pub mod digest;
pub mod files;
pub(crate) mod foreign;
pub mod gguf;
pub mod header;
pub mod hub;
pub mod journal;
pub mod layout;
pub mod map;
mod shard;
pub mod sink;
pub mod source;

/// Name of the index that every sharded checkpoint has.
pub const INDEX: &str = "model.safetensors.index.json";
/// Name of the weights of an output that is a GGUF file.
pub const GGUF: &str = "model.gguf";
/// Name of the model's configuration.
pub const CONFIG: &str = "config.json";
/// Name under which a manifest lies in the folder that it describes.
pub const MANIFEST: &str = "gptoss-manifest.json";
/// Name of the record of finished groups in an unfinished output.
const JOURNAL: &str = "journal.jsonl";
