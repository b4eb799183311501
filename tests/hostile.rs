//! Broken and hostile checkpoints, and a full disk: each a clear error that names file and tensor, exit code 2, and a
//! destination that nobody touched.

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::{Shard, command, edit, files, run, tiny, tiny_copy};

const S0: &str = "model-00000-of-00001.safetensors";
const S1: &str = "model-00001-of-00001.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const BLOCKS: &str = "model.layers.0.mlp.experts.down_proj_blocks";
const SCALES: &str = "model.layers.0.mlp.experts.down_proj_scales";

type Change = Box<dyn Fn(&Path)>;

fn config(field: &'static str, value: Value) -> Change {
    Box::new(move |d| edit(&d.join("config.json"), |c| c[field] = value.clone()))
}

fn index(change: impl Fn(&mut Value) + 'static) -> Change {
    Box::new(move |d| edit(&d.join(INDEX), &change))
}

fn shard(change: impl Fn(&mut Shard) + 'static) -> Change {
    Box::new(move |d| {
        let mut s = Shard::read(&d.join(S0));
        change(&mut s);
        s.write(&d.join(S0));
    })
}

/// Changes one header entry.
fn entry(tensor: &'static str, field: &'static str, value: Value) -> Change {
    shard(move |s| s.header[tensor][field] = value.clone())
}

fn bytes(change: impl Fn(Vec<u8>) -> Vec<u8> + 'static) -> Change {
    Box::new(move |d| std::fs::write(d.join(S0), change(std::fs::read(d.join(S0)).unwrap())).unwrap())
}

fn remove(name: &'static str) -> Change {
    Box::new(move |d| std::fs::remove_file(d.join(name)).unwrap())
}

/// A file with this header and no data.
fn header(text: &'static [u8]) -> Change {
    bytes(move |_| [&(text.len() as u64).to_le_bytes()[..], text].concat())
}

/// Renames a tensor in shard and index.
fn rename(from: &'static str, to: &'static str) -> Change {
    Box::new(move |d| {
        let mut s = Shard::read(&d.join(S0));
        let entry = s.header.remove(from).unwrap();
        s.header.insert(to.into(), entry);
        s.write(&d.join(S0));
        edit(&d.join(INDEX), |i| {
            let at = i["weight_map"].as_object_mut().unwrap().remove(from).unwrap();
            i["weight_map"][to] = at;
        });
    })
}

