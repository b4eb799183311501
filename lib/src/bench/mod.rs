//! How fast products are: the kernels of this processor and of a GPU beside products of floats, on the same shapes, in the same run.

pub mod cpu;
pub mod gpu;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernels::gpu::hopper;
use crate::kernels::gpu::product::{Block, PRODUCTS};
use crate::ops::random::Draw;

/// A linear layer, or the same one of all experts of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// What people call it, such as `experts.down_proj` or `4096x4096`.
    pub name: String,
    /// Outputs.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// How many experts there are, and how many a token goes to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub experts: Option<(usize, usize)>,
}

/// A product on some shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GemmRow {
    /// `gpu` or `cpu`.
    pub device: String,
    /// The shape's name.
    pub layer: String,
    /// What multiplied: `cublas-bf16`, `cublas-f16`, `f32`, or a kernel.
    pub kernel: String,
    /// Tokens.
    pub m: usize,
    /// Outputs.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Columns of a scale of the weight; 0 of floats.
    pub group: usize,
    /// What a block of the kernel has, on a GPU; of a whole layer of experts, of its first product. With 64 tokens it multiplies by `wgmma`, else by `mma.sync`: that and the kernels' build fix the order
    /// in which tensor cores add products of bf16.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub block: Option<Block>,
    /// Weights that were read: 1, or the experts that the tokens went to.
    pub weights: usize,
    /// How many sets of them took turns, so that no cache holds what is read.
    pub copies: usize,
    /// How often each was timed.
    pub runs: usize,
    /// Median. Rounding of the inputs is included.
    pub microseconds: f64,
    /// A tenth of the runs were faster. On a GPU a run is a graph of 32 launches or more, and this their mean.
    pub fast_microseconds: f64,
    /// A tenth of the runs were slower.
    pub slow_microseconds: f64,
    /// 10^12 operations a second; a product and a sum are two.
    pub teraflops: f64,
    /// 10^9 bytes of weights, inputs and outputs a second.
    pub gigabytes_per_second: f64,
    /// How many times the speed of the products of floats on this device: cuBLAS's FP16, or f32 on a processor. Over experts cuBLAS multiplies once
    /// for each, its rows gathered already; kernels on a GPU of 9.0 or later may begin while the one before ends.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub speedup: Option<f64>,
    /// That rate beside the one that was measured here: of copies within a GPU (each byte is read and written), of plain reads on a processor.
    pub bandwidth_share: f64,
}

/// A layer of experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mixture {
    /// What it is called in rows.
    pub name: String,
    /// Hidden size, and that of each expert.
    pub hidden: usize,
    /// The size between up and down.
    pub inner: usize,
    /// How many experts there are, and how many a token goes to.
    pub experts: (usize, usize),
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct Request {
    /// Numbers of tokens.
    pub m: Vec<usize>,
    /// Layers.
    pub shapes: Vec<Shape>,
    /// A whole layer of experts, on a GPU.
    pub mixture: Option<Mixture>,
    /// Columns of a scale of int4 and int8; the largest of 128, 64, 32 that divides K where `None`.
    pub group: Option<usize>,
    /// Runs of each.
    pub iters: usize,
    /// Only kernels whose names contain one of these; all where empty.
    pub kernels: Vec<String>,
    /// Blocks of the kernels on a GPU; what suits it where `None`.
    pub block: Option<Block>,
    /// Most memory for copies of weights on this processor; one copy there is always.
    pub memory: u64,
}

/// Names of all kernels, and of what they are compared with.
pub fn names() -> Vec<&'static str> {
    let mut names = vec!["f32", "cublas-f16", "cublas-bf16", "cublas-f16-grouped"];
    names.extend(PRODUCTS.iter().map(|p| p.name));
    names.extend([false, true].map(hopper::name));
    names
}

impl Request {
    /// Columns of a scale for `k` columns; `None` where the one asked for does not divide them.
    pub fn group_of(&self, k: usize) -> Option<usize> {
        match self.group {
            Some(group) => k.is_multiple_of(group).then_some(group),
            None => [128, 64, 32].into_iter().find(|g| k.is_multiple_of(*g)),
        }
    }

    /// Why a kernel is not measured on a shape.
    fn no_group(&self, kernel: &str, shape: &Shape) -> String {
        let group = self.group.map_or("none of 128, 64 and 32".into(), |g| format!("{g} is no part of it"));
        format!("{kernel} on {} is left out: K is {}, {group}", shape.name, shape.k)
    }

    fn wants(&self, kernel: &str) -> bool {
        self.kernels.is_empty() || self.kernels.iter().any(|k| kernel.contains(&k[..]))
    }
}

