//! A crash at every point of the work, a power cut there, and every call that fails once: a run after it ends with the same
//! bytes, or says what is wrong.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::faults::{Fault, Traced, Watched, once, trace, trace_calls};
use support::random::Random;
use support::{command, files, run, synthetic, tiny};

/// A way of writing a folder: what is run in a folder that holds `src`, and its output's name there.
struct Job {
    name: &'static str,
    line: String,
    /// Whether something stands at the output that is replaced.
    force: bool,
    /// Whether its source is the BF16 one.
    dense: bool,
}

impl Job {
    fn command(&self, dir: &Path) -> Command {
        let mut c = command(&self.line);
        let dequant = self.line.starts_with("gptoss-dequant");
        let (source, output) = if dequant { ("--src", "--dst") } else { ("--model-in", "--output-dir") };
        c.arg(source).arg(dir.join("src")).arg(output).arg(dir.join("work/out"));
        if self.force {
            c.arg("--force");
        }
        c
    }

    /// A folder for one run: the source outside of what is watched, and in it what is there before.
    fn fresh(&self, base: &Path, src: &Path, old: &Path) -> PathBuf {
        let dir = base.join("run");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("work")).unwrap();
        std::os::unix::fs::symlink(src, dir.join("src")).unwrap();
        if self.force {
            support::copy_folder(old, &dir.join("work/out"));
        }
        dir
    }
}

fn jobs() -> Vec<Job> {
    let calib = support::word(&tiny().join("calib.jsonl"));
    let text = |flags: &str| {
        format!("gptoss-quant -q --threads 1 --calib-jsonl {calib} --nsamples 2 --max-seq-length 32 {flags}")
    };
    let job = |name, line: String| Job { name, line, force: false, dense: false };
    vec![
        job("dequant", "gptoss-dequant -q --threads 1 --shard-size 200KB".into()),
        job("rtn", "gptoss-quant -q --threads 1 --algo rtn --experts w4a16 --mw w8a16 --shard-size 100KB".into()),
        job("gptq", text("--experts w4a16 --mw w8a8 --lm-head w8a16 --shard-size 100KB")),
        job("gguf", "gptoss-quant -q --threads 1 --algo rtn --experts q4_0 --mw q8_0 --container gguf".into()),
        Job { force: true, ..job("force", "gptoss-quant -q --threads 1 --algo rtn --experts w8a16 --mw w8a16".into()) },
        Job {
            dense: true,
            ..job("target size", text("--experts w4a16 --mw w8a16 --target-size 0.72MB --container compressed-tensors"))
        },
    ]
}

/// A model, another checkpoint that `--force` replaces, and what a run without faults makes.
struct Bench {
    dir: tempfile::TempDir,
    src: PathBuf,
    old: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let src = synthetic::small(dir.path(), 2);
        let old = dir.path().join("old");
        run(command("gptoss-dequant -q --src").arg(&src).arg("--dst").arg(&old)).manifest();
        Self { dir, src, old }
    }

    fn fresh(&self, job: &Job) -> PathBuf {
        job.fresh(self.dir.path(), if job.dense { &self.old } else { &self.src }, &self.old)
    }
}

/// The output's files; what is volatile in the manifest does not lie there.
fn made(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    files(&dir.join("work/out"))
}

/// After a fault: the output is not there, or it is the old one, or the whole new one. Then the same command again.
fn recovers(job: &Job, dir: &Path, expected: &BTreeMap<String, Vec<u8>>, old: &Path, what: &str) {
    let out = dir.join("work/out");
    if out.exists() {
        let there = files(&out);
        let is_old = job.force && there == files(old);
        assert!(there == *expected || is_old, "{what}: half an output stands there: {:?}", there.keys());
        if there == *expected {
            return;
        }
    }
    let ran = run(&mut job.command(dir));
    if ran.code != 0 {
        // A clear error, and the way on that it names works.
        assert_eq!(ran.code, 2, "{what}: {}", ran.err);
        assert!(ran.err.contains("--force"), "{what}: {}", ran.err);
        let again = run(job.command(dir).arg("--force"));
        assert_eq!(again.code, 0, "{what}: after {} --force says {}", ran.err, again.err);
    }
    let there = made(dir);
    for (name, bytes) in expected {
        assert!(there.get(name) == Some(bytes), "{what}: {name} differs after the rerun");
    }
    assert_eq!(there.len(), expected.len(), "{what}");
    assert!(!dir.join("work/out.partial").exists(), "{what}: the partial folder stays");
}

