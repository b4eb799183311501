//! Every kernel on the GPU beside what this processor computes.

mod formats;
mod pattern;
mod products;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::hopper;
use super::product::{PRODUCTS, Product};
use super::{Buffer, Gpu};
use crate::error::Result;
use crate::formats::float::Float;
use crate::ops::random::Draw;

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
    /// XXH3 of the bits of all numbers, in the order in which they are compared: the same on every GPU that gives the same bits.
    #[serde(default)]
    pub digest: String,
    /// The first case that is wrong.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<String>,
    /// What the wrong outputs of that case have in common.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pattern: Option<String>,
}

impl KernelTest {
    fn new(kernel: impl Into<String>, exact: bool) -> Self {
        let (kernel, digest) = (kernel.into(), String::new());
        Self { kernel, cases: 0, numbers: 0, same: 0, exact, error: 0.0, digest, failure: None, pattern: None }
    }

    /// Nothing could be looked at, for this reason.
    pub fn failed(kernel: impl Into<String>, why: String) -> Self {
        Self { failure: Some(why), ..Self::new(kernel, true) }
    }

    /// Takes the numbers of a case into the digest.
    fn digest(&mut self, numbers: &[f32]) {
        let mut hash = twox_hash::XxHash3_128::default();
        hash.write(self.digest.as_bytes());
        numbers.iter().for_each(|n| hash.write(&n.to_bits().to_le_bytes()));
        self.digest = format!("{:032x}", hash.finish_128());
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
        self.digest(have);
        self.see_each(have, want, case);
    }

    /// The same of what not every GPU has: the digest is without them.
    fn see_each(&mut self, have: &[f32], want: &[f32], case: &str) {
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

/// A test of a kernel.
#[derive(Debug, Clone, Copy)]
enum Subject {
    Quantize,
    Normalize,
    Dequantize,
    Fake,
    Mask,
    Single(Product),
    Experts(Product),
    Chain,
    Hopper { fp8: bool },
}

impl Subject {
    /// All of them, the simplest first, those for Hopper last.
    fn all() -> impl Iterator<Item = Self> {
        let simple = [Self::Quantize, Self::Normalize, Self::Dequantize, Self::Fake, Self::Mask].into_iter();
        let products = PRODUCTS.into_iter().map(Self::Single).chain(PRODUCTS.into_iter().map(Self::Experts));
        simple.chain(products).chain([Self::Chain]).chain([false, true].map(|fp8| Self::Hopper { fp8 }))
    }

    fn name(self) -> String {
        match self {
            Self::Quantize => "quantize_activations".into(),
            Self::Normalize => "normalize_activations".into(),
            Self::Dequantize => "dequantize_mxfp4".into(),
            Self::Fake => "fake_quantize".into(),
            Self::Mask => "mask_2_4".into(),
            Self::Single(product) => product.name.into(),
            Self::Experts(product) => format!("{}_experts", product.name),
            Self::Chain => "chain".into(),
            Self::Hopper { fp8 } => hopper::name(fp8).into(),
        }
    }

    fn run(self, gpu: &Gpu, extent: Extent) -> Result<KernelTest> {
        match self {
            Self::Quantize => formats::quantize(gpu),
            Self::Normalize => formats::normalize(gpu),
            Self::Dequantize => formats::dequantize(gpu),
            Self::Fake => formats::fake(gpu),
            Self::Mask => formats::mask(gpu),
            Self::Single(product) => products::single(gpu, product, extent),
            Self::Experts(product) => products::experts(gpu, product, extent),
            Self::Chain => products::chain(gpu, extent),
            Self::Hopper { fp8 } => products::hopper(gpu, fp8, extent),
        }
    }
}

/// Names of the tests, the simplest first; all where `only` is empty, else those that contain one of these words.
pub fn names(only: &[String]) -> Vec<String> {
    let wanted = |name: &String| only.is_empty() || only.iter().any(|o| name.contains(&o[..]));
    Subject::all().map(Subject::name).filter(wanted).collect()
}

/// Runs the test of this name; `None` for a kernel that the build has not, and for one of Hopper elsewhere. What the driver refuses is a failure.
///
/// An access outside of an array ends the process's use of the GPU, and a kernel may never end: whoever runs several gives each a process
/// of its own.
pub fn run(gpu: &Gpu, extent: Extent, name: &str) -> Option<KernelTest> {
    let subject = Subject::all().find(|s| s.name() == name)?;
    if matches!(subject, Subject::Hopper { .. }) && !gpu.has_hopper() {
        return None;
    }
    Some(subject.run(gpu, extent).unwrap_or_else(|e| KernelTest::failed(name, e.to_string())))
}