/// Name, change, and what the message must contain.
fn cases() -> Vec<(&'static str, Change, Vec<&'static str>)> {
    let nan = |tensor: &'static str, at: usize, value: [u8; 2]| {
        shard(move |s| s.tensor(tensor)[at..at + 2].copy_from_slice(&value))
    };
    vec![
        ("no folder", Box::new(|d| std::fs::remove_dir_all(d).unwrap()), vec!["model", "is no folder"]),
        (
            "empty folder",
            Box::new(|d| files(d).keys().for_each(|f| std::fs::remove_file(d.join(f)).unwrap())),
            vec!["has no config.json"],
        ),
        ("no config", remove("config.json"), vec!["has no config.json"]),
        (
            "config is a folder",
            Box::new(|d| {
                std::fs::remove_file(d.join("config.json")).unwrap();
                std::fs::create_dir(d.join("config.json")).unwrap();
            }),
            vec!["config.json", "is a folder"],
        ),
        (
            "config is not JSON",
            Box::new(|d| std::fs::write(d.join("config.json"), "{\"model_type\": ").unwrap()),
            vec!["config.json", "is not JSON"],
        ),
        (
            "config is a list",
            Box::new(|d| std::fs::write(d.join("config.json"), "[]").unwrap()),
            vec!["config.json", "is not a JSON object"],
        ),
        (
            "config nests without end",
            Box::new(|d| std::fs::write(d.join("config.json"), "[".repeat(100_000)).unwrap()),
            vec!["config.json", "is not JSON"],
        ),
        ("another architecture", config("model_type", json!("llama")), vec!["config.json", "model_type is \"llama\""]),
        ("no width", config("hidden_size", json!(0)), vec!["config.json", "hidden_size is 0"]),
        (
            "a width beyond reason",
            config("intermediate_size", json!(1u64 << 60)),
            vec!["intermediate_size is 1152921504606846976"],
        ),
        ("negative experts", config("num_local_experts", json!(-1)), vec!["config.json", "-1"]),
        (
            "a million layers",
            config("num_hidden_layers", json!(1_000_000)),
            vec!["config.json", "1000000 layers of 16 experts"],
        ),
        ("heads in words", config("num_attention_heads", json!("eight")), vec!["config.json", "eight"]),
        (
            "more layers than weights",
            config("num_hidden_layers", json!(5)),
            vec!["model.layers.4.input_layernorm.weight", "missing"],
        ),
        ("another width", config("hidden_size", json!(192)), vec![S0, "has shape [2048, 256]", "implies [2048, 192]"]),
        ("no index", remove(INDEX), vec!["has shards such as model-0000", "neither model.safetensors.index.json"]),
        (
            "index is not JSON",
            Box::new(|d| std::fs::write(d.join(INDEX), "\u{0}").unwrap()),
            vec![INDEX, "is not JSON"],
        ),
        (
            "index without a map",
            index(|i| drop(i.as_object_mut().unwrap().remove("weight_map"))),
            vec![INDEX, "weight_map"],
        ),
        ("an empty map", index(|i| i["weight_map"] = json!({})), vec![INDEX, "is empty"]),
        (
            "a path that climbs",
            index(|i| i["weight_map"][Q] = "../secret.safetensors".into()),
            vec![INDEX, Q, "\"../secret.safetensors\""],
        ),
        (
            "an absolute path",
            index(|i| i["weight_map"][Q] = "/etc/x.safetensors".into()),
            vec![INDEX, Q, "/etc/x.safetensors"],
        ),
        ("a shard that is no name", index(|i| i["weight_map"][Q] = 7.into()), vec![INDEX, Q, "7"]),
        (
            "a shard of another kind",
            index(|i| i["weight_map"][Q] = "weights.bin".into()),
            vec![INDEX, Q, "weights.bin"],
        ),
        (
            "a shard that is not there",
            index(|i| i["weight_map"][Q] = "gone.safetensors".into()),
            vec!["gone.safetensors", "is missing"],
        ),
        ("the other shard", index(|i| i["weight_map"][Q] = S1.into()), vec![INDEX, Q, "is said to lie in", S1]),
        (
            "a tensor that is nowhere",
            index(|i| i["weight_map"]["ghost"] = S0.into()),
            vec![S0, "ghost", "is not in the file"],
        ),
        ("a missing shard", remove(S1), vec![S1, "is missing"]),
        ("a half-downloaded shard", bytes(|mut b| (b.truncate(b.len() / 2), b).1), vec![S0, "truncated?"]),
        (
            "a shard cut by one byte",
            bytes(|mut b| (b.pop(), b).1),
            vec![S0, "tensor model.layers.1.mlp.experts.gate_up_proj_scales", "truncated?"],
        ),
        (
            "a shard cut in its header",
            bytes(|mut b| (b.truncate(1000), b).1),
            vec![S0, "the header ends at byte", "truncated?"],
        ),
        ("five bytes", bytes(|_| vec![1; 5]), vec![S0, "5 bytes are too few"]),
        ("an empty shard", bytes(|_| Vec::new()), vec![S0, "0 bytes are too few"]),
        (
            "a shard that is a folder",
            Box::new(|d| {
                std::fs::remove_file(d.join(S0)).unwrap();
                std::fs::create_dir(d.join(S0)).unwrap();
            }),
            vec![S0],
        ),
        (
            "a link to itself",
            Box::new(|d| {
                std::fs::remove_file(d.join(S0)).unwrap();
                std::os::unix::fs::symlink(S0, d.join(S0)).unwrap();
            }),
            vec![S0, "cannot follow the link"],
        ),
        (
            "a header of 2^64 bytes",
            bytes(|mut b| (b[..8].fill(255), b).1),
            vec![S0, "the header claims 18446744073709551615 bytes"],
        ),
        (
            "a header longer than the file",
            bytes(|mut b| (b[..8].copy_from_slice(&90_000_000u64.to_le_bytes()), b).1),
            vec![S0, "the header ends at byte 90000008"],
        ),
        ("a header that is not UTF-8", header(b"{\"\xff\xfe\": 1}"), vec![S0, "not a JSON object"]),
        ("a header that is no JSON", header(b"{\"a\": "), vec![S0, "not a JSON object"]),
        ("a header that is a list", header(b"[1, 2]"), vec![S0, "not a JSON object"]),
        (
            "a header that nests without end",
            bytes(|_| [&100_000u64.to_le_bytes()[..], &[b'['; 100_000]].concat()),
            vec![S0, "not a JSON object"],
        ),
        ("an entry that is a number", header(b"{\"a\": 1}"), vec![S0, "tensor a", "unusable header entry"]),
        (
            "overlapping tensors",
            shard(|s| {
                let span = json!([0, 262_144]);
                s.header[Q]["data_offsets"] = span;
            }),
            vec![S0, "inside the tensor that ends at"],
        ),
        (
            "a gap between tensors",
            shard(|s| {
                s.header.remove("model.layers.0.self_attn.sinks");
            }),
            vec![S0, "after a gap"],
        ),
        ("offsets that run backwards", entry(Q, "data_offsets", json!([10, 2])), vec![S0, Q, "run backwards: 10 to 2"]),
        (
            "offsets beyond the file",
            entry(Q, "data_offsets", json!([1u64 << 62, (1u64 << 62) + 262_144])),
            vec![S0, Q, "truncated?"],
        ),
        (
            "offsets that overflow",
            entry(Q, "data_offsets", json!([18446744073709551615u64, 1])),
            vec![S0, Q, "run backwards"],
        ),
        ("a negative offset", entry(Q, "data_offsets", json!([-2, 0])), vec![S0, Q, "unusable header entry"]),
        (
            "a span that is not the shape's",
            entry(Q, "shape", json!([512, 255])),
            vec![S0, Q, "span 262144 bytes, shape [512, 255] of BF16 needs 261120"],
        ),
        ("a shape that overflows", entry(Q, "shape", json!([1u64 << 40, 1u64 << 40])), vec![S0, Q, "overflows"]),
        ("a negative extent", entry(Q, "shape", json!([-512, -256])), vec![S0, Q, "unusable header entry"]),
        ("a type that does not exist", entry(Q, "dtype", json!("BF17")), vec![S0, Q, "BF17"]),
        (
            "bytes behind the last tensor",
            bytes(|mut b| (b.extend_from_slice(&[0; 64]), b).1),
            vec![S0, "the tensors end at byte"],
        ),
        (
            "a tensor in both shards",
            Box::new(|d| {
                std::fs::copy(d.join(S0), d.join(S1)).unwrap();
            }),
            vec![S1, "is not in the file"],
        ),
        ("integers for floats", entry(Q, "dtype", json!("I16")), vec![S0, Q, "I16"]),
        ("signed blocks", entry(BLOCKS, "dtype", json!("I8")), vec![S0, BLOCKS, "has type I8, wanted U8"]),
        (
            "a router on its side",
            entry("model.layers.0.mlp.router.weight", "shape", json!([256, 16])),
            vec![S0, "router.weight", "has shape [256, 16]"],
        ),
        ("blocks without scales", rename(SCALES, "elsewhere"), vec![S0, BLOCKS, "has no scales"]),
        ("scales without blocks", rename(BLOCKS, "elsewhere"), vec!["model.layers.0.mlp.experts", "missing"]),
        ("a lost bias", rename("model.layers.0.self_attn.k_proj.bias", "elsewhere"), vec!["k_proj.bias", "missing"]),
        ("a scale that is NaN", shard(|s| s.tensor(SCALES)[1024 * 2 + 4 * 3 + 1] = 255), vec![S0, "NaN"]),
        ("a weight that is NaN", nan(Q, 2 * (256 * 3 + 5), [0xc0, 0x7f]), vec![S0, "NaN"]),
        (
            "an embedding that is infinite",
            nan("model.embed_tokens.weight", 0, [0x80, 0xff]),
            vec![S0, "model.embed_tokens.weight", "first at [0, 0]"],
        ),
        (
            "a bias that is NaN",
            nan("model.layers.0.mlp.experts.gate_up_proj_bias", 2, [0xff, 0xff]),
            vec![S0, "gate_up_proj_bias", "first at [0, 1]"],
        ),
    ]
}