/// The linear layers of a model: attention as vLLM and transformers have it, experts by projection.
///
/// `None` for other names than gpt-oss-20b and gpt-oss-120b.
pub fn shapes_of(model: &str) -> Option<Vec<Shape>> {
    let count = match model {
        "gpt-oss-20b" => 32,
        "gpt-oss-120b" => 128,
        _ => return None,
    };
    let one = |name: &str, n, k, experts| Shape { name: name.into(), n, k, experts };
    Some(vec![
        one("q_proj", 4096, 2880, None),
        one("k_proj", 512, 2880, None),
        one("o_proj", 2880, 4096, None),
        one("experts.gate_up_proj", 5760, 2880, Some((count, 4))),
        one("experts.down_proj", 2880, 2880, Some((count, 4))),
        one("lm_head", 201_088, 2880, None),
    ])
}

/// The layer of experts of the model that [`shapes_of`] gives the shapes of.
pub fn mixture_of(shapes: &[Shape]) -> Option<Mixture> {
    let down = shapes.iter().find(|s| s.name == "experts.down_proj")?;
    Some(Mixture { name: "experts, the whole layer".into(), hidden: down.n, inner: down.k, experts: down.experts? })
}

/// Which experts each of `m` tokens goes to: [m, top_k], ascending in each token, the same every time.
fn routing(m: usize, (count, top_k): (usize, usize)) -> Vec<usize> {
    let mut draw = Draw::new(1);
    let mut all = Vec::with_capacity(m * top_k);
    for _ in 0..m {
        let mut own: Vec<usize> = Vec::with_capacity(top_k);
        while own.len() < top_k {
            let expert = draw.below(count);
            if !own.contains(&expert) {
                own.push(expert);
            }
        }
        own.sort_unstable();
        all.extend(own);
    }
    all
}

/// What was multiplied and how long that took.
struct Measured<'a> {
    device: &'static str,
    shape: &'a Shape,
    kernel: String,
    m: usize,
    group: usize,
    block: Option<Block>,
    /// Rows of inputs that were multiplied, and weights that they met.
    rows: usize,
    weights: usize,
    /// Bytes of all that is read and written once.
    bytes: usize,
    copies: usize,
    seconds: Vec<f64>,
}

impl Measured<'_> {
    /// Seconds.
    fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[(sorted.len() - 1) / 2]
    }

    /// The row, with `baseline` microseconds and `rate` bytes a second to compare with.
    fn row(mut self, baseline: Option<f64>, rate: f64) -> GemmRow {
        self.seconds.sort_by(f64::total_cmp);
        let at = |tenths: usize| self.seconds[(self.seconds.len() - 1) * tenths / 10];
        let median = self.median();
        let Shape { name, n, k, .. } = self.shape;
        GemmRow {
            device: self.device.into(),
            layer: name.clone(),
            kernel: self.kernel,
            m: self.m,
            n: *n,
            k: *k,
            group: self.group,
            block: self.block,
            weights: self.weights,
            copies: self.copies,
            runs: self.seconds.len(),
            microseconds: median * 1e6,
            fast_microseconds: at(1) * 1e6,
            slow_microseconds: at(9) * 1e6,
            teraflops: 2.0 * self.rows as f64 * (*n as f64) * (*k as f64) / median / 1e12,
            gigabytes_per_second: self.bytes as f64 / median / 1e9,
            speedup: baseline.map(|b| b / (median * 1e6)),
            bandwidth_share: self.bytes as f64 / median / rate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_to_as_many_experts_as_they_should() {
        let routes = routing(100, (32, 4));
        assert!(routes.chunks(4).all(|own| own.is_sorted_by(|a, b| a < b) && own[3] < 32));
        assert!((0..32).all(|e| routes.contains(&e)));
        assert_eq!(routes, routing(100, (32, 4)));
    }

    #[test]
    fn figures_follow_from_times() {
        let shape = Shape { name: "x".into(), n: 1000, k: 500, experts: None };
        let measured = Measured {
            device: "cpu",
            shape: &shape,
            kernel: "w4a8".into(),
            m: 4,
            group: 32,
            block: None,
            rows: 4,
            weights: 1,
            bytes: 2_000_000,
            copies: 8,
            seconds: vec![4e-3, 2e-3, 1e-3],
        };
        let row = measured.row(Some(6000.0), 2e9);
        assert_eq!((row.microseconds, row.speedup, row.gigabytes_per_second), (2000.0, Some(3.0), 1.0));
        assert_eq!((row.teraflops, row.bandwidth_share), (0.002, 0.5));
    }

    #[test]
    fn groups_divide_columns() {
        let (m, shapes, kernels) = (vec![1], Vec::new(), Vec::new());
        let mut request = Request { m, shapes, mixture: None, group: None, iters: 1, kernels, block: None, memory: 0 };
        assert_eq!([4096, 2880, 96, 48].map(|k| request.group_of(k)), [Some(128), Some(64), Some(32), None]);
        request.group = Some(128);
        assert_eq!([4096, 2880].map(|k| request.group_of(k)), [Some(128), None]);
    }
}
