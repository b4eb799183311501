//! Ternary weights as a user meets them: what they lose, how many are zero, how large they are, and that they run.

mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{command, run, tiny};

fn quantized(dir: &Path, flags: &str) -> (PathBuf, Value) {
    let out = dir.join(flags.replace(' ', "_"));
    let mut quant = command("gptoss-quant --quiet --num-calibration-samples 64 --max-seq-length 256 --calib-jsonl");
    quant.arg(tiny().join("calib.jsonl")).args(support::words(flags));
    let manifest = run(quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
    (out, manifest)
}

fn quality(dir: &Path, more: &str) -> Value {
    let mut c = command("gptoss-verify quality --quiet --max-seq-length 256 --packing pack --nsamples 32 --against");
    c.arg(tiny()).arg("--text").arg(tiny().join("test.jsonl")).args(support::words(more)).arg(dir);
    run(&mut c).manifest()["quality"].clone()
}

fn number(m: &Value, path: &str) -> f64 {
    m.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {m}"))
}

/// The share of zeros of each ternary family.
fn zeros(manifest: &Value) -> Vec<f64> {
    let ternary = |t: &&Value| t["stored"].as_str().is_some_and(|s| s.starts_with("ternary"));
    let all = manifest["tensors"].as_array().unwrap().iter().filter(ternary);
    all.map(|t| number(t, "/error/zeros")).collect()
}

#[test]
fn two_stages_lose_less_than_absmean_and_zeros_are_neither_few_nor_most() {
    let dir = tempfile::tempdir().unwrap();
    for (layers, groups) in [("--experts ternary --mw keep", "auto"), ("--experts ternary --mw ternary", "channel")] {
        let [(floor, absmean), (two, fitted)] = ["rtn", "pt-bitnet"].map(|algo| {
            let (out, m) = quantized(dir.path(), &format!("{layers} --group-size {groups} --algo {algo}"));
            (number(&quality(&out, ""), "/reference/kl_mean"), m)
        });
        assert!(two <= 0.7 * floor, "{layers}, {groups}: {two} is not 0.7 of {floor}");
        for m in [absmean, fitted] {
            let zeros = zeros(&m);
            assert!(zeros.len() >= 9, "every layer's experts are there: {zeros:?}");
            assert!(zeros.iter().all(|z| (0.2..=0.6).contains(z)), "{layers}: {zeros:?}");
        }
    }
}

#[test]
fn without_an_algorithm_ternary_is_fitted_in_two_stages() {
    let dir = tempfile::tempdir().unwrap();
    let (_, m) = quantized(dir.path(), "--experts ternary --mw w8a8");
    assert_eq!(m["job"]["recipe"]["experts"]["algorithm"], "pt-bitnet");
    assert_eq!(m["job"]["recipe"]["mw"]["algorithm"], "gptq");
}

#[test]
fn base_3_holds_the_same_codes_and_both_are_as_large_as_planned() {
    let dir = tempfile::tempdir().unwrap();
    let kl = |flags: &str| {
        let (out, m) = quantized(dir.path(), flags);
        let mut plan = command("gptoss-quant --quiet --dry-run");
        let plan = run(plan.args(support::words(flags)).arg("--model-in").arg(tiny())).manifest();
        let shards = std::fs::read_dir(&out)
            .unwrap()
            .map(|e| e.unwrap())
            .filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"));
        let size: u64 = shards.map(|e| e.metadata().unwrap().len()).sum();
        assert_eq!(plan["plan"]["bytes"], size, "{flags}");
        // A checkpoint that passes its own manifest's checks, and says for whom it is.
        let verdict = run(command("gptoss-verify check --quiet").arg(&out)).manifest();
        assert_eq!(verdict["verdict"]["passed"], true);
        for r in m["runtimes"].as_array().unwrap() {
            let loads = r["status"] == "loads";
            assert_eq!(loads, r["runtime"] == "native", "{flags}: {r}");
        }
        number(&quality(&out, ""), "/reference/kl_mean")
    };
    let flags = "--algo rtn --mw keep --experts";
    assert_eq!(kl(&format!("{flags} ternary")), kl(&format!("{flags} ternary_b3")));
}

/// 20.9 billion weights: 5.2 GB in two bits and 4.2 in base 3 if all are ternary, and never 1.5.
#[test]
fn the_20b_is_as_large_as_its_bits_say() {
    let config = support::root().join("tests/fixtures/configs/gpt-oss-20b.json");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(config, dir.path().join("config.json")).unwrap();
    let size = |scheme: &str, all: bool| {
        let mut c = command("gptoss-quant --quiet --dry-run --group-size channel");
        c.args(["--experts", scheme, "--mw", scheme]);
        if all {
            c.args(["--lm-head", scheme, "--embed-tokens", scheme]);
        }
        run(c.arg("--model-in").arg(dir.path())).manifest()["plan"]["bytes"].as_u64().unwrap()
    };
    let near = |bytes: u64, gigabytes: f64| (bytes as f64 / 1e9 - gigabytes).abs() < 0.07;
    assert!(near(size("ternary", true), 5.25) && near(size("ternary_b3", true), 4.2));
    // The embedding and the head stay BF16 unless a flag says otherwise: 2.3 GB of them.
    assert!(size("ternary", false) > size("ternary", true) + 2_000_000_000);
}

#[test]
fn the_engine_computes_on_the_codes() {
    let dir = tempfile::tempdir().unwrap();
    for flags in ["--algo rtn --experts ternary --mw w8a16 --lm-head w8a16", "--algo rtn --experts w2a16 --mw w4a16"] {
        let (out, _) = quantized(dir.path(), flags);
        let q = quality(&out, "--numerics engine");
        let kl = number(&q, "/engine/kl_mean");
        assert!(kl > 0.0 && kl < 2e-3, "{flags}: {kl}");
    }
    // And of what is published.
    let q = quality(&tiny(), "--numerics engine");
    assert!(number(&q, "/engine/kl_mean") < 1e-3 && number(&q, "/engine/top1_agreement") > 0.98, "{q}");
}
