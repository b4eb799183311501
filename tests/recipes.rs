//! Recipes as users write them: README's table, the files of other tools, what is refused.

mod support;

use std::path::Path;

use serde_json::Value;
use sha2::Digest;
use support::{command, root, run, run_with, tiny};

const TEXT: &str = "--dataset open_platypus --num-calibration-samples 256 --max-seq-length 2048";
const GROUPS: &str = "--group-size 128 --block-size 128 --dampening-frac 0.01 --offload-hessians";

/// README's recipes by name: nix/recipes.txt with a text, and with README's group size, which is not gpt-oss's.
fn recipes() -> Vec<(String, String)> {
    let all = support::recipes().into_iter();
    all.map(|(name, flags)| (name, flags.replace("--group-size auto", "--group-size 128") + " " + TEXT)).collect()
}

/// Sorted words, for the order of flags says nothing.
fn words(text: &str) -> Vec<&str> {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    words.sort();
    words
}

#[test]
fn the_recipes_are_readme_s() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    // "w4a8-all, fallback" is a row too.
    let row = |name: &str| {
        let named = |l: &&str| [" |", ","].iter().any(|end| l.starts_with(&format!("| {name}{end}")));
        readme.lines().find(named).unwrap_or_else(|| panic!("README has no row for {name}"))
    };
    // What stands between backticks, and what the letters behind stand for.
    let flags = |row: &str| {
        let mut parts: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        let letters = words(row);
        parts.extend([("C", TEXT), ("G", GROUPS)].into_iter().filter(|(l, _)| letters.contains(l)).map(|(_, f)| f));
        parts.join(" ")
    };
    let recipes = recipes();
    let of = |name: &str| &recipes.iter().find(|r| r.0 == name).unwrap().1;
    for name in ["w4a16-awq-all", "w8a8-gptq-all", "w4a8exp-w4a16mw", "mixed-awqexp-gptq-w8a8mw"] {
        assert_eq!(words(of(name)), words(&flags(row(name))), "{name}");
    }
    // The others are said by what they differ in.
    let base = of("w4a8exp-w4a16mw");
    assert_eq!(row("w4a8-all").split('`').nth(1), Some("--mw-scheme w4a8"));
    assert_eq!(words(of("w4a8-all")), words(&base.replace("--mw-scheme w4a16", "--mw-scheme w4a8")));
    let more = row("sparse-w4a8exp-w4a16mw").split('`').nth(1).unwrap();
    assert_eq!(words(of("sparse-w4a8exp-w4a16mw")), words(&format!("{more} {base}")));
    assert_eq!(recipes.len(), 6);
}

/// A dry run's manifest; nothing is installed on this machine.
fn plan(flags: &str, model: &Path) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let mut quant = command(&format!("gptoss-quant --dry-run --quiet --format json {flags}"));
    run(quant.arg("--model-in").arg(model).env("GPTOSS_KERNELS", dir.path()).current_dir(dir.path())).manifest()
}

fn recipe(flags: &str, model: &Path) -> Value {
    plan(flags, model)["job"]["recipe"].clone()
}

fn config(model: &str) -> std::path::PathBuf {
    root().join(format!("tests/fixtures/configs/gpt-oss-{model}.json"))
}