#[test]
fn each_is_a_clear_error_and_nothing_is_written() {
    let cases = cases();
    assert!(cases.len() >= 40);
    for (name, change, want) in &cases {
        for tool in ["gptoss-dequant --quiet --src", "gptoss-quant --quiet --algo rtn --model-in"] {
            let dir = tempfile::tempdir().unwrap();
            let (model, place) = (tiny_copy(dir.path()), dir.path().join("place"));
            change(&model);
            std::fs::create_dir(&place).unwrap();
            let to = if tool.contains("dequant") { "--dst" } else { "--output-dir" };
            let ran = run(command(tool).arg(&model).arg(to).arg(place.join("out")));
            assert_eq!(ran.code, 2, "{name}, {tool}: {}", ran.err);
            assert!(
                ran.err.starts_with(tool.split(' ').next().unwrap()) && ran.err.lines().count() == 1,
                "{name}: {}",
                ran.err
            );
            assert_eq!(ran.out, "", "{name}");
            for part in want {
                assert!(ran.err.contains(part), "{name}, {tool}: wanted {part:?} in: {}", ran.err);
            }
            let left: Vec<_> = std::fs::read_dir(&place).unwrap().collect();
            assert!(left.is_empty(), "{name}: {left:?}");
        }
        // The judges meet the same folders: whatever they say of them, they say it.
        let dir = tempfile::tempdir().unwrap();
        let model = tiny_copy(dir.path());
        change(&model);
        let check = run(command("gptoss-verify check --quiet").arg(&model));
        assert!([1, 2].contains(&check.code) && !check.err.contains("panicked"), "{name}: {check:?}");
        let against = run(command("gptoss-verify against --quiet").arg(tiny()).arg(&model));
        assert!([0, 1, 2].contains(&against.code) && !against.err.contains("panicked"), "{name}: {against:?}");
        let dry =
            run(command("gptoss-quant --dry-run --quiet --algo rtn --model-in").arg(&model).current_dir(dir.path()));
        assert!([0, 2].contains(&dry.code) && !dry.err.contains("panicked"), "{name}: {dry:?}");
        speaks_or_says_why_not(name, &model);
    }
    println!("{} hostile checkpoints, two tools each", cases.len());
}

