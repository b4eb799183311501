//! The forward pass against transformers' logits (golden/tiny-logits), against itself token by token and with other
//! numbers of threads, and against the plain reference on random small models.

use std::path::Path;

use gptoss::device::Device;
use gptoss::device::cpu::Cpu;
use gptoss::model::forward::{self, Places, Session};
use gptoss::model::{Model, reference};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Map, Value};

#[path = "support/synthetic.rs"]
mod synthetic;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn tiny() -> Model {
    Model::open(&Path::new(ROOT).join("tests/fixtures/tiny-gpt-oss")).unwrap()
}

/// Hidden states after each layer (the embedding first) and logits of a batch, layer by layer.
fn run(model: &Model, threads: usize, sequences: &[&[u32]]) -> (Vec<Vec<f32>>, Vec<f32>) {
    let device = Cpu::new(threads).unwrap();
    let lengths: Vec<usize> = sequences.iter().map(|s| s.len()).collect();
    let mut x = device.embed(&model.embedding(&device).unwrap(), &sequences.concat()).unwrap();
    let places = Places::new(&device, model, &vec![0; lengths.len()], &lengths).unwrap();
    let mut states = vec![device.download(x.clone()).unwrap()];
    for l in 0..model.config.layers {
        let layer = model.layer(&device, l).unwrap();
        let mut caches: Vec<_> = lengths.iter().map(|_| device.cache(&layer.attention)).collect();
        forward::layer(&device, model, &layer, &mut x, &places, &mut caches).unwrap();
        states.push(device.download(x.clone()).unwrap());
    }
    let head = model.head(&device).unwrap();
    (states, device.download(forward::logits(&device, model, &head, &x).unwrap()).unwrap())
}

/// Logits of one sequence, a token at a time.
fn token_by_token(model: &Model, ids: &[u32]) -> Vec<f32> {
    let device = Cpu::new(2).unwrap();
    let mut session = Session::new(&device, model).unwrap();
    let one = |&id| {
        let hidden = session.advance(&[id]).unwrap();
        device.download(session.logits(&hidden).unwrap()).unwrap()
    };
    ids.iter().flat_map(one).collect()
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

struct Golden(Vec<u8>);

impl Golden {
    fn open() -> Self {
        Self(std::fs::read(format!("{ROOT}/tests/golden/tiny-logits/tiny-logits.safetensors")).unwrap())
    }

    fn words<T>(&self, name: &str, convert: fn([u8; 4]) -> T) -> Vec<T> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let data = file.tensor(name).unwrap();
        let size = data.data().len() / data.shape().iter().product::<usize>();
        data.data().chunks_exact(size).map(|b| convert(b[..4].try_into().unwrap())).collect()
    }
}

#[test]
fn logits_and_hidden_states_are_transformers_logits() {
    let golden = Golden::open();
    let ids = golden.words("input_ids", u32::from_le_bytes);
    let (states, logits) = run(&tiny(), 2, &[&ids[..192], &ids[192..]]);
    let worst = farthest(&logits, &golden.words("logits", f32::from_le_bytes));
    assert!(worst < 1e-3, "a logit is off by {worst}");
    // transformers' last hidden state has gone through the final norm, so it is not among ours.
    for (i, state) in states[..4].iter().enumerate() {
        let worst = farthest(state, &golden.words(&format!("hidden.{i}"), f32::from_le_bytes));
        assert!(worst < 1e-3, "hidden state {i} is off by {worst}");
    }
    println!("farthest logit: {worst:e}");
}

#[test]
fn likelihoods_are_transformers_likelihoods() {
    let (golden, model) = (Golden::open(), tiny());
    let windows = golden.words("windows", u32::from_le_bytes);
    let want = golden.words("nll", f32::from_le_bytes);
    let windows: Vec<&[u32]> = windows.chunks(256).collect();
    let device = Cpu::new(2).unwrap();
    let (mut sum, mut worst) = (0f64, 0f64);
    for (windows, want) in windows.chunks(16).zip(want.chunks(16 * 255)) {
        let (_, logits) = run(&model, 2, windows);
        let targets: Vec<Option<u32>> = windows.iter().flat_map(|w| (1..=256).map(|i| w.get(i).copied())).collect();
        let logits = device.upload(logits, model.config.vocab).unwrap();
        let figures = device.compare(&logits, None, &targets).unwrap();
        let ours = figures.iter().zip(&targets).filter(|(_, t)| t.is_some()).map(|(f, _)| f.nll);
        for (ours, &want) in ours.zip(want) {
            sum += ours - f64::from(want);
            worst = worst.max((ours - f64::from(want)).abs());
        }
    }
    let mean = sum / (128.0 * 255.0);
    println!("mean difference {mean:e}, farthest {worst:e}");
    assert!(mean.abs() < 1e-4, "the mean is off by {mean}");
}

