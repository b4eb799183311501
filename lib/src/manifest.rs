//! The JSON that the tools hand each other through stdin and stdout, and that lies in every folder that they write.
//! Everything outside `volatile` is a function of the input bytes, the recipe and the version; a folder's own manifest
//! leaves `volatile` out.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{MANIFEST, files};
use crate::engine::Numerics;
use crate::error::{Error, Result};
use crate::formats::float::Float;
use crate::ops::dequantize::HalfCounts;
use crate::recipe::Recipe;

/// The version of the schema that this program writes and reads.
pub const SCHEMA: &str = "gptoss.manifest/1";

/// The arithmetic of this version; raised when a change of code changes bits, so that no run resumes across it.
pub const NUMERICS: &str = "cpu-1";

/// The same of the engine, whose inputs are int8.
pub const ENGINE_NUMERICS: &str = "cpu-engine-1";

/// One manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always "gptoss.manifest/1".
    pub schema: String,
    /// The program that wrote it.
    pub tool: Tool,
    /// What it was asked to do.
    pub job: Job,
    /// Which arithmetic made the bits.
    pub numerics: String,
    /// The checkpoint that was read.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source: Option<FileSet>,
    /// The checkpoint that was written or checked.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output: Option<FileSet>,
    /// What a dry run would write.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub plan: Option<PlanReport>,
    /// What the model's weights look like in the output: one line a family of tensors.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub tensors: Vec<TensorReport>,
    /// The text that a calibrated recipe was fitted to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub calibration: Option<crate::text::TextReport>,
    /// How many tokens each expert saw, one line a layer.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub coverage: Vec<Coverage>,
    /// Numbers that a 16-bit float could not hold.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub conversion: Option<HalfCounts>,
    /// Which runtimes load the output, by which rule.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub runtimes: Vec<RuntimeReport>,
    /// What a reader of the output must know.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
    /// What `gptoss-verify` found.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub verdict: Option<Verdict>,
    /// What a text says about the checkpoint, from `gptoss-verify quality`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub quality: Option<crate::verify::quality::QualityReport>,
    /// The machine, from `gptoss-verify env`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub environment: Option<crate::verify::env::Environment>,
    /// The kernels that `gptoss-kernel-install` built.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kernels: Option<crate::kernels::store::KernelBuild>,
    /// What each of them gave on the GPU, from `gptoss-verify kernels`.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub kernel_tests: Vec<crate::kernels::gpu::selftest::KernelTest>,
    /// What differs from run to run.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub volatile: Option<Volatile>,
}

/// A program and its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// `gptoss-dequant` ...
    pub name: String,
    /// The toolkit's version.
    pub version: String,
}

/// What was asked for, resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
#[allow(clippy::large_enum_variant, reason = "a manifest has one job")]
pub enum Job {
    /// Any container to plain floats.
    Dequantize {
        /// The type of every float tensor in the output.
        dtype: Float,
        /// Most bytes of data in a shard.
        shard_size: u64,
    },
    /// Floats or MXFP4 to codes.
    Quantize {
        /// The recipe.
        recipe: Recipe,
    },
    /// A checkpoint against its manifest and its own headers.
    Check,
    /// A checkpoint against the one that it was made from.
    Against,
    /// A checkpoint on a text.
    Quality {
        /// True where the source went through the same text.
        against: bool,
    },
    /// How fast a checkpoint runs here.
    Bench {
        /// `decode` or `prefill`.
        what: String,
        /// Tokens in the cache before, or 0.
        context: usize,
        /// Tokens that were timed.
        tokens: usize,
    },
    /// How fast products are here.
    Gemm {
        /// Numbers of tokens.
        m: Vec<usize>,
        /// Layers.
        shapes: Vec<crate::bench::Shape>,
        /// Runs of each, at most.
        iters: usize,
        /// Columns of a scale of int4 and int8, where that was asked for.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        group: Option<usize>,
        /// Blocks of the kernels on a GPU, where that was asked for.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        block: Option<crate::kernels::gpu::product::Block>,
        /// Parts of kernels' names, where not all were measured.
        #[serde(skip_serializing_if = "Vec::is_empty", default)]
        only: Vec<String>,
    },
    /// Which runtimes load a checkpoint.
    Runtimes,
    /// The CUDA kernels.
    #[serde(rename = "install-kernels")]
    InstallKernels,
    /// Those that are installed, on the GPU.
    #[serde(rename = "test-kernels")]
    TestKernels,
    /// Another job once more.
    Reproduce {
        /// It.
        job: Box<Job>,
    },
    /// The machine.
    Env,
}