/// Every change of a byte of their outputs is a line of the committed table, and one of the changelog.
#[test]
fn readme_s_recipes_run_on_the_tiny_model_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut table = String::new();
    for (name, flags) in recipes() {
        // Little of another text; nothing else differs from what README says.
        let text =
            format!("--calib-jsonl {} --nsamples 2 --max-seq-length 32", support::word(&tiny().join("calib.jsonl")));
        let (flags, out) = (flags.replace(TEXT, &text), dir.path().join(&name));
        let mut quant = command(&format!("gptoss-quant --quiet {flags}"));
        quant.arg("--model-in").arg(tiny()).arg("--output-dir").arg(&out);
        let made = run(quant.env("GPTOSS_KERNELS", dir.path())).manifest();
        assert_eq!(made["calibration"]["tokens"], 64, "{name}");
        let checked = run(command("gptoss-verify check").arg(&out)).manifest();
        assert_eq!(checked["verdict"]["passed"], true, "{name}: {checked}");
        let files = made["output"]["files"].as_array().unwrap().iter();
        let list: String =
            files.map(|f| format!("{}  {}\n", f["sha256"].as_str().unwrap(), f["name"].as_str().unwrap())).collect();
        table += &format!("{}  {name}\n", hex(&sha2::Sha256::digest(list)));
    }
    insta::assert_snapshot!("output-hashes", table);

    // The job of a manifest once more: from the folder, with other numbers of threads, and nothing stays behind.
    let (out, work) = (dir.path().join("mixed-awqexp-gptq-w8a8mw"), dir.path().join("work"));
    std::fs::create_dir(&work).unwrap();
    let reproduce = |flags: &str| {
        let mut c = command(&format!("gptoss-verify reproduce --quiet --threads 1 {flags}"));
        run(c.arg("--work-dir").arg(&work).arg(&out))
    };
    let (source, text) = (
        format!("--source {}", support::word(&tiny())),
        format!("--text {}", support::word(&tiny().join("calib.jsonl"))),
    );
    let again = reproduce(&format!("{source} {text}"));
    assert_eq!((again.code, &again.manifest()["verdict"]["passed"]), (0, &true.into()), "{}", again.err);
    assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0);
    let other = tiny().join("test.jsonl");
    for (flags, words) in [
        (text.clone(), "give --source DIR"),
        (source.clone(), "the text was calib.jsonl, a file: give --text FILE"),
        (format!("{source} --text {}", support::word(&other)), "not the one that the job was calibrated on"),
        (format!("--source {} {text}", support::word(&out)), "not what the job read"),
    ] {
        let ran = reproduce(&flags);
        assert!(ran.code == 2 && ran.err.contains(words), "{flags}: {}", ran.err);
    }
    // A manifest that lies.
    support::edit(&out.join("gptoss-manifest.json"), |m| m["output"]["files"][0]["sha256"] = "00".into());
    let lied = reproduce(&format!("{source} {text}"));
    assert_eq!(lied.code, 1, "{}", lied.err);
    let findings = serde_json::from_str::<Value>(&lied.out).unwrap()["verdict"]["findings"].clone();
    assert_eq!((findings.as_array().unwrap().len(), &findings[0]["kind"]), (1, &"hash".into()), "{findings}");
    // Through a pipe, which says where the source is; and a plan is no job.
    let bf16 = run(command("gptoss-dequant --quiet --src").arg(tiny()).arg("--dst").arg(dir.path().join("bf16")));
    let ran = run_with(command("gptoss-verify reproduce --quiet --work-dir").arg(&work), &bf16.out);
    assert_eq!((ran.code, &ran.manifest()["verdict"]["passed"]), (0, &true.into()), "{}", ran.err);
    let planned = run(command("gptoss-quant --dry-run --quiet --algo rtn --model-in").arg(tiny()));
    let ran = run_with(&mut command("gptoss-verify reproduce"), &planned.out);
    assert!(ran.code == 2 && ran.err.contains("is a plan"), "{}", ran.err);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn readme_s_recipes_plan_on_every_model() {
    for (name, flags) in recipes() {
        let tiny_plan = plan(&flags, &tiny());
        assert!(tiny_plan["plan"]["weights_read"] == true, "{name}");
        let auto = flags.replace("--group-size 128", "--group-size auto");
        for model in ["20b", "120b"] {
            let planned = plan(&auto, &config(model));
            let recipe = &planned["job"]["recipe"];
            let scheme = |class: &str| recipe[class]["scheme"].as_str().unwrap().to_owned();
            let expected = match &name[..] {
                "w8a8-gptq-all" => ("w8a8", "w8a8"),
                "mixed-awqexp-gptq-w8a8mw" => ("w4a16", "w8a8"),
                _ => ("w4a16", "w4a16"),
            };
            assert_eq!((scheme("experts").as_str(), scheme("mw").as_str()), expected, "{name}");
            let fell_back = flags.contains("w4a8");
            let note = planned["notes"].as_array().is_some_and(|n| n[0].as_str().unwrap().contains("in place of w4a8"));
            assert_eq!(note, fell_back, "{name}: {}", planned["notes"]);
            assert_eq!(recipe["sparsity"]["mask"], if name.starts_with("sparse") { "2:4".into() } else { Value::Null });
        }
    }
}

