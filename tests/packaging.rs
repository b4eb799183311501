//! The ways to the tools that are not cargo: Makefile, container, and what both start.

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::{Ran, command, exe, recipes, root, run, tiny};

/// The folder of the binaries under test.
fn binaries() -> &'static Path {
    Path::new(exe("gptoss-verify")).parent().unwrap()
}

fn make(words: &str) -> Ran {
    let mut make = Command::new("make");
    make.arg("--no-print-directory").args(support::words(words)).current_dir(root());
    // Make takes the caller's environment for its variables.
    make.env_clear().envs(std::env::vars_os().filter(|(name, _)| name == "PATH" || name == "HOME"));
    run(make.arg(format!("BIN={}", binaries().display())))
}

fn read(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap()
}

#[test]
fn recipes_plan_on_the_real_models() {
    for (name, flags) in &recipes() {
        let dir = tempfile::tempdir().unwrap();
        for model in ["20b", "120b"] {
            let config = root().join(format!("tests/fixtures/configs/gpt-oss-{model}.json"));
            let mut quant = command(&format!("gptoss-quant --dry-run --quiet {flags} --model-in"));
            let planned = run(quant.arg(config).env("GPTOSS_KERNELS", dir.path()).current_dir(dir.path())).manifest();
            assert!(planned["plan"]["bytes"].as_u64().unwrap() > 1 << 33, "{name}: {}", planned["plan"]);
            let group = planned["job"]["recipe"]["experts"]["group_size"].clone();
            assert!(group == "auto" || name == "w8a8-gptq-all", "{name}: {group}");
        }
        // What comes behind a recipe's flags counts.
        if flags.contains("--group-size auto") {
            let mut quant = command(&format!("gptoss-quant --dry-run --quiet {flags} --group-size 32"));
            let planned = run(quant.env("GPTOSS_KERNELS", dir.path()).current_dir(dir.path())).manifest();
            assert_eq!(planned["job"]["recipe"]["experts"]["group_size"]["size"], 32, "{name}");
        }
    }
}

#[test]
fn make_runs_recipes_here_and_in_a_container() {
    let help = make("help").out;
    for (name, flags) in recipes() {
        let target = name.replace('-', "_");
        assert!(help.contains(&format!("  {target}\n")), "{help}");
        let here = make(&format!("-n {target} MODEL=/m OUT=/o CALIB=/c.jsonl")).out;
        let tool = binaries().join("gptoss-quant");
        let want = format!(
            "{} --model-in '/m' --output-dir '/o/{name}' {flags} --calib-jsonl '/c.jsonl' --num-calibration-samples 256 --max-seq-length 2048",
            tool.display()
        );
        assert_eq!(here.trim(), want);
        let there = make(&format!("-n {target} DOCKER=1")).out;
        let begins =
            "docker compose run --rm gptoss gptoss-quant --model-in 'openai/gpt-oss-20b' --output-dir '/models/";
        let there = there.lines().last().unwrap();
        assert!(there.starts_with(begins) && there.contains(&flags), "{there}");
    }
    let mixed = make("-n w8a8_gptq_all DOCKER=1 CALIB=README.md");
    assert!(mixed.code == 2 && mixed.err.contains("README.md is a path of this machine"), "{mixed:?}");
    assert!(!make("-n verify DOCKER=0").out.contains("docker"));
    let missing = make("verify DOCKER=1 COMPOSE=/nowhere/compose");
    assert!(missing.code == 2 && missing.err.contains("/nowhere/compose does not work"), "{missing:?}");
    for target in
        ["dequant", "verify", "bench", "install-kernels", "test", "build", "shell", "test-gpu-access", "build-image"]
    {
        assert!(help.contains(&format!("  {target} ")), "{target}");
        let there = make(&format!("-n {target} DOCKER=1"));
        assert!(there.code == 0 && there.out.contains("docker compose "), "{target}: {there:?}");
    }
    assert!(make("gpu-help").out.contains("CONTAINER_RUNTIME=nvidia"));
}

#[test]
fn make_runs_the_tools() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let words = format!("dequant MODEL={} OUT={} FLAGS=--quiet", support::word(&tiny()), support::word(&out));
    assert_eq!(make(&words).code, 0);
    let checked = make(&format!("-s verify DIR={}", support::word(&out.join("bf16")))).manifest();
    assert_eq!(checked["verdict"]["passed"], true);
    let env = make("-s verify").manifest();
    assert!(env["environment"]["cpus"].as_u64().unwrap() > 0);
}

