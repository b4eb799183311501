//! The machine: processor, memory, driver, GPUs, compiler, installed kernels. "None" is a normal answer.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernels::gpu::has_driver;
use crate::kernels::store::{self, Installed};
use crate::kernels::toolkit::Toolkit;

/// What is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// Model name of the processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// Instruction sets that the toolkit has paths for and that are there.
    pub cpu_features: Vec<String>,
    /// All memory.
    pub memory_bytes: u64,
    /// Memory that is free or can be freed.
    pub memory_available_bytes: u64,
    /// The CUDA version that the driver supports, such as "13.0".
    pub cuda_driver: Option<String>,
    /// Every GPU that the driver shows.
    pub gpus: Vec<Gpu>,
    /// The CUDA compiler.
    pub nvcc: Option<Nvcc>,
    /// Installed kernel builds.
    pub kernels: Vec<InstalledBuild>,
    /// The version of the Python package `qqq`, in the active virtual environment or the first `python3` of PATH.
    pub qqq: Option<String>,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// As the driver names it.
    pub name: String,
    /// Compute capability, such as "9.0".
    pub compute_capability: String,
    /// All of its memory.
    pub memory_bytes: u64,
}

/// The CUDA compiler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nvcc {
    /// Where it is.
    pub path: String,
    /// Such as "13.0.88".
    pub version: String,
}

/// A build of the kernels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstalledBuild {
    /// Its folder's name.
    pub id: String,
    /// What it was compiled for, such as "9.0a".
    pub targets: Vec<String>,
    /// Files that are missing or have other hashes than its manifest says.
    pub damage: Vec<String>,
}

impl Environment {
    /// Looks.
    pub fn detect() -> Self {
        let (cuda_driver, gpus) = cuda();
        Self {
            cpu: proc_field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            cpu_features: cpu_features(),
            memory_bytes: memory("MemTotal"),
            memory_available_bytes: memory("MemAvailable"),
            cuda_driver,
            gpus,
            nvcc: nvcc(),
            kernels: kernels(),
            qqq: qqq(),
        }
    }
}

fn proc_field(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn memory(key: &str) -> u64 {
    let field = proc_field("/proc/meminfo", key);
    field.and_then(|f| f.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<String> {
    let all = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("sha", is_x86_feature_detected!("sha")),
    ];
    all.into_iter().filter(|f| f.1).map(|f| f.0.to_owned()).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<String> {
    Vec::new()
}

fn cuda() -> (Option<String>, Vec<Gpu>) {
    use cudarc::driver::{result, sys};
    if !has_driver() {
        return (None, Vec::new());
    }
    let mut version = 0;
    // SAFETY: the library is there and initialised; the pointer is to a live integer.
    let known = unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok();
    let driver = known.then(|| format!("{}.{}", version / 1000, version % 1000 / 10));
    let count = result::device::get_count().unwrap_or(0);
    let gpus = (0..count).filter_map(|i| gpu(result::device::get(i).ok()?)).collect();
    (driver, gpus)
}

fn gpu(device: cudarc::driver::sys::CUdevice) -> Option<Gpu> {
    use cudarc::driver::{result::device, sys::CUdevice_attribute as Attribute};
    // SAFETY: the device came from the driver.
    let attribute = |a| unsafe { device::get_attribute(device, a) }.ok();
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let memory = unsafe { device::total_mem(device) }.ok()?;
    let name = device::get_name(device).ok()?;
    Some(Gpu { name, compute_capability: format!("{major}.{minor}"), memory_bytes: memory as u64 })
}

fn nvcc() -> Option<Nvcc> {
    let Toolkit { nvcc, version } = Toolkit::find(None).ok()?;
    Some(Nvcc { path: nvcc.display().to_string(), version })
}

/// Where kernel builds are installed: `$GPTOSS_KERNELS`, or the user's data folder.
pub fn kernel_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = set("GPTOSS_KERNELS") {
        return std::path::absolute(dir).ok();
    }
    // The XDG specification has relative paths ignored.
    let data = set("XDG_DATA_HOME").filter(|d| d.is_absolute());
    let data = data.or_else(|| set("HOME").map(|h| h.join(".local/share")));
    data.map(|d| d.join("gptoss/kernels"))
}

/// Whether a build is installed that has the kernels of W4A8, undamaged.
pub fn kernels_installed() -> bool {
    let builds = kernel_dir().and_then(|d| store::list(&d).ok()).unwrap_or_default();
    let has = |b: &Installed| b.build.files.iter().any(|f| f.name.starts_with("w4a8.")) && b.damage().is_empty();
    builds.iter().any(has)
}

fn kernels() -> Vec<InstalledBuild> {
    let builds = kernel_dir().and_then(|d| store::list(&d).ok()).unwrap_or_default();
    let one = |b: Installed| InstalledBuild { damage: b.damage(), id: b.build.id, targets: b.build.targets };
    builds.into_iter().map(one).collect()
}

/// QQQ's own kernels come as a Python package; Python says whether it is there, without importing it.
fn qqq() -> Option<String> {
    let venv = std::env::var_os("VIRTUAL_ENV").map(|v| PathBuf::from(v).join("bin/python"));
    let python = venv.filter(|p| p.is_file()).or_else(|| which::which("python3").ok())?;
    let question = "import importlib.metadata as m\ntry: print(m.version('qqq'))\nexcept m.PackageNotFoundError: pass";
    let answer = duct::cmd!(python, "-c", question).stdin_null().stderr_null().unchecked().read().ok()?;
    Some(answer.trim().to_owned()).filter(|version| !version.is_empty())
}
