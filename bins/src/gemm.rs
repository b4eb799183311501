//! `gptoss-bench gemm`, which is `gptoss-verify --bench` too.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use gptoss::bench::{Request, Shape, cpu, gpu, shapes_of};
use gptoss::checkpoint::hub::Located;
use gptoss::kernels::gpu::{Gpu, has_driver};
use gptoss::manifest::{Job, Manifest};
use gptoss::pipeline::meter::Meter;
use gptoss::verify::env::{Environment, kernel_dir};

use crate::{Common, plot, volatile};

/// Where products are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// This processor, and the GPU where there is one with kernels.
    Auto,
    /// This processor.
    Cpu,
    /// The GPU.
    Gpu,
}

/// Flags of a measurement of products.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Products")]
pub struct GemmArgs {
    /// Tokens, such as 16 or 1,16,256 [default: 16; of --shapes 1, 2, 4 ... 1024]
    #[arg(long = "M", value_name = "LIST", value_delimiter = ',', value_parser = parse_size)]
    m: Vec<usize>,
    /// Columns of the weight (in_features), a multiple of 32 [default: 4096]
    #[arg(long = "K", value_name = "N", value_parser = parse_size, conflicts_with = "shapes")]
    k: Option<usize>,
    /// Rows of the weight (out_features) [default: 4096]
    #[arg(long = "N", value_name = "N", value_parser = parse_size, conflicts_with = "shapes")]
    n: Option<usize>,
    /// Every linear layer of a model: gpt-oss-20b or gpt-oss-120b
    #[arg(long, value_name = "MODEL")]
    shapes: Option<String>,
    /// Columns of a scale of int4 and int8 weights [default: the largest of 128, 64, 32 that divides K]
    #[arg(long, value_name = "N", value_parser = parse_size)]
    group: Option<usize>,
    /// Runs of each; on a processor it ends after two seconds
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = parse_size)]
    iters: usize,
    /// Only kernels whose names contain one of these, such as w4a8,cublas
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    only: Vec<String>,
    /// Parts of K on the GPU, which go to blocks of their own [default: what fills it]
    #[arg(long, value_name = "N", value_parser = parse_size)]
    splits: Option<usize>,
    /// Where
    #[arg(long, value_enum, default_value = "auto")]
    on: On,
    /// Draw the ratios over M into this SVG file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn parse_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=1_000_000) => Ok(n),
        _ => Err("wanted a number from 1 to 1000000".into()),
    }
}

impl GemmArgs {
    /// Measures, and writes a manifest with a row a product.
    pub fn run(&self, tool: &str, common: &Common) -> Result<ExitCode> {
        let (resources, meter) = (common.resources(), Meter::start());
        let request = self.request()?;
        if let Some(path) = &self.plot {
            plot::check(path)?;
        }
        let mut manifest = Manifest::new(
            tool,
            Job::Gemm { m: request.m.clone(), shapes: request.shapes.clone(), iters: request.iters },
        );
        manifest.environment = Some(Environment::detect());
        let (mut rows, mut notes) = (Vec::new(), Vec::new());
        if self.on != On::Cpu {
            match self.gpu() {
                Ok(gpu) => {
                    notes.push(format!("{}, code for {}", gpu.name, gpu.target()));
                    let (measured, more) = gpu::run(&gpu, &request, self.splits, &resources.progress)?;
                    rows.extend(measured);
                    notes.extend(more);
                }
                Err(error) if self.on == On::Gpu => return Err(error),
                // A machine without one is the usual case; one whose kernels are missing says so.
                Err(_) if !has_driver() => {}
                Err(error) => notes.push(format!("the GPU is left out: {error:#}")),
            }
        }
        if self.on != On::Gpu {
            rows.extend(cpu::run(&request, resources.threads, &resources.progress)?);
        }
        if rows.is_empty() {
            bail!("nothing was measured: --only leaves no kernel, or --group divides no K; {}", notes.join("; "));
        }
        if let Some(path) = &self.plot {
            plot::write(path, &rows).with_context(|| format!("cannot draw {}", path.display()))?;
        }
        let mut run = volatile(&Located { dir: ".".into(), hub: None }, None, meter.read(), resources.threads, 0);
        run.source_path = None;
        (run.gemm, manifest.notes) = (rows, notes);
        manifest.volatile = Some(run);
        common.emit(&manifest)?;
        Ok(ExitCode::SUCCESS)
    }

    fn gpu(&self) -> Result<Gpu> {
        let root = kernel_dir().context("neither GPTOSS_KERNELS nor HOME says where kernels are installed")?;
        Ok(Gpu::open(&root)?)
    }

    fn request(&self) -> Result<Request> {
        let shapes = match &self.shapes {
            Some(model) => match shapes_of(model) {
                Some(shapes) => shapes,
                None => bail!("--shapes {model}: wanted gpt-oss-20b or gpt-oss-120b"),
            },
            None => {
                let (n, k) = (self.n.unwrap_or(4096), self.k.unwrap_or(4096));
                vec![Shape { name: format!("{n}x{k}"), n, k, experts: None }]
            }
        };
        if let Some(shape) = shapes.iter().find(|s| !s.k.is_multiple_of(32)) {
            bail!("--K {}: the kernels take multiples of 32", shape.k);
        }
        if let Some(group) = self.group.filter(|g| !g.is_multiple_of(32)) {
            bail!("--group {group}: the kernels take multiples of 32");
        }
        let m = match (&self.m[..], &self.shapes) {
            ([], None) => vec![16],
            ([], Some(_)) => (0..=10).map(|i| 1 << i).collect(),
            (m, _) => m.to_vec(),
        };
        Ok(Request { m, shapes, group: self.group, iters: self.iters, kernels: self.only.clone() })
    }
}