#[test]
fn present_kernels_keep_w4a8_on_every_machine() {
    for (name, flags) in recipes().into_iter().filter(|r| r.1.contains("w4a8")) {
        let r = recipe(&format!("{flags} --kernels present"), &tiny());
        assert_eq!((&r["experts"]["scheme"], &r["kernels"]), (&"w4a8".into(), &"present".into()), "{name}");
        assert_eq!(r["notes"], Value::Null, "{name}");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sm_90")).unwrap();
    let quant = || {
        let mut c = command("gptoss-quant --dry-run --quiet --experts w4a8 --model-in");
        c.arg(tiny()).env("GPTOSS_KERNELS", dir.path());
        run(&mut c)
    };
    let err = quant().err;
    assert!(err.contains("w4a8 for the experts needs kernels, and none are installed here"), "{err}");
    // What only looks like a build is none.
    std::fs::write(dir.path().join("sm_90/manifest.json"), "{}").unwrap();
    assert!(quant().err.contains("none are installed here"));
}

#[test]
fn kernels_are_installed_where_that_is_asked_for_and_an_error_has_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = dir.path().join("kernels");
    let go = |flags: &str, cuda: Option<&Path>| {
        let mut c = command(&format!("gptoss-quant --quiet --algo rtn --experts w4a8 --try-install-qqq {flags}"));
        c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(dir.path().join("out"));
        c.env("GPTOSS_KERNELS", &kernels).env("PATH", "/usr/bin:/bin").env("TORCH_CUDA_ARCH_LIST", "8.6");
        match cuda {
            Some(cuda) => c.env("CUDA_HOME", cuda),
            None => c.env_remove("CUDA_HOME").env_remove("VIRTUAL_ENV"),
        };
        run(&mut c)
    };
    let unasked = go("", None);
    assert!(unasked.code == 2 && unasked.err.contains("give --yes"), "{}", unasked.err);
    let failed = go("--yes", None);
    assert!(failed.code == 2 && failed.out.is_empty(), "{}", failed.out);
    for part in ["no CUDA compiler: looked in", "gptoss-kernel-install failed", "--allow-fallback"] {
        assert!(failed.err.contains(part), "{}", failed.err);
    }
    assert!(!kernels.exists());

    let peers = std::env::var_os("GPTOSS_PEERS").map_or_else(|| root().join("venv"), Into::into);
    let done = go("--yes", Some(&peers.join("cuda/nvidia/cu13")));
    assert_eq!(done.manifest()["job"]["recipe"]["kernels"], "present", "{}", done.err);
    assert_eq!(std::fs::read_dir(&kernels).unwrap().count(), 1);
    // Found where the installer put them, until one is damaged.
    let plan = || {
        let mut c = command("gptoss-quant --dry-run --quiet --experts w4a8 --model-in");
        run(c.arg(tiny()).env("GPTOSS_KERNELS", &kernels))
    };
    assert_eq!(plan().manifest()["job"]["recipe"]["kernels"], "present");
    let build = std::fs::read_dir(&kernels).unwrap().next().unwrap().unwrap().path();
    std::fs::write(build.join("w4a8.sm_86.cubin"), "").unwrap();
    assert!(plan().err.contains("none are installed here"));
}

