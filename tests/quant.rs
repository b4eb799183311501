//! gptoss-quant, end to end.

mod support;

use std::path::Path;

use serde_json::Value;
use support::{Shard, assert_same, command, files, root, run, run_with, tiny};

fn json(path: &std::path::Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn mxfp4_and_bf16_sources_give_the_same_codes() {
    let dir = tempfile::tempdir().unwrap();
    let bf16 = dir.path().join("bf16");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    for (i, recipe) in [
        "",
        "--experts w4a16 --mw w4a16 --asymmetric",
        "--experts w8a16 --mw w8a8 --group-size channel",
        "--experts w8a8 --mw w8a16 --mw-group-size 32 --mw-symmetry asymmetric --extra-ignore layers.0.self_attn,experts.3",
    ]
    .iter()
    .enumerate()
    {
        let (a, b) = (dir.path().join(format!("a{i}")), dir.path().join(format!("b{i}")));
        let go = |src: &std::path::Path, out: &std::path::Path| {
            run(command("gptoss-quant --quiet --algo rtn").args(support::words(recipe)).arg("--model-in").arg(src).arg("--output-dir").arg(out)).manifest()
        };
        let (x, y) = (go(&tiny(), &a), go(&bf16, &b));
        assert_eq!(x["tensors"], y["tensors"], "{recipe}: the errors are the same");
        let (mut x, mut y) = (files(&a), files(&b));
        // The manifests name different sources, and only one source's config had a dtype.
        for name in ["gptoss-manifest.json", "config.json"] {
            assert!(x.remove(name).is_some() && y.remove(name).is_some());
        }
        assert!(x == y, "{recipe}");
        let (cx, cy) = (json(&a.join("config.json")), json(&b.join("config.json")));
        assert_eq!(cx["quantization_config"], cy["quantization_config"]);
        assert_eq!(cx["dtype"], "bfloat16");
    }
}

#[test]
fn threads_memory_and_folder_do_not_change_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = None;
    for (i, flags) in ["--threads 1", "--threads 2", "--threads 5 --max-memory 16MiB", "--threads 2 --max-memory 8GB"]
        .iter()
        .enumerate()
    {
        let out = dir.path().join(format!("q{i}"));
        run(command("gptoss-quant --quiet --algo rtn")
            .args(flags.split(' '))
            .arg("--model-in")
            .arg(tiny())
            .arg("--output-dir")
            .arg(&out))
        .manifest();
        assert_same(first.get_or_insert_with(|| out.clone()), &out);
    }
}

#[test]
fn experts_have_llm_compressors_names_and_gate_and_up_are_apart() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("q");
    run(command("gptoss-quant --quiet --algo rtn --container compressed-tensors")
        .arg("--model-in")
        .arg(tiny())
        .arg("--output-dir")
        .arg(&out))
    .manifest();
    let mut shard = Shard::read(&out.join("model-00001-of-00001.safetensors"));
    let base = "model.layers.2.mlp.experts.7";
    for (name, dtype, shape) in [
        ("gate_proj.weight_packed", "I32", vec![128, 32]),
        ("up_proj.weight_scale", "BF16", vec![128, 2]),
        ("down_proj.weight_packed", "I32", vec![256, 16]),
        ("down_proj.weight_shape", "I64", vec![2]),
        ("gate_proj.bias", "BF16", vec![128]),
        ("down_proj.bias", "BF16", vec![256]),
    ] {
        let entry = &shard.header[&format!("{base}.{name}")];
        assert_eq!((entry["dtype"].as_str(), entry["shape"].clone()), (Some(dtype), shape.into()), "{name}");
    }
    let mut source = Shard::read(&tiny().join("model-00001-of-00001.safetensors"));
    let fused = source.tensor("model.layers.2.mlp.experts.gate_up_proj_bias")[7 * 512..8 * 512].to_vec();
    let every_second = |first: usize| fused.chunks(2).skip(first).step_by(2).flatten().copied().collect::<Vec<u8>>();
    assert_eq!(shard.tensor(&format!("{base}.gate_proj.bias")), every_second(0));
    assert_eq!(shard.tensor(&format!("{base}.up_proj.bias")), every_second(1));

    let config = &json(&out.join("config.json"))["quantization_config"];
    assert_eq!(config["format"], "pack-quantized");
    let ignore: Vec<&str> = config["ignore"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(ignore.contains(&"lm_head") && ignore.contains(&"model.layers.3.mlp.router"), "{ignore:?}");
    // q, k, v and o have in_features that 128 divides; so have gate and up; down takes 128 as well: two bit widths, two groups.
    assert_eq!(config["config_groups"].as_object().unwrap().len(), 2);
}

