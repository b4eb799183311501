//! Every kernel on the GPU beside what this processor computes.

mod formats;
mod products;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::hopper;
use super::operations::PRODUCTS;
use super::{Buffer, Gpu};
use crate::error::Result;
use crate::formats::float::Float;
use crate::ops::random::Draw;
use crate::pipeline::progress::Progress;

/// What became of a kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelTest {
    /// Its name; of a product over experts with `_experts` behind it.
    pub kernel: String,
    /// Launches that were looked at.
    pub cases: usize,
    /// Numbers that were compared.
    pub numbers: usize,
    /// Of these, how many have the same bits as the reference.
    pub same: usize,
    /// True where all of them have to.
    pub exact: bool,
    /// The greatest distance from the result in f64, in parts of what rounding the sums and the output may do: at most 1. 0 where the bits are
    /// compared.
    pub error: f64,
    /// The first case that is wrong.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<String>,
}

impl KernelTest {
    fn new(kernel: impl Into<String>, exact: bool) -> Self {
        Self { kernel: kernel.into(), cases: 0, numbers: 0, same: 0, exact, error: 0.0, failure: None }
    }

    /// A number of the kernel beside the reference; `error` is their distance in parts of what is allowed.
    fn see(&mut self, have: f32, want: f32, error: f64, place: impl FnOnce() -> String) {
        self.numbers += 1;
        let same = have.to_bits() == want.to_bits() || have.is_nan() && want.is_nan();
        self.same += usize::from(same);
        let error = if self.exact { 0.0 } else { error };
        self.error = self.error.max(if error.is_nan() { f64::INFINITY } else { error });
        let right = if self.exact { same } else { error <= 1.0 };
        if !right && self.failure.is_none() {
            self.failure = Some(format!("{}: {have:e}, wanted {want:e}", place()));
        }
    }

    /// Numbers that have to have the same bits.
    fn see_all(&mut self, have: &[f32], want: &[f32], case: &str) {
        self.cases += 1;
        assert_eq!(have.len(), want.len(), "as many numbers");
        for (i, (&h, &w)) in have.iter().zip(want).enumerate() {
            self.see(h, w, f64::INFINITY, || format!("{case}, number {i}"));
        }
    }
}

/// Which shapes are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Small ones: seconds on a GPU.
    Small,
    /// Those of gpt-oss too.
    Models,
}

/// Sums of four, so that most are small.
fn numbers(draw: &mut Draw, n: usize, float: Float) -> Vec<f32> {
    (0..n).map(|_| float.round(draw.unit() + draw.unit() + draw.unit() + draw.unit())).collect()
}

fn stored(values: &[f32], float: Float) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * float.size());
    values.iter().for_each(|&v| float.write(v, &mut bytes));
    bytes
}

fn read(gpu: &Gpu, buffer: &Buffer, float: Float) -> Result<Vec<f32>> {
    let bytes: Vec<u8> = gpu.download(buffer)?;
    let mut values = vec![0f32; bytes.len() / float.size()];
    float.read(&bytes, &mut values);
    Ok(values)
}

/// Tests every kernel of the installed build whose name contains one of `only`; all of them where that is empty. What the driver refuses is a
/// failure of the kernel.
pub fn run(gpu: &Gpu, extent: Extent, only: &[String], progress: &Progress) -> Vec<KernelTest> {
    let mut tests = Vec::new();
    let mut add = |name: &str, test: &dyn Fn() -> Result<KernelTest>| {
        if only.is_empty() || only.iter().any(|o| name.contains(&o[..])) {
            // One that fails to launch is no reason not to look at the others.
            let test =
                test().unwrap_or_else(|e| KernelTest { failure: Some(e.to_string()), ..KernelTest::new(name, true) });
            let outcome = test.failure.as_deref().unwrap_or("right");
            progress.note(&format!("{}: {} launches, {outcome}", test.kernel, test.cases));
            tests.push(test);
        }
    };
    add("quantize_activations", &|| formats::quantize(gpu));
    add("dequantize_mxfp4", &|| formats::dequantize(gpu));
    add("fake_quantize", &|| formats::fake(gpu));
    add("mask_2_4", &|| formats::mask(gpu));
    for product in PRODUCTS {
        add(product.name, &|| products::single(gpu, product, extent));
        add(&format!("{}_experts", product.name), &|| products::experts(gpu, product, extent));
    }
    add("chain", &|| products::chain(gpu, extent));
    if gpu.has_hopper() {
        for fp8 in [false, true] {
            add(hopper::name(fp8), &|| products::hopper(gpu, fp8, extent));
        }
    }
    tests
}
