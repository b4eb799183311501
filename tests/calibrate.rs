//! Calibrated quantization: against llm-compressor's own results, itself under other resources, its transforms, few tokens,
//! and bad input. `tests/peers/quality_table.py` has the whole table.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::{Shard, assert_same, command, copy_folder, files, run, synthetic, tiny, tiny_copy};

/// The recorded results, with their sources.
fn peers() -> Value {
    let path = support::root().join("tests/golden/peer-quality.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Calibration as the peers had it: the first 128 windows of 256 tokens of calib.jsonl.
fn quant(out: &Path, flags: &str) -> Command {
    let mut c = command("gptoss-quant --quiet --max-seq-length 256 --kernels present");
    if !flags.contains("nsamples") {
        c.args(["--nsamples", "128"]);
    }
    c.args(support::words(flags)).arg("--calib-jsonl").arg(tiny().join("calib.jsonl"));
    c.arg("--output-dir").arg(out);
    if !flags.contains("--model-in") {
        c.arg("--model-in").arg(tiny());
    }
    c
}

/// What the first 128 windows of test.jsonl say about `out`, beside its source.
fn quality(out: &Path, source: &Path, samples: usize) -> Value {
    let mut c = command("gptoss-verify quality --quiet --max-seq-length 256");
    c.arg(out).arg("--against").arg(source).arg("--text").arg(tiny().join("test.jsonl"));
    run(c.args(["--nsamples", &samples.to_string()])).manifest()["quality"].clone()
}

fn kl(out: &Path) -> f64 {
    quality(out, &tiny(), 128)["reference"]["kl_mean"].as_f64().unwrap()
}

/// Our divergence over theirs, for a row of peer-quality.json.
fn beside_the_peer(row: &str, flags: &str) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    run(&mut quant(&out, flags)).manifest();
    let rows = peers();
    let theirs = rows["results"].as_array().unwrap().iter().find(|r| r["method"] == row).expect("the row is there");
    let (ours, theirs) = (kl(&out), theirs["kl"].as_f64().unwrap());
    println!("{row} {flags}: KL {ours:.6}, llm-compressor {theirs:.6}, ratio {:.3}", ours / theirs);
    ours / theirs
}

const ALL_TOKENS: &str = "--few-tokens all-experts --few-tokens-threshold 1";

#[test]
fn four_bits_lose_less_than_llm_compressors() {
    let rows = [
        ("gptq_w4a16", "--experts w4a16 --mw w4a16 --group-size 128"),
        ("gptq_w4a8", "--experts w4a8 --mw w4a8 --group-size 128"),
    ];
    for (row, flags) in rows {
        assert!(beside_the_peer(row, flags) <= 1.0, "{row}");
    }
    let (row, flags) = rows[0];
    assert!(beside_the_peer(row, &format!("{flags} {ALL_TOKENS}")) <= 1.0, "{row} with every token");
}

#[test]
fn other_widths_lose_less_than_llm_compressors() {
    for (row, flags) in [
        ("gptq_w8a8", "--experts w8a8 --mw w8a8"),
        ("gptq_w2a16_g32", "--experts w2a16 --mw w2a16 --group-size 32"),
        ("gptq_mxfp4", "--experts mxfp4 --mw mxfp4"),
    ] {
        assert!(beside_the_peer(row, flags) <= 1.0, "{row}");
    }
}

#[test]
fn half_the_weights_are_zero_and_lose_less_than_llm_compressors() {
    let dir = tempfile::tempdir().unwrap();
    let flags = "--experts dense --mw dense --with-sparse --sparsity 0.5 --mask 2:4";
    assert!(beside_the_peer("sparse24", flags) <= 1.0);
    // Every four neighbours of a row have two zeros, in the codes too.
    let out = dir.path().join("coded");
    run(&mut quant(&out, "--nsamples 16 --experts w4a16 --mw w8a16 --with-sparse --sparsity 0.5 --mask 2:4"))
        .manifest();
    let plain = dir.path().join("plain");
    run(command("gptoss-dequant --quiet").arg("--src").arg(&out).arg("--dst").arg(&plain)).manifest();
    let names = std::fs::read_dir(&plain).unwrap().map(|e| e.unwrap().path());
    let (mut seen, mut columns) = (0, 0);
    for shard in names.filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
        let mut shard = Shard::read(&shard);
        let names: Vec<String> = shard.header.keys().filter(|n| n.ends_with("_proj.weight")).cloned().collect();
        for name in names {
            for four in shard.tensor(&name).chunks_exact(8) {
                let zeros = four.chunks_exact(2).filter(|b| b[0] == 0 && b[1] & 0x7f == 0).count();
                assert!(zeros >= 2, "{name}");
            }
            seen += 1;
        }
        // Experts are [E, in, out] here: what neighbours are in a row of the weight lies a row of the tensor apart.
        let names: Vec<String> = shard.header.keys().filter(|n| n.ends_with("_proj")).cloned().collect();
        for name in names {
            let shape: Vec<usize> = serde_json::from_value(shard.header[&name]["shape"].clone()).unwrap();
            let numbers: Vec<bool> =
                shard.tensor(&name).chunks_exact(2).map(|b| b[0] == 0 && b[1] & 0x7f == 0).collect();
            for four in numbers.chunks_exact(4 * shape[2]) {
                for j in 0..shape[2] {
                    assert!((0..4).filter(|i| four[i * shape[2] + j]).count() >= 2, "{name}");
                    columns += 1;
                }
            }
        }
    }
    assert_eq!(seen, 16, "q, k, v and o of four layers");
    // Gate and up [128, 256] and down [256, 128] of 16 experts in four layers.
    assert_eq!(columns, 4 * 16 * 3 * 256 * 128 / 4);
}