#[test]
fn kept_experts_are_the_source_s_bytes_and_config_and_manifest_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("q");
    let manifest = run(command("gptoss-quant --quiet --algo rtn --experts keep --mw w8a8")
        .arg("--model-in")
        .arg(tiny())
        .arg("--output-dir")
        .arg(&out))
    .manifest();
    let mut ours = Shard::read(&out.join("model-00001-of-00001.safetensors"));
    let mut compared = 0;
    for file in ["model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors"] {
        let mut theirs = Shard::read(&tiny().join(file));
        let names: Vec<String> = theirs.header.keys().filter(|n| n.contains(".experts.")).cloned().collect();
        for name in names {
            assert!(ours.tensor(&name) == theirs.tensor(&name), "{name}");
            compared += 1;
        }
    }
    assert_eq!(compared, 4 * 6);
    let config = json(&out.join("config.json"));
    assert_eq!(config["gptoss_kept"]["quant_method"], "mxfp4");
    assert_eq!(config["quantization_config"]["format"], "int-quantized");
    assert_eq!(config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"], true);
    assert!(manifest["notes"][0].as_str().unwrap().contains("gptoss_kept"));
    let lost = |r: &Value| r["status"] != "loads" && !r["reason"].as_str().unwrap().is_empty();
    assert_eq!(manifest["runtimes"].as_array().unwrap().iter().filter(|r| lost(r)).count(), 3);
    run(command("gptoss-verify check --quiet").arg(&out)).manifest();
    let same = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&out)).manifest();
    let experts = |t: &&Value| t["name"].as_str().unwrap().contains("experts");
    assert!(same["tensors"].as_array().unwrap().iter().filter(experts).all(|t| t["error"]["max"] == 0.0));
}

#[test]
fn a_group_that_does_not_divide_2880_is_refused_before_any_data() {
    for model in ["20b", "120b"] {
        let config = root().join(format!("tests/fixtures/configs/gpt-oss-{model}.json"));
        let ran = run(command("gptoss-quant --dry-run --container compressed-tensors --group-size 128")
            .arg("--model-in")
            .arg(&config));
        assert_eq!(ran.code, 2);
        insta::assert_snapshot!("group-128-on-2880", ran.err);
        let plan = run(command(
            "gptoss-quant --dry-run --quiet --algo rtn --container compressed-tensors --experts w4a16 --mw w4a16",
        )
        .arg("--model-in")
        .arg(&config))
        .manifest();
        let stored = |name: &str| {
            let tensors = plan["tensors"].as_array().unwrap();
            tensors.iter().find(|t| t["name"] == name).unwrap_or_else(|| panic!("{name}"))["stored"].clone()
        };
        assert_eq!(stored("model.layers.0.mlp.experts.*.down_proj"), "int4 g64");
        assert_eq!(stored("model.layers.0.self_attn.q_proj"), "int4 g64");
        assert_eq!(stored("model.layers.0.self_attn.o_proj"), "int4 g128", "4096 takes 128");
        assert_eq!(plan["plan"]["weights_read"], false);
        let bytes = plan["plan"]["bytes"].as_u64().unwrap();
        let range = if model == "20b" { 12_000_000_000..14_000_000_000 } else { 63_000_000_000..67_000_000_000u64 };
        assert!(range.contains(&bytes), "{model}: {bytes}");
    }
}

