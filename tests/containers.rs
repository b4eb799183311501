//! Containers and targets: what goes where, what is refused, and codes that change nothing but their container.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{Ran, Shard, command, files, root, run, tiny};

fn quant(src: &Path, dst: &Path, flags: &str) -> Ran {
    let mut command = command("gptoss-quant --quiet");
    run(command.args(support::words(flags)).arg("--model-in").arg(src).arg("--output-dir").arg(dst))
}

fn plan(src: &Path, flags: &str) -> Ran {
    let mut command = command("gptoss-quant --quiet --dry-run --algo rtn");
    run(command.args(support::words(flags)).arg("--model-in").arg(src))
}

/// Type, shape and bytes of every tensor, whatever shard it is in.
fn tensors(dir: &Path) -> BTreeMap<String, (Value, Value, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for name in files(dir).into_keys().filter(|n| n.ends_with(".safetensors")) {
        let mut shard = Shard::read(&dir.join(name));
        let names: Vec<String> = shard.header.keys().filter(|n| *n != "__metadata__").cloned().collect();
        for name in names {
            let (dtype, shape) = (shard.header[&name]["dtype"].clone(), shard.header[&name]["shape"].clone());
            let bytes = shard.tensor(&name).to_vec();
            all.insert(name, (dtype, shape, bytes));
        }
    }
    all
}

