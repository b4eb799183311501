//! `gptoss-verify quality`: against transformers' figures, the peers' range, itself under other resources, and bad input.

mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{command, run, run_with, synthetic, tiny, tiny_copy};

/// The windows of the golden data: test.jsonl, packed by 256, the first 128.
fn quality(dir: &Path, more: &str) -> std::process::Command {
    let mut c = command("gptoss-verify quality --quiet --max-seq-length 256 --packing pack");
    c.arg(dir).arg("--text").arg(tiny().join("test.jsonl")).args(support::words(more));
    c
}

fn quantized(dir: &Path, flags: &str) -> PathBuf {
    let out = dir.join(flags.replace(' ', "_"));
    let mut quant = command("gptoss-quant --quiet --algo rtn");
    run(quant.args(support::words(flags)).arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
    out
}

fn number(m: &Value, path: &str) -> f64 {
    m.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {m}"))
}

#[test]
fn likelihood_is_transformers_and_a_model_is_no_distance_from_itself() {
    let m = run(quality(&tiny(), "--nsamples 128").arg("--against").arg(tiny())).manifest();
    // The mean of golden/tiny-logits, as peer-quality.json has it.
    let nll = number(&m, "/quality/nll");
    assert!((nll - 2.446580486671597).abs() < 1e-4, "{nll}");
    assert!((number(&m, "/quality/perplexity") - nll.exp()).abs() < 1e-9);
    assert_eq!(number(&m, "/quality/predicted"), 128.0 * 255.0);
    for (path, want) in [("perplexity_ratio", 1.0), ("kl_mean", 0.0), ("kl_p99", 0.0), ("top1_agreement", 1.0)] {
        assert_eq!(number(&m, &format!("/quality/reference/{path}")), want, "{path}");
    }
    assert_eq!(m["quality"]["activations"], serde_json::json!(["float"]));
    assert_eq!(m["quality"]["text"]["source"]["name"], "test.jsonl");
    assert_eq!(m["quality"]["text"]["layout"], "pack");
    assert_eq!(m["output"]["layout"], "mxfp4");
}

#[test]
fn quantized_figures_are_near_those_of_the_peers() {
    let dir = tempfile::tempdir().unwrap();
    // RTN to int4 in groups of 128, every linear layer: llm-compressor measures KL 0.011626, agreement 0.92981.
    let w4 = quantized(dir.path(), "--experts w4a16 --mw w4a16 --group-size 128");
    let m = run(quality(&w4, "--nsamples 128").arg("--against").arg(tiny())).manifest();
    let (kl, top) = (number(&m, "/quality/reference/kl_mean"), number(&m, "/quality/reference/top1_agreement"));
    assert!((kl - 0.011626).abs() < 0.0012, "KL {kl}");
    assert!((top - 0.92981).abs() < 0.01, "agreement {top}");
    assert!(number(&m, "/quality/reference/kl_p99") > kl);
    // int8 with int8 activations: GPTQ's KL is 0.001099.
    let w8 = quantized(dir.path(), "--experts w8a8 --mw w8a8");
    let m = run(quality(&w8, "--nsamples 32").arg("--against").arg(tiny())).manifest();
    let with = number(&m, "/quality/reference/kl_mean");
    assert!(with < 0.0012, "KL {with}");
    assert_eq!(m["quality"]["activations"], serde_json::json!(["float", "dynamic-token-int8"]));
    // The same codes without the rounding of activations are nearer: the rounding is really there.
    let config = w8.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    for group in json["quantization_config"]["config_groups"].as_object_mut().unwrap().values_mut() {
        group["input_activations"]["type"] = "float".into();
    }
    std::fs::write(&config, json.to_string()).unwrap();
    let m = run(quality(&w8, "--nsamples 32").arg("--against").arg(tiny())).manifest();
    let fp8 = number(&m, "/quality/reference/kl_mean");
    assert_eq!(m["quality"]["activations"], serde_json::json!(["float", "dynamic-token-fp8"]));
    assert!(fp8 > 1.5 * with && fp8 < 0.02, "fp8 activations {fp8}, int8 {with}");
}

#[test]
fn every_container_says_what_its_dequantized_copy_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut models = vec![tiny()];
    for flags in [
        "--experts w4a16 --mw w4a16 --asymmetric --group-size 32",
        "--experts w8a16 --mw w4a16 --group-size channel",
        "--experts keep --mw w8a16 --asymmetric",
    ] {
        models.push(quantized(dir.path(), flags));
    }
    let said = |model: &Path| run(&mut quality(model, "--nsamples 3")).manifest()["quality"]["nll"].clone();
    for model in models {
        let plain = dir.path().join("plain");
        run(command("gptoss-dequant --quiet --force --src").arg(&model).arg("--dst").arg(&plain)).manifest();
        assert_eq!(said(&model), said(&plain), "{}", model.display());
    }
}

