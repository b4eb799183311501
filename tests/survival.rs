//! What must not change a byte: a kill at any moment, another processor.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use support::faults::{Fault, at_file, once, trace};
use support::random::Random;
use support::{assert_same, command, files, run, synthetic, tiny};

/// Kills a kind of run.
fn kills() -> usize {
    if std::env::var_os("FULL").is_some() { 10 } else { 3 }
}

/// Compares two folders piece by piece: they are too large to hold.
fn same_bytes(a: &Path, b: &Path) {
    let list = |d: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(d).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(list(a), list(b));
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for name in list(a) {
        let open = |d: &Path| std::fs::File::open(d.join(&name)).unwrap();
        let (mut f, mut g) = (open(a), open(b));
        assert_eq!(f.metadata().unwrap().len(), g.metadata().unwrap().len(), "{name:?}");
        loop {
            let n = f.read(&mut x).unwrap();
            if n == 0 {
                break;
            }
            g.read_exact(&mut y[..n]).unwrap();
            assert!(x[..n] == y[..n], "{name:?} differs");
        }
    }
}

/// Kills runs at random points of their work, with all threads at work, and finishes each. `go` is the run that writes a
/// folder. tests/faults.rs goes through every point, with one thread and a smaller model.
fn killed_runs_end_with_the_same_bytes(what: &str, go: impl Fn(&Path) -> Command) {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let calls = trace(&mut go(&whole), dir.path(), |_, _| Fault::None).calls.len();
    let mut rng = Random::from_env("GPTOSS_SURVIVAL_SEED");
    let (mut hits, mut resumed) = (0, 0);
    for number in 0..kills() {
        // One in each part of the work, so that there is something to resume.
        let point = (number * calls + rng.below(calls)) / kills();
        let dst = dir.path().join(format!("killed-{number}"));
        let traced = trace(&mut go(&dst), dir.path(), once(point, Fault::Kill));
        // With several threads one run has a few calls more than another: it may be over before its last ones.
        if traced.struck {
            hits += 1;
            let manifest = run(&mut go(&dst)).manifest();
            resumed += manifest["volatile"]["resumed_groups"].as_u64().unwrap();
        } else {
            assert_eq!(traced.code, 0, "{}", traced.err);
        }
        same_bytes(&whole, &dst);
        std::fs::remove_dir_all(&dst).unwrap();
    }
    println!("{what}: {hits} kills among {calls} calls; reruns resumed behind {resumed} groups");
    assert!(hits > 0 && resumed > 0, "{hits} kills, {resumed} groups resumed");
}

/// Layers of the 20b's shape, so that there are layers to resume behind.
fn layers(dir: &Path) {
    let config = synthetic::config(&[("num_hidden_layers", 4), ("num_local_experts", 8), ("vocab_size", 512)]);
    synthetic::write(dir, &config);
}

#[test]
fn a_killed_dequantization_resumes_and_ends_with_the_same_bytes() {
    let src = tempfile::tempdir().unwrap();
    layers(src.path());
    killed_runs_end_with_the_same_bytes("dequantization", |dst| {
        let mut c = command("gptoss-dequant --quiet");
        c.arg("--src").arg(src.path()).arg("--dst").arg(dst);
        c
    });
}

#[test]
fn a_killed_quantization_resumes_and_ends_with_the_same_bytes() {
    let src = tempfile::tempdir().unwrap();
    layers(src.path());
    killed_runs_end_with_the_same_bytes("quantization", |dst| {
        let mut c = command("gptoss-quant --quiet --algo rtn");
        c.arg("--model-in").arg(src.path()).arg("--output-dir").arg(dst);
        c
    });
}

/// One file with gaps between its tensors, and a header with a vocabulary in it.
#[test]
fn a_killed_gguf_file_is_resumed_and_ends_with_the_same_bytes() {
    let src = tempfile::tempdir().unwrap();
    let config = synthetic::config(&[("num_hidden_layers", 4), ("num_local_experts", 8), ("vocab_size", 2048)]);
    synthetic::write(src.path(), &config);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny().join(name), src.path().join(name)).unwrap();
    }
    killed_runs_end_with_the_same_bytes("gguf", |dst| {
        let mut c = command("gptoss-quant --quiet --algo rtn --experts q4_0 --mw q8_0 --container gguf");
        c.arg("--model-in").arg(src.path()).arg("--output-dir").arg(dst);
        c
    });
}