/// The files of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileSet {
    /// How the weights are laid out: `mxfp4`, `bf16`, `fp16`, `fp32`, `compressed-tensors`, or several with `+`.
    pub layout: String,
    /// Sum of the files' sizes.
    pub bytes: u64,
    /// Every file that belongs to the model, by name; the manifest itself is not among them.
    pub files: Vec<FileRecord>,
}

impl FileSet {
    /// Adds up the sizes.
    pub fn new(layout: String, files: Vec<FileRecord>) -> Self {
        Self { layout, bytes: files.iter().map(|f| f.bytes).sum(), files }
    }
}

/// The size of an output that was planned and not written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanReport {
    /// Bytes of all shards.
    pub bytes: u64,
    /// How many shards.
    pub shards: u64,
    /// How many tensors.
    pub tensors: u64,
    /// False where only a config.json was there.
    pub weights_read: bool,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Name in the folder.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

impl FileRecord {
    /// Checks that the name stays in its folder.
    ///
    /// # Errors
    /// [`Error::BadManifest`] for an absolute path and for one that climbs out.
    pub fn require_plain_name(&self) -> Result<()> {
        let plain = |c| matches!(c, std::path::Component::Normal(_));
        if !self.name.is_empty() && std::path::Path::new(&self.name).components().all(plain) {
            return Ok(());
        }
        let reason = format!("names the file {:?}, which is no name in a folder", self.name);
        Err(Error::BadManifest { origin: "the manifest".into(), reason })
    }
}

/// A family of tensors, such as the gate projections of all experts of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TensorReport {
    /// `model.layers.0.self_attn.q_proj`, `model.layers.0.mlp.experts.*.gate_proj`.
    pub name: String,
    /// How many matrices.
    pub tensors: u64,
    /// How many numbers.
    pub parameters: u64,
    /// How they are stored.
    pub stored: String,
    /// What storing them so changed; absent where it changed nothing.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<ErrorReport>,
}

/// The tokens that the experts of a layer saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Coverage {
    /// The layer.
    pub layer: usize,
    /// Tokens of the text.
    pub tokens: u64,
    /// Tokens that the router sent to each expert.
    pub experts: Vec<u64>,
    /// Experts below the recipe's threshold.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub few: Vec<usize>,
}

/// The difference between stored and original values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ErrorReport {
    /// Greatest absolute difference.
    pub max: f64,
    /// Root of the mean squared difference.
    pub rms: f64,
    /// Norm of the difference over the norm of the original.
    pub relative: f64,
    /// Share of the codes that are 0, where they have two bits and no zero point.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub zeros: Option<f64>,
    /// Numbers that are NaN or infinite on one side; the other figures leave them out.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub non_finite: u64,
    /// Greatest `relative` of a single matrix, and which.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub worst: Option<Worst>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The matrix of a family that lost most.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Worst {
    /// The module.
    pub name: String,
    /// Its relative error.
    pub relative: f64,
}

/// What a runtime does with the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuntimeReport {
    /// `vllm`, `transformers`, `llama.cpp`.
    pub runtime: String,
    /// What happens.
    pub status: Loads,
    /// Why.
    pub reason: String,
    /// Where that was read.
    #[serde(default)]
    pub source: String,
}

/// Whether a runtime loads a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Loads {
    /// It loads and computes what the weights say.
    Loads,
    /// It loads but ignores or garbles something.
    LoadsWrongly,
    /// It refuses.
    DoesNotLoad,
}

/// The outcome of a check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// True where nothing contradicts anything.
    pub passed: bool,
    /// Tensors looked at; of a job that was done again, files.
    pub tensors: u64,
    /// True where hashes could be compared with a manifest.
    pub hashes_checked: bool,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// All weights together against the source; absent without one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub total_error: Option<ErrorReport>,
}

/// One contradiction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// `hash`, `size`, `missing`, `extra`, `index`, `tensor`, `header`, `value`, `config`, `manifest`.
    pub kind: String,
    /// The file.
    pub file: String,
    /// What is wrong, with the tensor's name where there is one.
    pub message: String,
}

