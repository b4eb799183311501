//! gptoss-verify, end to end: what it must notice, and what it must not complain of.

mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{Shard, command, edit, run, run_with, tiny, tiny_copy};

const SHARD: &str = "model-00001-of-00001.safetensors";

fn quantized(dir: &Path) -> PathBuf {
    let out = dir.join("q");
    run(command("gptoss-quant --quiet --algo rtn").arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out))
        .manifest();
    out
}

/// Kinds of the findings of `check DIR`, with its exit code.
fn check(dir: &Path) -> (i32, Vec<String>, String) {
    let ran = run(command("gptoss-verify check --quiet").arg(dir));
    let Ok(manifest) = serde_json::from_str::<Value>(&ran.out) else { return (ran.code, Vec::new(), ran.err) };
    let findings = manifest["verdict"]["findings"].as_array().unwrap().clone();
    let mut kinds: Vec<String> = findings.iter().map(|f| f["kind"].as_str().unwrap().to_owned()).collect();
    kinds.dedup();
    (ran.code, kinds, ran.out)
}

#[test]
fn sound_checkpoints_pass_with_and_without_a_manifest() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(check(&tiny()).0, 0, "OpenAI's layout, which has no manifest");
    let q = quantized(dir.path());
    assert_eq!(check(&q).0, 0);
    std::fs::remove_file(q.join("gptoss-manifest.json")).unwrap();
    assert_eq!(check(&q).0, 0);
}

#[test]
fn every_contradiction_is_found_and_named() {
    type Change = fn(&Path);
    let cases: [(&str, Change, &[&str]); 12] = [
        ("a flipped bit", |d| flip(&d.join(SHARD)), &["hash"]),
        ("a changed config", |d| edit(&d.join("config.json"), |c| c["rope_theta"] = 1.into()), &["size"]),
        ("a missing tokenizer", |d| std::fs::remove_file(d.join("tokenizer.json")).unwrap(), &["missing"]),
        ("a missing shard", |d| std::fs::remove_file(d.join(SHARD)).unwrap(), &["missing", "header"]),
        ("a shard too many", |d| std::fs::write(d.join("more.safetensors"), "").unwrap(), &["extra"]),
        ("a truncated shard", |d| truncate(&d.join(SHARD)), &["size", "tensor"]),
        ("an index that forgets", |d| forget(d), &["size", "index"]),
        ("a NaN", |d| poke(d, "lm_head.weight", &[0xff, 0xff]), &["hash", "value"]),
        ("an infinite bias", |d| poke(d, "model.layers.1.self_attn.q_proj.bias", &[0x80, 0x7f]), &["hash", "value"]),
        (
            "a negative scale",
            |d| poke(d, "model.layers.1.self_attn.q_proj.weight_scale", &[0x80, 0xbf]),
            &["hash", "value"],
        ),
        (
            "another weight_shape",
            |d| poke(d, "model.layers.1.self_attn.q_proj.weight_shape", &[7]),
            &["hash", "tensor"],
        ),
        (
            "a scheme that is not there",
            |d| {
                edit(&d.join("config.json"), |c| c["quantization_config"]["ignore"] = Value::Array(Vec::new()));
                edit(&d.join("config.json"), |c| {
                    c["quantization_config"]["config_groups"]["group_0"]["targets"] = vec!["Linear"].into()
                });
            },
            &["size", "tensor", "config"],
        ),
    ];
    for (what, change, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        let q = quantized(dir.path());
        change(&q);
        let (code, kinds, out) = check(&q);
        assert_eq!(code, 1, "{what}: {out}");
        for kind in want {
            assert!(kinds.iter().any(|k| k == kind), "{what}: wanted {kind} among {kinds:?}: {out}");
        }
    }
}

fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.len() / 3;
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - 10]).unwrap();
}

fn forget(dir: &Path) {
    edit(&dir.join("model.safetensors.index.json"), |i| {
        i["weight_map"].as_object_mut().unwrap().remove("model.norm.weight").unwrap();
    });
}

fn poke(dir: &Path, tensor: &str, bytes: &[u8]) {
    let mut shard = Shard::read(&dir.join(SHARD));
    shard.tensor(tensor)[..bytes.len()].copy_from_slice(bytes);
    shard.write(&dir.join(SHARD));
}

