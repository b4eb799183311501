//! Checkpoints as people have them: copied, linked, wrapped, merged, split, half downloaded; and each output of our own.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::json;
use support::faults::{Fault, trace};
use support::faults::{Refusal, refuse};
use support::tensors::{Tensors, read, write};
use support::{Shard, command, edit, files, run, tiny, tiny_copy};

const INDEX: &str = "model.safetensors.index.json";
const LFS: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4792272488\n";

fn dequant(src: &Path, dst: &Path) -> support::Ran {
    run(command("gptoss-dequant -q --src").arg(src).arg("--dst").arg(dst))
}

/// The fixture in BF16.
fn floats(dir: &Path) -> PathBuf {
    let to = dir.join("floats");
    dequant(&tiny(), &to).manifest();
    to
}

/// One file, no index.
fn single(tensors: &Tensors, from: &Path, dir: &Path) -> PathBuf {
    write(tensors, &[tensors.keys().collect()], from, dir);
    fs::remove_file(dir.join(INDEX)).unwrap();
    fs::rename(dir.join("model-00000-of-00000.safetensors"), dir.join("model.safetensors")).unwrap();
    dir.to_path_buf()
}

/// Fails with exit code 2 and each of `parts` in its message, and writes nothing.
fn refused(ran: &support::Ran, dst: &Path, parts: &[&str]) {
    assert_eq!(ran.code, 2, "{parts:?}: {}", ran.err);
    for part in parts {
        assert!(ran.err.contains(part), "wanted {part:?}: {}", ran.err);
    }
    assert!(!dst.exists() && !dst.with_extension("partial").exists(), "{parts:?}");
}

fn noted(ran: &support::Ran, part: &str) {
    let notes = ran.manifest()["notes"].to_string();
    assert!(notes.contains(part), "wanted {part:?}: {notes}");
}

#[test]
fn side_files_are_copied_with_their_modes_or_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (src, dst) = (tiny_copy(dir.path()), dir.path().join("out"));
    let tokenizer = src.join("tokenizer.json");
    let text = fs::read(&tokenizer).unwrap();
    fs::set_permissions(&tokenizer, fs::Permissions::from_mode(0o640)).unwrap();
    dequant(&src, &dst).manifest();
    assert_eq!(fs::metadata(dst.join("tokenizer.json")).unwrap().permissions().mode() & 0o777, 0o640);
    fs::remove_dir_all(&dst).unwrap();

    fs::write(&tokenizer, LFS).unwrap();
    refused(&dequant(&src, &dst), &dst, &["tokenizer.json", "Git LFS pointer"]);
    fs::remove_file(&tokenizer).unwrap();
    symlink("nowhere", &tokenizer).unwrap();
    refused(&dequant(&src, &dst), &dst, &["follow the link", "tokenizer.json"]);
    fs::remove_file(&tokenizer).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&tokenizer).status().unwrap().success());
    refused(&dequant(&src, &dst), &dst, &["tokenizer.json", "a device or pipe"]);
    // A link inside the folder is a file; one that leads out of it is a note.
    fs::remove_file(&tokenizer).unwrap();
    fs::write(dir.path().join("elsewhere.json"), &text).unwrap();
    symlink(dir.path().join("elsewhere.json"), &tokenizer).unwrap();
    noted(&dequant(&src, &dst), "tokenizer.json is a link out of the source");
    assert!(!dst.join("tokenizer.json").is_symlink());
    assert_eq!(fs::read(dst.join("tokenizer.json")).unwrap(), text);
}

#[test]
fn what_is_no_checkpoint_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    let folder = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let adapter = folder("adapter");
    let lora = json!({"peft_type": "LORA", "base_model_name_or_path": "openai/gpt-oss-20b"});
    fs::write(adapter.join("adapter_config.json"), lora.to_string()).unwrap();
    refused(&dequant(&adapter, &dst), &dst, &["LORA adapter of openai/gpt-oss-20b", "merge it first"]);
    fs::copy(tiny().join("config.json"), adapter.join("config.json")).unwrap();
    refused(&dequant(&adapter, &dst), &dst, &["LORA adapter of openai/gpt-oss-20b"]);
    let pickled = folder("pickled");
    fs::copy(tiny().join("config.json"), pickled.join("config.json")).unwrap();
    fs::write(pickled.join("pytorch_model-00001-of-00002.bin"), "PK").unwrap();
    refused(&dequant(&pickled, &dst), &dst, &["pytorch_model-00001-of-00002.bin", "convert it to safetensors"]);
    let pointers = tiny_copy(dir.path());
    fs::write(pointers.join("model-00000-of-00001.safetensors"), LFS).unwrap();
    refused(&dequant(&pointers, &dst), &dst, &["Git LFS pointer", "git lfs pull"]);
    let openai = folder("original");
    let config = json!({"initial_context_length": 4096, "rope_scaling_factor": 32.0, "num_experts": 16});
    fs::write(openai.join("config.json"), config.to_string()).unwrap();
    fs::copy(tiny().join("model-00000-of-00001.safetensors"), openai.join("model.safetensors")).unwrap();
    refused(&dequant(&openai, &dst), &dst, &["give the folder above it"]);
}

