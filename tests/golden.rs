//! Codes, scales, zero points and packing against what compressed-tensors and llm-compressor computed, bit for bit
//! (golden/compressed_tensors, whose `make.py` says how).

use gptoss::algorithms::rtn::{Codes, rtn};
use gptoss::containers::compressed_tensors::{Activations, Scheme, Strategy};
use gptoss::formats::float::Float;
use gptoss::formats::int::IntFormat;
use gptoss::formats::minifloat::Minifloat;
use gptoss::formats::{FP8, MXFP4, NumberFormat};
use gptoss::recipe::Observer;
use safetensors::SafeTensors;

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/compressed_tensors/");

fn load(name: &str) -> Vec<u8> {
    std::fs::read(format!("{DIR}{name}.safetensors")).expect("the golden data is committed")
}

fn matches_golden(name: &str, scheme: Scheme) {
    let (weight, golden) = (load("weight"), load(name));
    let weight = SafeTensors::deserialize(&weight).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    let tensor = weight.tensor("weight").unwrap();
    let &[out, inp] = tensor.shape() else { panic!("a matrix") };
    let mut w = vec![0f32; out * inp];
    Float::Bf16.read(tensor.data(), &mut w);

    let extremes = w.iter().fold((0f32, 0f32), |(a, b), &w| (a.min(w), b.max(w)));
    let target = scheme.target(inp, Float::Bf16, extremes);
    let mut codes = Codes::default();
    rtn(&w, inp, target, Observer::Minmax, &mut codes);
    let mut parts = Vec::new();
    scheme.encode(&codes, 0, (out, inp), Float::Bf16, &mut parts);

    let mut specs = scheme.specs("", (out, inp), Float::Bf16);
    // Calibration's, of which the golden data has none.
    specs.retain(|s| s.name != ".input_scale");
    let theirs: Vec<&str> = golden.names().into_iter().filter(|n| *n != "dequantized").collect();
    assert_eq!(specs.len(), theirs.len(), "{name}: {theirs:?}");
    for (spec, ours) in specs.iter().zip(&parts) {
        let want = golden.tensor(spec.name.trim_start_matches('.')).unwrap();
        assert_eq!((want.dtype(), want.shape()), (spec.dtype, &spec.shape[..]), "{name} {}", spec.name);
        let differ = want.data().iter().zip(ours).filter(|(a, b)| a != b).count();
        assert!(want.data() == &ours[..], "{name} {}: {differ} of {} bytes differ", spec.name, ours.len());
    }

    let want = golden.tensor("dequantized").unwrap();
    let mut values = vec![0f32; out * inp];
    Float::F32.read(want.data(), &mut values);
    for (i, (&code, want)) in codes.codes.iter().zip(values).enumerate() {
        let have = target.format.dequantize(
            code,
            codes.params[i / inp * target.groups(inp) + i % inp / target.group],
            Float::Bf16,
        );
        assert_eq!(have.to_bits(), want.to_bits(), "{name}: value {i} is {have}, wanted {want}");
    }
}

fn scheme(num_bits: u8, symmetric: bool, strategy: Strategy, activations: Activations) -> Scheme {
    Scheme { weights: NumberFormat::Int(IntFormat { num_bits, symmetric }), strategy, activations }
}

fn float(weights: NumberFormat, strategy: Strategy, activations: Activations) -> Scheme {
    Scheme { weights, strategy, activations }
}

#[test]
fn w2a16_to_w7a16_are_bit_exact_and_odd_widths_are_dense() {
    for bits in [2, 3, 5, 6, 7] {
        matches_golden(&format!("W{bits}A16"), scheme(bits, true, Strategy::Group(128), Activations::Float));
    }
}

#[test]
fn w4a8_is_bit_exact() {
    matches_golden("W4A8", scheme(4, true, Strategy::Group(128), Activations::DynamicTokenInt8));
}

#[test]
fn fp8_is_bit_exact() {
    matches_golden("FP8_DYNAMIC", float(FP8, Strategy::Channel, Activations::DynamicTokenFp8));
}

#[test]
fn static_fp8_is_bit_exact() {
    matches_golden("FP8", float(FP8, Strategy::Tensor, Activations::StaticFp8));
}

#[test]
fn fp8_in_blocks_is_bit_exact() {
    matches_golden("FP8_BLOCK", float(FP8, Strategy::Block(128, 128), Activations::DynamicGroupFp8));
}

#[test]
fn mxfp8_is_bit_exact() {
    matches_golden("MXFP8A16", float(NumberFormat::Mx(Minifloat::E4M3), Strategy::Group(32), Activations::Float));
}

#[test]
fn nvfp4_is_bit_exact() {
    matches_golden("NVFP4A16", float(NumberFormat::Nvfp4, Strategy::Group(16), Activations::Float));
}

#[test]
fn w4afp8_is_bit_exact() {
    matches_golden("W4AFP8", scheme(4, true, Strategy::Group(128), Activations::DynamicTokenFp8));
}

#[test]
fn mxfp4_is_bit_exact() {
    matches_golden("MXFP4A16", float(MXFP4, Strategy::Group(32), Activations::Float));
}

#[test]
fn w4a16_is_bit_exact() {
    matches_golden("W4A16", scheme(4, true, Strategy::Group(128), Activations::Float));
}

#[test]
fn w4a16_asym_is_bit_exact() {
    matches_golden("W4A16_ASYM", scheme(4, false, Strategy::Group(128), Activations::Float));
}

#[test]
fn w8a16_is_bit_exact() {
    matches_golden("W8A16", scheme(8, true, Strategy::Group(128), Activations::Float));
}

#[test]
fn w8a8_is_bit_exact() {
    matches_golden("W8A8", scheme(8, true, Strategy::Channel, Activations::DynamicTokenInt8));
}