fn same_tensors(a: &Path, b: &Path) {
    let (a, b) = (tensors(a), tensors(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, tensor) in &a {
        assert!(tensor == &b[name], "{name}: {} {} and {} {}", tensor.0, tensor.1, b[name].0, b[name].1);
    }
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

fn status(manifest: &Value, runtime: &str) -> String {
    let all = manifest["runtimes"].as_array().unwrap();
    all.iter().find(|r| r["runtime"] == runtime).unwrap()["status"].as_str().unwrap().to_owned()
}

#[test]
fn mxfp4_to_gguf_and_back_are_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    quant(&tiny(), &there, "--keep-codes --container gguf").manifest();
    let manifest = quant(&there, &back, "--keep-codes --container openai").manifest();
    same_tensors(&tiny(), &back);
    assert_eq!(status(&manifest, "vllm"), "loads");
    assert_eq!(config(&back)["quantization_config"]["quant_method"], "mxfp4");
    let checked = run(command("gptoss-verify check --quiet").arg(&back)).manifest();
    assert_eq!(checked["verdict"]["passed"], true, "{checked}");
    // The file alone carries what its config said.
    let (alone, again) = (dir.path().join("alone"), dir.path().join("again"));
    std::fs::create_dir(&alone).unwrap();
    std::fs::copy(there.join("model.gguf"), alone.join("x.gguf")).unwrap();
    quant(&alone, &again, "--keep-codes --container compressed-tensors").manifest();
    same_tensors(&tiny(), &again);
    // Padded blocks come back as they went, and so do the norms that BF16 cannot hold.
    let (wide, gguf, wide_back) = (dir.path().join("wide"), dir.path().join("wg"), dir.path().join("wb"));
    quant(&tiny(), &wide, "--algo rtn --experts keep --mw keep --pad-to 160").manifest();
    quant(&wide, &gguf, "--keep-codes --container gguf").manifest();
    quant(&gguf, &wide_back, "--keep-codes --container openai").manifest();
    same_tensors(&wide, &wide_back);
    // So do floats, which a file has by projection.
    let (bf16, gguf, floats) = (dir.path().join("bf16"), dir.path().join("fg"), dir.path().join("fb"));
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    quant(&bf16, &gguf, "--keep-codes --container gguf").manifest();
    quant(&gguf, &floats, "--keep-codes --container compressed-tensors").manifest();
    same_tensors(&bf16, &floats);
}

#[test]
fn integer_experts_go_to_vllm_s_names_and_back_without_a_bit_changed() {
    let dir = tempfile::tempdir().unwrap();
    for (i, recipe) in [
        "--experts w4a16 --mw w8a16 --group-size 32",
        "--experts w8a16 --mw keep --group-size channel",
        "--experts w4a16 --mw w4a16 --mw-symmetry asymmetric --pad-to 160 --group-size 32",
    ]
    .iter()
    .enumerate()
    {
        let at = |name: &str| -> PathBuf { dir.path().join(format!("{name}{i}")) };
        quant(&tiny(), &at("ct"), &format!("--algo rtn --container compressed-tensors {recipe}")).manifest();
        quant(&tiny(), &at("vllm"), &format!("--algo rtn --container vllm-int {recipe}")).manifest();
        let manifest = quant(&at("ct"), &at("there"), "--keep-codes --container vllm-int").manifest();
        same_tensors(&at("vllm"), &at("there"));
        assert_eq!(config(&at("vllm")), config(&at("there")), "{recipe}");
        assert!(manifest["tensors"].to_string().contains("experts.*.gate_proj"), "{manifest}");
        quant(&at("there"), &at("back"), "--keep-codes --container compressed-tensors").manifest();
        same_tensors(&at("ct"), &at("back"));
        assert_eq!(config(&at("ct")), config(&at("back")), "{recipe}");
        for name in ["vllm", "back"] {
            let checked = run(command("gptoss-verify check --quiet").arg(at(name))).manifest();
            assert_eq!(checked["verdict"]["passed"], true, "{checked}");
        }
        let against = run(command("gptoss-verify against --quiet").arg(at("ct")).arg(at("vllm"))).manifest();
        assert_eq!(against["verdict"]["total_error"]["max"], 0.0, "{recipe}");
    }
}

#[test]
fn fp8_experts_have_quark_s_names_and_the_values_of_compressed_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let (quark, ct) = (dir.path().join("quark"), dir.path().join("ct"));
    let manifest = quant(&tiny(), &quark, "--algo rtn --experts fp8 --mw keep").manifest();
    assert_eq!(manifest["job"]["recipe"]["container"], "vllm-fp8");
    quant(&tiny(), &ct, "--algo rtn --experts fp8 --mw keep --container compressed-tensors").manifest();
    let (q, c) = (tensors(&quark), tensors(&ct));
    let name = |rest: &str| format!("model.layers.1.mlp.experts.5.{rest}");
    let (dtype, shape, codes) = &q[&name("gate_up_proj.weight")];
    assert_eq!((dtype, shape), (&"F8_E4M3".into(), &serde_json::json!([256, 256])));
    assert_eq!(
        (&q[&name("gate_up_proj.weight_scale")].0, &q[&name("gate_up_proj.weight_scale")].1),
        (&"F32".into(), &serde_json::json!([256]))
    );
    assert_eq!(
        (&q[&name("down_proj.bias")].0, &q[&name("down_proj.bias")].1),
        (&"BF16".into(), &serde_json::json!([256]))
    );
    for (row, codes) in codes.chunks_exact(256).enumerate() {
        let proj = if row % 2 == 0 { "gate_proj.weight" } else { "up_proj.weight" };
        assert!(codes == &c[&name(proj)].2[row / 2 * 256..][..256], "row {row}");
    }
    let quantization = &config(&quark)["quantization_config"];
    assert_eq!(
        (&quantization["quant_method"], &quantization["export"]["kv_cache_group"]),
        (&"quark".into(), &serde_json::json!([]))
    );
    let checked = run(command("gptoss-verify check --quiet").arg(&quark)).manifest();
    assert_eq!(checked["verdict"]["passed"], true, "{checked}");
    let against = run(command("gptoss-verify against --quiet").arg(&ct).arg(&quark)).manifest();
    // The scales are BF16 numbers in both; one rounds the product to BF16.
    assert!(against["verdict"]["total_error"]["relative"].as_f64().unwrap() < 4e-3, "{against}");
}