#[test]
fn threads_memory_and_spilling_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let w4 = quantized(dir.path(), "--experts w4a16 --mw w8a8");
    let report = |flags: &str| {
        let m = run(quality(&w4, flags).arg("--against").arg(tiny()).arg("--offload-folder").arg(dir.path()));
        m.manifest()["quality"].clone()
    };
    let one = report("--nsamples 9 --threads 1");
    // 1 MiB: hidden states of 9 x 256 tokens (2.4 MB) go to a file, and sequences go through the layers in pieces.
    for other in ["--nsamples 9 --threads 2 --max-memory 1MiB", "--nsamples 9 --threads 3 --max-memory 3MB"] {
        assert_eq!(report(other), one, "{other}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing stays in the offload folder");
}

#[test]
fn a_manifest_brings_model_and_source() {
    let dir = tempfile::tempdir().unwrap();
    let mut quant = command("gptoss-quant --quiet --algo rtn");
    let made = run(quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(dir.path().join("q")));
    let mut verify = command("gptoss-verify quality --quiet --nsamples 2 --max-seq-length 64 --text");
    let m = run_with(verify.arg(tiny().join("calib.jsonl")), &made.out).manifest();
    assert!(number(&m, "/quality/reference/kl_mean") > 0.0);
    assert!(m["volatile"]["source_path"].as_str().unwrap().ends_with("tiny-gpt-oss"));
}

#[test]
fn padding_is_no_text() {
    let cut = |more: &str| {
        let mut c =
            command("gptoss-verify quality --quiet --nsamples 4 --max-seq-length 400 --packing truncate --text");
        c.arg(tiny().join("test.jsonl")).arg(tiny()).args(support::words(more));
        run(&mut c).manifest()["quality"].clone()
    };
    let (plain, padded) = (cut(""), cut("--pad-to-max-length True"));
    assert_eq!(plain["nll"], padded["nll"]);
    assert_eq!(plain["predicted"], padded["predicted"]);
    assert_eq!((&plain["text"]["padded"], &padded["text"]["padded"]), (&false.into(), &true.into()));
}