#[test]
fn kernels_that_cannot_be_installed_are_an_error_with_the_reason() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    // A program that has no installer beside it.
    let alone = dir.path().join("gptoss-quant");
    std::fs::copy(support::exe("gptoss-quant"), &alone).unwrap();
    let go = |flags: &[&str], path: &Path| {
        let mut c = std::process::Command::new(&alone);
        c.args(["--quiet", "--algo", "rtn", "--experts", "w4a8", "--try-install-qqq"]).args(flags);
        c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(dir.path().join("out"));
        run(c.env("GPTOSS_KERNELS", dir.path().join("kernels")).env("PATH", path).stdin(std::process::Stdio::null()))
    };
    let nothing = go(&["--yes"], dir.path());
    assert_eq!(nothing.code, 2);
    for part in ["there is no gptoss-kernel-install beside this program or in PATH", "--allow-fallback"] {
        assert!(nothing.err.contains(part), "{}", nothing.err);
    }
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let installer = bin.join("gptoss-kernel-install");
    std::fs::write(&installer, "#!/bin/sh\necho \"asked with $*\"\nexit 3\n").unwrap();
    std::fs::set_permissions(&installer, std::fs::Permissions::from_mode(0o755)).unwrap();
    let unasked = go(&[], &bin);
    assert!(unasked.code == 2 && unasked.err.contains("give --yes"), "{}", unasked.err);
    let failed = go(&["--yes"], &bin);
    assert!(failed.code == 2 && failed.out.is_empty(), "{}", failed.out);
    for part in ["asked with --yes", "gptoss-kernel-install failed"] {
        assert!(failed.err.contains(part), "{}", failed.err);
    }
}

#[test]
fn without_a_model_the_plan_is_for_the_120b() {
    let flags =
        "--experts-algo awq --experts-type int4 --experts-scheme w4a16 --mw-algo gptq --mw-type int8 --mw-scheme w8a8";
    let mut quant = command(&format!("gptoss-quant --dry-run --quiet {flags}"));
    let planned = run(&mut quant).manifest();
    let named = plan(flags, &config("120b"));
    assert_eq!((&planned["plan"], &planned["tensors"]), (&named["plan"], &named["tensors"]));
    assert!(planned["notes"].to_string().contains("no model was given"));
    // A manifest on standard input still names one.
    let err = run_with(&mut command("gptoss-quant --dry-run --quiet"), "{}").err;
    assert!(err.contains("is not a manifest"), "{err}");
}

#[test]
fn an_algorithm_that_needs_text_says_what_would_do_without() {
    let dir = tempfile::tempdir().unwrap();
    let go = |flags: &str| {
        let mut c = command(&format!("gptoss-quant --quiet {flags}"));
        c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(dir.path().join("out"));
        run(c.env("HF_HOME", dir.path()).env("HF_HUB_OFFLINE", "1"))
    };
    let none = go("--experts w4a16");
    assert_eq!(none.code, 2);
    for part in ["open_platypus", "--calib-jsonl FILE", "--algo rtn", "garage-bAInd/Open-Platypus"] {
        assert!(none.err.contains(part), "{part}: {}", none.err);
    }
    let named = go("--dataset gsm8k");
    assert!(named.code == 2 && !named.err.contains("--algo rtn"), "{}", named.err);
    assert!(go("--nsamples 0").err.contains("wanted a number from 1"));
    assert!(!dir.path().join("out").exists() && !dir.path().join("out.partial").exists());
    let unused = command("gptoss-quant --algo rtn --calib-jsonl /nowhere --format json")
        .arg("--model-in")
        .arg(tiny())
        .arg("--output-dir")
        .arg(dir.path().join("out"))
        .output()
        .unwrap();
    assert!(unused.status.success());
    assert!(String::from_utf8_lossy(&unused.stderr).contains("needs no text, so the one that was given is not used"));
}

/// A recipe with `ignore` as the modules that it leaves alone are named differently in each form.
fn without_ignore(mut recipe: Value) -> Value {
    recipe.as_object_mut().unwrap().remove("ignore");
    recipe
}