#[test]
fn a_lost_or_foreign_tensor_is_found_without_a_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_copy(dir.path());
    let path = model.join("model-00000-of-00001.safetensors");
    let mut shard = Shard::read(&path);
    let sinks = shard.header.remove("model.layers.0.self_attn.sinks").unwrap();
    shard.header.insert("model.layers.0.self_attn.snks".into(), sinks);
    shard.write(&path);
    edit(&model.join("model.safetensors.index.json"), |i| {
        let map = i["weight_map"].as_object_mut().unwrap();
        let at = map.remove("model.layers.0.self_attn.sinks").unwrap();
        map.insert("model.layers.0.self_attn.snks".into(), at);
    });
    let (code, kinds, out) = check(&model);
    assert_eq!((code, kinds), (1, vec!["missing".to_owned(), "extra".to_owned()]), "{out}");
}

#[test]
fn blocks_that_the_config_does_not_announce_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_copy(dir.path());
    edit(&model.join("config.json"), |c| drop(c.as_object_mut().unwrap().remove("quantization_config")));
    let (code, kinds, out) = check(&model);
    assert_eq!((code, kinds), (1, vec!["config".to_owned()]), "{out}");
}

#[test]
fn what_is_no_checkpoint_cannot_be_judged() {
    let dir = tempfile::tempdir().unwrap();
    let none = dir.path().join("none");
    assert_eq!(check(&none).0, 2);
    std::fs::create_dir(&none).unwrap();
    let (code, _, err) = check(&none);
    assert!(code == 2 && err.contains("has no config.json"), "{err}");
    std::fs::write(none.join("config.json"), "{").unwrap();
    let (code, _, err) = check(&none);
    assert!(code == 2 && err.contains("is not JSON"), "{err}");
}

#[test]
fn against_reports_a_known_difference_and_exits_0() {
    let dir = tempfile::tempdir().unwrap();
    let bf16 = dir.path().join("bf16");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    let same = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&bf16)).manifest();
    assert_eq!(same["verdict"]["total_error"]["max"], 0.0, "MXFP4 in BF16 is exact");
    // One weight, 0.5 away.
    let mut shard = Shard::read(&bf16.join(SHARD));
    let first = shard.tensor("model.layers.1.self_attn.sinks");
    let old = f32::from_bits(u32::from(u16::from_le_bytes([first[0], first[1]])) << 16);
    let new = (((old + 0.5).to_bits() >> 16) as u16).to_le_bytes();
    let moved = f32::from_bits(u32::from(u16::from_le_bytes(new)) << 16) - old;
    first[..2].copy_from_slice(&new);
    shard.write(&bf16.join(SHARD));
    let ran = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&bf16));
    let manifest = ran.manifest();
    let sinks =
        manifest["tensors"].as_array().unwrap().iter().find(|t| t["name"] == "model.layers.1.self_attn.sinks").unwrap();
    assert_eq!(sinks["error"]["max"].as_f64().unwrap() as f32, moved);
    assert!((sinks["error"]["rms"].as_f64().unwrap() - f64::from(moved) / 8f64.sqrt()).abs() < 1e-9);
}

#[test]
fn against_can_report_every_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let q = quantized(dir.path());
    let tensors = |each: &str| {
        let ran = run(command("gptoss-verify against --quiet").args(support::words(each)).arg(tiny()).arg(&q));
        ran.manifest()["tensors"].as_array().unwrap().clone()
    };
    let (families, matrices) = (tensors(""), tensors("--each"));
    // Of each of the 4 layers: 16 experts' 3 projections instead of 3 families.
    assert_eq!(matrices.len() - families.len(), 4 * (16 * 3 - 3));
    let worst =
        &families.iter().find(|t| t["name"] == "model.layers.2.mlp.experts.*.up_proj").unwrap()["error"]["worst"];
    let one = matrices.iter().find(|t| t["name"] == worst["name"]).unwrap();
    assert_eq!(one["error"]["relative"], worst["relative"]);
}

#[test]
fn what_is_no_number_is_counted_and_left_out_of_the_figures() {
    let dir = tempfile::tempdir().unwrap();
    let q = quantized(dir.path());
    poke(&q, "model.layers.1.self_attn.q_proj.weight_scale", &[0xc0, 0x7f]);
    let ran = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&q));
    assert_eq!(ran.code, 1, "{}", ran.err);
    let manifest: Value = serde_json::from_str(&ran.out).unwrap();
    let total = &manifest["verdict"]["total_error"];
    assert_eq!(total["non_finite"], 128, "one group");
    assert!(total["relative"].as_f64().unwrap() < 0.1, "{total}");
}

#[test]
fn a_source_that_has_changed_is_not_compared_with() {
    let dir = tempfile::tempdir().unwrap();
    let (src, out) = (tiny_copy(dir.path()), dir.path().join("q"));
    let made =
        run(command("gptoss-quant --quiet --algo rtn").arg("--model-in").arg(&src).arg("--output-dir").arg(&out));
    flip(&src.join(SHARD));
    let manifest = run_with(&mut command("gptoss-verify --quiet"), &made.out).manifest();
    assert!(manifest["verdict"]["total_error"].is_null());
    assert!(manifest["notes"].to_string().contains("has changed since"), "{manifest}");
}