#[test]
fn a_dry_run_reads_headers_where_weights_are_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plan =
        run(command("gptoss-quant --dry-run --quiet --algo rtn").arg("--model-in").arg(tiny()).current_dir(dir.path()))
            .manifest();
    assert_eq!(plan["plan"]["weights_read"], true);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let table = run(command("gptoss-quant --dry-run --quiet --algo rtn --format table").arg("--model-in").arg(tiny()));
    insta::assert_snapshot!("dry-run-table", table.out);
    // The plan is what the run then writes.
    let out = dir.path().join("q");
    run(command("gptoss-quant --quiet --algo rtn").arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out))
        .manifest();
    let size = std::fs::metadata(out.join("model-00001-of-00001.safetensors")).unwrap().len();
    assert_eq!(plan["plan"]["bytes"], size);
}

#[test]
fn the_default_name_says_model_algorithms_and_schemes() {
    let dir = tempfile::tempdir().unwrap();
    run(command("gptoss-quant --quiet --algo rtn --experts keep")
        .arg("--model-in")
        .arg(tiny())
        .current_dir(dir.path()))
    .manifest();
    let name = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().file_name();
    assert_eq!(name, "tiny-gpt-oss-KEEP-RTN-experts-keep-mw-w8a16");
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let quantized = dir.path().join("q");
    run(command("gptoss-quant --quiet --algo rtn").arg("--model-in").arg(tiny()).arg("--output-dir").arg(&quantized))
        .manifest();
    for (flags, want) in [
        ("--experts-algo awq --experts w8a16", "the experts: AWQ is for w4a16, not for w8a16"),
        ("--experts-algo pt-bitnet --experts w8a16", "the experts: PT-BitNet is for ternary"),
        (
            "--experts-algo pt-bitnet --experts ternary --experts-group-size tensor",
            "PT-BitNet is for ternary, ternary_b3",
        ),
        ("--embed-tokens w8a8", "nothing is multiplied with the embedding"),
        ("--experts ternary --experts-group-size tensor", "ternary scales belong to a group or a channel"),
        (
            "--mw-algo qqq",
            "the algorithm qqq is not in this version; it has rtn, which needs no data, gptq, awq and pt-bitnet",
        ),
        ("--mw-algo magic", "there is no algorithm \"magic\""),
        ("--experts fp6_e3m2", "compressed-tensors has no layout for fp6_e3m2"),
        ("--experts w4a8 --kernels absent", "w4a8 for the experts needs kernels, and none are installed here"),
        ("--experts w5a5", "there is no scheme \"w5a5\""),
        ("--experts w4a16 --experts-type int8", "--experts-scheme w4a16 does not have weights of --experts-type int8"),
        ("--experts keep --mw keep", "nothing is left to quantize"),
        ("--extra-ignore q_prj", "the ignore pattern \"q_prj\" matches no module"),
        ("--extra-ignore re:(", "is no regular expression"),
        ("--extra-ignore re:.*", "nothing is left to quantize"),
        ("--group-size 0", "is no group size"),
        (
            "--group-size 96",
            "group_size 96 does not divide in_features 256 of model.layers.0.self_attn.q_proj; use --group-size auto (or one of 128, 64, 32)",
        ),
        ("--symmetric --asymmetric", "cannot be used with"),
    ] {
        let out = dir.path().join("x");
        let ran = run(command("gptoss-quant --quiet --algo rtn")
            .args(flags.split(' '))
            .arg("--model-in")
            .arg(tiny())
            .arg("--output-dir")
            .arg(&out));
        assert_eq!(ran.code, 2, "{flags}");
        assert!(ran.err.contains(want), "{flags}: {}", ran.err);
        assert!(!out.exists() && !dir.path().join("x.partial").exists(), "{flags}");
    }
    let twice = run(command("gptoss-quant --quiet --algo rtn")
        .arg("--model-in")
        .arg(&quantized)
        .arg("--output-dir")
        .arg(dir.path().join("x")));
    assert!(twice.code == 2 && twice.err.contains("is quantized already (compressed-tensors)"), "{}", twice.err);
}

