//! gptoss-dequant, end to end.

mod support;

use support::{Shard, assert_same, command, edit, files, run, run_with, tiny, tiny_copy};

#[test]
fn the_output_is_a_checkpoint_with_everything_but_the_quantization() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("bf16");
    std::fs::write(tiny_copy(dir.path()).join("LICENSE"), "terms").unwrap();
    let src = dir.path().join("model");
    std::fs::write(src.join("chat_template.jinja"), "{{ messages }}").unwrap();
    std::fs::write(src.join("notes.txt"), "not the model's").unwrap();
    let manifest = run(command("gptoss-dequant --quiet").arg("--src").arg(&src).arg("--dst").arg(&dst)).manifest();
    let names: Vec<String> = files(&dst).into_keys().collect();
    assert_eq!(
        names,
        [
            "LICENSE",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "gptoss-manifest.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    );
    let config = |p: &std::path::Path| -> serde_json::Map<String, serde_json::Value> {
        serde_json::from_slice(&std::fs::read(p.join("config.json")).unwrap()).unwrap()
    };
    let (mut before, mut after) = (config(&src), config(&dst));
    assert!(before.remove("quantization_config").is_some());
    assert_eq!(after.remove("dtype").unwrap(), "bfloat16");
    assert_eq!(before, after, "every other field is kept");
    assert_eq!(manifest["conversion"]["overflows"], 0);
    // The folder's own manifest is the same without what differs from run to run.
    let mut piped = manifest.clone();
    assert!(piped.as_object_mut().unwrap().remove("volatile").is_some());
    let own: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dst.join("gptoss-manifest.json")).unwrap()).unwrap();
    assert_eq!(own, piped);
}

#[test]
fn threads_memory_and_folder_do_not_change_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = None;
    for (i, flags) in ["--threads 1", "--threads 2", "--threads 7 --max-memory 24MiB", "--threads 2 --max-memory 8GB"]
        .iter()
        .enumerate()
    {
        for dtype in ["bf16", "fp16"] {
            let dst = dir.path().join(format!("{dtype}-{i}"));
            run(command("gptoss-dequant --quiet")
                .args(flags.split(' '))
                .args(["--dtype", dtype])
                .arg("--src")
                .arg(tiny())
                .arg("--dst")
                .arg(&dst))
            .manifest();
        }
        let now = (dir.path().join(format!("bf16-{i}")), dir.path().join(format!("fp16-{i}")));
        let (bf16, fp16) = first.get_or_insert_with(|| now.clone());
        assert_same(bf16, &now.0);
        assert_same(fp16, &now.1);
    }
}

#[test]
fn shards_are_cut_at_the_size_and_listed_in_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let (one, many) = (dir.path().join("one"), dir.path().join("many"));
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&one)).manifest();
    run(command("gptoss-dequant --quiet --shard-size 3MB").arg("--src").arg(tiny()).arg("--dst").arg(&many)).manifest();
    let shards: Vec<String> = files(&many).into_keys().filter(|n| n.ends_with(".safetensors")).collect();
    assert!(
        shards.len() > 4 && shards.iter().all(|s| s.ends_with(&format!("-of-{:05}.safetensors", shards.len()))),
        "{shards:?}"
    );
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(many.join("model.safetensors.index.json")).unwrap()).unwrap();
    let mut whole = Shard::read(&one.join("model-00001-of-00001.safetensors"));
    for (name, shard) in index["weight_map"].as_object().unwrap() {
        let mut part = Shard::read(&many.join(shard.as_str().unwrap()));
        assert!(part.tensor(name) == whole.tensor(name), "{name}");
    }
    run(command("gptoss-verify check --quiet").arg(&many)).manifest();
}

#[test]
fn fp16_counts_what_it_cannot_hold_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let src = tiny_copy(dir.path());
    let path = src.join("model-00000-of-00001.safetensors");
    let mut shard = Shard::read(&path);
    let scales = shard.tensor("model.layers.0.mlp.experts.down_proj_scales");
    (scales[0], scales[1]) = (160, 100);
    let blocks = shard.tensor("model.layers.0.mlp.experts.down_proj_blocks");
    blocks[..16].fill(0x07);
    blocks[16..32].fill(0x12);
    shard.write(&path);
    let (dst, plain) = (dir.path().join("fp16"), dir.path().join("plain"));
    let trained =
        run(command("gptoss-dequant --dtype fp16").arg("--src").arg(tiny()).arg("--dst").arg(&plain)).manifest();
    let trained = &trained["conversion"];
    let ran = run(command("gptoss-dequant --dtype fp16").arg("--src").arg(&src).arg("--dst").arg(&dst));
    let counts = &ran.manifest()["conversion"];
    // 16 codes of 6 x 2^33; 16 of 1 x 2^-27 and 16 of 0.5 x 2^-27, of which F16 holds neither; a few trained ones.
    let more = |what: &str| counts[what].as_u64().unwrap() - trained[what].as_u64().unwrap();
    assert_eq!((more("overflows"), more("underflows")), (16, 32));
    assert!(ran.err.contains("warning: 16 weights overflowed"), "{}", ran.err);
    // A stated overflow contradicts nothing.
    let verdict = run(command("gptoss-verify check --quiet").arg(&dst)).manifest();
    assert_eq!(verdict["verdict"]["passed"], true, "{verdict}");
}