fn written(name: &str, text: &str, flags: &str) -> (Value, Value) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name);
    std::fs::write(&file, text).unwrap();
    let flag = if name.ends_with("json") { "--config" } else { "--recipe" };
    let planned = plan(&format!("{flag} {} {flags}", support::word(&file)), &tiny());
    (planned["job"]["recipe"].clone(), planned["tensors"].clone())
}

#[test]
fn the_three_forms_of_a_recipe_are_one_recipe() {
    let cases = [
        (
            "--algo rtn --experts w4a16 --mw w8a8 --experts-group-size 64 --mw-group-size channel",
            r#"{"default": {"wq": "int8", "aq": "int8", "group_size": -1, "extra": {"method": "rtn"}},
                "overrides": [{"pattern": "*.mlp.experts.*", "wq": "int4", "aq": "bf16", "group_size": 64},
                              {"pattern": "*.mlp.router", "skip": true}, {"pattern": "lm_head", "skip": true}]}"#,
            "quant_stage:
  quant_modifiers:
    QuantizationModifier:
      ignore: [mlp.router, lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 8, strategy: channel}
          input_activations: {num_bits: 8, dynamic: true, strategy: token}
        group_1:
          targets: ['re:.*mlp.experts.*']
          weights: {num_bits: 4, group_size: 64}
",
        ),
        (
            "--experts w4a16 --mw w4a16 --group-size 128 --dampening-frac 0.05 --actorder off --observer mse",
            r#"{"default": {"wq": "int4", "group_size": 128,
                            "extra": {"method": "gptq", "percdamp": 0.05, "actorder": false, "observer": "mse"}},
                "overrides": [{"pattern": "*router", "skip": true}, {"pattern": "lm_head", "wq": "bf16"}]}"#,
            "GPTQModifier: {scheme: W4A16, ignore: [mlp.router, lm_head], dampening_frac: 0.05, actorder: off, weight_observer: mse}",
        ),
        (
            "--experts mxfp4 --mw fp8 --algo rtn --mw-group-size channel --experts-group-size 32",
            r#"{"default": {"wq": "fp8", "aq": "fp8", "group_size": -1},
                "overrides": [{"pattern": "model.layers.*.mlp.experts", "wq": "mxfp4", "aq": "bf16", "group_size": 32},
                              {"pattern": "*router", "skip": true}, {"pattern": "lm_head", "wq": "bf16", "aq": "bf16"}]}"#,
            "QuantizationModifier: {scheme: {FP8_DYNAMIC: ['re:.*self_attn.*'], MXFP4A16: ['re:.*mlp.experts.*']}}",
        ),
    ];
    for (i, (flags, json, yaml)) in cases.into_iter().enumerate() {
        let flat = format!("--algo {}", if i == 1 { "gptq" } else { "rtn" });
        let planned = plan(flags, &tiny());
        let want = (without_ignore(planned["job"]["recipe"].clone()), planned["tensors"].clone());
        for (name, text, beside) in [("c.json", json, flat.as_str()), ("r.yaml", yaml, "")] {
            let (recipe, tensors) = written(name, text, beside);
            assert_eq!(without_ignore(recipe), want.0, "{flags}: {name}");
            assert_eq!(tensors, want.1, "{flags}: {name}");
        }
    }
}

#[test]
fn group_sizes_of_a_file_give_way_to_the_flag() {
    let yaml = "GPTQModifier: {scheme: {W4A16: ['re:.*experts.*'], W8A8: ['re:.*self_attn.*']}}";
    let (r, _) = written("r.yaml", yaml, "--group-size auto --extra-ignore layers.0 --no-sequential-update");
    assert_eq!((&r["experts"]["group_size"], &r["mw"]["group_size"]), (&"auto".into(), &"channel".into()));
    assert_eq!((&r["ignore"][3], &r["calibration"]["sequential_update"]), (&"layers.0".into(), &false.into()));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.yaml");
    std::fs::write(&file, yaml).unwrap();
    let mut quant = command("gptoss-quant --dry-run --quiet --container compressed-tensors --recipe");
    let ran = run(quant.arg(&file).arg("--model-in").arg(config("20b")));
    assert!(ran.code == 2 && ran.err.contains("group_size 128 does not divide in_features 2880"), "{}", ran.err);
}