/// What runs a model meets the same folders: it works, or one line says why not.
fn speaks_or_says_why_not(name: &str, model: &Path) {
    let mut quality = command("gptoss-verify quality --quiet --max-seq-length 16 --nsamples 1");
    let quality = run(quality.arg(model).arg("--text").arg(tiny().join("test.jsonl")));
    let spoken = run(command("gptoss-run --quiet --prompt fn --max-tokens 2 --temperature 0 --model").arg(model));
    for ran in [quality, spoken] {
        assert!(ran.code == 0 || (ran.code == 2 && ran.err.lines().count() == 1), "{name}: {ran:?}");
        assert!(!ran.err.contains("panicked"), "{name}: {ran:?}");
    }
}

/// A compressed-tensors checkpoint, changed; `gptoss-dequant` reads it.
#[test]
fn hostile_quantized_checkpoints_are_clear_errors_too() {
    const SHARD: &str = "model-00001-of-00001.safetensors";
    const MODULE: &str = "model.layers.1.self_attn.q_proj";
    let weights = |change: fn(&mut Shard)| -> Change {
        Box::new(move |d| {
            let mut s = Shard::read(&d.join(SHARD));
            change(&mut s);
            s.write(&d.join(SHARD));
        })
    };
    let scheme = |field: &'static str, value: Value| -> Change {
        Box::new(move |d| {
            edit(&d.join("config.json"), |c| {
                for group in c["quantization_config"]["config_groups"].as_object_mut().unwrap().values_mut() {
                    group["weights"][field] = value.clone();
                }
            });
        })
    };
    let cases: Vec<(&str, Change, &str)> = vec![
        (
            "a NaN scale",
            weights(|s| s.tensor(&format!("{MODULE}.weight_scale"))[..2].copy_from_slice(&[0xc0, 0x7f])),
            "weight_scale: holds NaN",
        ),
        (
            "an infinite scale",
            weights(|s| {
                s.tensor("model.layers.0.mlp.experts.3.up_proj.weight_scale")[..2].copy_from_slice(&[0x80, 0x7f]);
            }),
            "experts.3.up_proj.weight_scale: holds NaN or infinity",
        ),
        (
            "a shape that lies",
            weights(|s| s.tensor(&format!("{MODULE}.weight_shape"))[0] = 9),
            "weight_shape: holds [521, 256]",
        ),
        (
            "no scale",
            Box::new(|d| edit(&d.join("config.json"), |c| c["quantization_config"]["ignore"] = vec!["re:.*"].into())),
            "has no group for its module",
        ),
        ("ten bits", scheme("num_bits", json!(10)), "num_bits is 10"),
        ("no bits", scheme("num_bits", json!(0)), "num_bits is 0"),
        ("groups of nothing", scheme("group_size", json!(0)), "group_size Some(0)"),
        ("groups of 7", scheme("group_size", json!(7)), "group_size 7 does not divide"),
        ("other groups", scheme("group_size", json!(32)), "has shape"),
        ("another strategy", scheme("strategy", json!("mystery")), "mystery"),
        ("floats", scheme("type", json!("float")), "q_proj.weight is missing"),
        ("asymmetric without zero points", scheme("symmetric", json!(false)), "weight_zero_point is missing"),
        (
            "no groups",
            Box::new(|d| edit(&d.join("config.json"), |c| c["quantization_config"]["config_groups"] = json!(3))),
            "config_groups",
        ),
        (
            "a target that is no expression",
            Box::new(|d| {
                edit(&d.join("config.json"), |c| {
                    c["quantization_config"]["config_groups"]["group_0"]["targets"] = vec!["re:("].into()
                });
            }),
            "is no regular expression",
        ),
    ];
    let home = tempfile::tempdir().unwrap();
    let sound = home.path().join("q");
    run(command("gptoss-quant --quiet --algo rtn --container compressed-tensors --model-in")
        .arg(tiny())
        .arg("--output-dir")
        .arg(&sound))
    .manifest();
    for (name, change, want) in &cases {
        let dir = tempfile::tempdir().unwrap();
        let model = support::copy_folder(&sound, &dir.path().join("model"));
        change(&model);
        let ran = run(command("gptoss-dequant --quiet --src").arg(&model).arg("--dst").arg(dir.path().join("out")));
        assert_eq!(ran.code, 2, "{name}: {}", ran.err);
        assert!(ran.err.contains(want) && ran.err.lines().count() == 1, "{name}: wanted {want:?} in: {}", ran.err);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{name}: something was left");
        speaks_or_says_why_not(name, &model);
        let check = run(command("gptoss-verify check --quiet").arg(&model));
        assert_eq!(check.code, 1, "{name}: {}", check.err);
    }
}