#[test]
fn a_killed_calibration_resumes_and_ends_with_the_same_bytes() {
    killed_runs_end_with_the_same_bytes("calibration", |dst| {
        let mut c = command("gptoss-quant --quiet --nsamples 16 --max-seq-length 256 --experts w4a16 --mw w8a8");
        c.args(["--with-sparse", "--mask", "2:4"]).arg("--calib-jsonl").arg(tiny().join("calib.jsonl"));
        c.arg("--model-in").arg(tiny()).arg("--output-dir").arg(dst);
        c
    });
}

/// Kills a run over four layers once two of them are finished; gives the folder with `src` and `out.partial`.
fn interrupted() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("src");
    synthetic::write(
        &src,
        &synthetic::config(&[("num_hidden_layers", 4), ("num_local_experts", 8), ("vocab_size", 512)]),
    );
    // The head of the journal, and three groups.
    let traced = trace(&mut resume(dir.path()), dir.path(), at_file("write", "journal.jsonl", 4, Fault::Kill));
    assert!(traced.struck, "{}", traced.err);
    dir
}

fn first_shard(partial: &Path) -> PathBuf {
    let first = files_of(partial).into_iter().find(|n| n.starts_with("model-00001-of-"));
    partial.join(first.expect("it is there"))
}

fn files_of(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

fn resume(dir: &Path) -> Command {
    let mut c = command("gptoss-dequant --threads 1 --shard-size 300MB --src");
    c.arg(dir.join("src")).arg("--dst").arg(dir.join("out"));
    c
}

/// Bytes of a finished group that somebody changed, a journal's line, a link in the place of a shard.
#[test]
fn what_an_interrupted_run_left_is_believed_only_where_it_is_as_it_was_written() {
    let whole = tempfile::tempdir().unwrap();
    let first = interrupted();
    run(command("gptoss-dequant --quiet --shard-size 300MB --src")
        .arg(first.path().join("src"))
        .arg("--dst")
        .arg(whole.path().join("out")))
    .manifest();
    for (what, resumed) in [("a byte", 2), ("a line", 2), ("nothing", 3)] {
        let dir = interrupted();
        let partial = dir.path().join("out.partial");
        match what {
            "a byte" => {
                let shard = first_shard(&partial);
                let mut bytes = std::fs::read(&shard).expect("the first shard");
                let middle = bytes.len() / 4;
                bytes[middle] ^= 1;
                std::fs::write(&shard, bytes).unwrap();
            }
            "a line" => {
                let journal = partial.join("journal.jsonl");
                let mut bytes = std::fs::read(&journal).unwrap();
                let last = bytes.len() - 40;
                bytes[last] ^= 1;
                std::fs::write(&journal, bytes).unwrap();
            }
            _ => {}
        }
        let ran = run(&mut resume(dir.path()));
        assert_eq!(ran.manifest()["volatile"]["resumed_groups"], resumed, "{what}: {}", ran.err);
        assert_eq!(ran.err.contains("were changed since"), what == "a byte", "{}", ran.err);
        same_bytes(&whole.path().join("out"), &dir.path().join("out"));
    }
    // A link, soft or hard, to a file of the source.
    for link in ["soft", "hard"] {
        let dir = interrupted();
        let shard = first_shard(&dir.path().join("out.partial"));
        let source = dir.path().join("src/model-00000-of-00001.safetensors");
        let before = std::fs::metadata(&source).unwrap().len();
        std::fs::remove_file(&shard).expect("the first shard");
        match link {
            "soft" => std::os::unix::fs::symlink(&source, &shard).unwrap(),
            _ => std::fs::hard_link(&source, &shard).unwrap(),
        }
        let ran = run(&mut resume(dir.path()));
        assert!(ran.code == 2, "{link}: {}", ran.err);
        assert_eq!(std::fs::metadata(&source).unwrap().len(), before, "{link}: the source is as it was");
    }
}

/// The folder for unfinished output as a link: to the source, to somewhere else.
#[test]
fn a_partial_folder_that_is_a_link_is_not_followed() {
    for force in ["", "--force"] {
        let dir = tempfile::tempdir().unwrap();
        let src = support::tiny_copy(dir.path());
        let elsewhere = support::copy_folder(&tiny(), &dir.path().join("elsewhere"));
        for to in [&src, &elsewhere] {
            let (dst, partial) = (dir.path().join("out"), dir.path().join("out.partial"));
            std::os::unix::fs::symlink(to, &partial).unwrap();
            let line = format!("gptoss-dequant --quiet {force} --src");
            let ran = run(command(&line).arg(&src).arg("--dst").arg(&dst));
            assert!(ran.code == 2 && ran.err.contains("out.partial"), "{}", ran.err);
            assert_same(&tiny(), to);
            std::fs::remove_file(&partial).unwrap();
        }
        // And hidden states do not go into the source.
        let mut quant = command("gptoss-quant --quiet --nsamples 2 --max-seq-length 32");
        quant.arg("--calib-jsonl").arg(tiny().join("calib.jsonl")).arg("--model-in").arg(&src);
        let ran = run(quant.arg("--output-dir").arg(dir.path().join("q")).arg("--offload-folder").arg(&src));
        assert!(ran.code == 2 && ran.err.contains("lies in the source"), "{}", ran.err);
    }
}

#[test]
fn a_shard_that_was_taken_away_is_made_again_and_not_believed() {
    let dir = interrupted();
    let whole = dir.path().join("whole");
    run(command("gptoss-dequant --quiet --shard-size 300MB --src")
        .arg(dir.path().join("src"))
        .arg("--dst")
        .arg(&whole))
    .manifest();
    let partial = dir.path().join("out.partial");
    std::fs::remove_file(first_shard(&partial)).unwrap();
    let ran = run(&mut resume(dir.path()));
    // Groups that have nothing in it are kept.
    let resumed = ran.manifest()["volatile"]["resumed_groups"].as_u64().unwrap();
    assert!(resumed < 3, "{resumed}");
    same_bytes(&whole, &dir.path().join("out"));
}

#[test]
fn a_destination_that_fills_up_during_the_run_is_left_alone() {
    let dir = interrupted();
    let dst = dir.path().join("out");
    // Somebody takes the name while the run is at work.
    let traced = trace(&mut resume(dir.path()), dir.path(), |_, call| {
        if call.name == "pwrite64" && !dst.exists() {
            std::fs::create_dir(&dst).unwrap();
            std::fs::write(dst.join("thesis.tex"), "years of work").unwrap();
        }
        Fault::None
    });
    let said = traced.err;
    assert!(said.contains("resuming behind 3 finished groups"), "{said}");
    assert_eq!(traced.code, 2);
    assert!(said.contains("exists and is not empty"), "{said}");
    assert_eq!(std::fs::read_to_string(dst.join("thesis.tex")).unwrap(), "years of work");
    // And nothing is lost: once it is out of the way, all layers are there.
    std::fs::remove_dir_all(&dst).unwrap();
    let ran = run(&mut resume(dir.path()));
    assert_eq!(ran.manifest()["volatile"]["resumed_groups"], 6);
    assert!(ran.err.contains("resuming behind 6 finished groups"), "{}", ran.err);
    run(command("gptoss-verify check --quiet").arg(&dst)).manifest();
}

/// Neither without `--force` nor with it, however late it comes.
#[test]
fn what_comes_to_the_destination_in_the_last_moment_stays() {
    for force in [false, true] {
        let dir = interrupted();
        let dst = dir.path().join("out");
        if force {
            let made = dir.path().join("made");
            run(command("gptoss-dequant --quiet --src").arg(tiny()).arg("--dst").arg(&made)).manifest();
            std::fs::rename(made, &dst).unwrap();
        }
        let old = std::fs::read(dst.join("config.json")).ok();
        let forced = || {
            let mut c = resume(dir.path());
            c.args(force.then_some("--force"));
            c
        };
        let last = if force { "renameat2" } else { "rename" };
        let mut came = false;
        let traced = trace(&mut forced(), dir.path(), |_, call| {
            if call.name == last && call.path.ends_with("out.partial") && !std::mem::replace(&mut came, true) {
                let _ = std::fs::create_dir(&dst);
                std::fs::write(dst.join("thesis.tex"), "years of work").unwrap();
            }
            Fault::None
        });
        assert_eq!(traced.code, 2, "{force}: {}", traced.err);
        assert_eq!(std::fs::read_to_string(dst.join("thesis.tex")).unwrap(), "years of work");
        if force {
            assert!(traced.err.contains("thesis.tex came into"), "{}", traced.err);
            assert_eq!(std::fs::read(dst.join("config.json")).ok(), old);
            std::fs::remove_file(dst.join("thesis.tex")).unwrap();
        } else {
            assert!(traced.err.contains("exists and is not empty"), "{}", traced.err);
            std::fs::remove_dir_all(&dst).unwrap();
        }
        let ran = run(&mut forced());
        assert_eq!(ran.manifest()["volatile"]["resumed_groups"], 6, "{}", ran.err);
        run(command("gptoss-verify check --quiet").arg(&dst)).manifest();
    }
}

#[test]
fn two_runs_into_one_folder_are_not_both_let_in() {
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("src");
    synthetic::write(
        &src,
        &synthetic::config(&[("num_hidden_layers", 1), ("num_local_experts", 16), ("vocab_size", 512)]),
    );
    let dst = dir.path().join("out");
    let go = || {
        let mut c = command("gptoss-dequant --quiet --src");
        c.arg(&src).arg("--dst").arg(&dst);
        c
    };
    let mut second = None;
    let first = trace(&mut go(), dir.path(), |_, call| {
        if call.name == "pwrite64" && second.is_none() {
            second = Some(run(&mut go()));
        }
        Fault::None
    });
    assert_eq!(first.code, 0, "{}", first.err);
    let second = second.expect("the first one wrote");
    assert!(second.code == 2 && second.err.contains("another run is writing"), "{second:?}");
}

#[test]
fn an_unfinished_run_with_other_settings_is_not_mixed_in() {
    let dir = tempfile::tempdir().unwrap();
    let dst = dir.path().join("out");
    let partial = dir.path().join("out.partial");
    let other = trace(
        command("gptoss-dequant --quiet --dtype fp16").arg("--src").arg(tiny()).arg("--dst").arg(&dst),
        dir.path(),
        at_file("write", "journal.jsonl", 2, Fault::Kill),
    );
    assert!(other.struck && partial.join("journal.jsonl").exists());
    let ran = run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&dst));
    assert!(ran.code == 2 && ran.err.contains("holds an unfinished run with another source"), "{}", ran.err);
    assert!(partial.join("journal.jsonl").exists());
    run(command("gptoss-dequant --quiet --force").arg("--src").arg(tiny()).arg("--dst").arg(&dst)).manifest();
    assert!(!partial.exists());
}