#[test]
fn command_lines_of_other_tools_have_their_meaning() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("R.yaml"), "GPTQModifier: {scheme: W4A16, targets: Linear, ignore: [lm_head]}")
        .unwrap();
    std::fs::write(dir.path().join("F.json"), r#"{"default": {"wq": "int4", "group_size": 32}}"#).unwrap();
    let go = |line: &str| {
        let mut c = command(&format!("gptoss-quant --dry-run --quiet {line}"));
        run(c.arg("--model").arg(tiny()).current_dir(dir.path())).manifest()["job"]["recipe"].clone()
    };
    let oneshot = go("--dataset gsm8k --output_dir O --recipe R.yaml --num_calibration_samples 10 \
                      --pad_to_max_length False --dataset_config_name main");
    assert_eq!(oneshot["mw"]["group_size"]["size"], 128);
    let alpha =
        go("--config F.json --dataset wikitext2 --nsamples 128 --method rtn --blocksize 128 --actorder --save O");
    assert_eq!((&alpha["experts"]["algorithm"], &alpha["mw"]["group_size"]["size"]), (&"rtn".into(), &32.into()));
    assert_eq!(alpha["gptq"]["actorder"], "static");
}

#[test]
fn a_recipe_with_a_typing_error_is_refused_with_the_nearest_key() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text, want) in [
        ("c.json", r#"{"defualt": {}}"#, "defualt: is no known key; did you mean default?"),
        (
            "c.json",
            r#"{"default": {"wq": "int4"}, "overrides": [{"pattern": "*.w1", "wq": "int8"}]}"#,
            "matches no module",
        ),
        (
            "c.json",
            r#"{"default": {"wq": "int4", "extra": {"method": "awq"}}, "overrides": [{"pattern": "lm_head", "wq": "int8"}]}"#,
            "AWQ is for w4a16, not for w8a16",
        ),
        (
            "r.yaml",
            "GPTQModifier: {scheme: W4A16, dampening: 1}",
            "GPTQModifier.dampening: is no known key; did you mean dampening_frac?",
        ),
        ("r.yaml", "GPTQModifier: {scheme: W4A8, ignore: [lm_head]}", "--kernels present"),
        ("r.yaml", "AWQModifier: {scheme: W8A16}", "AWQ is for w4a16"),
    ] {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        let flag = if name.ends_with("json") { "--config" } else { "--recipe" };
        let mut quant = command(&format!("gptoss-quant --dry-run --quiet --kernels absent {flag}"));
        let ran = run(quant.arg(&file).arg("--model-in").arg(tiny()));
        assert!(ran.code == 2 && ran.err.contains(want), "{text}: {}", ran.err);
    }
}