#[test]
fn a_token_has_the_same_bits_alone_in_a_batch_and_with_any_number_of_threads() {
    let model = tiny();
    let ids = Golden::open().words("input_ids", u32::from_le_bytes);
    // 160 tokens: past the window of 64, past the point where the cache forgets.
    let (first, second) = (&ids[..160], &ids[192..230]);
    let (_, batch) = run(&model, 2, &[first, second]);
    let (_, alone) = run(&model, 1, &[first]);
    assert_eq!(bits(&batch[..alone.len()]), bits(&alone));
    assert_eq!(bits(&run(&model, 5, &[first, second]).1), bits(&batch));
    assert_eq!(bits(&token_by_token(&model, first)), bits(&alone));
    // And in pieces: a prompt, then more.
    let device = Cpu::new(2).unwrap();
    let mut session = Session::new(&device, &model).unwrap();
    let mut pieces = Vec::new();
    for piece in [&first[..100], &first[100..101], &first[101..]] {
        let hidden = session.advance(piece).unwrap();
        pieces.extend(device.download(session.logits(&hidden).unwrap()).unwrap());
    }
    assert_eq!(bits(&pieces), bits(&alone));
}

#[test]
fn the_plain_reference_agrees_on_the_tiny_model() {
    let model = tiny();
    let ids = &Golden::open().words("input_ids", u32::from_le_bytes)[..96];
    let (_, fast) = run(&model, 2, &[ids]);
    let plain = reference::logits(&model, ids).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let worst = farthest(&fast, &plain);
    assert!(worst < 1e-3, "a logit is off by {worst}");
}

/// A small gpt-oss at random. Widths are odd where the container allows it.
fn small() -> impl Strategy<Value = Map<String, Value>> {
    let experts = (1usize..=8).prop_flat_map(|e| (Just(e), 1..=e.min(4)));
    let heads = (1usize..=3, 1usize..=3);
    let window = prop_oneof![Just(1usize), 2usize..6, Just(100)];
    (experts, heads, window, 1usize..=20, 5usize..=70, 3usize..=40, 1usize..=3, any::<[bool; 3]>()).prop_map(
        |((experts, top_k), (kv, group), window, half, hidden, inter, layers, [bias, tied, new_rope])| {
            let mut config = synthetic::config(&[
                ("num_hidden_layers", layers),
                ("num_local_experts", experts),
                ("num_experts_per_tok", top_k),
                ("hidden_size", hidden),
                ("intermediate_size", inter),
                ("num_attention_heads", kv * group),
                ("num_key_value_heads", kv),
                ("head_dim", 2 * half),
                ("vocab_size", 61),
                ("sliding_window", window),
            ]);
            config.insert("attention_bias".into(), bias.into());
            config.insert("tie_word_embeddings".into(), tied.into());
            if new_rope {
                let mut rope = config.remove("rope_scaling").unwrap();
                rope["rope_theta"] = 10_000.into();
                rope["truncate"] = true.into();
                config.insert("rope_parameters".into(), rope);
            }
            config
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 40, ..ProptestConfig::default() })]
    #[test]
    fn random_small_models_agree_with_the_plain_reference(
        config in small(),
        ids in prop::collection::vec(0u32..61, 1..24),
        seed: u64,
    ) {
        let dir = tempfile::tempdir().unwrap();
        synthetic::write_dense(dir.path(), &config, seed);
        let model = Model::open(dir.path()).unwrap();
        let (_, fast) = run(&model, 2, &[&ids]);
        let plain = reference::logits(&model, &ids).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let largest = plain.iter().fold(1f32, |m, v| m.max(v.abs()));
        let worst = farthest(&fast, &plain);
        prop_assert!(worst < 1e-4 * largest, "a logit is off by {} of {}", worst, largest);
        prop_assert_eq!(bits(&token_by_token(&model, &ids)), bits(&fast));
    }
}