#[test]
fn wrapped_and_doubled_tensors_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (tensors, dst) = (read(&tiny()), dir.path().join("out"));
    let wrapped: Tensors = tensors.iter().map(|(k, v)| (format!("_orig_mod.{k}"), v.clone())).collect();
    let src = single(&wrapped, &tiny(), &dir.path().join("wrapped"));
    refused(&dequant(&src, &dst), &dst, &["_orig_mod.model.embed_tokens.weight", "torch.compile"]);
    // Floats and blocks of the same experts: one of the two would be lost.
    let bf16 = floats(dir.path());
    let name = "model.layers.1.mlp.experts.down_proj";
    let mut both = tensors.clone();
    both.insert(name.into(), read(&bf16)[name].clone());
    let src = single(&both, &tiny(), &dir.path().join("both"));
    refused(&dequant(&src, &dst), &dst, &[name, "in another form"]);
}

#[test]
fn of_two_readings_one_is_taken_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let dst = |n: &str| dir.path().join(format!("out-{n}"));
    let expected = floats(dir.path());
    let same = |name: &str| {
        for (file, bytes) in files(&expected).iter().filter(|(n, _)| n.ends_with(".safetensors")) {
            assert!(&files(&dst(name))[file] == bytes, "{name}: {file}");
        }
    };
    // A stale single file beside an index.
    let src = tiny_copy(&dir.path().join("stale"));
    fs::write(src.join("model.safetensors"), "broken").unwrap();
    noted(&dequant(&src, &dst("stale")), "both model.safetensors.index.json and model.safetensors are there");
    same("stale");
    let check = run(command("gptoss-verify check -q").arg(&src));
    assert!(check.code == 1 && check.out.contains("ambiguous"), "{}", check.out);
    // A tensor in two shards: the index says which counts.
    let src = tiny_copy(&dir.path().join("overlay"));
    let name = "model.norm.weight";
    let old = src.join("model-00000-of-00001.safetensors");
    let mut shard = Shard::read(&old);
    let at = shard.data.len();
    shard.data.extend_from_slice(&[1; 512]);
    shard.header.insert(name.into(), json!({"dtype": "BF16", "shape": [256], "data_offsets": [at, at + 512]}));
    shard.write(&old);
    noted(&dequant(&src, &dst("overlay")), "model.norm.weight stands in model-00000-of-00001.safetensors and in");
    same("overlay");
    // A config that announces blocks which are not there.
    let src = support::copy_folder(&expected, &dir.path().join("announced"));
    fs::copy(tiny().join("config.json"), src.join("config.json")).unwrap();
    fs::remove_file(src.join("gptoss-manifest.json")).unwrap();
    noted(&dequant(&src, &dst("announced")), "quantization_config announces weights that are not there");
    same("announced");
    let runtimes = run(command("gptoss-verify runtimes").arg(&src)).manifest()["runtimes"].clone();
    assert_eq!(runtimes[0]["status"], "does-not-load", "{runtimes}");
    // Two spellings of rope: the same is no remark.
    let src = tiny_copy(&dir.path().join("rope"));
    edit(&src.join("config.json"), |c| c["rope_parameters"] = c["rope_scaling"].clone());
    let notes = dequant(&src, &dst("rope")).manifest()["notes"].to_string();
    assert!(!notes.contains("rope_scaling"), "{notes}");
    edit(&src.join("config.json"), |c| c["rope_parameters"]["factor"] = 2.0.into());
    let other = dir.path().join("out-ropes");
    noted(&dequant(&src, &other), "rope_scaling was taken");
}