#[test]
fn data_free_schemes_are_within_a_fiftieth_of_llm_compressors() {
    for (row, flags) in [
        ("rtn_w4a16", "--algo rtn --experts w4a16 --mw w4a16 --group-size 128"),
        ("rtn_w2a16_g32", "--algo rtn --experts w2a16 --mw w2a16 --group-size 32"),
        ("fp8", "--algo rtn --experts fp8 --mw fp8"),
    ] {
        assert!(beside_the_peer(row, flags) <= 1.02, "{row}");
    }
}

#[test]
fn awq_loses_less_than_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let [ours, floor] = ["awq", "rtn"].map(|algo| {
        let out = dir.path().join(algo);
        run(&mut quant(&out, &format!("--algo {algo} --experts w4a16 --mw w4a16 --group-size 128"))).manifest();
        kl(&out)
    });
    println!("AWQ {ours:.6}, RTN {floor:.6}");
    assert!(ours < floor, "{ours} is not below {floor}");
}

fn number(b: &[u8]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)
}

/// Multiplies BF16 numbers by powers of two, one a number.
fn scale(numbers: &mut [u8], scales: impl Iterator<Item = f32>) {
    for (b, s) in numbers.chunks_exact_mut(2).zip(scales) {
        let v = number(b) * s;
        assert_eq!(v.to_bits() & 0xffff, 0, "a power of two keeps BF16 exact");
        b.copy_from_slice(&((v.to_bits() >> 16) as u16).to_le_bytes());
    }
}

/// One shard of a BF16 checkpoint, all of the tiny model's tensors in it.
const SHARD: &str = "model-00001-of-00001.safetensors";