/// The container's start, outside of one.
fn enter(variables: &[(&str, &str)], kernels: &Path, words: &[&str]) -> Ran {
    let path = format!("{}:/usr/bin:/bin", binaries().display());
    let mut entry = Command::new(root().join("nix/entrypoint.sh"));
    entry.args(words).env("PATH", path).env("GPTOSS_KERNELS", kernels).envs(variables.iter().copied());
    // A shell complains of a locale that the caller has and the machine has not.
    entry.env("LC_ALL", "C");
    for name in ["CUDA_HOME", "VIRTUAL_ENV", "TORCH_CUDA_ARCH_LIST"] {
        entry.env_remove(name);
    }
    run(&mut entry)
}

#[test]
fn a_container_verifies_first_and_then_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (kernels, echo) = (dir.path().join("kernels"), ["echo", "the command"]);
    let plain = enter(&[], &kernels, &echo);
    assert_eq!((plain.code, &plain.out[..]), (0, "the command\n"), "{}", plain.err);
    for words in ["processors", "no kernels in", "kernels were not run: there is no GPU"] {
        assert!(plain.err.contains(words), "{words}: {}", plain.err);
    }
    assert_eq!(enter(&[("SKIP_STARTUP_COMMANDS", "1")], &kernels, &echo).err, "");
    let none = [("AUTO_TEST_ENV", "0"), ("AUTO_VERIFY", "0")];
    assert_eq!(enter(&none, &kernels, &echo).err, "");
    let install = enter(&[none[0], none[1], ("AUTO_INSTALL_KERNELS", "1")], &kernels, &echo);
    assert!(install.code == 0 && install.err.contains("no CUDA compiler"), "{}", install.err);
    assert!(install.err.contains("INSTALL_KERNELS=1 make build-image"), "{}", install.err);
    let word = enter(&[("AUTO_VERIFY", "true")], &kernels, &echo);
    assert!(word.code == 2 && word.out.is_empty() && word.err.contains("AUTO_VERIFY is 0 or 1"), "{word:?}");
    let bench = enter(&[none[0], none[1], ("RUN_MICROBENCH", "1")], &kernels, &echo);
    assert!(bench.code == 0 && bench.err.contains("4096x4096"), "{}", bench.err);
    // The command's own exit code, and kernels that are damaged.
    assert_eq!(enter(&[("SKIP_STARTUP_COMMANDS", "1")], &kernels, &["sh", "-c", "exit 7"]).code, 7);
    std::fs::create_dir_all(kernels.join("beef")).unwrap();
    std::fs::write(kernels.join("beef/manifest.json"), "{").unwrap();
    let damaged = enter(&[], &kernels, &echo);
    assert!(damaged.code == 1 && damaged.out.is_empty() && damaged.err.contains("are damaged"), "{damaged:?}");
    // What it says to do works there, and those that are there are not built again.
    let installs = [("AUTO_INSTALL_KERNELS", "1")];
    let mended = enter(&installs, &kernels, &["gptoss-kernel-install", "--uninstall", "all", "--quiet"]);
    assert!(mended.code == 0 && !mended.err.contains("no CUDA compiler"), "{mended:?}");
    assert!(!kernels.join("beef").exists());
}

/// It holds what the tools are and what there is here; nix/container.sh lints it and runs its steps.
#[test]
fn the_dockerfile_names_what_there_is() {
    let text = read("Dockerfile").replace("\\\n", " ");
    let lines = |word: &'static str| text.lines().filter_map(move |l| l.strip_prefix(word));
    let bins = std::fs::read_dir(root().join("bins/src/bin")).unwrap();
    let flake = read("nix/default.nix");
    for bin in bins.map(|e| e.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()) {
        assert!(text.contains(&format!(" target/release/{bin}")), "{bin}");
        assert!(flake.contains(&format!("    \"{bin}\"\n")), "{bin}");
    }
    for copy in lines("COPY ").filter(|c| !c.starts_with("--from") && *c != ". .") {
        let (from, _) = copy.rsplit_once(' ').unwrap();
        assert!(root().join(from).exists(), "{copy}");
    }
    assert!(text.contains("pip install") && text.contains(" --require-hashes "));
    // The rust image is the least that Cargo.toml asks for.
    let rust = lines("ARG RUST=").next().unwrap();
    assert!(read("Cargo.toml").contains(&format!("rust-version = \"{rust}\"")), "{rust}");
}