#[test]
fn a_plan_is_no_output() {
    let plan = run(command("gptoss-quant --dry-run --quiet --algo rtn --model-in").arg(tiny()));
    let ran = run_with(&mut command("gptoss-verify --quiet"), &plan.out);
    assert!(ran.code == 2 && ran.err.contains("is a plan (--dry-run)"), "{}", ran.err);
}

#[test]
fn flags_may_stand_before_or_behind_a_subcommand() {
    for line in ["gptoss-verify --format table --quiet env", "gptoss-verify env --format table --quiet"] {
        assert!(run(&mut command(line)).out.starts_with("cpu "), "{line}");
    }
}

#[test]
fn models_of_different_shapes_are_not_compared() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_copy(dir.path());
    edit(&model.join("config.json"), |c| c["num_hidden_layers"] = 3.into());
    let ran = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&model));
    assert!(ran.code == 2 && ran.err.contains("different shapes"), "{}", ran.err);
}

#[test]
fn a_piped_manifest_is_held_against_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("q");
    let made =
        run(command("gptoss-quant --quiet --algo rtn").arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out));
    let go = |text: &str| run_with(&mut command("gptoss-verify --quiet"), text);
    assert_eq!(go(&made.out).code, 0);
    flip(&out.join(SHARD));
    assert_eq!(go(&made.out).code, 1);
    let mut unknown: Value = serde_json::from_str(&made.out).unwrap();
    unknown["surprise"] = 1.into();
    let ran = go(&unknown.to_string());
    assert!(ran.code == 2 && ran.err.contains("unknown field `surprise`"), "{}", ran.err);
    let ran = go(&made.out.replace("gptoss.manifest/1", "gptoss.manifest/9"));
    assert!(ran.code == 2 && ran.err.contains("this version reads"), "{}", ran.err);
    let own = std::fs::read_to_string(out.join("gptoss-manifest.json")).unwrap();
    let ran = go(&own);
    assert!(ran.code == 2 && ran.err.contains("does not say where its output lies"), "{}", ran.err);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let q = quantized(dir.path());
    let mut child =
        command("gptoss-verify check --quiet").arg(&q).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), out.stderr), (Some(0), Vec::new()));
}

#[test]
fn env_answers_on_any_machine() {
    let manifest = run(command("gptoss-verify env --quiet").env("GPTOSS_KERNELS", "/nonexistent")).manifest();
    let env = &manifest["environment"];
    assert!(env["memory_bytes"].as_u64().unwrap() > 1 << 28 && env["cpus"].as_u64().unwrap() >= 1);
    assert!(env["gpus"].is_array() && env["kernels"].as_array().unwrap().is_empty());
    // A virtual environment whose Python has the package, and one whose has not.
    let venv = tempfile::tempdir().unwrap();
    std::fs::create_dir(venv.path().join("bin")).unwrap();
    for (answer, want) in [("echo 0.2.1", Value::from("0.2.1")), ("true", Value::Null)] {
        let python = venv.path().join("bin/python");
        std::fs::write(&python, format!("#!/bin/sh\ncase \"$*\" in *qqq*) {answer} ;; esac\n")).unwrap();
        std::fs::set_permissions(&python, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let manifest = run(command("gptoss-verify env --quiet").env("VIRTUAL_ENV", venv.path())).manifest();
        assert_eq!(manifest["environment"]["qqq"], want);
    }
}

#[test]
fn the_committed_schema_is_the_one_that_the_types_give() {
    let ran = run(&mut command("gptoss-verify schema"));
    let path = support::root().join("lib/schema/manifest-1.json");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == ran.out, "regenerate it: gptoss-verify schema > lib/schema/manifest-1.json");
}

#[test]
fn help_shows_examples() {
    for tool in
        ["gptoss-dequant", "gptoss-quant", "gptoss-kernel-install", "gptoss-verify", "gptoss-run", "gptoss-bench"]
    {
        let ran = run(command(tool).arg("--help").env("COLUMNS", "120"));
        assert_eq!(ran.code, 0);
        insta::assert_snapshot!(format!("{tool}-help"), ran.out);
        let wrong = run(command(tool).arg("--no-such-flag"));
        assert!(wrong.code == 2 && wrong.err.contains("unexpected argument '--no-such-flag'"), "{}", wrong.err);
    }
}
