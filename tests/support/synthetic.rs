//! A gpt-oss of any size with random weights: for benchmarks, kills, hostile changes, and the forward.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use gptoss::checkpoint::header::{TensorSpec, encode};
use gptoss::model::{ModelConfig, Role, mxfp4_specs, slots};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

/// The config of the 20b with these changes.
pub fn config(changes: &[(&str, usize)]) -> Map<String, Value> {
    let text = include_str!("../fixtures/configs/gpt-oss-20b.json");
    let mut config: Map<String, Value> = serde_json::from_str(text).expect("the fixture is JSON");
    for &(name, n) in changes {
        config.insert(name.into(), n.into());
    }
    let layers = config["num_hidden_layers"].as_u64().expect("the fixture has it") as usize;
    let types = (0..layers).map(|l| if l % 2 == 0 { "sliding_attention" } else { "full_attention" });
    config.insert("layer_types".into(), types.collect::<Vec<_>>().into());
    config
}

/// Writes the checkpoint in OpenAI's MXFP4 layout. The bytes depend on `config` alone.
pub fn write(dir: &Path, config: &Map<String, Value>) {
    write_with(dir, config, true, 0x9e37_79b9_7f4a_7c15);
}

/// Writes the checkpoint in BF16, experts transposed as transformers loads them.
pub fn write_dense(dir: &Path, config: &Map<String, Value>, seed: u64) {
    write_with(dir, config, false, seed | 1);
}

/// One shard, an index, `config.json`.
fn write_with(dir: &Path, config: &Map<String, Value>, mxfp4: bool, mut seed: u64) {
    std::fs::create_dir_all(dir).expect("the folder can be made");
    let shapes = ModelConfig::parse(dir, config).expect("the config is a gpt-oss");
    let mut specs = Vec::new();
    for slot in slots(&shapes) {
        match slot.role {
            Role::Experts(fused, layer) if mxfp4 => specs.extend(mxfp4_specs(fused, layer, &shapes)),
            _ => specs.push(TensorSpec::new(slot.name, Dtype::BF16, slot.shape)),
        }
    }
    let shard = "model-00000-of-00001.safetensors";
    let mut file = BufWriter::with_capacity(1 << 20, File::create(dir.join(shard)).expect("the shard can be made"));
    file.write_all(&encode(&specs.iter().collect::<Vec<_>>())).expect("there is room");
    for spec in &specs {
        fill(&mut file, spec, &mut seed);
    }
    file.flush().expect("there is room");
    let map: Map<String, Value> = specs.iter().map(|s| (s.name.clone(), shard.into())).collect();
    let total: usize = specs.iter().map(TensorSpec::byte_len).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("there is room");
    std::fs::write(dir.join("config.json"), Value::Object(config.clone()).to_string()).expect("there is room");
}

fn fill(file: &mut impl Write, spec: &TensorSpec, seed: &mut u64) {
    let mut left = spec.byte_len();
    let mut buffer = Vec::with_capacity(1 << 16);
    while left > 0 {
        buffer.clear();
        while buffer.len() < left.min(1 << 16) {
            *seed ^= *seed << 13;
            *seed ^= *seed >> 7;
            *seed ^= *seed << 17;
            let mut bytes = seed.to_le_bytes();
            if spec.dtype == Dtype::BF16 {
                // Signs and fractions at random, exponents of trained weights: 2^-9 to 2^-2.
                for b in bytes.as_chunks_mut::<2>().0 {
                    *b = (u16::from_le_bytes(*b) & 0x83ff | 0x3b00).to_le_bytes();
                }
            } else if spec.name.ends_with("_scales") {
                bytes.iter_mut().for_each(|b| *b = 114 + *b % 11);
            }
            buffer.extend_from_slice(&bytes);
        }
        let n = left.min(buffer.len());
        file.write_all(&buffer[..n]).expect("there is room");
        left -= n;
    }
}

/// A model of `layers` layers that is quick to quantize, with the fixture's tokenizer, in one shard of `dir/whole`.
pub fn small(dir: &Path, layers: usize) -> PathBuf {
    let sizes = [("hidden_size", 64), ("intermediate_size", 64), ("num_local_experts", 4), ("num_experts_per_tok", 2)];
    let more =
        [("num_hidden_layers", layers), ("vocab_size", 2048), ("num_attention_heads", 4), ("num_key_value_heads", 2)];
    let mut shapes = config(&[sizes.as_slice(), &more].concat());
    shapes.insert("head_dim".into(), 32.into());
    shapes.insert("experts_per_token".into(), 2.into());
    let whole = dir.join("whole");
    write(&whole, &shapes);
    let fixture = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tiny-gpt-oss"));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture.join(name), whole.join(name)).unwrap();
    }
    whole
}