/// Takes scales into one layer's norm and out of everything that reads it: the same model.
fn move_scales(shard: &mut Shard, layer: usize, attention: bool, scales: &[f32]) {
    let at = |name: &str| format!("model.layers.{layer}.{name}");
    let (norm, readers, fused) = if attention {
        (
            "input_layernorm.weight",
            vec!["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            None,
        )
    } else {
        ("post_attention_layernorm.weight", vec!["mlp.router.weight"], Some("mlp.experts.gate_up_proj"))
    };
    scale(shard.tensor(&at(norm)), scales.iter().map(|s| 1.0 / s));
    for name in readers {
        scale(shard.tensor(&at(name)), scales.iter().copied().cycle());
    }
    if let Some(name) = fused {
        // [E, H, 2 I]: a row is an input channel.
        let width = shard.header[&at(name)]["shape"][2].as_u64().unwrap() as usize;
        scale(shard.tensor(&at(name)), scales.iter().flat_map(|s| std::iter::repeat_n(*s, width)).cycle());
    }
}

#[test]
fn awqs_scales_are_exact_and_save_channels_that_stand_out() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&plain)).manifest();
    // Some channels are 32 times as large as they were, and what reads them as much smaller.
    let loud = copy_folder(&plain, &dir.path().join("loud"));
    let mut shard = Shard::read(&loud.join(SHARD));
    let outliers: Vec<f32> = (0..256).map(|j| if j % 19 == 3 { 1.0 / 32.0 } else { 1.0 }).collect();
    for layer in 0..4 {
        move_scales(&mut shard, layer, true, &outliers);
        move_scales(&mut shard, layer, false, &outliers);
    }
    shard.write(&loud.join(SHARD));
    let same = quality(&loud, &plain, 8);
    assert_eq!(same["reference"]["kl_mean"], 0.0, "{same}");

    let flags = |algo: &str| {
        format!(
            "--nsamples 32 --algo {algo} --observer mse --experts w4a16 --mw w4a16 --group-size 128 --model-in {}",
            support::word(&loud)
        )
    };
    let (out, rtn) = (dir.path().join("awq"), dir.path().join("rtn"));
    let m = run(&mut quant(&out, &flags("awq"))).manifest();
    assert!(m["notes"].to_string().contains("AWQ's scales take"), "{m}");
    run(&mut quant(&rtn, &flags("rtn"))).manifest();
    let of = |out: &Path| quality(out, &loud, 32)["reference"]["kl_mean"].as_f64().unwrap();
    let (ours, floor) = (of(&out), of(&rtn));
    // Both search scales of codes, AWQ by the outputs and the other by the weights; AWQ's own part is what it notes.
    println!("channels that stand out: AWQ {ours:.6}, RTN {floor:.6}");
    assert!(ours < 0.7 * floor, "AWQ {ours}, RTN {floor}");
    let shares = m["notes"].as_array().unwrap().iter().filter_map(|n| {
        let (_, rest) = n.as_str().unwrap().split_once("AWQ's scales take ")?;
        rest.split('%').next()?.parse::<f64>().ok()
    });
    let shares: Vec<f64> = shares.collect();
    println!("{shares:?}");
    assert!(shares.len() == 8 && shares.iter().all(|s| *s > 30.0), "{shares:?}");

    // A comparison takes the scales back, so the error is that of rounding alone.
    let told = run(command("gptoss-verify against --quiet --each --format json").arg(&loud).arg(&out)).manifest();
    assert!(told["notes"][0].as_str().unwrap().contains("model.layers.0.input_layernorm.weight"), "{told}");
    for t in told["tensors"].as_array().unwrap() {
        let relative = t["error"]["relative"].as_f64().unwrap_or(0.0);
        let bound = if t["stored"] == "int4" { 0.2 } else { 0.0 };
        assert!(relative <= bound, "{t}");
    }

    // The transform alone: the source with the scales that went into the norms. It changes no figure at all.
    let mut awq = Shard::read(&out.join(SHARD));
    let mut moved = 0;
    for layer in 0..4 {
        for (attention, norm) in [(true, "input_layernorm"), (false, "post_attention_layernorm")] {
            let norm = format!("model.layers.{layer}.{norm}.weight");
            let (new, old) = (awq.tensor(&norm).to_vec(), shard.tensor(&norm).to_vec());
            let ratio = |(a, b): (&[u8], &[u8])| if number(b) == 0.0 { 1.0 } else { number(a) / number(b) };
            let scales: Vec<f32> = old.chunks_exact(2).zip(new.chunks_exact(2)).map(ratio).collect();
            assert!(scales.iter().all(|s| s.log2().fract() == 0.0), "{scales:?}");
            moved += scales.iter().filter(|s| **s != 1.0).count();
            move_scales(&mut shard, layer, attention, &scales);
            assert_eq!(*awq.tensor(&norm), *shard.tensor(&norm));
        }
        let router = format!("model.layers.{layer}.mlp.router.weight");
        assert_eq!(*awq.tensor(&router), *shard.tensor(&router), "the router takes its share");
    }
    assert!(moved > 0, "no scale moved anything");
    shard.write(&loud.join(SHARD));
    let q = quality(&loud, &plain, 8);
    assert_eq!(q["reference"]["kl_mean"], 0.0, "{q}");
}

