//! `gptoss-verify kernels`: each kernel in a process of its own, so that one that leaves its arrays, or never ends, takes no other with it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gptoss::checkpoint::hub::Located;
use gptoss::kernels::gpu::Gpu;
use gptoss::kernels::gpu::selftest::{self, Extent, KernelTest};
use gptoss::manifest::{Job, Manifest};
use gptoss::pipeline::meter::Meter;
use gptoss::verify::env::{Environment, kernel_dir};

use crate::{Common, DIFFERENT, volatile};

/// What is tested, and for how long.
#[derive(Debug, clap::Args)]
pub struct KernelArgs {
    /// Also the shapes of gpt-oss, which takes this processor some minutes
    #[arg(long)]
    model_shapes: bool,
    /// Only kernels whose names contain one of these
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    only: Vec<String>,
    /// Seconds that one kernel may take, this processor's part included [default: 20, with --model-shapes 300]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Launches begin only when those in front of them have ended, also on 9.0 and later
    #[arg(long)]
    no_early_launch: bool,
    /// Test the kernel of exactly this name in this process, as for a debugger or compute-sanitizer
    #[arg(long, value_name = "NAME", conflicts_with_all = ["only", "limit"])]
    one: Option<String>,
}

/// What a process for one kernel left.
enum Left {
    /// A manifest.
    Manifest(Box<Manifest>),
    /// A message of an error before any launch: no driver, no kernels.
    Refused(String),
    /// Nothing, for this reason.
    Nothing(String),
}

impl KernelArgs {
    /// Tests and prints.
    pub fn run(&self, common: &Common) -> Result<ExitCode> {
        match &self.one {
            Some(name) => self.one(name, common),
            None => self.each(common),
        }
    }

    /// One kernel, here.
    fn one(&self, name: &str, common: &Common) -> Result<ExitCode> {
        let (resources, meter) = (common.resources(), Meter::start());
        let Some(root) = kernel_dir() else {
            bail!("neither GPTOSS_KERNELS nor HOME says where kernels are installed")
        };
        let gpu = Gpu::open(&root)?;
        let gpu = if self.no_early_launch { gpu.without_early_launch() } else { gpu };
        if !selftest::names(&[]).iter().any(|n| n == name) {
            bail!("--one {name}: the kernels are {}", selftest::names(&[]).join(", "));
        }
        let extent = if self.model_shapes { Extent::Models } else { Extent::Small };
        let mut manifest = Manifest::new("gptoss-verify", Job::TestKernels);
        // None where the kernel is not for this GPU, which whoever asked for several does not mind.
        manifest.kernel_tests.extend(selftest::run(&gpu, extent, name));
        manifest.kernels = Some(gpu.build.build.clone());
        manifest.notes.push(format!("{} ran code for {}", gpu.name, gpu.target()));
        let place = Located { dir: gpu.build.path.clone(), hub: None };
        let mut run = volatile(&place, None, meter.read(), resources.threads, 0);
        run.output_path = run.source_path.take();
        manifest.volatile = Some(run);
        common.emit(&manifest)?;
        Ok(code(&manifest.kernel_tests))
    }

    /// All that are wanted, each in a process of its own.
    fn each(&self, common: &Common) -> Result<ExitCode> {
        let (resources, meter) = (common.resources(), Meter::start());
        let names = selftest::names(&self.only);
        if names.is_empty() {
            bail!("--only {} names no kernel; they are {}", self.only.join(","), selftest::names(&[]).join(", "));
        }
        let mut manifest = Manifest::new("gptoss-verify", Job::TestKernels);
        let environment = Environment::detect();
        let damaged = environment.kernels.iter().any(|k| !k.damage.is_empty());
        manifest.environment = Some(environment);
        let mut build = None;
        for name in &names {
            let tests = match self.child(name)? {
                Left::Manifest(child) => {
                    let tests = child.kernel_tests.clone();
                    build.get_or_insert(child);
                    tests
                }
                // Before the first launch it is a matter of the machine.
                Left::Refused(message) if build.is_none() => bail!(message),
                Left::Refused(why) | Left::Nothing(why) => vec![KernelTest::failed(name, why)],
            };
            for test in &tests {
                let outcome = test.failure.as_deref().unwrap_or("right");
                resources.progress.note(&format!("{}: {} launches, {outcome}", test.kernel, test.cases));
            }
            manifest.kernel_tests.extend(tests);
        }
        if manifest.kernel_tests.is_empty() {
            bail!("none of the kernels {} is in this build and for this GPU", names.join(", "));
        }
        let place = build.map(|child| {
            (manifest.kernels, manifest.notes) = (child.kernels, child.notes);
            child.volatile.and_then(|v| v.output_path).unwrap_or_default()
        });
        let place = Located { dir: PathBuf::from(place.unwrap_or_default()), hub: None };
        let mut run = volatile(&place, None, meter.read(), resources.threads, 0);
        run.output_path = run.source_path.take();
        manifest.volatile = Some(run);
        common.emit(&manifest)?;
        Ok(if damaged { ExitCode::from(DIFFERENT) } else { code(&manifest.kernel_tests) })
    }

    /// One kernel, in a process of its own.
    fn child(&self, name: &str) -> Result<Left> {
        let this = std::env::current_exe().context("cannot find this program")?;
        let mut words = vec!["kernels", "--quiet", "--format", "json", "--one", name];
        words.extend(self.model_shapes.then_some("--model-shapes"));
        words.extend(self.no_early_launch.then_some("--no-early-launch"));
        let process = duct::cmd(this, words).stdin_null().stdout_capture().stderr_capture().unchecked().start();
        let process = process.context("cannot start a process for a kernel")?;
        let limit = Duration::from_secs(self.limit.unwrap_or(if self.model_shapes { 300 } else { 20 }));
        let Some(output) = process.wait_timeout(limit).context("cannot wait for a process")? else {
            process.kill().context("cannot end a process")?;
            return Ok(Left::Nothing(format!("did not end within {} s", limit.as_secs())));
        };
        if let Ok(manifest) = serde_json::from_slice(&output.stdout) {
            return Ok(Left::Manifest(Box::new(manifest)));
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.trim().lines().last().unwrap_or("without a word").to_owned();
        Ok(match last.strip_prefix("gptoss-verify: error: ") {
            Some(message) => Left::Refused(message.to_owned()),
            None => Left::Nothing(format!("its process ended with {}: {last}", output.status)),
        })
    }
}

fn code(tests: &[KernelTest]) -> ExitCode {
    if tests.iter().any(|t| t.failure.is_some()) { ExitCode::from(DIFFERENT) } else { ExitCode::SUCCESS }
}