#[test]
fn without_a_wish_it_is_what_vllm_loads_where_there_is_such_a_thing() {
    for (flags, container, loads) in [
        ("", "vllm-int", true),
        ("--experts w4a16 --mw keep", "vllm-int", true),
        ("--experts fp8 --mw keep", "vllm-fp8", true),
        ("--experts mxfp4 --mw keep", "compressed-tensors", true),
        ("--experts fp8 --mw w8a8", "compressed-tensors", false),
        ("--experts keep --mw w8a16", "compressed-tensors", false),
        ("--experts w4a16 --asymmetric", "compressed-tensors", false),
        ("--experts w3a16", "compressed-tensors", false),
        ("--experts q4_0 --mw q8_0", "gguf", false),
        ("--container dense", "dense", true),
    ] {
        let manifest = plan(&tiny(), flags).manifest();
        let have = manifest["job"]["recipe"]["container"].as_str().unwrap_or("compressed-tensors");
        assert_eq!((have, status(&manifest, "vllm") == "loads"), (container, loads), "{flags}");
        assert_eq!(manifest["runtimes"].as_array().unwrap().len(), 4);
    }
    // 2880 is no multiple of 128: padded it loads, whether somebody asked for that or not.
    let real = root().join("tests/fixtures/configs/gpt-oss-20b.json");
    for pad in ["", "--pad-to 128"] {
        let manifest = plan(&real, &format!("--experts w4a16 --mw w8a16 {pad}")).manifest();
        let recipe = &manifest["job"]["recipe"];
        assert_eq!((&recipe["container"], &recipe["pad_to"]), (&"vllm-int".into(), &128.into()));
        assert_eq!(status(&manifest, "vllm"), "loads");
    }
    // Whoever names a container gets it, as wide as it was.
    let manifest = plan(&real, "--experts w4a16 --mw w8a16 --container compressed-tensors").manifest();
    assert_eq!(status(&manifest, "vllm"), "loads-wrongly");
    assert!(manifest["notes"].to_string().contains("no public runtime loads this output"), "{}", manifest["notes"]);
}

#[test]
fn a_target_chooses_or_says_by_which_rule_it_cannot() {
    let real = root().join("tests/fixtures/configs/gpt-oss-20b.json");
    let manifest = plan(&real, "--experts w4a16 --mw w8a16 --target vllm").manifest();
    let recipe = &manifest["job"]["recipe"];
    assert_eq!((&recipe["container"], &recipe["pad_to"]), (&"vllm-int".into(), &128.into()));
    assert_eq!(status(&manifest, "vllm"), "loads");
    let manifest = plan(&tiny(), "--experts q8_0 --mw q8_0 --target llama.cpp").manifest();
    assert_eq!(
        (&manifest["job"]["recipe"]["container"], status(&manifest, "llama.cpp")),
        (&"gguf".into(), "loads".into())
    );
    let manifest = plan(&tiny(), "--experts w3a16 --mw keep --target native").manifest();
    assert_eq!(status(&manifest, "native"), "loads");
    for (flags, said) in [
        ("--experts keep --mw w8a8 --target vllm", "the kept MXFP4 experts are not recognised"),
        ("--experts keep --mw w8a8 --target vllm", "nearest: --mw keep, or"),
        ("--experts w4a16 --mw w8a16 --group-size 32 --target vllm --pad-to 160", "nearest: --pad-to 128"),
        (
            "--experts fp8 --mw keep --target vllm --extra-ignore layers.0",
            "container vllm-fp8: model.layers.0.mlp.experts.0.gate_proj would stay as it is",
        ),
        ("--experts q4_0 --mw keep --target vllm", "container vllm-int: "),
        ("--experts w3a16 --mw keep --target vllm", "nearest: w4a16 or w8a16 experts"),
        (
            "--experts w4a16 --mw w8a16 --target transformers",
            "nearest: --experts mxfp4 --mw keep, or --container dense",
        ),
        ("--experts w4a16 --mw q8_0 --target llama.cpp", "a GGUF file has no int4; the nearest that it has is q4_0"),
        ("--experts q4_0 --mw q4_0 --target vllm --container gguf", "has no GGUF names for gpt-oss"),
        (
            "--experts w4a16 --mw w4a16 --container openai",
            "container openai holds the other weights as floats alone; give --mw keep",
        ),
        (
            "--experts w4a16 --mw keep --container openai",
            "container openai holds experts of MXFP4 alone; give --experts mxfp4",
        ),
        (
            "--experts w4a16 --asymmetric --mw keep --container vllm-int",
            "vllm-int holds experts of w4a16 and w8a16, symmetric",
        ),
        ("--experts fp8 --mw w8a8 --container vllm-fp8", "give --mw keep"),
        ("--experts keep --mw w8a16 --container vllm-int", "would stay as it is, and vllm-int holds experts of"),
        (
            "--experts w4a16 --mw keep --extra-ignore layers.1.mlp.experts.3 --container vllm-int",
            "model.layers.1.mlp.experts.3.gate_proj would stay",
        ),
        ("--target sglang", "there is no runtime \"sglang\"; there are vllm, transformers, llama.cpp, native"),
        (
            "--container zip",
            "there is no container \"zip\"; there are compressed-tensors, openai, dense, gguf, vllm-int, vllm-fp8",
        ),
    ] {
        let ran = plan(&tiny(), flags);
        assert!(ran.code == 2 && ran.err.contains(said), "{flags}: {ran:?}");
    }
}