#[test]
fn a_transform_that_cannot_be_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (flags, want)) in [
        (
            "--algo awq --experts w4a16 --mw w4a16 --extra-ignore v_proj",
            "AWQ moves no scales into input_layernorm of layers 0, 1, 2, 3",
        ),
        (
            "--smoothquant-strength 0.5 --experts w8a8 --mw w8a8 --extra-ignore experts.3",
            "SmoothQuant moves no scales into post_attention_layernorm",
        ),
        ("--algo rtn --smoothquant-strength 0.5 --experts w4a16 --mw w4a16", "SmoothQuant does nothing here"),
    ]
    .into_iter()
    .enumerate()
    {
        let m = run(&mut quant(&dir.path().join(i.to_string()), &format!("--nsamples 2 {flags}"))).manifest();
        assert!(m["notes"].to_string().contains(want), "{want}: {}", m["notes"]);
        // Nothing to smooth, no text to read.
        assert_eq!(m["calibration"].is_null(), flags.contains("rtn"), "{flags}");
    }
}

#[test]
fn inputs_of_zero_prune_by_magnitude_and_say_so_once() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&plain)).manifest();
    let mut shard = Shard::read(&plain.join(SHARD));
    shard.tensor("model.layers.1.post_attention_layernorm.weight").fill(0);
    shard.write(&plain.join(SHARD));
    let flags = format!("--nsamples 2 --experts dense --mw dense --with-sparse --model-in {}", support::word(&plain));
    let m = run(&mut quant(&dir.path().join("out"), &flags)).manifest();
    let notes: Vec<&str> = m["notes"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    let said = notes.iter().filter(|n| n.contains("its inputs are all zero on this text, so its smallest weights"));
    assert_eq!(said.clone().count(), 1, "{notes:?}");
    assert!(said.clone().next().unwrap().starts_with("layer 1: 32 matrices, the first model.layers.1.mlp.experts.0."));
    // The smallest of four, wherever it stands; of equals, of which MXFP4 has many, the first.
    let mut out = Shard::read(&dir.path().join("out").join(SHARD));
    let gate_up = out.tensor("model.layers.1.mlp.experts.gate_up_proj").to_vec();
    let width = 256; // columns of [E, H, 2 I]: gate and up of one expert
    let mut places = [0f64; 4];
    for (row, numbers) in gate_up.chunks_exact(2 * width).enumerate() {
        places[row % 4] += numbers.chunks_exact(2).filter(|b| b[0] == 0 && b[1] & 0x7f == 0).count() as f64;
    }
    let all: f64 = places.iter().sum();
    assert!(places.iter().all(|p| (p / all - 0.25).abs() < 0.05), "{places:?}");
}

#[test]
fn threads_memory_and_offloading_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = "--nsamples 12 --experts w4a16 --mw w8a8 --with-sparse --mask 2:4 --router-weighted";
    let smooth = "--nsamples 8 --algo awq --experts w4a16 --mw w4a16 --few-tokens-threshold 0.3";
    for (i, recipe) in [recipe, smooth].into_iter().enumerate() {
        let first = dir.path().join(format!("{i}"));
        let m = run(quant(&first, recipe).args(["--threads", "1"])).manifest();
        assert!(m["calibration"]["tokens"].as_u64().unwrap() > 0);
        for (j, other) in [
            "--threads 2",
            "--threads 5 --max-memory 24MiB",
            "--threads 2 --max-memory 4GiB",
            "--threads 2 --max-memory 40MiB --offload-hessians",
        ]
        .iter()
        .enumerate()
        {
            let again = dir.path().join(format!("{i}-{j}"));
            let mut c = quant(&again, recipe);
            c.args(support::words(other)).arg("--offload-folder").arg(dir.path());
            run(&mut c).manifest();
            assert_same(&first, &again);
        }
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().contains("hidden-states")), "{left:?}");
}

