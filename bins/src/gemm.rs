//! `gptoss-bench gemm`, which is `gptoss-verify --bench` too.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use gptoss::bench::{GemmRow, Request, Shape, cpu, gpu, mixture_of, names, shapes_of};
use gptoss::checkpoint::hub::Located;
use gptoss::kernels::gpu::Gpu;
use gptoss::kernels::gpu::operations::LARGEST_GROUP;
use gptoss::kernels::gpu::product::Block;
use gptoss::manifest::{Job, Manifest};
use gptoss::pipeline::meter::Meter;
use gptoss::verify::env::{Environment, kernel_dir};

use crate::report::human;
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
pub struct GemmArgs {
    /// Tokens, such as 16 or 1,16,256 [default: 16; of --shapes 1, 2, 4 ... 1024]
    #[arg(long = "M", value_name = "LIST", value_delimiter = ',', value_parser = parse_size, help_heading = "Products")]
    m: Vec<usize>,
    /// Columns of the weight (in_features), a multiple of 32 [default: 4096]
    #[arg(long = "K", value_name = "N", value_parser = parse_size, conflicts_with = "shapes", help_heading = "Products")]
    k: Option<usize>,
    /// Rows of the weight (out_features) [default: 4096]
    #[arg(long = "N", value_name = "N", value_parser = parse_size, conflicts_with = "shapes", help_heading = "Products")]
    n: Option<usize>,
    /// Every linear layer of a model: gpt-oss-20b or gpt-oss-120b
    #[arg(long, value_name = "MODEL", help_heading = "Products")]
    shapes: Option<String>,
    /// Only layers of the model whose names contain one of these, such as experts
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "shapes", help_heading = "Products")]
    layers: Vec<String>,
    /// Columns of a scale of int4 and int8 weights [default: the largest of 128, 64, 32 that divides K]
    #[arg(long, value_name = "N", value_parser = parse_size, help_heading = "Products")]
    group: Option<usize>,
    /// Runs of each, fewer where they take long [default: 50]
    #[arg(long, value_name = "N", value_parser = parse_size, help_heading = "Products")]
    iters: Option<usize>,
    /// Only kernels whose names contain one of these, such as w4a8,cublas
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Products")]
    only: Vec<String>,
    /// Rows of the weight and tokens that a block of the kernels has on the GPU: 16x8, 16x16, 32x8, 32x16, and on 9.0a 64x64 or 128x64 [default: what suits it]
    #[arg(long, value_name = "ROWSxTOKENS", help_heading = "Products")]
    block: Option<Block>,
    /// Where [default: auto]
    #[arg(long, value_enum, help_heading = "Products")]
    on: Option<On>,
    /// Also a whole layer of experts of the model on the GPU, from grouping rows to combining outputs, as one figure
    #[arg(long, requires = "shapes", help_heading = "Products")]
    whole_layer: bool,
    /// Write each row of the GPU's into this file as soon as it is measured, JSON, an object a line
    #[arg(long, value_name = "FILE", help_heading = "Products")]
    rows: Option<PathBuf>,
    /// Launches begin only when those in front of them have ended, also on 9.0 and later
    #[arg(long, help_heading = "Products")]
    no_early_launch: bool,
    /// Draw the ratios over M into this SVG file
    #[arg(long, value_name = "FILE", help_heading = "Products")]
    plot: Option<PathBuf>,
}

/// A file that rows are written to, one by one: what was measured is there, however the program ends.
struct RowsFile {
    path: PathBuf,
    file: File,
}

impl RowsFile {
    fn open(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    fn write(&mut self, row: &GemmRow) -> gptoss::Result<()> {
        let line = serde_json::to_string(row).expect("plain data serializes") + "\n";
        self.file.write_all(line.as_bytes()).map_err(gptoss::Error::io("write", &self.path))
    }
}

/// Runs where nothing else is said.
const ITERS: usize = 50;

/// Whether the weights in f32 fit into memory, once.
fn check_memory(shapes: &[Shape], available: u64) -> Result<()> {
    for Shape { name, n, k, .. } in shapes {
        let bytes = 8 * (*n as u64) * (*k as u64);
        if bytes > available {
            let (bytes, available) = (human(bytes), human(available));
            bail!("{name} takes {bytes} of memory on this processor, and {available} are available");
        }
    }
    Ok(())
}

fn parse_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=1_000_000) => Ok(n),
        _ => Err("wanted a number from 1 to 1000000".into()),
    }
}

impl GemmArgs {
    /// Whether any of the flags was given.
    pub fn is_given(&self) -> bool {
        let lists = [self.m.is_empty(), self.layers.is_empty(), self.only.is_empty()];
        let numbers = [self.k, self.n, self.group, self.iters].iter().any(Option::is_some);
        lists.contains(&false)
            || numbers
            || self.block.is_some()
            || self.shapes.is_some()
            || self.plot.is_some()
            || self.on.is_some()
            || self.whole_layer
            || self.no_early_launch
            || self.rows.is_some()
    }

