//! The command lines that users bring from other tools, spelled as there.

mod support;

use std::path::Path;
use std::process::Command;

use support::{command, run, tiny};

fn calibrated(dir: &Path, flags: &str) -> Command {
    let mut c = command("gptoss-quant -q");
    c.args(support::words(flags)).arg("--calib-jsonl").arg(tiny().join("calib.jsonl"));
    c.args(["--num-calibration-samples", "4", "--max-seq-length", "64"]);
    c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(dir).env("GPTOSS_KERNELS", dir.join("none"));
    c
}

#[test]
fn dequantize_takes_every_flag() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (dtype, map)) in [("fp16", "auto"), ("bf16", "sequential"), ("bf16", "cpu-only")].into_iter().enumerate() {
        let mut c = command(&format!("gptoss-dequant -q --dtype {dtype} --device-map {map} --src"));
        let out = dir.path().join(i.to_string());
        let spill = dir.path().join("spill");
        let manifest = run(c.arg(tiny()).arg("--dst").arg(out).arg("--offload-folder").arg(spill)).manifest();
        assert_eq!(manifest["volatile"]["settings"]["device_map"], map);
    }
}

#[test]
fn quantize_takes_every_flag() {
    let dir = tempfile::tempdir().unwrap();
    for (i, flags) in [
        "--algo gptq --experts-type int4 --mw-type int8 --experts-scheme w4a16 --mw-scheme w8a8 --device-map sequential",
        "--experts-algo gptq --mw-algo gptq --experts int4 --mw int8 --device-map auto",
        "--experts int8 --mw int4 --device-map cpu-only",
        "--auto-detect-experts --with-sparse --sparsity 0.5 --mask 2:4 --group-size 64 --block-size 128 --dampening-frac 0.01",
        "--experts-regex re:.*mlp\\.experts.* --offload-hessians --symmetric --no-sequential-update",
        "--experts w4a8 --mw w4a16 --try-install-qqq --yes --allow-fallback --kernels absent --extra-ignore q_proj",
    ]
    .into_iter()
    .enumerate()
    {
        run(&mut calibrated(&dir.path().join(i.to_string()), flags)).manifest();
        let planned = run(calibrated(&dir.path().join("dry"), flags).arg("--dry-run")).manifest();
        assert!(planned["plan"]["bytes"].as_u64().unwrap() > 0, "{flags}");
    }
    for (shortcut, scheme) in [("int4", "w4a16"), ("int8", "w8a8"), ("w4a8", "w4a8")] {
        let flags = format!("--dry-run --kernels present --experts {shortcut} --mw {shortcut}");
        let planned = run(&mut calibrated(&dir.path().join("dry"), &flags)).manifest();
        for class in ["experts", "mw"] {
            assert_eq!(planned["job"]["recipe"][class]["scheme"], scheme, "{class} {shortcut}");
        }
    }
    let wrong = run(&mut calibrated(&dir.path().join("dry"), "--experts int9"));
    assert!(wrong.code == 2 && wrong.err.contains("int9"), "{}", wrong.err);
}

#[test]
fn verify_and_install_take_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let bench = run(&mut command("gptoss-verify --bench --M 16 --K 4096 --N 4096 --iters 50 -q")).manifest();
    assert!(!bench["volatile"]["gemm"].as_array().unwrap().is_empty());
    // Without a compiler there is nothing to install with, and it says so instead of asking.
    let mut install = command("gptoss-kernel-install --yes --arch 8.6");
    let ran = run(install.env_clear().env("PATH", dir.path()).env("HOME", dir.path()));
    assert!(ran.code == 2 && ran.err.contains("nvcc"), "{}", ran.err);
}

/// Without any flag the plan is smaller than the source, and a runtime that people have loads it.
#[test]
fn the_default_is_worth_having() {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = support::root().join("tests/fixtures/configs");
    for (name, mxfp4) in [("gpt-oss-20b", 13_761_264_768u64), ("gpt-oss-120b", 65_248_815_744)] {
        let published: serde_json::Value =
            serde_json::from_slice(&std::fs::read(fixtures.join(format!("{name}.json"))).unwrap()).unwrap();
        for floats in [false, true] {
            let mut config = published.clone();
            if floats {
                config.as_object_mut().unwrap().remove("quantization_config");
            }
            let file = dir.path().join("config.json");
            std::fs::write(&file, config.to_string()).unwrap();
            let planned = run(command("gptoss-quant --dry-run --model-in").arg(&file)).manifest();
            let bytes = planned["plan"]["bytes"].as_u64().unwrap();
            let source = if floats { 3 * mxfp4 } else { mxfp4 };
            assert!(bytes < source, "{name}: {bytes} of {source}");
            let loads = |r: &serde_json::Value| r["status"] == "loads" && r["runtime"] != "native";
            assert!(planned["runtimes"].as_array().unwrap().iter().any(loads), "{}", planned["runtimes"]);
        }
    }
    // And it runs.
    let out = dir.path().join("out");
    let made = run(command("gptoss-quant -q --model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
    assert!(out.join("model.gguf").exists());
    assert_eq!(made["job"]["recipe"]["container"], "gguf");
}

/// Where nobody loads what was asked for, it is made all the same, and said; an output that is no smaller is said, too.
#[test]
fn a_recipe_that_no_runtime_loads_says_so() {
    let planned = run(&mut command("gptoss-quant --dry-run --experts w8a8 --mw w8a8")).manifest();
    let notes: Vec<&str> = planned["notes"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    assert!(notes.iter().any(|n| n.contains("no public runtime loads this output")), "{notes:?}");
    assert!(notes.iter().any(|n| n.contains("not smaller than its source")), "{notes:?}");
    let padded = run(&mut command("gptoss-quant --dry-run --experts w4a16 --mw w8a16")).manifest();
    assert_eq!(padded["job"]["recipe"]["pad_to"], 128);
    assert_eq!(padded["job"]["recipe"]["container"], "vllm-int");
}