#[test]
fn sizes_beyond_reason_are_refused_by_a_dry_run() {
    let million = 1 << 20;
    for (changes, want) in [
        (vec![("num_attention_heads", million), ("head_dim", million), ("hidden_size", million)], "times head_dim is"),
        (vec![("num_hidden_layers", 4096), ("num_local_experts", 4096)], "layers of 4096 experts"),
        (
            vec![("hidden_size", million), ("intermediate_size", million), ("num_local_experts", 1024)],
            "parameters, wanted at most",
        ),
        (vec![("vocab_size", million + 1)], "vocab_size is 1048577"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = support::synthetic::config(&[]);
        let path = dir.path().join("config.json");
        std::fs::write(&path, Value::Object(config).to_string()).unwrap();
        edit(&path, |c| changes.iter().for_each(|&(k, v)| c[k] = v.into()));
        let ran = run(command("gptoss-quant --dry-run --quiet --algo rtn --model-in").arg(&path));
        assert!(ran.code == 2 && ran.err.contains(want), "{changes:?}: {ran:?}");
    }
}

#[test]
fn the_exact_place_of_a_nan_is_named() {
    let find = |change: Change, tool: &str, to: &str| {
        let dir = tempfile::tempdir().unwrap();
        let model = tiny_copy(dir.path());
        change(&model);
        run(command(tool).arg(&model).arg(to).arg(dir.path().join("out"))).err
    };
    let scale = || shard(|s| s.tensor(SCALES)[1024 * 2 + 4 * 3 + 1] = 255);
    let err = find(scale(), "gptoss-dequant --quiet --src", "--dst");
    assert!(err.contains("expert 2, row 3, block 1"), "{err}");
    let err = find(scale(), "gptoss-quant --quiet --algo rtn --experts keep --model-in", "--output-dir");
    assert!(err.contains("expert 2, row 3, block 1"), "{err}");
    let err = find(scale(), "gptoss-quant --quiet --algo rtn --model-in", "--output-dir");
    assert!(err.contains("experts.2.down_proj holds NaN or infinity at row 3, column 32"), "{err}");
}

/// Runs a tool in a file system of `kib` KiB, in a mount name space of its own.
fn on_a_small_disk(kib: u64, tool: &str, flags: &str, script_after: &str) -> support::Ran {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let script = format!(
        "mount -t tmpfs -o size={kib}k none '{disk}' && cd '{disk}' && '{exe}' --quiet {flags} >/dev/null; code=$?; {script_after}; exit $code",
        disk = disk.display(),
        exe = support::exe(tool),
    );
    // As root a mount name space is enough; otherwise one inside a user name space.
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let flags: &[&str] = if root { &["--mount"] } else { &["--mount", "--map-root-user"] };
    Command::new("unshare").args(flags).args(["sh", "-c", &script]).output().expect("util-linux is there").into()
}

#[test]
fn a_full_disk_is_an_error_before_or_after_the_weights_and_leaves_no_output() {
    let dequant = &format!("--src {} --dst out", support::word(&tiny()));
    // Too small for the weights: said before anything is written.
    let ran = on_a_small_disk(4096, "gptoss-dequant", dequant, "ls -A 1>&2");
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(
        ran.err.contains("not enough room: 17420376 bytes are needed") && ran.err.lines().count() == 1,
        "{}",
        ran.err
    );
    // Room for the weights, none for the tokenizer behind them: the work is kept, the output does not appear.
    let ran = on_a_small_disk(17_420_376 / 1024 + 60, "gptoss-dequant", dequant, "ls -A 1>&2");
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(ran.err.contains("No space left on device") && ran.err.contains("out.partial"), "{}", ran.err);
    assert_eq!(ran.err.lines().nth(1), Some("out.partial"), "{}", ran.err);
}

#[test]
fn what_a_calibration_cannot_use_is_refused_before_it_begins() {
    let dir = tempfile::tempdir().unwrap();
    let (file, text) = (dir.path().join("file"), tiny().join("calib.jsonl"));
    std::fs::write(&file, "x").unwrap();
    let (file, text) = (support::word(&file), support::word(&text));
    for (flags, want) in [
        (format!("--calib-jsonl {text} --output-dir {file}"), "exists and is no folder"),
        (format!("--calib-jsonl {text} --output-dir {file}/below"), "cannot"),
        (format!("--calib-jsonl {text} --offload-folder {file}"), "is no folder; create it"),
        (format!("--calib-jsonl {text} --max-memory 1kB"), "--max-memory 1000 is too small"),
        (format!("--calib-jsonl {file}.jsonl"), "cannot open"),
        (format!("--calib-jsonl {}", support::word(dir.path())), "is no regular file"),
        ("--dataset c5".into(), "no dataset has the name"),
    ] {
        for dry in ["", "--dry-run"] {
            let out = if flags.contains("--output-dir") {
                String::new()
            } else {
                format!("--output-dir {}", support::word(&dir.path().join("out")))
            };
            let mut quant = command(&format!("gptoss-quant --quiet {out} {dry}"));
            let flags = support::words(&flags);
            let ran = run(quant.args(["--model-in"]).arg(tiny()).args(flags).env("HF_HUB_OFFLINE", "1"));
            assert!(ran.code == 2 && ran.err.contains(want), "{dry} {want}: {}", ran.err);
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was left");
}

#[test]
fn a_small_offload_folder_is_an_error_before_the_calibration() {
    let out = tempfile::tempdir().unwrap();
    let (model, out) = (tiny(), out.path().join("out"));
    let flags = format!(
        "--model-in '{model}' --output-dir '{}' --calib-jsonl '{model}/calib.jsonl' --nsamples 4 --max-seq-length 256 --offload-folder .",
        out.display(),
        model = model.display()
    );
    // Two copies of 1024 hidden states of 256 numbers.
    let ran = on_a_small_disk(2048 - 64, "gptoss-quant", &flags, "ls -A 1>&2");
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(ran.err.contains(".: not enough room: 2097152 bytes are needed"), "{}", ran.err);
    let ran = on_a_small_disk(2048 + 256, "gptoss-quant", &flags, "ls -A 1>&2");
    assert_eq!((ran.code, &ran.err[..]), (0, ""), "{}", ran.err);
}