#[test]
fn what_a_kill_around_the_last_rename_leaves_does_not_get_into_the_output() {
    let dir = tempfile::tempdir().unwrap();
    let (fresh, dst, partial) = (dir.path().join("fresh"), dir.path().join("out"), dir.path().join("out.partial"));
    let go = |dst: &Path| run(command("gptoss-dequant --quiet --force").arg("--src").arg(tiny()).arg("--dst").arg(dst));
    go(&fresh).manifest();
    // Just after the exchange: the old checkpoint lies under the partial name.
    support::copy_folder(&fresh, &partial);
    std::fs::write(partial.join("model-00007-of-00009.safetensors"), "old").unwrap();
    std::fs::write(partial.join("chat_template.jinja"), "old").unwrap();
    go(&dst).manifest();
    assert_same(&fresh, &dst);
    assert!(!partial.exists());
    // Just before the rename: the finished output, without its journal. No --force is needed.
    let (again, beside) = (dir.path().join("again"), dir.path().join("again.partial"));
    support::copy_folder(&fresh, &beside);
    let plain = || run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&again));
    plain().manifest();
    assert_same(&fresh, &again);
    // A checkpoint of somebody's that happens to have that name stays.
    std::fs::remove_dir_all(&again).unwrap();
    support::copy_folder(&fresh, &beside);
    std::fs::remove_file(beside.join("gptoss-manifest.json")).unwrap();
    let before = files(&beside);
    let ran = plain();
    assert!(ran.code == 2 && ran.err.contains("not this run's unfinished output"), "{}", ran.err);
    assert_eq!(before, files(&beside));
    // A folder of that name with something else in it is not ours to empty.
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("diary.txt"), "mine").unwrap();
    let ran = go(&dst);
    assert!(ran.code == 2 && ran.err.contains("diary.txt is in the way"), "{}", ran.err);
    assert_eq!(std::fs::read_to_string(partial.join("diary.txt")).unwrap(), "mine");
    assert_same(&fresh, &dst);
}