/// GPTQ beside llm-compressor's on one weight and Hessian, settings and scales equal: the error on disk and the codes.
mod gptq {
    use std::collections::BTreeMap;

    use gptoss::algorithms::rtn::{Codes, Target, rtn};
    use gptoss::algorithms::sweep::{Factor, Zeros};
    use gptoss::formats::float::Float;
    use gptoss::formats::int::IntFormat;
    use gptoss::formats::{FP8, NumberFormat};
    use gptoss::recipe::{ActOrder, Observer};
    use safetensors::SafeTensors;
    use serde_json::Value;

    const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/gptq/");

    fn values(tensors: &SafeTensors, name: &str) -> (Vec<f32>, Vec<usize>) {
        let tensor = tensors.tensor(name).unwrap();
        let mut out = vec![0f32; tensor.shape().iter().product()];
        Float::of(tensor.dtype()).expect("floats").read(tensor.data(), &mut out);
        (out, tensor.shape().to_vec())
    }

    /// tr(D H D^T) / 2 with H = 2 / n sum of x x^T.
    fn loss(q: &[f32], w: &[f32], hessian: &[f32], k: usize) -> f64 {
        let mut total = 0f64;
        for (q, w) in q.chunks_exact(k).zip(w.chunks_exact(k)) {
            let d: Vec<f64> = q.iter().zip(w).map(|(q, w)| f64::from(q - w)).collect();
            for (i, row) in hessian.chunks_exact(k).enumerate() {
                total += d[i] * row.iter().zip(&d).map(|(h, d)| f64::from(*h) * d).sum::<f64>();
            }
        }
        total / 2.0
    }

    #[test]
    fn every_recorded_case_is_met() {
        let bytes = std::fs::read(format!("{DIR}gptq.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let cases: BTreeMap<String, Value> =
            serde_json::from_slice(&std::fs::read(format!("{DIR}gptq.json")).unwrap()).unwrap();
        let ((w, shape), (hessian, _)) = (values(&golden, "weight"), values(&golden, "hessian"));
        let k = shape[1];
        for (name, case) in &cases {
            let args = &case["args"];
            let format = match args["type"].as_str().unwrap() {
                "float" => FP8,
                _ => NumberFormat::Int(IntFormat {
                    num_bits: args["num_bits"].as_u64().unwrap() as u8,
                    symmetric: args["symmetric"].as_bool().unwrap(),
                }),
            };
            let group = args["group_size"].as_u64().map_or(k, |g| g as usize);
            let target = Target::new(format, group, Float::Bf16);
            let order = if args["actorder"] == "static" { ActOrder::Static } else { ActOrder::Off };
            let factor = Factor::new(&hessian, 1, k, order, 0.01).unwrap();
            assert_eq!((factor.dead(), factor.dampening_frac), (2, 0.01));
            let ours = gptoss::algorithms::gptq::gptq(&w, &factor, target, Observer::Minmax, Zeros::None);
            let (theirs, _) = values(&golden, &format!("{name}.quantized"));
            let equal = ours.values.iter().zip(&theirs).filter(|(a, b)| a == b).count() as f64 / w.len() as f64;
            let error = loss(&ours.values, &w, &hessian, k);
            let mut nearest = Codes::default();
            rtn(&w, k, target, Observer::Minmax, &mut nearest);
            let params = |i: usize| nearest.params[i / group];
            let rounded: Vec<f32> = (nearest.codes.iter().enumerate())
                .map(|(i, &c)| format.dequantize(c, params(i), Float::Bf16))
                .collect();
            let floor = loss(&rounded, &w, &hessian, k);
            let recorded = case["error_tr_DHDt_half"].as_f64().unwrap();
            println!("{name}: error {error:.6} beside {recorded:.6}, rtn {floor:.6}, equal {equal:.5}");

            assert!(error <= 1.01 * recorded, "{name}: {error} > 1.01 x {recorded}");
            assert!(error < floor, "{name}: {error}, round to nearest has {floor}");
            assert!(equal >= 0.99, "{name}: only {equal} of the values are equal");
        }
    }
}

#[test]
fn ggml_s_block_types_are_gguf_py_s_bytes_and_values() {
    use gptoss::algorithms::rtn::Target;
    use gptoss::containers::gguf;
    use gptoss::formats::ggml::Ggml;
    use gptoss::ops::decode;

    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/gguf/gguf.safetensors");
    let bytes = std::fs::read(file).expect("the golden data is committed");
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = golden.tensor("weight").unwrap();
    let &[out, inp] = tensor.shape() else { panic!("a matrix") };
    let mut w = vec![0f32; out * inp];
    Float::F32.read(tensor.data(), &mut w);
    for ty in Ggml::ALL {
        let name = ty.name().to_uppercase();
        let mut codes = Codes::default();
        let target = Target::new(NumberFormat::Ggml(ty), ty.group(), Float::F32);
        rtn(&w, inp, target, Observer::Minmax, &mut codes);
        let packed = gguf::pack(&codes, ty);
        let want = golden.tensor(&name).unwrap();
        assert!(packed == want.data(), "{name}: {:?}", packed.iter().zip(want.data()).position(|(a, b)| a != b));
        let (mut have, mut values) = (vec![0f32; out * inp], vec![0f32; out * inp]);
        decode::ggml(ty, &packed, &mut have);
        Float::F32.read(golden.tensor(&format!("{name}.dequantized")).unwrap().data(), &mut values);
        assert!(have == values, "{name}");
    }
    for (name, float) in [("BF16", Float::Bf16), ("F16", Float::F16)] {
        let mut ours = Vec::new();
        w.iter().for_each(|&w| float.write(w, &mut ours));
        assert!(ours == golden.tensor(name).unwrap().data(), "{name}");
    }
}
