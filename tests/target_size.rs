//! A size as the target, as a user meets it.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::{Ran, assert_same, command, files, run, tiny};

fn quant(size: &str, out: &Path, flags: &str) -> Command {
    let mut c = command("gptoss-quant --quiet --num-calibration-samples 32 --max-seq-length 256 --calib-jsonl");
    c.arg(tiny().join("calib.jsonl")).arg("--model-in").arg(tiny()).args(["--target-size", size]);
    c.args(support::words(flags)).arg("--output-dir").arg(out);
    c
}

fn beside(out: &Path) -> PathBuf {
    out.with_file_name(format!("{}.sensitivity.json", out.file_name().unwrap().to_string_lossy()))
}

fn weights(out: &Path) -> u64 {
    let weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".gguf");
    files(out).into_iter().filter(|(name, _)| weights(name)).map(|(_, bytes)| bytes.len() as u64).sum()
}

fn kl(out: &Path) -> f64 {
    let mut c = command("gptoss-verify quality --quiet --max-seq-length 256 --packing pack --nsamples 32 --against");
    let report = run(c.arg(tiny()).arg("--text").arg(tiny().join("test.jsonl")).arg(out)).manifest();
    report["quality"]["reference"]["kl_mean"].as_f64().unwrap()
}

fn read(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn notes(m: &Value) -> String {
    m["notes"].to_string()
}

fn refusal(ran: &Ran) -> &str {
    assert_eq!((ran.code, &*ran.out), (2, ""), "{}", ran.err);
    &ran.err
}

#[test]
fn what_loses_most_is_raised_until_the_size_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    let of = |size: &str| {
        let out = dir.path().join(size);
        let figures = dir.path().join("figures.json");
        let m = run(quant(size, &out, "").arg("--sensitivity").arg(figures)).manifest();
        let verdict = run(command("gptoss-verify check --quiet").arg(&out)).manifest();
        assert_eq!(verdict["verdict"]["passed"], true);
        (out, m)
    };
    let mut last = f64::INFINITY;
    for (size, bytes) in [("5.4MB", 5_400_000), ("5.8MB", 5_800_000), ("6.6MB", 6_600_000)] {
        let (out, m) = of(size);
        // An expert in MXFP4 instead of int2 is 25 kB more.
        assert!((bytes - 30_000..=bytes).contains(&weights(&out)), "{size}: {}", weights(&out));
        assert_eq!(m["job"]["recipe"]["target_size"], bytes);
        let now = kl(&out);
        assert!(now < 0.7 * last, "{size}: {now}, and {last} a size before");
        last = now;
    }
    // Where everything can be as large as can be, nothing is measured: experts are the source's, attention is.
    let all = dir.path().join("all");
    let m = run(&mut quant("20MB", &all, "")).manifest();
    assert!(notes(&m).contains("room for the largest scheme everywhere") && !beside(&all).exists());
    assert_eq!(kl(&all), 0.0);
}

/// The same size, with every place's figures given to the one at the other end of the order: what the measuring is worth.
#[test]
fn the_measured_order_beats_its_reverse() {
    let dir = tempfile::tempdir().unwrap();
    let (right, wrong) = (dir.path().join("right"), dir.path().join("wrong"));
    run(&mut quant("6.2MB", &right, "")).manifest();
    let mut figures = read(&beside(&right));
    let mut places: Vec<(usize, usize, Value)> = Vec::new();
    for (l, layer) in figures["layers"].as_array().unwrap().iter().enumerate() {
        places.extend(layer["experts"].as_array().unwrap().iter().enumerate().map(|(e, v)| (l, e, v.clone())));
    }
    assert_eq!(places.len(), 64);
    places.sort_by(|a, b| a.2[0].as_f64().unwrap().total_cmp(&b.2[0].as_f64().unwrap()));
    let reversed: Vec<Value> = places.iter().rev().map(|p| p.2.clone()).collect();
    for ((l, e, _), v) in places.into_iter().zip(reversed) {
        figures["layers"][l]["experts"][e] = v;
    }
    std::fs::write(beside(&wrong), figures.to_string()).unwrap();
    let m = run(&mut quant("6.2MB", &wrong, "")).manifest();
    assert!(weights(&wrong).abs_diff(weights(&right)) < 60_000);
    let (right, wrong) = (kl(&right), kl(&wrong));
    assert!(right < 0.5 * wrong, "{right} beside {wrong}: {}", notes(&m));
}