/// Hashes of the files of an output, as its manifest has them.
fn hashes(dir: &Path) -> String {
    let manifest: Value = serde_json::from_slice(&files(dir)["gptoss-manifest.json"]).unwrap();
    let lines = manifest["output"]["files"].as_array().unwrap().iter();
    lines.map(|f| format!("{} {}\n", f["sha256"].as_str().unwrap(), f["name"].as_str().unwrap())).collect()
}

/// The tools under qemu's model of a processor of 2008: no AVX2, no FMA, no F16C, no SHA extensions.
#[test]
fn another_processor_gives_the_committed_hashes() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = [
        ("bf16", "gptoss-dequant", "--src", "--dst", ""),
        ("fp16", "gptoss-dequant", "--src", "--dst", "--dtype fp16"),
        (
            "w4a16",
            "gptoss-quant",
            "--model-in",
            "--output-dir",
            "--algo rtn --experts w4a16 --mw w8a16 --container compressed-tensors",
        ),
        ("gguf", "gptoss-quant", "--model-in", "--output-dir", "--algo rtn --experts q4_1 --mw q8_0 --container gguf"),
        (
            "tq2_0",
            "gptoss-quant",
            "--model-in",
            "--output-dir",
            "--algo rtn --experts tq2_0 --mw mxfp4 --pad-to 256 --container gguf",
        ),
        (
            "asymmetric",
            "gptoss-quant",
            "--model-in",
            "--output-dir",
            "--algo rtn --experts w4a16 --mw w8a8 --asymmetric",
        ),
    ];
    for (name, tool, from, to, flags) in jobs {
        let (native, emulated) = (dir.path().join(name), dir.path().join(format!("{name}-qemu")));
        run(command(tool).arg("--quiet").args(support::words(flags)).arg(from).arg(tiny()).arg(to).arg(&native))
            .manifest();
        let mut qemu = Command::new("qemu-x86_64");
        qemu.args(["-cpu", "Nehalem", support::exe(tool), "--quiet"]).args(support::words(flags));
        let ran = qemu.arg(from).arg(tiny()).arg(to).arg(&emulated).stdin(Stdio::null()).output();
        let ran: support::Ran =
            ran.expect("qemu-x86_64 runs (Debian's package qemu-user; tests/run.sh installs it)").into();
        ran.manifest();
        assert_same(&native, &emulated);
        insta::assert_snapshot!(format!("hashes-{name}"), hashes(&native));
    }
    // Calibration: one projection of one layer, for emulated arithmetic is slow.
    let calibrate = |out: &Path, c: &mut Command| {
        c.args(["--quiet", "--experts", "keep", "--mw", "w4a16", "--nsamples", "1", "--max-seq-length", "12"])
            .args(["--extra-ignore", "q_proj,v_proj,o_proj,layers.1,layers.2,layers.3", "--calib-jsonl"])
            .arg(tiny().join("calib.jsonl"))
            .arg("--model-in")
            .arg(tiny())
            .arg("--output-dir")
            .arg(out)
            .stdin(Stdio::null());
        run(c).manifest();
    };
    let (native, emulated) = (dir.path().join("gptq"), dir.path().join("gptq-qemu"));
    calibrate(&native, &mut command("gptoss-quant"));
    let mut qemu = Command::new("qemu-x86_64");
    calibrate(&emulated, qemu.args(["-cpu", "Nehalem", support::exe("gptoss-quant")]));
    assert_same(&native, &emulated);
    insta::assert_snapshot!("hashes-gptq", hashes(&native));
    // The forward too: a quantized model, with rounded activations, beside its source.
    let arguments = |c: &mut Command| {
        c.args(["quality", "--quiet", "--max-seq-length", "12", "--nsamples", "2", "--text"])
            .arg(tiny().join("test.jsonl"))
            .arg(dir.path().join("asymmetric"))
            .arg("--against")
            .arg(tiny())
            .stdin(Stdio::null());
        run(c).manifest()["quality"].clone()
    };
    let native = arguments(&mut command("gptoss-verify"));
    let mut qemu = Command::new("qemu-x86_64");
    assert_eq!(arguments(qemu.args(["-cpu", "Nehalem", support::exe("gptoss-verify")])), native);
    insta::assert_snapshot!("figures-asymmetric", format!("{:#}", native));
    let env =
        Command::new("qemu-x86_64").args(["-cpu", "Nehalem", support::exe("gptoss-verify"), "env"]).output().unwrap();
    let env: Value = serde_json::from_slice(&env.stdout).unwrap();
    assert_eq!(env["environment"]["cpu_features"], Value::Array(Vec::new()), "the other processor is really another");
}