/// What a manifest says of its errors is what a comparison of the two checkpoints finds.
#[test]
fn errors_are_those_of_what_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("--calib-jsonl {} --nsamples 4 --max-seq-length 64", support::word(&tiny().join("calib.jsonl")));
    for (i, flags) in [
        "--algo rtn --experts q4_0 --mw q8_0 --container dense".to_owned(),
        "--algo rtn --experts q4_0 --mw q8_0 --container gguf".to_owned(),
        "--algo rtn --experts w4a16 --mw w8a16 --container vllm-int".to_owned(),
        format!("--algo gptq --experts q4_1 --mw q5_0 --container dense {text}"),
        format!("--algo gptq --experts q4_1 --mw q5_0 --container gguf {text}"),
    ]
    .iter()
    .enumerate()
    {
        let out = dir.path().join(format!("e{i}"));
        let manifest = quant(&tiny(), &out, flags).manifest();
        let against = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&out)).manifest();
        let families: Vec<&Value> =
            manifest["tensors"].as_array().unwrap().iter().filter(|t| t.get("error").is_some()).collect();
        // Seven projections in each of four layers.
        assert_eq!(families.len(), 28, "{flags}");
        for family in families {
            let all = against["tensors"].as_array().unwrap();
            let seen = all.iter().find(|t| t["name"] == family["name"]).unwrap();
            for figure in ["rms", "max"] {
                let (a, b) = (family["error"][figure].as_f64().unwrap(), seen["error"][figure].as_f64().unwrap());
                assert!((a - b).abs() <= 1e-9 * a.abs(), "{flags} {} {figure}: {a} and {b}", family["name"]);
            }
        }
    }
}

#[test]
fn codes_that_do_not_survive_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (ct, gguf, out) = (dir.path().join("ct"), dir.path().join("gguf"), dir.path().join("out"));
    quant(&tiny(), &ct, "--algo rtn --experts nvfp4 --mw keep").manifest();
    quant(&tiny(), &gguf, "--algo rtn --experts q4_0 --mw q8_0").manifest();
    for (src, flags, said) in [
        (&ct, "--keep-codes --container vllm-int", "codes whose scales belong to more than their own rows"),
        (&gguf, "--keep-codes --container compressed-tensors", "compressed-tensors has no layout for q8_0"),
        (&gguf, "--keep-codes --container vllm-int", "vllm-int has no layout for q8_0"),
        (&gguf, "--algo rtn --experts w4a16", "is a GGUF file, which --keep-codes puts into another container"),
        (&ct, "--keep-codes --container dense", "keeps no codes"),
        (&ct, "--keep-codes", "--container"),
        (&ct, "--keep-codes --container gguf --algo rtn", "cannot be used with"),
        (&ct, "--keep-codes --container gguf --asymmetric", "--keep-codes rounds nothing: leave out --asymmetric"),
        (&ct, "--keep-codes --container gguf --group-size 32", "leave out --group-size"),
        (&ct, "--keep-codes --container gguf --with-sparse", "leave out --with-sparse"),
        (&ct, "--keep-codes --container gguf --calib-jsonl nofile", "leave out the text"),
    ] {
        let ran = quant(src, &out, flags);
        assert!(ran.code == 2 && ran.err.contains(said), "{flags}: {ran:?}");
    }
    assert!(!out.exists());
}