#[test]
fn a_destination_that_holds_something_is_left_alone_without_force() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    std::fs::create_dir(&dst).unwrap();
    std::fs::write(dst.join("thesis.tex"), "years of work").unwrap();
    let go = |extra: &[&str]| {
        run(command("gptoss-dequant --quiet").args(extra).arg("--src").arg(tiny()).arg("--dst").arg(&dst))
    };
    let refused = go(&[]);
    assert_eq!(refused.code, 2);
    assert!(refused.err.contains("not empty; --force replaces it"), "{}", refused.err);
    let refused = go(&["--force"]);
    assert_eq!(refused.code, 2, "what is no checkpoint is not replaced even with --force");
    assert_eq!(std::fs::read_to_string(dst.join("thesis.tex")).unwrap(), "years of work");

    std::fs::remove_file(dst.join("thesis.tex")).unwrap();
    go(&[]).manifest();
    assert_eq!(go(&[]).code, 2);
    std::fs::write(dst.join("old.safetensors"), "stale").unwrap();
    go(&["--force"]).manifest();
    assert!(!dst.join("old.safetensors").exists(), "the whole folder was replaced");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn a_link_to_the_destination_stays_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    for force in ["", "--force"] {
        let ran = run(command("gptoss-dequant --quiet")
            .args(support::words(force))
            .arg("--src")
            .arg(tiny())
            .arg("--dst")
            .arg(&link));
        ran.manifest();
        assert!(link.is_symlink() && real.join("config.json").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

#[test]
fn the_source_is_never_the_destination() {
    let dir = tempfile::tempdir().unwrap();
    let src = tiny_copy(dir.path());
    let before = files(&src);
    for dst in [src.clone(), src.join("inside"), dir.path().to_path_buf(), src.join("../model")] {
        let ran = run(command("gptoss-dequant --quiet --force").arg("--src").arg(&src).arg("--dst").arg(&dst));
        assert_eq!(ran.code, 2, "{}", dst.display());
        assert!(ran.err.contains("lie in one another") || ran.err.contains("no name of its own"), "{}", ran.err);
    }
    // By way of a link, and of a folder that does not exist.
    std::os::unix::fs::symlink(&src, dir.path().join("link")).unwrap();
    for dst in ["link/sub", "link/sub/deeper", "other/../model/sub"] {
        let ran = run(command("gptoss-dequant --quiet").arg("--src").arg(&src).arg("--dst").arg(dir.path().join(dst)));
        assert_eq!(ran.code, 2, "{dst}");
    }
    let partial = support::copy_folder(&src, &dir.path().join("out.partial"));
    let ran =
        run(command("gptoss-dequant --quiet").arg("--src").arg(&partial).arg("--dst").arg(dir.path().join("out")));
    assert!(ran.code == 2 && ran.err.contains("lie in one another"), "{}", ran.err);
    assert_eq!(before, files(&partial));
    assert_eq!(before, files(&src));
}

#[test]
fn force_replaces_a_checkpoint_and_nothing_that_lies_beside_one() {
    let dir = tempfile::tempdir().unwrap();
    let dst = tiny_copy(dir.path());
    for text in ["calib.jsonl", "test.jsonl"] {
        std::fs::remove_file(dst.join(text)).unwrap();
    }
    std::fs::create_dir(dst.join(".git")).unwrap();
    let go = || run(command("gptoss-dequant --quiet --force").arg("--src").arg(tiny()).arg("--dst").arg(&dst));
    let ran = go();
    assert!(ran.code == 2 && ran.err.contains(".git is no file of a checkpoint"), "{}", ran.err);
    std::fs::remove_dir(dst.join(".git")).unwrap();
    go().manifest();
}

#[test]
fn what_is_no_part_of_the_model_is_named_when_it_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let src = tiny_copy(dir.path());
    let (path, name) = (src.join("model-00000-of-00001.safetensors"), "model.layers.0.self_attn.q_norm.weight");
    let mut shard = Shard::read(&path);
    let end = shard.data.len();
    shard.data.extend_from_slice(&[0; 4]);
    shard
        .header
        .insert(name.into(), serde_json::json!({"dtype": "BF16", "shape": [2], "data_offsets": [end, end + 4]}));
    shard.write(&path);
    edit(&src.join("model.safetensors.index.json"), |i| {
        i["weight_map"][name] = "model-00000-of-00001.safetensors".into()
    });
    std::fs::remove_file(src.join("tokenizer.json")).unwrap();
    std::fs::remove_file(src.join("tokenizer_config.json")).unwrap();
    let both =
        [("gptoss-dequant --quiet --src", "--dst"), ("gptoss-quant --quiet --algo rtn --model-in", "--output-dir")];
    for (i, (tool, to)) in both.into_iter().enumerate() {
        let dst = dir.path().join(i.to_string());
        let refused = run(command(tool).arg(&src).arg(to).arg(&dst));
        assert!(refused.code == 2 && refused.err.contains("--drop-unknown-tensors allows that"), "{}", refused.err);
        assert!(refused.err.contains(name) && !dst.exists(), "{}", refused.err);
        let manifest = run(command(tool).arg(&src).arg(to).arg(&dst).arg("--drop-unknown-tensors")).manifest();
        let notes = manifest["notes"].to_string();
        assert!(
            notes.contains(&format!("{name} is no tensor of the model that config.json describes, and was left out")),
            "{notes}"
        );
        assert!(notes.contains("the source has no tokenizer"), "{notes}");
    }
}

#[test]
fn what_is_plain_already_is_refused_and_other_floats_convert() {
    let dir = tempfile::tempdir().unwrap();
    let (bf16, fp16, back) = (dir.path().join("bf16"), dir.path().join("fp16"), dir.path().join("back"));
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    let again = run(command("gptoss-dequant --quiet").arg("--src").arg(&bf16).arg("--dst").arg(&fp16));
    assert_eq!(again.code, 2);
    assert!(again.err.contains("nothing to dequantize"), "{}", again.err);
    // Through the manifest of the first, as a pipe would bring it.
    edit(&bf16.join("config.json"), |c| c["torch_dtype"] = "bfloat16".into());
    run(command("gptoss-dequant --quiet --dtype fp16").arg("--src").arg(&bf16).arg("--dst").arg(&fp16)).manifest();
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(fp16.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["dtype"], &config["torch_dtype"]), (&"float16".into(), &"float16".into()));
    // Weights of this model fit into FP16 but for their smallest, so nearly all come back.
    let manifest = run(command("gptoss-dequant --quiet").arg("--src").arg(&fp16).arg("--dst").arg(&back)).manifest();
    assert_eq!(manifest["conversion"]["overflows"], 0);
}