#[test]
fn bad_input_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("t.jsonl");
    let fails = |model: &Path, content: &str, more: &str, wanted: &str| {
        std::fs::write(&text, content).unwrap();
        let mut c = command("gptoss-verify quality --quiet");
        let r = run(c.arg(model).arg("--text").arg(&text).args(support::words(more)));
        assert_eq!((r.code, r.out.as_str()), (2, ""), "{wanted}: {}", r.err);
        assert!(r.err.contains(wanted), "wanted {wanted:?} in {}", r.err);
    };
    fails(&tiny(), "{\"text\": \"a few tokens\"}\n", "--max-seq-length 1", "none to predict");
    let mut piped = command("gptoss-verify quality --quiet --text /dev/stdin");
    let r = run_with(piped.arg(tiny()), "text");
    assert!(r.code == 2 && r.err.contains("is no regular file"), "{}", r.err);
    let good = "{\"text\": \"a line of text that has a few tokens\"}\n";
    fails(&tiny(), "", "", "there is no text in it");
    fails(&tiny(), &format!("{good}{{\"text\": \n"), "", "line 2: is not JSON");
    fails(&tiny(), "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}", "", "has no chat template");
    fails(&tiny(), good, "--max-seq-length 0", "--max-seq-length");
    fails(&dir.path().join("nothing"), good, "", "nothing: is no folder");

    let copy = tiny_copy(dir.path());
    let edit = |file: &str, change: &dyn Fn(&mut Value)| {
        let path = copy.join(file);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(path, json.to_string()).unwrap();
    };
    edit("config.json", &|c| c["max_position_embeddings"] = 8.into());
    fails(&copy, good, "", "the context of");
    edit("config.json", &|c| c["num_experts_per_tok"] = 17.into());
    fails(&copy, good, "", "num_experts_per_tok is 17");
    edit("config.json", &|c| (c["num_experts_per_tok"], c["max_position_embeddings"]) = (4.into(), 4096.into()));
    // A head beside a config that ties it is taken, as transformers takes it.
    edit("config.json", &|c| c["tie_word_embeddings"] = true.into());
    std::fs::write(&text, good).unwrap();
    let measured = |model: &Path| {
        let mut c = command("gptoss-verify quality --quiet --text");
        run(c.arg(&text).arg(model)).manifest()["quality"]["nll"].clone()
    };
    assert_eq!(measured(&copy), measured(&tiny()));
    edit("config.json", &|c| c["tie_word_embeddings"] = false.into());
    edit("tokenizer.json", &|t| t["model"]["vocab"]["!"] = 2048.into());
    fails(&copy, good, "", "2048");
    std::fs::remove_file(copy.join("tokenizer.json")).unwrap();
    fails(&copy, good, "", "tokenizer.json");
    std::fs::copy(tiny().join("tokenizer.json"), copy.join("tokenizer.json")).unwrap();
    // Predictions that no number can tell: the last norm's weight is 2^14 times what it was.
    let shards = std::fs::read_dir(&copy).unwrap().map(|f| f.unwrap().path());
    for file in shards.filter(|f| f.extension().is_some_and(|e| e == "safetensors")) {
        let mut shard = support::Shard::read(&file);
        if shard.header.contains_key("model.norm.weight") {
            let norm = shard.tensor("model.norm.weight");
            norm.chunks_exact_mut(2).for_each(|bf16| bf16[1] = bf16[1] & 0x80 | 0x48);
            shard.write(&file);
        }
    }
    fails(&copy, good, "", "so it predicts nothing");
    // The name is changed wherever it stands: index and headers.
    let (name, other) = (&b"model.layers.3.self_attn.sinks"[..], &b"model.layers.3.self_attn.sinkz"[..]);
    for file in std::fs::read_dir(&copy).unwrap().map(|f| f.unwrap().path()) {
        let mut bytes = std::fs::read(&file).unwrap();
        while let Some(at) = bytes.windows(name.len()).position(|w| w == name) {
            bytes[at..at + name.len()].copy_from_slice(other);
        }
        std::fs::write(&file, bytes).unwrap();
    }
    fails(&copy, good, "", "model.layers.3.self_attn.sinks is missing");
    let r = run(command("gptoss-verify quality --quiet").arg(tiny()));
    assert!(r.code == 2 && r.err.contains("give --text FILE or --dataset NAME"), "{}", r.err);
}

#[test]
fn a_checkpoint_of_the_20bs_width_and_vocabulary_stays_under_4_gb() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    synthetic::write(&model, &synthetic::config(&[("num_hidden_layers", 2)]));
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny().join(file), model.join(file)).unwrap();
    }
    let mut c = command("gptoss-verify quality --quiet --nsamples 8 --max-seq-length 512");
    let m = run(c.arg(&model).arg("--text").arg(tiny().join("test.jsonl"))).manifest();
    let peak = number(&m, "/volatile/peak_resident_bytes");
    println!("peak resident memory, mapped weights included: {:.2} GB", peak / 1e9);
    assert!(peak < 4e9, "{peak}");
    assert_eq!(m["quality"]["predicted"], 8 * 511);
}