#[test]
fn a_split_gguf_file_is_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    run(command("gptoss-quant -q --algo rtn --experts q4_0 --mw q8_0 --container gguf")
        .arg("--model-in")
        .arg(tiny())
        .arg("--output-dir")
        .arg(&whole))
    .manifest();
    // One file under the name of a part: its metadata knows nothing of parts.
    let part = dir.path().join("part");
    fs::create_dir(&part).unwrap();
    fs::copy(whole.join("model.gguf"), part.join("m-00001-of-00002.gguf")).unwrap();
    let dst = dir.path().join("out");
    refused(&dequant(&part, &dst), &dst, &["m-00002-of-00002.gguf is missing"]);
    fs::copy(whole.join("model.gguf"), part.join("m-00002-of-00002.gguf")).unwrap();
    refused(&dequant(&part, &dst), &dst, &["says that it is part 1 of 1"]);
    fs::copy(whole.join("model.gguf"), part.join("other.gguf")).unwrap();
    refused(&dequant(&part, &dst), &dst, &["other.gguf beside them"]);
}

/// Somebody writes the source, or cuts it off, while it is read.
/// Runs over a source that changes: at the first write, and, where it is to heal, back as it was, dates too, at the first
/// line of the journal.
#[test]
fn a_source_that_changes_during_a_run_is_an_error() {
    let text = format!("--calib-jsonl {} --nsamples 2 --max-seq-length 32", support::word(&tiny().join("calib.jsonl")));
    let jobs = [
        "gptoss-dequant -q --threads 1".to_owned(),
        "gptoss-quant -q --threads 1 --algo rtn --experts keep --mw w8a16".to_owned(),
        format!("gptoss-quant -q --threads 1 --experts w4a16 --mw w8a16 {text}"),
    ];
    let mut healed = 0;
    for job in &jobs {
        let words = |c: &mut std::process::Command, src: &Path, out: &Path| {
            let dequant = job.starts_with("gptoss-dequant");
            let (from, to) = if dequant { ("--src", "--dst") } else { ("--model-in", "--output-dir") };
            c.arg(from).arg(src).arg(to).arg(out);
        };
        let whole = tempfile::tempdir().unwrap();
        let mut c = command(job);
        words(&mut c, &tiny(), &whole.path().join("out"));
        run(&mut c).manifest();
        for change in ["rewritten", "cut", "healed", "tokenizer"] {
            let dir = tempfile::tempdir().unwrap();
            let src = tiny_copy(dir.path());
            let work = dir.path().join("work");
            fs::create_dir(&work).unwrap();
            let shard = src.join("model-00001-of-00001.safetensors");
            let (bytes, date) = (fs::read(&shard).unwrap(), fs::metadata(&shard).unwrap().modified().unwrap());
            let (mut done, mut lines) = (false, 0);
            let mut c = command(job);
            words(&mut c, &src, &work.join("out"));
            let traced = trace(&mut c, &work, |_, call| {
                let open = |p: &Path| fs::File::options().write(true).open(p).unwrap();
                let at_work = call.name == "pwrite64" || call.path.ends_with("hidden-states");
                if at_work && !std::mem::replace(&mut done, true) {
                    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
                    match change {
                        "rewritten" => open(&shard).set_modified(later).unwrap(),
                        "cut" | "healed" => open(&shard).set_len(20_000).unwrap(),
                        _ => open(&src.join("tokenizer.json")).set_modified(later).unwrap(),
                    }
                }
                lines += usize::from(call.name == "write" && call.path.ends_with("journal.jsonl"));
                if change == "healed" && done && lines >= 2 {
                    fs::write(&shard, &bytes).unwrap();
                    open(&shard).set_modified(date).unwrap();
                }
                Fault::None
            });
            let what = format!("{job}, {change}: {} {}", traced.code, traced.err);
            assert!(done, "{what}");
            // Where nothing was read of what was gone for a while, nothing is wrong.
            if change == "healed" && traced.code == 0 {
                let (mut made, mut wanted) = (files(&work.join("out")), files(&whole.path().join("out")));
                made.remove("gptoss-manifest.json");
                wanted.remove("gptoss-manifest.json");
                assert!(made == wanted, "{what}");
                continue;
            }
            healed += usize::from(change == "healed");
            assert!(traced.code == 2 && traced.err.contains("while it was read"), "{what}");
            assert!(!work.join("out").exists(), "{what}");
        }
    }
    assert!(healed > 0, "no run read what was gone for a while");
}

