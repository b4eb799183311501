//! However a model is cut into shards, the output is the one of a single shard: calibrated, data-free and dequantized.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use support::random::Random;
use support::synthetic::small;
use support::tensors::{Tensors, read, write};
use support::{command, files, run, tiny};

/// Random cuts of the small model.
const CUTS: usize = 64;

/// Shards as they are published: names in alphabetical order, a new shard where the next tensor does not fit.
fn greedy(tensors: &Tensors, shards: usize) -> Vec<Vec<&String>> {
    let total: usize = tensors.values().map(|t| t.2.len()).sum();
    let cut = |limit: usize| {
        let (mut list, mut filled) = (vec![Vec::new()], 0);
        for (name, (_, _, bytes)) in tensors {
            if filled > 0 && filled + bytes.len() > limit {
                list.push(Vec::new());
                filled = 0;
            }
            filled += bytes.len();
            list.last_mut().unwrap().push(name);
        }
        list
    };
    (total / shards..total).step_by(total / 1000).map(cut).find(|s| s.len() == shards).expect("some size gives so many")
}

/// A random cut: in order, or each tensor anywhere.
fn random<'t>(tensors: &'t Tensors, rng: &mut Random) -> Vec<Vec<&'t String>> {
    let count = 2 + rng.below(19);
    let mut shards = vec![Vec::new(); count];
    let in_order = rng.below(2) == 0;
    let mut ends: Vec<usize> = (1..count).map(|_| rng.below(tensors.len())).collect();
    ends.sort_unstable();
    for (i, name) in tensors.keys().enumerate() {
        let shard = if in_order { ends.partition_point(|&end| end <= i) } else { rng.below(count) };
        shards[shard].push(name);
    }
    shards.retain(|s| !s.is_empty());
    shards
}

/// What is made of each cut: a name and the command but for its source and destination.
fn jobs(fixture: &Path) -> Vec<(&'static str, String)> {
    let text = |flags: &str| {
        let calib = fixture.join("calib.jsonl");
        format!("gptoss-quant -q --calib-jsonl {} --nsamples 3 --max-seq-length 48 {flags}", support::word(&calib))
    };
    vec![
        ("dequant", "gptoss-dequant -q --dtype fp16 --shard-size 1MB".into()),
        ("rtn", "gptoss-quant -q --algo rtn --experts w4a16 --mw w8a16".into()),
        ("gguf", "gptoss-quant -q --algo rtn --experts q4_0 --mw q8_0 --container gguf".into()),
        ("gptq", text("--experts w4a16 --mw w8a8")),
        ("gptq with its head", text("--experts w4a8 --mw w4a16 --kernels present --lm-head w8a16")),
        ("gptq, a head alone", text("--algo gptq --experts keep --mw keep --lm-head w8a16")),
        ("awq", text("--algo awq --experts w4a16 --mw w4a16")),
        ("smoothquant", text("--experts w8a8 --mw w8a8 --smoothquant-strength 0.5")),
        ("sparse", text("--experts w4a16 --mw w8a8 --with-sparse --mask 2:4")),
        ("pt-bitnet", text("--experts ternary --mw w8a16")),
        ("source states", text("--experts w4a16 --mw w8a16 --no-sequential-update")),
        ("padded", text("--experts w4a16 --mw w4a16 --pad-to 128")),
    ]
}

/// The output of `job` over `src`, but for what names the source.
fn output(job: &str, src: &Path, dst: &Path) -> BTreeMap<String, Vec<u8>> {
    let (source, output) =
        if job.starts_with("gptoss-dequant") { ("--src", "--dst") } else { ("--model-in", "--output-dir") };
    let mut c = command(job);
    run(c.arg(source).arg(src).arg(output).arg(dst)).manifest();
    let mut made = files(dst);
    // What a manifest says of the output must not depend on the cut either.
    let mut manifest: serde_json::Value = serde_json::from_slice(&made["gptoss-manifest.json"]).unwrap();
    manifest.as_object_mut().unwrap().retain(|key, _| !["source", "volatile"].contains(&key.as_str()));
    // One note compares with the source's files, whose headers and gaps are of other lengths in another cut.
    let notes = manifest["notes"].as_array_mut();
    notes.into_iter().for_each(|n| n.retain(|n| !n.as_str().unwrap().starts_with("the output is not smaller")));
    made.insert("gptoss-manifest.json".into(), serde_json::to_string_pretty(&manifest).unwrap().into_bytes());
    std::fs::remove_dir_all(dst).unwrap();
    // What a target size measured lies beside it.
    let _ = std::fs::remove_file(dst.with_extension("sensitivity.json"));
    made
}