/// Groups and padding of gpt-oss-20b for vLLM's tensor parallelism: the sizes that its own `create_weights` was seen to take.
#[test]
fn a_plan_says_over_how_many_gpus_vllm_can_cut_it_and_can_be_asked_for_more() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(root().join("tests/fixtures/configs/gpt-oss-20b.json"), dir.path().join("config.json")).unwrap();
    let plan = |flags: &str| {
        let line = format!("gptoss-quant --dry-run --quiet --algo rtn --experts w4a16 --mw w8a16 {flags} --model-in");
        run(command(&line).arg(dir.path()))
    };
    let noted = |ran: &Ran| {
        let manifest = ran.manifest();
        let notes = manifest["notes"].as_array().unwrap();
        let note = notes.iter().filter_map(|n| n.as_str()).find(|n| n.starts_with("vLLM can")).unwrap().to_owned();
        (note, manifest["job"]["recipe"].clone())
    };
    for (flags, sizes) in [
        ("--target vllm", "on one GPU alone"),
        ("--target vllm --group-size 64", "over 1 and 2 GPUs"),
        ("--target vllm --group-size 32", "over 1, 2 and 4 GPUs"),
        ("--target vllm --group-size channel", "over 1, 2, 4 and 8 GPUs"),
        ("--target vllm --pad-to 1024", "over 1, 2, 4 and 8 GPUs"),
        ("--tensor-parallel 1", "on one GPU alone"),
        ("--tensor-parallel 2", "over 1 and 2 GPUs"),
        ("--tensor-parallel 4", "over 1, 2 and 4 GPUs"),
        ("--tensor-parallel 8", "over 1, 2, 4 and 8 GPUs"),
    ] {
        let (note, _) = noted(&plan(flags));
        assert!(note.contains(sizes), "{flags}: {note}");
    }
    // What was chosen is the smallest, and goes into the recipe.
    let (_, recipe) = noted(&plan("--tensor-parallel 2"));
    assert!(recipe["experts"]["group_size"]["size"] == 64 && recipe["pad_to"] == 128, "{recipe}");
    let (_, recipe) = noted(&plan("--tensor-parallel 8"));
    assert!(recipe["experts"]["group_size"] == "auto" && recipe["pad_to"] == 1024, "{recipe}");
    for (flags, words) in [
        ("--tensor-parallel 8 --group-size 128 --pad-to 128", "as it is it serves 1"),
        ("--tensor-parallel 3", "wanted 1, 2, 4 or 8"),
        ("--tensor-parallel 2 --target llama.cpp", "is about vLLM"),
        ("--tensor-parallel 2 --experts nf4", "nf4"),
        ("--tensor-parallel 2 --experts w3a16", "nearest: w4a16 or w8a16 experts"),
    ] {
        let ran = plan(flags);
        assert!(ran.code == 2 && ran.err.contains(words), "{flags}: {}", ran.err);
    }
    // Heads that cannot be shared are no matter of groups.
    let config = dir.path().join("config.json");
    let mut odd: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    (odd["num_attention_heads"], odd["num_key_value_heads"]) = (12.into(), 3.into());
    std::fs::write(config, odd.to_string()).unwrap();
    let ran = plan("--tensor-parallel 2");
    assert!(ran.code == 2 && ran.err.contains("cannot share 12 heads and 3 key heads among 2 GPUs"), "{}", ran.err);
    assert_eq!(noted(&plan("--target vllm")).0, "vLLM can run it on one GPU alone");
}