/// A tensor is part of the model where reading the model asks for it, whatever its name looks like.
#[test]
fn tensors_that_nothing_reads_are_not_dropped_in_silence() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    let tensors = read(&tiny());
    let layer = "model.layers.0";
    for (name, like) in [
        ("lm_head.bias".to_owned(), format!("{layer}.self_attn.q_proj.bias")),
        ("model.embed_tokens.bias".to_owned(), format!("{layer}.self_attn.q_proj.bias")),
        (format!("{layer}.self_attn.q_proj.input_scale"), format!("{layer}.self_attn.sinks")),
        (format!("{layer}.self_attn.q_proj.weight_zero_point"), format!("{layer}.self_attn.sinks")),
        (format!("{layer}.mlp.experts.0.gate_proj.bias"), format!("{layer}.self_attn.sinks")),
        (format!("{layer}.mlp.experts.0.w13_bias"), format!("{layer}.self_attn.sinks")),
    ] {
        let mut more = tensors.clone();
        more.insert(name.clone(), tensors[&like].clone());
        let folder = dir.path().join("more");
        let _ = fs::remove_dir_all(&folder);
        let src = single(&more, &tiny(), &folder);
        refused(&dequant(&src, &dst), &dst, &[&name, "--drop-unknown-tensors"]);
        let ran = run(command("gptoss-verify check -q").arg(&src));
        assert!(ran.code == 1 && ran.out.contains(&name), "{name}: {} {}", ran.code, ran.out);
    }
    // A config that denies biases which are there.
    let src = tiny_copy(dir.path());
    edit(&src.join("config.json"), |c| c["attention_bias"] = false.into());
    refused(&dequant(&src, &dst), &dst, &["self_attn.k_proj.bias", "15 more"]);
    run(command("gptoss-dequant -q --drop-unknown-tensors --src").arg(&src).arg("--dst").arg(&dst)).manifest();
}

/// A head that is the embedding cannot be quantized apart from it, and the plan says so.
#[test]
fn a_tied_head_is_no_layer_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    let mut tensors = read(&tiny());
    tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    let both = single(&tensors, &tiny(), &dir.path().join("both"));
    tensors.remove("lm_head.weight");
    let one = single(&tensors, &tiny(), &dir.path().join("one"));
    let text = format!("--calib-jsonl {} --nsamples 2 --max-seq-length 32", support::word(&tiny().join("calib.jsonl")));
    for src in [&both, &one] {
        edit(&src.join("config.json"), |c| c["tie_word_embeddings"] = true.into());
        for flags in ["--algo rtn --lm-head w8a16", "--lm-head w8a16", "--preset ternary"] {
            for dry in ["", "--dry-run"] {
                let mut c = command(&format!("gptoss-quant -q {flags} {text} {dry} --model-in"));
                refused(
                    &run(c.arg(src).arg("--output-dir").arg(&dst)),
                    &dst,
                    &["tie_word_embeddings", "--lm-head keep"],
                );
            }
        }
        let mut c =
            command(&format!("gptoss-quant -q --experts w4a16 --mw w8a16 --embed-tokens w8a16 {text} --model-in"));
        run(c.arg(src).arg("--output-dir").arg(&dst)).manifest();
        run(command("gptoss-verify check -q").arg(&dst)).manifest();
        fs::remove_dir_all(&dst).unwrap();
    }
}

/// Of an output that is not whole no runtime is said to load it, and `null` is no quantization.
#[test]
fn what_check_refuses_loads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let src = floats(dir.path());
    edit(&src.join("config.json"), |c| c["quantization_config"] = json!(null));
    let dst = dir.path().join("out");
    let mut c = command("gptoss-quant -q --algo rtn --model-in");
    run(c.arg(&src).arg("--output-dir").arg(&dst)).manifest();
    fs::remove_file(dst.join(INDEX)).or_else(|_| fs::remove_file(dst.join("model.gguf"))).unwrap();
    let ran = run(command("gptoss-verify check -q").arg(&dst));
    assert_eq!(ran.code, 1, "{}", ran.err);
    let said: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let runtimes = said["runtimes"].as_array().unwrap();
    assert!(runtimes.len() > 2 && runtimes.iter().all(|r| r["status"] == "does-not-load"), "{runtimes:?}");
}