#[test]
fn experts_with_few_tokens_are_named_and_never_nan() {
    let dir = tempfile::tempdir().unwrap();
    let mut ways = Vec::new();
    for way in ["rtn", "all-experts", "weighted"] {
        let out = dir.path().join(way);
        let flags = format!(
            "--nsamples 1 --max-seq-length 24 --experts w4a16 --mw keep --few-tokens {way} --few-tokens-threshold 0.4"
        );
        let mut c = command("gptoss-quant --quiet");
        c.args(support::words(&flags))
            .arg("--model-in")
            .arg(tiny())
            .arg("--calib-jsonl")
            .arg(tiny().join("calib.jsonl"));
        let m = run(c.arg("--output-dir").arg(&out)).manifest();
        let coverage = m["coverage"].as_array().unwrap();
        assert_eq!(coverage.len(), 4);
        for layer in coverage {
            let counts: Vec<u64> = layer["experts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
            assert_eq!(counts.iter().sum::<u64>(), 4 * 24, "every token goes to four experts");
            let few: Vec<u64> = layer["few"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
            let below = |(_, n): &(usize, &u64)| (**n as f64) < 0.4 * 24.0;
            let want: Vec<u64> = counts.iter().enumerate().filter(below).map(|(i, _)| i as u64).collect();
            assert_eq!(few, want);
        }
        let notes = m["notes"].to_string();
        assert!(notes.contains("experts got fewer than 10 of 24 tokens (40%)"), "{notes}");
        assert!(run(command("gptoss-verify check").arg(&out)).code == 0);
        ways.push(files(&out)["model-00001-of-00001.safetensors"].clone());
    }
    assert!(ways[0] != ways[1] && ways[1] != ways[2] && ways[0] != ways[2], "the three ways differ");
}

#[test]
fn without_the_update_a_layer_sees_the_sources_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let out = |name: &str, flags: &str| -> PathBuf {
        let out = dir.path().join(name);
        run(&mut quant(&out, &format!("--nsamples 8 --experts w2a16 --mw w2a16 --group-size 32 {flags}"))).manifest();
        out
    };
    let (with, without) = (out("with", ""), out("without", "--no-sequential-update"));
    assert!(files(&with)["model-00001-of-00001.safetensors"] != files(&without)["model-00001-of-00001.safetensors"]);
    // The first layer's attention reads the same inputs in both.
    let mut shards = [&with, &without].map(|d| Shard::read(&d.join("model-00001-of-00001.safetensors")));
    let [a, b] = &mut shards;
    let q = |l: usize| format!("model.layers.{l}.self_attn.q_proj.weight_packed");
    assert_eq!(a.tensor(&q(0)), b.tensor(&q(0)));
    assert_ne!(a.tensor(&q(3)), b.tensor(&q(3)));
    assert!(kl(&with) < kl(&without), "the update is worth its time");
}

#[test]
fn what_overflows_is_an_error_that_names_the_layer() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_copy(dir.path());
    let path = model.join("model-00000-of-00001.safetensors");
    let name = "model.layers.0.input_layernorm.weight";
    let path = if Shard::read(&path).header.contains_key(name) {
        path
    } else {
        model.join("model-00001-of-00001.safetensors")
    };
    let mut shard = Shard::read(&path);
    // Greatest finite BF16, times a few: infinite in f32.
    shard.tensor(name).chunks_exact_mut(2).for_each(|b| b.copy_from_slice(&[0x7f, 0x7f]));
    shard.write(&path);
    let out = dir.path().join("out");
    let ran = run(&mut quant(&out, &format!("--nsamples 2 --model-in {}", support::word(&model))));
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("the inputs of model.layers.0.self_attn.q_proj are NaN or infinite"), "{}", ran.err);
    assert!(!out.exists() && std::fs::read_dir(dir.path()).unwrap().count() == 1, "nothing is left");
}

#[test]
fn a_model_without_layers_that_read_the_text_still_works() {
    // An embedding of zeros: the first layer's inputs are all zero, and with them its Hessian.
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("zeros");
    synthetic::write(
        &model,
        &synthetic::config(&[
            ("num_hidden_layers", 1),
            ("num_local_experts", 4),
            ("vocab_size", 2048),
            ("hidden_size", 128),
            ("intermediate_size", 64),
            ("num_attention_heads", 2),
            ("num_key_value_heads", 1),
        ]),
    );
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny().join(name), model.join(name)).unwrap();
    }
    let zeros = copy_folder(&model, &dir.path().join("model"));
    for entry in std::fs::read_dir(&zeros).unwrap().map(|e| e.unwrap().path()) {
        if entry.extension().is_some_and(|e| e == "safetensors") {
            let mut shard = Shard::read(&entry);
            if shard.header.contains_key("model.embed_tokens.weight") {
                shard.tensor("model.embed_tokens.weight").fill(0);
            }
            shard.write(&entry);
        }
    }
    let out = dir.path().join("out");
    let m = run(&mut quant(&out, &format!("--nsamples 2 --model-in {}", support::word(&zeros)))).manifest();
    let notes = m["notes"].to_string();
    assert!(notes.contains("self_attn.q_proj: its inputs are all zero on this text"), "{notes}");
    assert_eq!(run(command("gptoss-verify check").arg(&out)).code, 0);
}