/// What differs from run to run and proves nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Volatile {
    /// Full path of the source.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source_path: Option<String>,
    /// The hub id that the source came from.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source_hub: Option<String>,
    /// Full path of the output.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output_path: Option<String>,
    /// Wall time.
    pub seconds: f64,
    /// Greatest resident memory, mapped input included.
    pub peak_resident_bytes: u64,
    /// Greatest anonymous resident memory that was seen, ten looks a second.
    pub peak_anonymous_bytes: u64,
    /// Worker threads.
    pub threads: usize,
    /// Groups that an earlier, interrupted run had finished.
    pub resumed_groups: usize,
    /// What `gptoss-bench` measured, one line a number of threads.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub bench: Vec<BenchRow>,
    /// What `gptoss-bench gemm` measured.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub gemm: Vec<crate::bench::GemmRow>,
    /// How the flags were taken that do not change the output, such as `device_map`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub settings: BTreeMap<String, String>,
}

/// The speed of a model with a number of threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BenchRow {
    /// Threads.
    pub threads: usize,
    /// Median.
    pub tokens_per_second: f64,
    /// A tenth of the steps (of the runs, for prefill) were slower than this.
    pub slow_tokens_per_second: f64,
    /// Bytes of weights that a token needs.
    pub bytes_per_token: u64,
    /// Those times the rate, in 10^9 bytes a second, for decode; a prefill reads a weight once for many tokens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gigabytes_per_second: Option<f64>,
    /// What as many threads reach that do nothing but read, over and over, the first 2 GiB of the weights by name; measured in
    /// the same run, for decode. Of a model that is larger than memory it is no limit: what it reads stays there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub read_gigabytes_per_second: Option<f64>,
}

impl Manifest {
    /// A manifest with the fields that every tool fills.
    pub fn new(tool: &str, job: Job) -> Self {
        Self {
            schema: SCHEMA.into(),
            tool: Tool { name: tool.into(), version: env!("CARGO_PKG_VERSION").into() },
            job,
            numerics: NUMERICS.into(),
            source: None,
            output: None,
            plan: None,
            tensors: Vec::new(),
            calibration: None,
            coverage: Vec::new(),
            conversion: None,
            runtimes: Vec::new(),
            notes: Vec::new(),
            verdict: None,
            quality: None,
            environment: None,
            kernels: None,
            kernel_tests: Vec::new(),
            volatile: None,
        }
    }

    /// The same, of a model that ran with `numerics`.
    pub fn with(mut self, numerics: Numerics) -> Self {
        let name = if numerics == Numerics::Engine { ENGINE_NUMERICS } else { NUMERICS };
        self.numerics = name.into();
        self
    }

    /// Parses a manifest that came from `origin`.
    pub fn parse(text: &str, origin: &str) -> Result<Self> {
        let bad = |reason: String| Error::BadManifest { origin: origin.to_owned(), reason };
        let manifest: Self = serde_json::from_str(text).map_err(|e| bad(format!("is not a manifest: {e}")))?;
        if manifest.schema != SCHEMA {
            return Err(bad(format!("has schema {:?}, this version reads {SCHEMA:?}", manifest.schema)));
        }
        Ok(manifest)
    }

    /// Reads standard input to its end.
    pub fn from_stdin() -> Result<Self> {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(Error::io("read", "standard input"))?;
        if text.trim().is_empty() {
            let reason = "is empty: no manifest came through the pipe (did the command before it fail?)".into();
            return Err(Error::BadManifest { origin: "standard input".into(), reason });
        }
        Self::parse(&text, "standard input")
    }

    /// The manifest that lies in a checkpoint's folder, if there is one.
    pub fn in_folder(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(MANIFEST);
        let text = files::read_text_if_there(&path)?;
        text.map(|text| Self::parse(&text, &path.display().to_string())).transpose()
    }

    /// The folder of the checkpoint that this manifest speaks of.
    pub fn output_path(&self) -> Result<&Path> {
        let path = self.volatile.as_ref().and_then(|v| v.output_path.as_deref()).map(Path::new);
        if self.plan.is_some() {
            let reason = "is a plan (--dry-run): nothing was written that could be looked at".into();
            return Err(Error::BadManifest { origin: "the manifest".into(), reason });
        }
        path.ok_or_else(|| Error::BadManifest {
            origin: "the manifest".into(),
            reason: "does not say where its output lies (volatile.output_path); pipe the tool's own standard output"
                .into(),
        })
    }

    /// The JSON Schema of this type.
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }
}