/// A weight that stands there as blocks and as floats is no model for any tool.
#[test]
fn a_weight_in_two_forms_is_refused_by_every_tool() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = read(&tiny());
    let name = "model.layers.1.mlp.experts.down_proj";
    tensors.insert(name.into(), read(&floats(dir.path()))[name].clone());
    let src = single(&tensors, &tiny(), &dir.path().join("both"));
    let text = tiny().join("test.jsonl");
    for (line, code) in [
        ("gptoss-verify check -q", 1),
        ("gptoss-verify runtimes -q", 0),
        ("gptoss-verify quality -q", 2),
        ("gptoss-bench decode -q --context 4 --tokens 1 --model", 2),
        ("gptoss-run -q --prompt x --model", 2),
    ] {
        let mut c = command(line);
        c.arg(&src);
        if line.contains("quality") {
            c.arg("--text").arg(&text);
        }
        let ran = run(&mut c);
        let said = ran.out.clone() + &ran.err;
        assert!(ran.code == code && said.contains("is the same weight as"), "{line}: {} {said}", ran.code);
    }
}

/// What a reader would take for ever over, or all of the memory, is an error that names the file.
#[test]
fn files_without_end_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (src, dst) = (tiny_copy(dir.path()), dir.path().join("out"));
    // No fifo is waited for.
    let manifest = src.join("gptoss-manifest.json");
    assert!(std::process::Command::new("mkfifo").arg(&manifest).status().unwrap().success());
    let ran = run(command("gptoss-verify check -q").arg(&src));
    assert!(ran.code == 2 && ran.err.contains("a device or pipe"), "{}", ran.err);
    fs::remove_file(&manifest).unwrap();
    // A side file that nobody can mean, before the work.
    let large = src.join("tokenizer.bak");
    fs::File::create(&large).unwrap().set_len(1 << 40).unwrap();
    refused(&dequant(&src, &dst), &dst, &["tokenizer.bak", "has 1099511627776 bytes"]);
    fs::remove_file(&large).unwrap();
    // Templates: constants that double, and operators without end.
    let template = src.join("chat_template.jinja");
    let doubled = format!("{{{{ {} }}}}", vec!["(\"a\"*100000000)"; 40].join(" ~ "));
    for (text, want) in [
        (doubled, "takes more than 512 MB of memory"),
        (format!("{{{{ {} }}}}", vec!["x"; 65_000].join("~")), ""),
        (format!("{{{{ {} }}}}", "(".repeat(200_000)), "is no chat template that can be read"),
        (format!("{{# {} #}}", "x".repeat(300_000)), "has more than 262144 bytes"),
    ] {
        fs::write(&template, &text).unwrap();
        let chat = dir.path().join("chat.jsonl");
        fs::write(&chat, "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}\n").unwrap();
        let mut quality = command("gptoss-verify quality -q --text");
        let ran = run(quality.arg(&chat).arg(&src));
        assert!(ran.code == 2 && ran.err.contains(want), "{}...: {} {}", &text[..30], ran.code, ran.err);
        assert!(ran.err.contains("error: ") && !ran.err.contains("panicked"), "{}", ran.err);
    }
    // YAML whose reader's time grows with the square of its length.
    let recipe = dir.path().join("recipe.yaml");
    fs::write(&recipe, format!("a: {}", "[\"]\",".repeat(60_000))).unwrap();
    let mut plan = command("gptoss-quant -q --dry-run --recipe");
    let ran = run(plan.arg(&recipe).arg("--model-in").arg(tiny()));
    assert!(ran.code == 2 && ran.err.contains("recipe.yaml"), "{}", ran.err);
}

#[test]
fn an_output_is_named_after_the_model_and_not_after_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("hub/models--acme--small/snapshots/0123456789abcdef0123456789abcdef01234567");
    support::copy_folder(&tiny(), &snapshot);
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let mut c = command("gptoss-quant -q --algo rtn --model-in");
    run(c.arg(&snapshot).current_dir(&work)).manifest();
    let made = fs::read_dir(&work).unwrap().next().unwrap().unwrap().file_name();
    assert!(made.to_string_lossy().starts_with("small-RTN"), "{made:?}");
}