#[test]
fn a_run_that_is_killed_while_it_measures_goes_on_behind_the_layers_that_are_done() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    run(quant("5.6MB", &whole, "").args(["--threads", "1"])).manifest();
    let layers = |file: &Path| read(file)["layers"].as_array().unwrap().len();
    assert_eq!(layers(&beside(&whole)), 4);
    let mut child = quant("5.6MB", &cut, "").spawn().unwrap();
    while !beside(&cut).exists() || layers(&beside(&cut)) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it was over before it was killed");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(layers(&beside(&cut)) < 4 && !cut.exists());
    run(&mut quant("5.6MB", &cut, "")).manifest();
    assert_eq!(read(&beside(&cut)), read(&beside(&whole)));
    assert_same(&cut, &whole);
    // Another size needs no measuring.
    let other = dir.path().join("other");
    let mut c = quant("6MB", &other, "");
    let before = std::fs::metadata(beside(&cut)).unwrap().modified().unwrap();
    run(c.arg("--sensitivity").arg(beside(&cut))).manifest();
    assert_eq!(std::fs::metadata(beside(&cut)).unwrap().modified().unwrap(), before);
    // Nor does what has nothing to do with it.
    let other = dir.path().join("not/there/yet");
    run(quant("6MB", &other, "--lm-head w8a16 --shard-size 1GB").arg("--sensitivity").arg(beside(&cut))).manifest();
    assert_eq!(std::fs::metadata(beside(&cut)).unwrap().modified().unwrap(), before);
    // Another recipe does, and takes nobody's figures for its own.
    let again = run(quant("6MB", &dir.path().join("again"), "--experts w2a16").arg("--sensitivity").arg(beside(&cut)));
    assert!(refusal(&again).contains("holds what was measured of another checkpoint, text or recipe"), "{}", again.err);
    for change in [
        |f: &mut Value| f["layers"][0]["experts"].as_array_mut().unwrap().truncate(3),
        |f: &mut Value| f["layers"][1]["experts"][2].as_array_mut().unwrap().truncate(1),
        |f: &mut Value| f["layers"][2]["attention"][0] = (-1.0).into(),
        |f: &mut Value| f["layers"] = vec![f["layers"][0].clone(); 9].into(),
    ] {
        let (bad, mut figures) = (dir.path().join("bad.json"), read(&beside(&cut)));
        change(&mut figures);
        std::fs::write(&bad, figures.to_string()).unwrap();
        let ran = run(quant("6MB", &dir.path().join("again"), "").arg("--sensitivity").arg(&bad));
        assert!(refusal(&ran).contains("bad.json"), "{}", ran.err);
    }
    std::fs::write(beside(&cut), "{").unwrap();
    let broken = run(quant("6MB", &dir.path().join("again"), "").arg("--sensitivity").arg(beside(&cut)));
    assert!(refusal(&broken).contains("is no list of measured errors"), "{}", broken.err);
}

#[test]
fn a_size_that_cannot_be_reached_is_refused_with_the_smallest_and_what_to_add() {
    let config = support::root().join("tests/fixtures/configs/gpt-oss-20b.json");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(config, dir.path().join("config.json")).unwrap();
    let plan = |flags: &str| {
        let mut c = command("gptoss-quant --quiet --dry-run");
        run(c.args(support::words(flags)).arg("--model-in").arg(dir.path()))
    };
    let said = plan("--target-size 6.5GB");
    for part in [
        "6.500 GB is less than this recipe can reach: 7.408 GB",
        "add --lm-head w8a16: 6.847 GB; and --embed-tokens w8a16: 6.285 GB",
    ] {
        assert!(refusal(&said).contains(part), "{part}: {}", said.err);
    }
    // What it says to add is enough.
    let m = plan("--target-size 6.5GB --lm-head w8a16 --embed-tokens w8a16").manifest();
    assert!(notes(&m).contains("this plan is the smallest, 6.285 GB"), "{}", notes(&m));
    assert!(refusal(&plan("--target-size 1.5GB")).contains("no other flag was tried"));
    for (flags, part) in [
        ("--target-size 14GB --experts w4a16 --algo awq --mw keep", "AWQ is a matter of whole layers"),
        ("--target-size 14GB --with-sparse", "sparsity is a matter of whole layers"),
        ("--target-size 14GB --experts w8a8 --mw w8a8 --smoothquant-strength 0.5", "SmoothQuant is a matter"),
        (
            "--target-size 90GB --experts keep --mw fp8 --container compressed-tensors --extra-ignore self_attn",
            "nothing is left",
        ),
        ("--sensitivity f.json", "--target-size"),
        ("--target-size 18GB --experts w8a16", "are MXFP4, which loses nothing and is smaller"),
        ("--target-size 9GB --experts-regex re:.*layers.[01].mlp.experts.*", "chooses schemes itself"),
    ] {
        let ran = plan(flags);
        assert!(refusal(&ran).contains(part), "{flags}: {}", ran.err);
    }
}

#[test]
fn containers_that_hold_a_layers_experts_together_raise_them_together() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("gguf");
    let m = run(&mut quant("6.8MB", &out, "--container gguf --experts keep --mw q4_0 --algo rtn")).manifest();
    assert!((6_600_000..=6_800_000).contains(&weights(&out)), "{}", weights(&out));
    assert!(notes(&m).contains("[\"for at most 6.800 MB, attentions: 3 q5_0, 1 q8_0\""), "{}", notes(&m));
    assert!(kl(&out) < 0.01);
    let out = dir.path().join("vllm");
    let m = run(&mut quant("9.5MB", &out, "--target vllm --experts w4a16 --mw w8a16")).manifest();
    assert!(weights(&out) <= 9_500_000, "{}", weights(&out));
    assert!(notes(&m).contains("layers of experts: 1 w4a16, 3 w8a16"), "{}", notes(&m));
    assert_eq!(m["runtimes"][0]["status"], "loads", "{}", m["runtimes"]);
}