#[test]
fn the_three_tools_are_one_pipeline() {
    let dir = tempfile::tempdir().unwrap();
    let dequantized =
        run(command("gptoss-dequant --quiet --dst bf16").arg("--src").arg(tiny()).current_dir(dir.path()));
    let quantized =
        run_with(command("gptoss-quant --quiet --algo rtn --output-dir q").current_dir(dir.path()), &dequantized.out);
    let verified = run_with(command("gptoss-verify --quiet").current_dir(dir.path()), &quantized.out).manifest();
    let verdict = &verified["verdict"];
    assert_eq!((&verdict["passed"], &verdict["hashes_checked"]), (&true.into(), &true.into()));
    let relative = verdict["total_error"]["relative"].as_f64().unwrap();
    assert!((0.01..0.1).contains(&relative), "int4 loses something, but not much: {relative}");
    // What the quantizer measured is what the comparison of the two folders measures.
    let quantized = quantized.manifest();
    for t in quantized["tensors"].as_array().unwrap().iter().filter(|t| !t["error"].is_null()) {
        let name = &t["name"];
        let again = verified["tensors"].as_array().unwrap().iter().find(|v| &v["name"] == name).unwrap();
        for figure in ["rms", "max", "relative"] {
            let (a, b) = (t["error"][figure].as_f64().unwrap(), again["error"][figure].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-12 * a, "{name} {figure}: {a} and {b}");
        }
    }
}

#[test]
fn mxfp4_experts_of_either_source_are_the_published_layout_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bf16 = dir.path().join("bf16");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    for (i, src) in [tiny(), bf16].iter().enumerate() {
        let out = dir.path().join(format!("q{i}"));
        let mut quant = command("gptoss-quant --quiet --algo rtn --experts mxfp4 --mw keep");
        let manifest = run(quant.arg("--model-in").arg(src).arg("--output-dir").arg(&out)).manifest();
        let loads = |r: &&Value| r["status"] == "loads" && r["runtime"] != "native";
        assert_eq!(manifest["runtimes"].as_array().unwrap().iter().filter(loads).count(), 2);
        assert_eq!(manifest["output"]["layout"], "mxfp4");
        assert_eq!(json(&out.join("config.json"))["quantization_config"]["quant_method"], "mxfp4");
        run(command("gptoss-verify check --quiet").arg(&out)).manifest();
        // E2M1 under a power of two stays what it is, whatever power its block is given.
        let same = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&out)).manifest();
        assert_eq!(same["verdict"]["total_error"]["max"], 0.0);
    }
}

#[test]
fn every_scheme_checks_and_its_error_is_what_the_comparison_finds() {
    let dir = tempfile::tempdir().unwrap();
    for (i, flags) in [
        "--experts mxfp4 --mw mxfp4",
        "--experts fp8 --mw w4a8",
        "--experts w2a16 --mw w7a16",
        "--experts mxfp4 --mw w3a16 --extra-ignore layers.1.mlp.experts.3",
    ]
    .iter()
    .enumerate()
    {
        let out = dir.path().join(format!("q{i}"));
        let mut quant = command("gptoss-quant --quiet --algo rtn --kernels present");
        quant.args(flags.split(' ')).arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out);
        let manifest = run(&mut quant).manifest();
        run(command("gptoss-verify check --quiet").arg(&out)).manifest();
        let again = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&out)).manifest();
        for t in manifest["tensors"].as_array().unwrap().iter().filter(|t| !t["error"].is_null()) {
            let found = again["tensors"].as_array().unwrap().iter().find(|v| v["name"] == t["name"]).unwrap();
            let (a, b) = (t["error"]["rms"].as_f64().unwrap(), found["error"]["rms"].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-12 * a, "{flags} {}: {a} and {b}", t["name"]);
        }
    }
}

fn quant_manifest(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("gptoss-manifest.json")).unwrap()).unwrap()
}

