//! Programs that nobody here wrote judge the output: transformers and compressed-tensors, at the versions of
//! peers/requirements.txt. `tests/run.sh` installs them; without them these tests fail.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use gptoss::device::Device;
use gptoss::device::cpu::Cpu;
use gptoss::model::Model;
use gptoss::model::forward::{self, Places};
use gptoss::text::chat::ChatTemplate;
use gptoss::text::clock::Clock;
use support::{command, files, root, run, tiny};

/// Python with the peers in it: `$GPTOSS_PEERS`, or `venv/` in the repository.
fn python() -> PathBuf {
    let venv = std::env::var_os("GPTOSS_PEERS").map_or_else(|| root().join("venv"), PathBuf::from);
    let python = venv.join("bin/python");
    assert!(python.exists(), "{} is missing: tests/run.sh installs the Python peers", python.display());
    python
}

/// Runs a script of tests/peers and gives what it printed.
fn judge(script: &str, args: &[&Path]) -> String {
    let mut command = Command::new(python());
    command
        .arg(root().join("tests/peers").join(script))
        .args(args)
        .env("HF_HUB_OFFLINE", "1")
        .env("CUDA_VISIBLE_DEVICES", "");
    let out = command.output().expect("python starts");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "{script}: {}\n{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

#[test]
fn transformers_dequantizes_to_the_same_tensors_and_computes_the_golden_logits() {
    let dir = tempfile::tempdir().unwrap();
    let bf16 = dir.path().join("bf16");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    let golden = root().join("tests/golden/tiny-logits/tiny-logits.safetensors");
    let said = judge("transformers_equal.py", &[&tiny(), &bf16, &golden]);
    println!("{said}");
    assert!(said.contains("71 tensors equal") && said.contains("logits within"), "{said}");
}

#[test]
fn transformers_reads_experts_that_we_made_mxfp4_and_they_are_the_source_s() {
    let dir = tempfile::tempdir().unwrap();
    let (bf16, mxfp4, back) = (dir.path().join("bf16"), dir.path().join("mxfp4"), dir.path().join("back"));
    let golden = root().join("tests/golden/tiny-logits/tiny-logits.safetensors");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    let mut quant = command("gptoss-quant --quiet --algo rtn --experts mxfp4 --mw keep");
    run(quant.arg("--model-in").arg(&bf16).arg("--output-dir").arg(&mxfp4)).manifest();
    run(command("gptoss-dequant --quiet").arg("--src").arg(&mxfp4).arg("--dst").arg(&back)).manifest();
    let said = judge("transformers_equal.py", &[&mxfp4, &back, &golden]);
    println!("{said}");
    assert!(said.contains("71 tensors equal") && said.contains("logits within"), "{said}");
}

#[test]
fn compressed_tensors_decompresses_to_the_values_of_our_dequantizer() {
    for flags in [
        "",
        "--experts w4a16 --mw w4a16 --asymmetric --group-size 32",
        "--experts w8a16 --mw w8a8 --group-size channel",
        "--experts w8a8 --mw w4a16 --mw-symmetry asymmetric --extra-ignore layers.0.self_attn,layers.1.mlp.experts.3",
        "--experts keep --mw w8a8 --asymmetric",
        "--experts fp8 --mw mxfp4",
        "--experts w4a8 --mw w3a16",
        "--experts mxfp4 --mw w5a16 --extra-ignore layers.1.mlp.experts.3 --mw-symmetry asymmetric",
        "--experts mxfp4 --mw fp8",
        "--experts fp8_block --mw fp8a16",
        "--experts mxfp6 --mw mxfp8",
        "--experts nvfp4 --mw nvfp4",
        "--experts w4afp8 --mw w8a8 --asymmetric --experts-symmetry symmetric",
        "--experts w4a16 --mw w8a16 --group-size tensor --asymmetric",
        "--experts w4a8 --mw w3a16 --group-size block",
        "--experts w8a16 --mw w5a16 --group-size block --asymmetric",
        "--experts fp8_static --mw fp8_static --nsamples 4 --max-seq-length 64",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (quantized, back) = (dir.path().join("q"), dir.path().join("back"));
        run(command("gptoss-quant --quiet --algo rtn --container compressed-tensors --kernels present --calib-jsonl")
            .arg(tiny().join("calib.jsonl"))
            .args(support::words(flags))
            .arg("--model-in")
            .arg(tiny())
            .arg("--output-dir")
            .arg(&quantized))
        .manifest();
        run(command("gptoss-dequant --quiet").arg("--src").arg(&quantized).arg("--dst").arg(&back)).manifest();
        let said = judge("compressed_tensors_equal.py", &[&quantized, &back]);
        println!("{flags}: {said}");
        assert!(said.contains("modules equal"), "{flags}: {said}");
    }
}

/// Raw f32 hidden states behind the first layer, of the first golden sequence, by the library's forward.
fn write_states(model: &Path, golden: &Path, to: &Path) {
    let bytes = std::fs::read(golden).unwrap();
    let ids = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = ids.tensor("input_ids").unwrap();
    let ids: Vec<u32> = ids.data().chunks(8).map(|b| u32::from_le_bytes(b[..4].try_into().unwrap())).collect();
    let ids = &ids[..192];
    let (model, device) = (Model::open(model).unwrap(), Cpu::new(2).unwrap());
    let mut x = device.embed(&model.embedding(&device).unwrap(), ids).unwrap();
    let layer = model.layer(&device, 0).unwrap();
    let places = Places::new(&device, &model, &[0], &[ids.len()]).unwrap();
    let mut caches = [device.cache(&layer.attention)];
    forward::layer(&device, &model, &layer, &mut x, &places, &mut caches).unwrap();
    let states = device.download(x).unwrap();
    std::fs::write(to, states.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
}

#[test]
fn compressed_tensors_rounds_activations_as_our_forward_does() {
    let dir = tempfile::tempdir().unwrap();
    let (out, back, states) = (dir.path().join("q"), dir.path().join("back"), dir.path().join("states"));
    let golden = root().join("tests/golden/tiny-logits/tiny-logits.safetensors");
    let mut quant = command("gptoss-quant --quiet --algo rtn --experts keep --mw w8a8");
    run(quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
    run(command("gptoss-dequant --quiet").arg("--src").arg(&out).arg("--dst").arg(&back)).manifest();
    for kind in ["int", "float"] {
        let config = out.join("config.json");
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        for group in json["quantization_config"]["config_groups"].as_object_mut().unwrap().values_mut() {
            group["input_activations"]["type"] = kind.into();
        }
        std::fs::write(&config, json.to_string()).unwrap();
        write_states(&out, &golden, &states);
        let said = judge("transformers_forward.py", &[&out, &back, &golden, &states]);
        println!("{kind}: {said}");
        assert!(said.contains("forward agrees"), "{kind}: {said}");
    }
}

/// Logits of the golden sequences by the library's forward, with the ids, as safetensors.
fn write_logits(model: &Path, golden: &Path, to: &Path) {
    let bytes = std::fs::read(golden).unwrap();
    let ids = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ids = ids.tensor("input_ids").unwrap();
    let &[sequences, length] = ids.shape() else { panic!("a matrix") };
    let (model, device) = (Model::open(model).unwrap(), Cpu::new(2).unwrap());
    let all: Vec<u32> = ids.data().chunks(8).map(|b| u32::from_le_bytes(b[..4].try_into().unwrap())).collect();
    let mut logits = Vec::new();
    for sequence in all.chunks(length) {
        let mut session = forward::Session::new(&device, &model).unwrap();
        let hidden = session.advance(sequence).unwrap();
        let all = session.logits(&hidden).unwrap();
        logits.extend(device.download(all).unwrap().iter().flat_map(|v| v.to_le_bytes()));
    }
    let shape = vec![sequences, length, model.config.vocab];
    let views = [
        (
            "input_ids",
            safetensors::tensor::TensorView::new(safetensors::Dtype::I64, ids.shape().to_vec(), ids.data()).unwrap(),
        ),
        ("logits", safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &logits).unwrap()),
    ];
    safetensors::serialize_to_file(views, None, to).unwrap();
}

#[test]
fn llama_cpp_loads_every_type_and_computes_our_logits() {
    let golden = root().join("tests/golden/tiny-logits/tiny-logits.safetensors");
    for (experts, mw, more) in [
        ("keep", "keep", ""),
        ("mxfp4", "q8_0", ""),
        ("q8_0", "q8_0", ""),
        ("q4_0", "q4_0", ""),
        ("q4_1", "q5_1", ""),
        ("q5_0", "q4_1", ""),
        ("tq2_0", "tq2_0", "--pad-to 256"),
        ("tq1_0", "q8_0", "--pad-to 256"),
        ("keep", "keep", "--pad-to 160"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (out, logits) = (dir.path().join("out"), dir.path().join("logits.safetensors"));
        let mut quant = command("gptoss-quant --quiet --algo rtn --container gguf --experts");
        quant.args([experts, "--mw", mw]).args(support::words(more));
        run(quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
        write_logits(&out, &golden, &logits);
        let file = out.join("model.gguf");
        let said = judge("llama_logits.py", &[&file, &tiny().join("tokenizer.json"), &logits, Path::new("0.01")]);
        println!("{experts} {mw} {more}: {said}");
        assert!(said.contains("tokens equal"), "{said}");
    }
}

#[test]
fn transformers_loads_quantized_attention_beside_plain_experts() {
    let dir = tempfile::tempdir().unwrap();
    let bf16 = dir.path().join("bf16");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    let golden = root().join("tests/golden/tiny-logits/tiny-logits.safetensors");
    // Half again what was measured: 5.4e-3 and 5.4e-4.
    for (scheme, bound) in [("w4a16", "8e-3"), ("w8a8", "8e-4")] {
        let out = dir.path().join(scheme);
        let mut quant = command("gptoss-quant --quiet --algo rtn --experts keep --mw");
        let manifest = run(quant.arg(scheme).arg("--model-in").arg(&bf16).arg("--output-dir").arg(&out)).manifest();
        assert_eq!(
            (&manifest["runtimes"][1]["runtime"], &manifest["runtimes"][1]["status"]),
            (&"transformers".into(), &"loads".into())
        );
        let said = judge("transformers_loads.py", &[&out, &golden, Path::new(bound)]);
        println!("{scheme}: {said}");
    }
    // A quantized head loads, measured 2.4e-4; a quantized embedding does not, and the report says both.
    for (flag, loads) in [("--lm-head", true), ("--embed-tokens", false)] {
        let out = dir.path().join(flag);
        let mut quant = command("gptoss-quant --quiet --algo rtn --experts keep --mw w8a16");
        let manifest =
            run(quant.args([flag, "w8a16"]).arg("--model-in").arg(&bf16).arg("--output-dir").arg(&out)).manifest();
        assert_eq!(manifest["runtimes"][1]["status"] == "loads", loads, "{flag}");
        if loads {
            println!("{flag}: {}", judge("transformers_loads.py", &[&out, &golden, Path::new("4e-4")]));
        }
    }
    // Floats that stand for codes are a checkpoint like any other; measured 6.0e-4.
    let out = dir.path().join("dense");
    let mut quant = command("gptoss-quant --quiet --algo rtn --experts fp6 --mw fp8a16 --container dense");
    run(quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out)).manifest();
    println!("dense: {}", judge("transformers_loads.py", &[&out, &golden, Path::new("9e-4")]));
}

/// A wider model is the same function to transformers too: exactly in F32, and in BF16 but for the rounding of its norms.
#[test]
fn transformers_loads_padded_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let bf16 = dir.path().join("bf16");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    let golden = root().join("tests/golden/tiny-logits/tiny-logits.safetensors");
    for (name, source) in [("mxfp4", tiny()), ("bf16", bf16.clone())] {
        let out = dir.path().join(format!("wide-{name}"));
        let mut quant = command("gptoss-quant --quiet --algo rtn --experts keep --mw keep --pad-to 160");
        run(quant.arg("--model-in").arg(&source).arg("--output-dir").arg(&out)).manifest();
        // In BF16 the narrow one is at 2.2e-4, and this at 2.7e-4.
        for (dtype, bound) in [("float32", "1e-7"), ("auto", "4e-4")] {
            let said = judge("transformers_loads.py", &[&out, &golden, Path::new(bound), Path::new(dtype)]);
            println!("{name} {dtype}: {said}");
        }
    }
}

#[test]
fn transformers_renders_chats_to_the_same_text() {
    let peers = root().join("tests/peers");
    let chats: Vec<Vec<serde_json::Value>> =
        serde_json::from_slice(&std::fs::read(peers.join("chats.json")).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut folders = Vec::new();
    for (name, template) in files(&peers.join("chat")) {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
            std::fs::copy(tiny().join(file), folder.join(file)).unwrap();
        }
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
        let template = ChatTemplate::require(&folder, Clock::FIXED).unwrap();
        let ours = chats.iter().flat_map(|messages| {
            [false, true].map(|prompt| {
                let text = template.render(messages, prompt).ok();
                serde_json::json!({"messages": messages, "add_generation_prompt": prompt, "text": text})
            })
        });
        let ours: Vec<_> = ours.collect();
        std::fs::write(folder.join("chats.json"), serde_json::to_vec(&ours).unwrap()).unwrap();
        folders.push(folder);
    }
    assert!(folders.len() >= 5);
    let said = judge("chat_equal.py", &folders.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    println!("{said}");
    assert!(said.contains("chats equal") && !said.starts_with("0 "), "{said}");
}