    /// Measures, and writes a manifest with a row a product.
    pub fn run(&self, tool: &str, common: &Common) -> Result<ExitCode> {
        let (resources, meter) = (common.resources(), Meter::start());
        let request = self.request(resources.max_memory)?;
        let on = self.on.unwrap_or(On::Auto);
        if let Some(path) = &self.plot {
            plot::check(path)?;
        }
        let environment = Environment::detect();
        if on != On::Gpu {
            check_memory(&request.shapes, environment.memory_available_bytes)?;
        }
        let Request { m, shapes, iters, group, block, kernels, .. } = request.clone();
        let mut manifest = Manifest::new(tool, Job::Gemm { m, shapes, iters, group, block, only: kernels });
        manifest.environment = Some(environment);
        let (mut rows, mut notes) = (Vec::new(), Vec::new());
        if on != On::Cpu {
            match self.gpu() {
                Ok(gpu) => {
                    notes.push(format!("{}, code for {}", gpu.name, gpu.target()));
                    let mut rows_file = self.rows.as_deref().map(RowsFile::open).transpose()?;
                    let mut emit = |row: &GemmRow| rows_file.as_mut().map_or(Ok(()), |file| file.write(row));
                    let (measured, more) = gpu::run(&gpu, &request, &resources.progress, &mut emit)?;
                    rows.extend(measured);
                    notes.extend(more);
                }
                Err(error) if on == On::Gpu => return Err(error),
                Err(error) => notes.push(format!("no GPU was measured: {error:#}")),
            }
        }
        if on != On::Gpu {
            let (measured, more) = cpu::run(&request, resources.threads, &resources.progress)?;
            rows.extend(measured);
            notes.extend(more);
        }
        if rows.is_empty() {
            bail!("nothing was measured ({})", notes.join("; "));
        }
        let drawn = self
            .plot
            .as_ref()
            .map(|path| plot::write(path, &rows).with_context(|| format!("cannot draw {}", path.display())));
        let mut run = volatile(&Located { dir: ".".into(), hub: None }, None, meter.read(), resources.threads, 0);
        run.source_path = None;
        (run.gemm, manifest.notes) = (rows, notes);
        manifest.volatile = Some(run);
        common.emit(&manifest)?;
        drawn.transpose()?;
        Ok(ExitCode::SUCCESS)
    }

    fn gpu(&self) -> Result<Gpu> {
        let root = kernel_dir().context("neither GPTOSS_KERNELS nor HOME says where kernels are installed")?;
        let gpu = Gpu::open(&root)?;
        Ok(if self.no_early_launch { gpu.without_early_launch() } else { gpu })
    }

    fn request(&self, memory: u64) -> Result<Request> {
        let mixture = self
            .shapes
            .as_ref()
            .filter(|_| self.whole_layer)
            .and_then(|m| mixture_of(&shapes_of(m).unwrap_or_default()));
        let mut shapes = match &self.shapes {
            Some(model) => match shapes_of(model) {
                Some(shapes) => shapes,
                None => bail!("--shapes {model}: wanted gpt-oss-20b or gpt-oss-120b"),
            },
            None => {
                let (n, k) = (self.n.unwrap_or(4096), self.k.unwrap_or(4096));
                vec![Shape { name: format!("{n}x{k}"), n, k, experts: None }]
            }
        };
        if !self.layers.is_empty() {
            let all: Vec<String> = shapes.iter().map(|s| s.name.clone()).collect();
            if let Some(none) = self.layers.iter().find(|l| !all.iter().any(|name| name.contains(&l[..]))) {
                bail!("--layers {none}: the layers are {}", all.join(", "));
            }
            shapes.retain(|s| self.layers.iter().any(|l| s.name.contains(&l[..])));
        }
        if let Some(none) = self.only.iter().find(|o| !names().iter().any(|name| name.contains(&o[..]))) {
            bail!("--only {none}: the kernels are {}", names().join(", "));
        }
        if let Some(shape) = shapes.iter().find(|s| !s.k.is_multiple_of(32)) {
            bail!("--K {}: the kernels take multiples of 32", shape.k);
        }
        if let Some(group) = self.group.filter(|g| !g.is_multiple_of(32) || *g > LARGEST_GROUP) {
            bail!("--group {group}: the kernels take multiples of 32 up to {LARGEST_GROUP}");
        }
        let m = match (&self.m[..], &self.shapes) {
            ([], None) => vec![16],
            ([], Some(_)) => (0..=10).map(|i| 1 << i).collect(),
            (m, _) => m.to_vec(),
        };
        let (group, iters, kernels) = (self.group, self.iters.unwrap_or(ITERS), self.only.clone());
        Ok(Request { m, shapes, mixture, group, iters, kernels, block: self.block, memory })
    }
}