#[test]
fn dense_output_is_what_the_codes_stand_for() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("--nsamples 2 --max-seq-length 64 --calib-jsonl {}", support::word(&tiny().join("calib.jsonl")));
    for (i, flags) in [
        "--algo rtn --experts w4a16 --mw w8a8 --asymmetric --experts-group-size block",
        "--algo rtn --experts mxfp4 --mw nvfp4",
        "--algo gptq --experts w3a16 --mw fp8_static --extra-ignore layers.1.mlp.experts.3",
        "--algo awq --experts w4a16 --mw w4a16",
    ]
    .into_iter()
    .enumerate()
    {
        let [coded, dense, back] = ["coded", "dense", "back"].map(|n| dir.path().join(format!("{n}{i}")));
        let quant = |container: &str, out: &Path| {
            let mut c = command(&format!("gptoss-quant --quiet {flags} {text} --container {container}"));
            run(c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(out)).manifest()
        };
        quant("compressed-tensors", &coded);
        let m = quant("dense", &dense);
        let runtimes = m["runtimes"].as_array().unwrap().iter().filter(|r| r["status"] == "loads");
        // vLLM, transformers, and our own.
        assert_eq!(runtimes.count(), 3, "{}", m["runtimes"]);
        // A look at the folder finds the same.
        for (out, maker) in [(&dense, m), (&coded, quant_manifest(&coded))] {
            let seen = run(command("gptoss-verify runtimes --quiet").arg(out)).manifest();
            assert_eq!(seen["runtimes"], maker["runtimes"], "{flags}");
            assert!(seen["runtimes"].as_array().unwrap().iter().all(|r| r["source"].as_str().unwrap().len() > 10));
        }
        run(command("gptoss-dequant --quiet").arg("--src").arg(&coded).arg("--dst").arg(&back)).manifest();
        let told = run(command("gptoss-verify against --quiet").arg(&back).arg(&dense)).manifest();
        assert_eq!(told["verdict"]["total_error"]["max"], 0.0, "{flags}: {told}");
        let check = run(command("gptoss-verify check --quiet").arg(&dense)).manifest();
        assert_eq!(check["verdict"]["passed"], true, "{check}");
    }
    // Formats that no container has a layout for.
    for (scheme, bound) in [
        ("fp6", 0.008),
        ("fp6_e3m2", 0.016),
        ("fp4", 0.06),
        ("fp8_e5m2", 0.016),
        ("mxfp6_e3m2", 0.016),
        ("mxfp8_e5m2", 0.016),
    ] {
        let out = dir.path().join(scheme);
        let mut c =
            command(&format!("gptoss-quant --quiet --algo rtn --experts {scheme} --mw {scheme} --container dense"));
        let m = run(c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
        let told = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&out)).manifest();
        let error = told["verdict"]["total_error"]["relative"].as_f64().unwrap();
        println!("{scheme}: {error}");
        assert!(error > 0.0 && error < bound, "{scheme}: {error}");
        assert!(m["tensors"].to_string().contains(&format!("bfloat16 of {scheme}")), "{}", m["tensors"]);
    }
}

/// BF16 and FP16 are number formats as well: MXFP4 fits the first, and the second where it does not overflow.
#[test]
fn experts_and_other_weights_become_halves() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("--calib-jsonl {} --nsamples 4 --max-seq-length 64", support::word(&tiny().join("calib.jsonl")));
    for (i, (flags, exact, layout)) in [
        ("--algo rtn --experts bf16 --mw keep", true, "bf16"),
        ("--algo gptq --experts bf16 --mw w8a16", false, "compressed-tensors"),
        ("--algo rtn --experts fp16 --mw fp16", false, "fp16"),
        ("--algo gptq --experts fp16 --mw fp16", false, "fp16"),
        ("--algo rtn --experts fp16 --mw q8_0 --container gguf", false, "gguf"),
        ("--algo rtn --experts bf16 --mw bf16 --container gguf", true, "gguf"),
    ]
    .iter()
    .enumerate()
    {
        let out = dir.path().join(format!("h{i}"));
        let mut quant = command(&format!("gptoss-quant --quiet {flags} {text}"));
        let manifest = run(quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
        assert_eq!(manifest["output"]["layout"], *layout, "{flags}");
        let checked = run(command("gptoss-verify check --quiet").arg(&out)).manifest();
        assert_eq!(checked["verdict"]["passed"], true, "{flags}: {checked}");
        let against = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&out)).manifest();
        let max = against["verdict"]["total_error"]["max"].as_f64().unwrap();
        assert!(if *exact { max == 0.0 } else { max < 2e-2 }, "{flags}: {max}");
        let half = json(&out.join("config.json"))["dtype"] == "float16";
        assert_eq!(half, flags.contains("--mw fp16"), "{flags}");
    }
}