/// Every job over every cut gives what it gives over one shard.
fn all_cuts_agree(whole: &Path, cuts: &[Vec<Vec<&String>>], tensors: &Tensors, jobs: &[(&str, String)], work: &Path) {
    let expected: Vec<_> = jobs.iter().map(|(_, job)| output(job, whole, &work.join("expected"))).collect();
    for (i, shards) in cuts.iter().enumerate() {
        let src = work.join("cut");
        write(tensors, shards, whole, &src);
        for ((name, job), expected) in jobs.iter().zip(&expected) {
            let made = output(job, &src, &work.join("made"));
            assert_eq!(made.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
            for (file, bytes) in &made {
                if bytes != &expected[file] {
                    let lines = |b: &[u8]| String::from_utf8_lossy(b).lines().map(str::to_owned).collect::<Vec<_>>();
                    let (x, y) = (lines(&expected[file]), lines(bytes));
                    let first = x.iter().zip(&y).find(|(x, y)| x != y);
                    panic!("{name}, cut {i}: {file} differs, first in {first:?}; cut: {shards:?}");
                }
            }
        }
        std::fs::remove_dir_all(src).unwrap();
    }
}

#[test]
fn random_cuts_give_the_bytes_of_one_shard() {
    let dir = tempfile::tempdir().unwrap();
    let whole = small(dir.path(), 3);
    let tensors = read(&whole);
    let mut rng = Random::from_env("GPTOSS_CUTS_SEED");
    let cuts: Vec<_> = (0..CUTS).map(|_| random(&tensors, &mut rng)).collect();
    all_cuts_agree(&whole, &cuts, &tensors, &jobs(&tiny()), dir.path());
}

/// gpt-oss-20b has 24 layers in 3 shards, gpt-oss-120b 36 in 15, in the alphabetical order of names: a layer lies in two
/// shards, and layer 10 comes before layer 2.
#[test]
fn the_cuts_of_the_published_models_give_the_bytes_of_one_shard() {
    for (layers, shards) in [(24, 3), (36, 15)] {
        let dir = tempfile::tempdir().unwrap();
        let whole = small(dir.path(), layers);
        let tensors = read(&whole);
        all_cuts_agree(&whole, &[greedy(&tensors, shards)], &tensors, &jobs(&tiny()), dir.path());
    }
}

#[test]
fn cuts_of_the_trained_fixture_give_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = read(&tiny());
    let whole = dir.path().join("whole");
    write(&tensors, &[tensors.keys().collect()], &tiny(), &whole);
    let mut rng = Random::from_env("GPTOSS_CUTS_SEED");
    let cuts = [greedy(&tensors, 3), greedy(&tensors, 15), random(&tensors, &mut rng)];
    all_cuts_agree(&whole, &cuts, &tensors, &jobs(&tiny()), dir.path());

    // And what our own tool writes in small shards, BF16 experts in transformers' layout.
    let dense = |size: &str| {
        let to = dir.path().join(size);
        run(command(&format!("gptoss-dequant -q --shard-size {size} --src")).arg(&whole).arg("--dst").arg(&to))
            .manifest();
        to
    };
    let (one, many) = (dense("5GB"), dense("2MB"));
    assert!(files(&many).len() > files(&one).len() + 5);
    for (name, job) in &jobs(&tiny())[1..] {
        let (a, b) = (output(job, &one, &dir.path().join("a")), output(job, &many, &dir.path().join("b")));
        assert!(a == b, "{name} over shards of 2 MB");
    }
}

/// A target size chooses schemes by measured errors: those depend on no cut either.
#[test]
fn a_target_size_is_met_alike_whatever_the_cut() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = read(&tiny());
    let whole = dir.path().join("whole");
    write(&tensors, &[tensors.keys().collect()], &tiny(), &whole);
    let calib = tiny().join("calib.jsonl");
    let job = format!(
        "gptoss-quant -q --experts w4a16 --mw w8a16 --target-size 7MB --calib-jsonl {} --nsamples 3 --max-seq-length 48",
        support::word(&calib)
    );
    let mut rng = Random::from_env("GPTOSS_CUTS_SEED");
    let cuts = [greedy(&tensors, 3), random(&tensors, &mut rng)];
    all_cuts_agree(&whole, &cuts, &tensors, &[("target size", job)], dir.path());
}