#[test]
fn a_manifest_on_standard_input_names_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let (quantized, back) = (dir.path().join("q"), dir.path().join("back"));
    let made = run(command("gptoss-quant --quiet --algo rtn")
        .arg("--model-in")
        .arg(tiny())
        .arg("--output-dir")
        .arg(&quantized));
    made.manifest();
    let ran = run_with(command("gptoss-dequant --quiet").arg("--dst").arg(&back), &made.out);
    assert_eq!(ran.manifest()["source"]["layout"], "compressed-tensors");
    let empty = run_with(command("gptoss-dequant --quiet").arg("--dst").arg(dir.path().join("x")), "");
    assert_eq!(empty.code, 2);
    assert!(empty.err.contains("did the command before it fail?"), "{}", empty.err);
    let other =
        run_with(command("gptoss-dequant --quiet --src -").arg("--dst").arg(dir.path().join("x")), r#"{"schema":"x"}"#);
    assert_eq!(other.code, 2);
    assert!(other.err.contains("is not a manifest"), "{}", other.err);
}

#[test]
fn too_little_memory_is_said_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run(command("gptoss-dequant --quiet --max-memory 1MB")
        .arg("--src")
        .arg(tiny())
        .arg("--dst")
        .arg(dir.path().join("x")));
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("--max-memory 1000000 is too small: one worker needs"), "{}", ran.err);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn progress_is_plain_lines_off_a_terminal_and_nothing_when_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let loud = run(command("gptoss-dequant").arg("--src").arg(tiny()).arg("--dst").arg(dir.path().join("a")));
    assert!(loud.err.starts_with("dequantize: 1") && loud.err.contains("done after"), "{}", loud.err);
    assert!(!loud.err.contains('\u{1b}') && !loud.err.contains('\r'), "no control characters in a log");
    let quiet = run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(dir.path().join("b")));
    assert_eq!(quiet.err, "");
}