fn in_full() -> bool {
    std::env::var_os("FULL").is_some()
}

/// Points that are tried: all of them in full, else a share of them, other ones for each seed.
fn points(count: usize, rng: &mut Random) -> Vec<usize> {
    const SOME: usize = 24;
    if in_full() || count <= SOME {
        return (0..count).collect();
    }
    let stride = count / SOME + 1;
    let first = rng.below(stride);
    // The ends are where folders change their names.
    let mut points: Vec<usize> = (first..count).step_by(stride).chain(count.saturating_sub(10)..count).collect();
    points.sort_unstable();
    points.dedup();
    points
}

/// Runs once without a fault; gives what it makes and how many calls that takes.
fn plain(bench: &Bench, job: &Job) -> (BTreeMap<String, Vec<u8>>, usize) {
    let dir = bench.fresh(job);
    let traced = trace(&mut job.command(&dir), &dir.join("work"), |_, _| Fault::None);
    assert_eq!(traced.code, 0, "{}: {}", job.name, traced.err);
    let names = |n: &str| traced.calls.iter().filter(|c| c.name == n).count();
    let writes = names("write") + names("pwrite64");
    assert!(writes > 5 && names("fdatasync") + names("fsync") > 3 && names("ftruncate") > 0, "{:?}", traced.calls);
    (made(&dir), traced.calls.len())
}

/// Programs with the faults that this file looks for: each is seen, so what it says of the tools means something.
#[test]
fn planted_faults_are_seen() {
    let base = tempfile::tempdir().unwrap();
    let shell = |script: &str| {
        let dir = base.path().join("run");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("work")).unwrap();
        let mut c = Command::new("sh");
        c.args(["-c", script]).current_dir(dir.join("work"));
        (c, dir.join("work"))
    };
    let text = |path: PathBuf| std::fs::read_to_string(path).ok();
    // An output that appears under its name before it is whole.
    let script = "mkdir out; echo one > out/a; echo two > out/b";
    let (mut c, work) = shell(script);
    let calls = trace(&mut c, &work, |_, _| Fault::None).calls.len();
    assert!(calls >= 5, "a folder, two files, two writes: {calls}");
    let halves = (0..calls).filter(|&point| {
        let (mut c, work) = shell(script);
        assert!(trace(&mut c, &work, once(point, Fault::Kill)).struck);
        work.join("out").exists() && text(work.join("out/b")).as_deref() != Some("two\n")
    });
    assert!(halves.count() >= 3);
    // A rename of what is not on the disk yet: the name is durable and the bytes are not.
    for (sync, whole) in [("", false), ("sync new; ", true)] {
        let script = format!("echo whole > new; {sync}mv new out; sync .; echo > end");
        let (mut c, work) = shell(&script);
        let traced = trace(&mut c, &work, |_, call| if call.path.ends_with("end") { Fault::Kill } else { Fault::None });
        assert!(traced.struck, "{:?}", traced.calls);
        traced.cut_power(&mut Random::new(1), 256);
        assert_eq!(text(work.join("out")).as_deref() == Some("whole\n"), whole, "{sync}");
    }
    // A journal that is ahead of what it speaks of.
    for (order, whole) in [("sync journal; sync data", false), ("sync data; sync journal", true)] {
        let script = format!(": > data; : > journal; sync .; echo whole >> data; echo done >> journal; {order}");
        let (mut c, work) = shell(&script);
        let mut syncs = 0;
        let traced = trace(&mut c, &work, |_, call| {
            syncs += usize::from(call.name == "fsync" && !call.path.as_os_str().is_empty());
            if syncs == 2 { Fault::Kill } else { Fault::None }
        });
        assert!(traced.struck, "{:?}", traced.calls);
        traced.cut_power(&mut Random::new(1), 256);
        let holds = |file: &str, line: &str| text(work.join(file)).as_deref() == Some(line);
        let ahead = holds("journal", "done\n") && !holds("data", "whole\n");
        assert_eq!(ahead, !whole, "{order}");
    }
    // A file that was cut off and written again: the power cut brings back what it was.
    for (sync, back) in [("", "old\n"), ("sync file; ", "new\n")] {
        let (mut c, work) = shell(&format!("echo old > file; sync file; sync .; echo new > file; {sync}echo > end"));
        let traced = trace(&mut c, &work, |_, call| if call.path.ends_with("end") { Fault::Kill } else { Fault::None });
        traced.cut_power(&mut Random::new(1), 256);
        assert_eq!(text(work.join("file")).as_deref(), Some(back));
    }
    // A write whose failure nobody looks at.
    let (mut c, work) = shell("echo one > out; echo two >> out || true");
    let traced = trace(&mut c, &work, support::faults::at_file("write", "out", 1, Fault::Fail(libc::ENOSPC)));
    assert!(traced.struck && traced.code == 0 && text(work.join("out")).as_deref() == Some("one\n"), "{traced:?}");
}