#[test]
fn the_compose_file_has_the_services_and_the_variables() {
    let peers = std::env::var_os("GPTOSS_PEERS").map_or_else(|| root().join("venv"), Into::into);
    let question = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let python =
        Command::new(peers.join("bin/python")).args(["-c", question]).arg(root().join("compose.yaml")).output();
    let read_back: Ran = python.expect("the peers' Python").into();
    let compose: Value = serde_json::from_str(&read_back.out).unwrap_or_else(|_| panic!("{}", read_back.err));
    let services = compose["services"].as_object().unwrap();
    let names: Vec<&str> = services.keys().map(|k| &k[..]).collect();
    assert_eq!(names, ["gptoss", "shell", "verify", "dequantize", "quantize-w4a8", "recipe", "debug"]);
    let entry = read("nix/entrypoint.sh");
    for name in ["AUTO_VERIFY", "AUTO_INSTALL_KERNELS", "RUN_MICROBENCH", "SKIP_STARTUP_COMMANDS", "AUTO_TEST_ENV"] {
        assert!(
            services["gptoss"]["environment"][name].is_string() && entry.contains(&format!(" on {name} ")),
            "{name}"
        );
    }
    for service in services.values() {
        let mounts = service["volumes"].to_string();
        assert!(["MODELS_DIR", "CACHE_DIR", "OFFLOAD_DIR"].iter().all(|m| mounts.contains(m)), "{mounts}");
    }
    // Its commands are ones that the tools take, and the recipe is the recipe.
    let line = services["quantize-w4a8"]["command"].as_str().unwrap();
    let flags = recipes().into_iter().find(|r| r.0 == "w4a8exp-w4a16mw").unwrap().1;
    assert!(line.contains(&format!(" {flags} --dataset ")), "{line}");
    let config = root().join("tests/fixtures/configs/gpt-oss-20b.json");
    let line = line.replace("${MODEL:-openai/gpt-oss-20b}", config.to_str().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let planned = run(command(&format!("{line} --dry-run --quiet")).env("GPTOSS_KERNELS", dir.path())).manifest();
    assert_eq!(planned["job"]["recipe"]["experts"]["scheme"], "w4a16");
}

#[test]
fn storage_is_set_up_where_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("nix")).unwrap();
    std::fs::copy(root().join("nix/setup-storage.sh"), dir.path().join("nix/setup-storage.sh")).unwrap();
    let base = dir.path().join("disk");
    std::fs::create_dir(&base).unwrap();
    let mut script = Command::new("bash");
    script.arg(dir.path().join("nix/setup-storage.sh")).arg(&base);
    for name in ["MODELS_DIR", "CACHE_DIR", "OFFLOAD_DIR"] {
        script.env_remove(name);
    }
    let ran = run(&mut script);
    assert!(ran.code == 0 && ran.err.contains("GiB are free"), "{ran:?}");
    let env = std::fs::read_to_string(dir.path().join(".env")).unwrap();
    assert_eq!(env, ran.out);
    // Done again it is the same, and what else is there stays.
    std::fs::write(dir.path().join(".env"), format!("HF_TOKEN=secret\n{env}")).unwrap();
    assert_eq!(run(&mut script).out, env);
    assert_eq!(std::fs::read_to_string(dir.path().join(".env")).unwrap(), format!("HF_TOKEN=secret\n{env}"));
    for line in env.lines() {
        let (name, value) = line.split_once('=').unwrap();
        match name {
            "CONTAINER_USER" => assert!(value.split(':').all(|id| id.parse::<u32>().is_ok()), "{line}"),
            _ => assert!(Path::new(value).is_dir(), "{line}"),
        }
    }
}

/// nix/pins.nix says what the tools say, and the lock is the flake's: it can be read without Nix.
#[test]
fn pins_and_lock_are_what_the_tools_and_the_flake_say() {
    let pins = read("nix/pins.nix");
    let list: Vec<&str> =
        pins.lines().find(|l| l.contains("architectures = ")).unwrap().split('"').skip(1).step_by(2).collect();
    assert_eq!(list.join(";"), gptoss::kernels::arch::DEFAULT);
    assert!(pins.contains(&format!("nvcc = \"{}\"", gptoss::kernels::toolkit::PINNED)), "{pins}");
    let (flake, lock) = (read("flake.nix"), serde_json::from_str::<Value>(&read("flake.lock")).unwrap());
    assert_eq!(lock["version"], 7);
    for (name, commit, hash) in [
        ("nixpkgs", "21a67dc470149f337cecafbe965d8d252a390518", "sha256-ugpsyk3NM2s87vXfUiIIiibbJ4Pp0JPS5p/3mfs+q+c="),
        ("cutlass", "f3fde58372d33e9a5650ba7b80fc48b3b49d40c8", "sha256-iP560D5Vwuj6wX1otJhwbvqe/X4mYVeKTpK533Wr5gY="),
    ] {
        let node = &lock["nodes"][name];
        assert_eq!(node["locked"]["narHash"], hash);
        let of = |key: &str| node["original"][key].as_str().unwrap();
        assert!(flake.contains(&format!("github:{}/{}/{}", of("owner"), of("repo"), of("ref"))), "{name}");
        assert_eq!((&node["locked"]["rev"], &lock["nodes"]["root"]["inputs"][name]), (&commit.into(), &name.into()));
    }
    assert!(pins.contains("cutlass = \"4.2.1\"") && lock["nodes"]["cutlass"]["original"]["ref"] == "v4.2.1");
}