#[test]
fn a_calibration_resumes_only_where_its_hidden_states_are_and_loses_nothing_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let go = |dst: &str, offload: &str| {
        std::fs::create_dir_all(dir.path().join(offload)).unwrap();
        let mut c = command("gptoss-quant --quiet --nsamples 24 --max-seq-length 256 --experts w4a16 --mw w4a16");
        c.arg("--calib-jsonl").arg(tiny().join("calib.jsonl")).arg("--model-in").arg(tiny());
        c.arg("--output-dir").arg(dir.path().join(dst)).arg("--offload-folder").arg(dir.path().join(offload));
        c
    };
    run(&mut go("whole", "a")).manifest();
    let killed = at_file("write", "journal.jsonl", 4, Fault::Kill);
    assert!(trace(&mut go("killed", "a"), dir.path(), killed).struck);
    let elsewhere = run(&mut go("killed", "b"));
    assert_eq!(elsewhere.code, 2);
    assert!(elsewhere.err.contains("give the --offload-folder that it had"), "{}", elsewhere.err);
    // A torn file is known, too, and costs nothing either.
    let states = || -> Vec<_> {
        let all = std::fs::read_dir(dir.path().join("a")).unwrap().map(|e| e.unwrap().path());
        all.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("hidden-states-")).collect()
    };
    let kept: Vec<_> = states().into_iter().map(|p| (p.clone(), std::fs::read(p).unwrap())).collect();
    for (path, bytes) in &kept {
        let mut torn = bytes.clone();
        torn[bytes.len() / 2..bytes.len() / 2 + 4096].fill(0);
        std::fs::write(path, torn).unwrap();
    }
    let torn = run(&mut go("killed", "a"));
    assert!(torn.code == 2 && torn.err.contains("not there as it kept them"), "{}", torn.err);
    kept.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
    let resumed = run(&mut go("killed", "a")).manifest();
    assert!(resumed["volatile"]["resumed_groups"].as_u64().unwrap() >= 3);
    assert_same(&dir.path().join("whole"), &dir.path().join("killed"));
    assert!(states().is_empty(), "a finished run leaves none");
}