#[test]
fn a_kill_at_any_call_loses_nothing() {
    let bench = Bench::new();
    let mut rng = Random::from_env("GPTOSS_FAULTS_SEED");
    for job in jobs() {
        let (expected, count) = plain(&bench, &job);
        let (mut hits, mut resumed) = (0, 0);
        for point in points(count, &mut rng) {
            let dir = bench.fresh(&job);
            let traced = trace(&mut job.command(&dir), &dir.join("work"), once(point, Fault::Kill));
            hits += usize::from(traced.struck);
            let at = traced.calls.last().cloned();
            if traced.struck {
                assert_eq!(traced.code, -1, "{}", job.name);
                resumed += usize::from(dir.join("work/out.partial/journal.jsonl").exists());
            }
            recovers(&job, &dir, &expected, &bench.old, &format!("{}, killed at {point}, {at:?}", job.name));
        }
        println!("{}: {count} points, {hits} kills, {resumed} with a journal", job.name);
        assert!(hits > 10 && resumed > 0, "{}: {hits} kills", job.name);
    }
}

#[test]
fn a_power_cut_at_any_call_loses_nothing_that_was_durable() {
    let bench = Bench::new();
    let mut rng = Random::from_env("GPTOSS_FAULTS_SEED");
    for job in jobs() {
        let (expected, count) = plain(&bench, &job);
        for point in points(count, &mut rng) {
            // All that was not durable is lost, or some of it.
            for lost in [256, 128] {
                let dir = bench.fresh(&job);
                let traced = trace(&mut job.command(&dir), &dir.join("work"), once(point, Fault::Kill));
                let at = traced.calls.last().cloned();
                traced.cut_power(&mut rng, lost);
                let what = format!("{}, power cut at {point} ({lost} of 256 lost), {at:?}", job.name);
                recovers(&job, &dir, &expected, &bench.old, &what);
            }
        }
    }
}

/// After a call that failed: the whole output, or an error that a rerun recovers from.
fn sound(job: &Job, dir: &Path, traced: &Traced, expected: &BTreeMap<String, Vec<u8>>, old: &Path, what: &str) {
    match traced.code {
        0 => assert!(made(dir) == *expected, "{what}: it ends well, with other bytes"),
        2 => {
            let said = traced.err.trim_end();
            assert!(said.contains("error: "), "{what}: {said}");
            assert!(!said.contains("panicked"), "{what}: {said}");
            recovers(job, dir, expected, old, what);
        }
        code => panic!("{what}: exit code {code}: {}", traced.err),
    }
}

