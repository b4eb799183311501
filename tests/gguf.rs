//! GGUF end to end: what is written, what is read back, what is refused.

mod support;

use std::path::Path;

use serde_json::Value;
use support::{command, files, run, tiny};

fn quant(src: &Path, dst: &Path, flags: &str) -> support::Ran {
    let mut command = command("gptoss-quant --quiet");
    run(command.args(support::words(flags)).arg("--model-in").arg(src).arg("--output-dir").arg(dst))
}

fn total(report: &Value) -> f64 {
    report["verdict"]["total_error"]["max"].as_f64().unwrap_or_else(|| panic!("{report}"))
}

#[test]
fn what_stays_is_what_it_was_in_every_type_that_can_hold_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("gguf");
    let manifest = quant(&tiny(), &out, "--algo rtn --experts keep --mw keep --container gguf").manifest();
    let names: Vec<String> = files(&out).into_keys().collect();
    assert!(names.contains(&"model.gguf".into()) && !names.iter().any(|n| n.ends_with(".index.json")), "{names:?}");
    assert_eq!(manifest["output"]["layout"], "gguf");
    let llama = manifest["runtimes"].as_array().unwrap().iter().find(|r| r["runtime"] == "llama.cpp").unwrap();
    assert_eq!(llama["status"], "loads");
    let compared = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&out)).manifest();
    assert_eq!(total(&compared), 0.0);
    let checked = run(command("gptoss-verify check --quiet").arg(&out)).manifest();
    assert_eq!(checked["verdict"]["passed"], true);
    // The plan has the size to the byte.
    let mut plan = command("gptoss-quant --quiet --dry-run --algo rtn --experts keep --mw keep --container gguf");
    let plan = run(plan.arg("--model-in").arg(tiny())).manifest();
    assert_eq!(plan["plan"]["bytes"], std::fs::metadata(out.join("model.gguf")).unwrap().len());
    // Without the files beside it, the file says what it is.
    let alone = dir.path().join("alone");
    std::fs::create_dir(&alone).unwrap();
    std::fs::copy(out.join("model.gguf"), alone.join("other-name.gguf")).unwrap();
    let compared = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&alone)).manifest();
    assert_eq!(total(&compared), 0.0);
    // And is dequantized to what its source is.
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    for (src, dst) in [(tiny(), &a), (out.clone(), &b)] {
        run(command("gptoss-dequant --quiet").arg("--src").arg(src).arg("--dst").arg(dst)).manifest();
    }
    let (mut a, mut b) = (files(&a), files(&b));
    for name in ["gptoss-manifest.json", "config.json"] {
        assert!(a.remove(name).is_some() && b.remove(name).is_some());
    }
    assert!(a == b);
}

#[test]
fn threads_and_memory_do_not_change_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = None;
    for (i, flags) in ["--threads 1", "--threads 5 --max-memory 16MiB"].iter().enumerate() {
        let out = dir.path().join(format!("q{i}"));
        quant(&tiny(), &out, &format!("--algo rtn --experts q4_0 --mw q8_0 --container gguf {flags}")).manifest();
        let files = files(&out);
        assert!(*first.get_or_insert_with(|| files.clone()) == files, "{flags}");
    }
}

#[test]
fn what_a_gguf_file_cannot_hold_is_refused_in_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (flags, said) in [
        ("", "a GGUF file has no int8; the nearest that it has is q8_0"),
        ("--experts w4a16 --mw q8_0", "a GGUF file has no int4; the nearest that it has is q4_0"),
        ("--experts w5a16 --asymmetric --mw q8_0 --mw-symmetry symmetric", "the nearest that it has is q5_1"),
        ("--experts nvfp4 --mw q8_0", "the nearest that it has is mxfp4"),
        (
            "--experts tq2_0 --mw q8_0",
            "in_features 128 of model.layers.0.mlp.experts.0.down_proj is no multiple of tq2_0's block, 256; use --pad-to 256",
        ),
        ("--experts keep --mw keep --with-sparse", "nothing is left to quantize"),
        (
            "--experts q4_0 --mw q8_0 --extra-ignore layers.1.mlp.experts.3",
            "in a GGUF file one tensor of one type holds a projection of all experts of a layer",
        ),
    ] {
        for dry in ["--dry-run", ""] {
            let ran = quant(&tiny(), &out, &format!("--algo rtn --container gguf {flags} {dry}"));
            assert!(ran.code == 2 && ran.err.contains(said), "{flags}: {ran:?}");
        }
    }
    let ran = quant(&tiny(), &out, "--algo rtn --experts q4_0 --mw keep --container compressed-tensors --dry-run");
    assert!(
        ran.code == 2 && ran.err.contains("compressed-tensors has no layout for q4_0; --container gguf has one"),
        "{ran:?}"
    );
    let bare = dir.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    for (name, bytes) in files(&tiny()).into_iter().filter(|(n, _)| n != "tokenizer.json") {
        std::fs::write(bare.join(name), bytes).unwrap();
    }
    for dry in ["--dry-run", ""] {
        let ran = quant(&bare, &out, &format!("--algo rtn --experts keep --mw q8_0 --container gguf {dry}"));
        assert!(ran.code == 2 && ran.err.contains("a GGUF file holds the model's tokenizer"), "{ran:?}");
    }
    assert!(!out.exists() && !dir.path().join("out.partial").exists());
}

#[test]
fn a_damaged_file_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("gguf");
    quant(&tiny(), &out, "--algo rtn --experts keep --mw keep --container gguf").manifest();
    let file = out.join("model.gguf");
    let whole = std::fs::read(&file).unwrap();
    for len in [0, 3, 20, 1000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..len]).unwrap();
        let ran = run(command("gptoss-verify check --quiet").arg(&out));
        assert!(ran.code == 1 && ran.out.contains("model.gguf"), "{len}: {ran:?}");
        let mut dequant = command("gptoss-dequant --quiet");
        let ran = run(dequant.arg("--src").arg(&out).arg("--dst").arg(dir.path().join("x")));
        assert!(ran.code == 2 && ran.err.contains("model.gguf"), "{len}: {ran:?}");
    }
    // A scale that is no number.
    let bad = dir.path().join("bad");
    quant(&tiny(), &bad, "--algo rtn --experts q8_0 --mw q8_0 --container gguf").manifest();
    let file_of_bad = bad.join("model.gguf");
    let mut bytes = std::fs::read(&file_of_bad).unwrap();
    let (_, tensors) = gptoss::checkpoint::gguf::parse(&file_of_bad, &bytes).unwrap();
    let at = tensors["blk.1.attn_k.weight"].start + 5 * 34;
    bytes[at..at + 2].copy_from_slice(&[0, 0x7c]);
    std::fs::write(&file_of_bad, bytes).unwrap();
    let ran = run(command("gptoss-verify check --quiet").arg(&bad));
    assert!(ran.code == 1 && ran.out.contains("holds 1 blocks whose scale is NaN or infinite"), "{ran:?}");
    let copy = out.join("second.gguf");
    std::fs::write(&file, &whole).unwrap();
    std::fs::write(&copy, &whole).unwrap();
    let ran = run(command("gptoss-verify runtimes --quiet").arg(&out));
    assert!(ran.code == 2 && ran.err.contains("holds 2 GGUF files"), "{ran:?}");
}
