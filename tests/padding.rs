//! --pad-to: wider models that compute the same function.

mod support;

use std::path::Path;

use gptoss::device::Device;
use gptoss::device::cpu::Cpu;
use gptoss::formats::float::Float;
use gptoss::model::Model;
use gptoss::model::forward::Session;
use serde_json::Value;
use support::{Shard, command, run, tiny};

const IDS: [u32; 24] =
    [5, 900, 33, 2, 1500, 77, 41, 8, 300, 301, 302, 9, 9, 9, 1024, 64, 7, 512, 600, 13, 1999, 2, 3, 4];

fn logits(dir: &Path) -> Vec<f32> {
    let (model, device) = (Model::open(dir).unwrap(), Cpu::new(2).unwrap());
    let mut session = Session::new(&device, &model).unwrap();
    let hidden = session.advance(&IDS).unwrap();
    device.download(session.logits(&hidden).unwrap()).unwrap()
}

fn quant(src: &Path, dst: &Path, flags: &str) -> Value {
    let mut command = command("gptoss-quant --quiet --calib-jsonl");
    command.arg(tiny().join("calib.jsonl")).args(support::words(flags));
    run(command.arg("--model-in").arg(src).arg("--output-dir").arg(dst)).manifest()
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_wider_model_has_the_same_logits_in_every_container_and_from_every_source() {
    let dir = tempfile::tempdir().unwrap();
    let bf16 = dir.path().join("bf16");
    run(command("gptoss-dequant --quiet").arg("--src").arg(tiny()).arg("--dst").arg(&bf16)).manifest();
    let want = logits(&tiny());
    // 320 and 160; 256 and 256.
    for (i, flags) in
        ["--pad-to 160", "--pad-to 256", "--pad-to 160 --container gguf", "--pad-to 160 --container dense"]
            .iter()
            .enumerate()
    {
        for (source, name) in [(tiny(), "mxfp4"), (bf16.clone(), "bf16")] {
            let out = dir.path().join(format!("{name}{i}"));
            let manifest = quant(&source, &out, &format!("--algo rtn --experts keep --mw keep {flags}"));
            let distance = farthest(&logits(&out), &want);
            println!("{flags} {name}: {distance:e}");
            assert!(distance < 1e-4, "{flags} {name}: {distance}");
            assert!(manifest["notes"].to_string().contains("padded from"), "{manifest}");
            let checked = run(command("gptoss-verify check --quiet").arg(&out)).manifest();
            assert_eq!(checked["verdict"]["passed"], true, "{checked}");
            let against = run(command("gptoss-verify against --quiet").arg(&source).arg(&out)).manifest();
            assert_eq!(against["verdict"]["total_error"]["max"], 0.0, "{against}");
        }
    }
}

/// Codes on padded widths are those on the source's own: the same groups, but for the zeros behind them.
#[test]
fn rounding_a_wider_model_rounds_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    for (i, recipe) in [
        "--algo rtn --experts w4a16 --mw w8a16 --group-size 32",
        "--algo rtn --experts mxfp4 --mw w4a16 --mw-group-size 32 --mw-symmetry asymmetric",
        "--algo rtn --experts w8a16 --mw fp8a16 --group-size channel",
        "--algo rtn --experts nvfp4 --mw mxfp8",
        "--algo rtn --experts q4_0 --mw q8_0",
        "--algo rtn --experts mxfp4 --mw keep --container openai",
    ]
    .iter()
    .enumerate()
    {
        let (narrow, wide) = (dir.path().join(format!("n{i}")), dir.path().join(format!("w{i}")));
        quant(&tiny(), &narrow, recipe);
        quant(&tiny(), &wide, &format!("{recipe} --pad-to 160"));
        let distance = farthest(&logits(&wide), &logits(&narrow));
        println!("{recipe}: {distance:e}");
        assert!(distance < 1e-4, "{recipe}: {distance}");
    }
}

/// What looks at a text looks at the wider model, whose padding sees zeros: no worse than on the narrow one.
#[test]
fn calibration_on_a_wider_model_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    let want = logits(&tiny());
    let lost = |out: &Path| logits(out).iter().zip(&want).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    for recipe in [
        "--algo gptq --experts w4a16 --mw w4a16",
        "--algo awq --experts w4a16 --mw w4a16",
        "--algo gptq --experts w4a16 --mw w8a8 --smoothquant-strength 0.5",
        "--algo gptq --experts mxfp4 --mw w4a16 --with-sparse --sparse-algo wanda",
    ] {
        let (narrow, wide) = (dir.path().join("n"), dir.path().join("w"));
        let flags = format!("{recipe} --group-size 32 --nsamples 16 --max-seq-length 128 --force");
        quant(&tiny(), &narrow, &flags);
        quant(&tiny(), &wide, &format!("{flags} --pad-to 160"));
        let ratio = lost(&wide) / lost(&narrow);
        println!("{recipe}: {ratio}");
        assert!((0.5..1.5).contains(&ratio), "{recipe}: {ratio}");
    }
}

/// A runtime that rounds the scaled norms to BF16 changes little: the figure that the README gives.
#[test]
fn norms_in_bf16_cost_little() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("wide");
    quant(&tiny(), &out, "--algo rtn --experts keep --mw keep --pad-to 160");
    let file = out.join("model-00001-of-00001.safetensors");
    let mut shard = Shard::read(&file);
    let norms: Vec<String> = shard.header.keys().filter(|n| n.ends_with("norm.weight")).cloned().collect();
    assert_eq!(norms.len(), 9);
    for name in norms {
        assert_eq!(shard.header[&name]["dtype"], "F32");
        for number in shard.tensor(&name).chunks_exact_mut(4) {
            let value = f32::from_le_bytes(number.try_into().unwrap());
            number.copy_from_slice(&Float::Bf16.round(value).to_le_bytes());
        }
    }
    shard.write(&file);
    let mut quality = command("gptoss-verify quality --quiet --nsamples 32 --max-seq-length 256 --text");
    quality.arg(tiny().join("test.jsonl")).arg("--against").arg(tiny()).arg(&out);
    let kl = run(&mut quality).manifest()["quality"]["reference"]["kl_mean"].as_f64().unwrap();
    println!("mean KL {kl:.2e}");
    assert!(kl > 0.0 && kl < 2e-4, "{kl}");
}

#[test]
fn group_128_and_formats_of_256_fit_the_published_models_once_they_are_padded() {
    for (flags, bytes) in [
        ("--experts w4a16 --mw w4a16 --group-size 128 --pad-to 128", 12..14),
        ("--experts tq2_0 --mw q8_0 --container gguf --pad-to 256", 6..10),
    ] {
        let config = support::root().join("tests/fixtures/configs/gpt-oss-20b.json");
        let mut plan = command("gptoss-quant --quiet --dry-run --algo rtn");
        plan.args(support::words(flags)).arg("--model-in").arg(config);
        let ran = run(&mut plan);
        let manifest = ran.manifest();
        let size = manifest["plan"]["bytes"].as_u64().unwrap() >> 30;
        assert!(bytes.contains(&size), "{flags}: {size} GiB");
    }
    let mut wrong = command("gptoss-quant --quiet --dry-run --algo rtn --pad-to 100 --model-in");
    let ran = run(wrong.arg(tiny()));
    assert!(ran.code == 2 && ran.err.contains("--pad-to 100: wanted a multiple of 32 up to 65536"), "{ran:?}");
}