#[test]
fn a_call_that_fails_is_an_error_or_is_tried_again() {
    let bench = Bench::new();
    let mut rng = Random::from_env("GPTOSS_FAULTS_SEED");
    for job in jobs() {
        let (expected, count) = plain(&bench, &job);
        let mut struck = 0;
        for errno in [libc::EIO, libc::ENOSPC, libc::EMFILE, libc::EINTR] {
            for point in points(count, &mut rng) {
                let dir = bench.fresh(&job);
                let traced = trace(&mut job.command(&dir), &dir.join("work"), once(point, Fault::Fail(errno)));
                struck += usize::from(traced.struck);
                let what = format!("{}, errno {errno} at {point}, {:?}", job.name, traced.calls.get(point));
                sound(&job, &dir, &traced, &expected, &bench.old, &what);
            }
        }
        assert!(struck > 40, "{}: {struck} failures", job.name);
    }
}

/// A source, text or unfinished output that cannot be looked at is not one that is empty or not there.
#[test]
fn a_look_that_fails_is_an_error_or_is_tried_again() {
    const ERRORS: [i32; 4] = [libc::EIO, libc::EACCES, libc::EMFILE, libc::EINTR];
    let bench = Bench::new();
    let mut rng = Random::from_env("GPTOSS_FAULTS_SEED");
    // The calibration's text too lies where calls are watched.
    let text = bench.dir.path().join("calib.jsonl");
    std::fs::copy(tiny().join("calib.jsonl"), &text).unwrap();
    for job in jobs() {
        let line = job.line.replace(&support::word(&tiny().join("calib.jsonl")), &support::word(&text));
        let job = Job { line, ..job };
        let looks = |dir: &Path, point, fault| {
            trace_calls(&mut job.command(dir), bench.dir.path(), Watched::Looks, once(point, fault))
        };
        let dir = bench.fresh(&job);
        let (expected, calls) = {
            let traced = trace(&mut job.command(&dir), &dir.join("work"), |_, _| Fault::None);
            assert_eq!(traced.code, 0, "{}: {}", job.name, traced.err);
            (made(&dir), traced.calls.len())
        };
        // Of an empty folder, and of what a run left that was killed at two thirds of its changes.
        for begun in [false, true] {
            let ready = || {
                let dir = bench.fresh(&job);
                if begun {
                    trace(&mut job.command(&dir), &dir.join("work"), once(calls * 2 / 3, Fault::Kill));
                }
                dir
            };
            let dir = ready();
            let (journal, partial) = (dir.join("work/out.partial/journal.jsonl"), begun);
            assert!(journal.exists() == partial, "{}", job.name);
            let traced = looks(&dir, 0, Fault::None);
            assert_eq!(traced.code, 0, "{}: {}", job.name, traced.err);
            let (count, mut failed) = (traced.calls.len(), 0);
            for (i, point) in points(count, &mut rng).into_iter().enumerate() {
                // Each error at each point in full; else they take turns, in another order for each seed.
                let turn = (i + rng.below(4)) % 4;
                for &errno in if in_full() { &ERRORS[..] } else { &ERRORS[turn..=turn] } {
                    let dir = ready();
                    let before = begun.then(|| std::fs::read(dir.join("work/out.partial/journal.jsonl")).unwrap());
                    let traced = looks(&dir, point, Fault::Fail(errno));
                    let what = format!("{}, errno {errno} at {point}, {:?}", job.name, traced.calls.get(point));
                    failed += usize::from(traced.code == 2);
                    let placed = dir.join("work/out").exists() && made(&dir) == expected;
                    if let (Some(before), 2, false) = (before, traced.code, placed) {
                        // What was finished is still there.
                        let now = std::fs::read(dir.join("work/out.partial/journal.jsonl")).unwrap_or_default();
                        assert!(now.starts_with(&before), "{what}: the finished groups are gone: {}", traced.err);
                    }
                    sound(&job, &dir, &traced, &expected, &bench.old, &what);
                }
            }
            println!("{}: {count} looks, {failed} errors, begun: {begun}", job.name);
            assert!(failed > 10, "{}: {failed}", job.name);
        }
    }
}