/// Every scheme in every container that takes it: our own judges pass what we write.
#[test]
fn check_against_and_runtimes_know_every_output() {
    const SCHEMES: &str = "w2a16 w3a16 w4a16 w5a16 w6a16 w7a16 w8a16 w4a8 w8a8 w4afp8 fp8 fp8_static fp8_block fp8a16 mxfp4 mxfp6 \
                           mxfp8 nvfp4 ternary ternary_b3 q4_0 q4_1 q5_0 q5_1 q8_0 bf16 fp16 keep";
    let dir = tempfile::tempdir().unwrap();
    let calib = tiny().join("calib.jsonl");
    let mut made = 0;
    for scheme in SCHEMES.split_whitespace() {
        for container in ["compressed-tensors", "dense", "gguf", "vllm-int", "vllm-fp8", "openai"] {
            let dst = dir.path().join(format!("{scheme}-{container}"));
            for mw in [scheme, "keep"] {
                let algo = if scheme == "fp8_static" { "gptq" } else { "rtn" };
                let line = format!(
                    "gptoss-quant -q --algo {algo} --kernels present --experts {scheme} --mw {mw} --container {container}"
                );
                let mut c = command(&line);
                if scheme == "fp8_static" {
                    c.arg("--calib-jsonl").arg(&calib).args(["--nsamples", "2", "--max-seq-length", "32"]);
                }
                let ran = run(c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&dst));
                assert!(ran.code == 0 || ran.code == 2, "{line}: {}", ran.err);
                // A container refuses what it cannot hold; that is for other tests.
                if ran.code == 2 {
                    continue;
                }
                made += 1;
                let check = run(command("gptoss-verify check -q").arg(&dst));
                assert_eq!(check.code, 0, "{line}: {} {}", check.err, check.out);
                let against = run(command("gptoss-verify against -q").arg(tiny()).arg(&dst));
                assert_eq!(against.code, 0, "{line}: {}", against.err);
                let runtimes = run(command("gptoss-verify runtimes").arg(&dst)).manifest();
                let said = &ran.manifest()["runtimes"];
                assert_eq!(&runtimes["runtimes"], said, "{line}: the folder and its plan are judged alike");
                fs::remove_dir_all(&dst).unwrap();
            }
        }
    }
    println!("{made} outputs");
    assert!(made >= 120, "{made}");
}

/// A system that starts no thread, maps no file or lets no file grow: an error with a message, no crash, and no output that looks whole. A job
/// that does not need what is refused is done.
#[test]
fn what_the_system_refuses_is_an_error_with_a_message() {
    let dir = tempfile::tempdir().unwrap();
    let text = tiny().join("calib.jsonl");
    let jobs = |out: &Path| {
        let mut all = Vec::new();
        let mut dequant = command("gptoss-dequant --quiet --threads 2 --src");
        dequant.arg(tiny()).arg("--dst").arg(out);
        all.push(dequant);
        for flags in [
            "--algo rtn --experts w4a16 --mw w8a16",
            "--experts w4a16 --mw keep --num-calibration-samples 2 --max-seq-length 32",
        ] {
            let mut quant = command(&format!("gptoss-quant --quiet --threads 2 {flags} --model-in"));
            quant.arg(tiny()).arg("--output-dir").arg(out);
            if !flags.contains("rtn") {
                quant.arg("--calib-jsonl").arg(&text);
            }
            all.push(quant);
        }
        let mut check = command("gptoss-verify check --quiet --threads 2");
        check.arg(tiny());
        all.push(check);
        all
    };
    for (i, refusal) in [Refusal::Threads, Refusal::Maps, Refusal::FileSize(100_000)].into_iter().enumerate() {
        for job in 0..4 {
            let out = dir.path().join(format!("{i}-{job}"));
            let mut one = jobs(&out).remove(job);
            refuse(&mut one, refusal);
            let ran = run(&mut one);
            let what = format!("{refusal:?}, job {job}: {} {}", ran.code, ran.err);
            let words = match refusal {
                Refusal::Threads => "start",
                Refusal::Maps => "cannot map",
                Refusal::FileSize(_) => "File too large",
            };
            // A check writes nothing, and its own thread does the work where no other starts.
            if job == 3 && !matches!(refusal, Refusal::Maps) {
                assert_eq!(ran.code, 0, "{what}");
                continue;
            }
            assert!(ran.code == 2 && ran.err.contains(words), "{what}");
            assert!(!out.exists(), "{what}");
        }
    }
}