/// The table of docs/SIZES.md, from plans over the published configs.
fn sizes() -> String {
    let mut table = String::from(
        "# Sizes\n\nBytes of the output for every scheme, experts and the other weights alike (embedding, router and head stay BF16), \
         as\n`gptoss-quant --dry-run --group-size auto` plans them from the published configs. GB are 10^9 bytes; bits are those of \
         the\noutput over its parameters. ggml's types are in a GGUF file, whose tokenizer (about 10 MB) is not counted. `tests/recipes.rs` holds this table to what the plans say.\n\n\
         | scheme | 20b, GB | bits | 120b, GB | bits |\n|---|---|---|---|---|\n",
    );
    let schemes = [
        "keep",
        "ternary",
        "ternary_b3",
        "w2a16",
        "w3a16",
        "w4a16",
        "w4a16 asymmetric",
        "w5a16",
        "w6a16",
        "w7a16",
        "w8a16",
        "w4a8",
        "w4afp8",
        "w8a8",
        "fp8",
        "fp8_static",
        "fp8_block",
        "fp8a16",
        "mxfp4",
        "mxfp6",
        "mxfp8",
        "nvfp4",
        "bf16",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "tq1_0, padded to 256",
        "tq2_0, padded to 256",
    ];
    for scheme in schemes {
        let (name, padding) = scheme.split_once(", ").map_or((scheme, ""), |s| (s.0, "--pad-to 256"));
        let (name, kind) = name.split_once(' ').unwrap_or((name, "symmetric"));
        table += &format!("| {scheme} |");
        for model in ["20b", "120b"] {
            // Everything kept is no plan; what then stands is the published checkpoint.
            let (bytes, parameters) = match (name, model) {
                ("keep", "20b") => (13_761_264_768, 20_914_757_184u64),
                ("keep", _) => (65_248_815_744, 116_829_156_672),
                _ => {
                    let flags = format!(
                        "--algo rtn --kernels present --experts {name} --mw {name} --{kind} --group-size auto {padding}"
                    );
                    let planned = plan(&flags, &config(model));
                    let parameters = if model == "20b" { 20_914_757_184 } else { 116_829_156_672 };
                    (planned["plan"]["bytes"].as_u64().unwrap(), parameters)
                }
            };
            table += &format!(" {:.2} | {:.2} |", bytes as f64 / 1e9, 8.0 * bytes as f64 / parameters as f64);
        }
        table += "\n";
    }
    table
}

#[test]
fn the_table_of_sizes_is_what_the_plans_say() {
    let file = root().join("docs/SIZES.md");
    let (have, want) = (std::fs::read_to_string(&file).unwrap_or_default(), sizes());
    if std::env::var_os("GPTOSS_BLESS").is_some() {
        std::fs::write(&file, &want).unwrap();
    } else {
        assert_eq!(have, want, "run this test with GPTOSS_BLESS=1 to write {}", file.display());
    }
}

/// README's table of presets: what each stands for, and how large it makes 20b.
#[test]
fn presets_are_the_flags_that_readme_says_and_flags_replace_their_parts() {
    let readme = std::fs::read_to_string(support::root().join("README.md")).unwrap();
    for name in ["snapdragon", "ternary", "mobile-2bit"] {
        let row = readme.lines().find(|l| l.starts_with(&format!("| `{name}` | `--"))).unwrap();
        let cells: Vec<&str> = row.split('|').map(|c| c.trim().trim_matches('`')).collect();
        let (by_name, by_flags) = (plan(&format!("--preset {name}"), &config("20b")), plan(cells[2], &config("20b")));
        assert_eq!(by_name["job"], by_flags["job"], "{name}");
        let gigabytes = by_name["plan"]["bytes"].as_f64().unwrap() / 1e9;
        assert_eq!(format!("{gigabytes:.1} GB"), cells[3], "{name}");
        let loads = |r: &&Value| r["status"] == "loads";
        let loading =
            by_name["runtimes"].as_array().unwrap().iter().filter(loads).map(|r| r["runtime"].as_str().unwrap());
        let named: Vec<&str> = loading.map(|r| if r == "native" { "gptoss-run" } else { r }).collect();
        assert_eq!(cells[5].replace('`', "").split(", ").collect::<Vec<_>>(), named, "{name}");
    }
    let int4 = recipe("--preset ternary --experts w4a16", &config("20b"));
    assert_eq!((&int4["experts"]["scheme"], &int4["experts"]["group_size"]), (&"w4a16".into(), &"auto".into()));
    let other = recipe("--preset ternary --mw w4a16 --experts-group-size 64", &config("20b"));
    assert_eq!((&other["mw"]["scheme"], &other["experts"]["scheme"]), (&"w4a16".into(), &"ternary_b3".into()));
    assert_eq!(other["experts"]["group_size"], serde_json::json!({"size": 64}));
}
