//! Installing builds of the kernels, with the pinned compiler or one that only answers, and a driver whose GPU is this processor.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

use crate::support::{Ran, command, root, run};

/// The pinned toolkit, which tests/run.sh installs.
pub fn toolkit() -> PathBuf {
    let peers = std::env::var_os("GPTOSS_PEERS").map_or_else(|| root().join("venv"), PathBuf::from);
    let cuda = peers.join("cuda/nvidia/cu13");
    assert!(cuda.join("bin/nvcc").is_file(), "{} is missing: tests/run.sh installs it", cuda.display());
    cuda
}

/// The installer, with a folder of its own for kernels and no compiler but a named one.
pub fn install(data: &Path, line: &str) -> Command {
    let mut command = command(&format!("gptoss-kernel-install {line}"));
    command.env("XDG_DATA_HOME", data).env("PATH", "/usr/bin:/bin");
    for name in ["GPTOSS_KERNELS", "CUDA_HOME", "VIRTUAL_ENV", "TORCH_CUDA_ARCH_LIST"] {
        command.env_remove(name);
    }
    command
}

pub fn with_nvcc(data: &Path, line: &str) -> Ran {
    run(install(data, line).arg("--nvcc").arg(toolkit().join("bin/nvcc")))
}

/// A compiler that answers and writes a file, in no time: for what is not about code. Where its words are `broken`, it fails.
pub fn stand_in(folder: &Path, broken: &str) -> PathBuf {
    let nvcc = folder.join("nvcc");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n*--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\n{broken}\
         *) while [ \"$1\" != -o ]; do shift; done; printf %0200d 0 > \"$2\" ;;\nesac\n"
    );
    std::fs::write(&nvcc, script).unwrap();
    std::fs::set_permissions(&nvcc, std::fs::Permissions::from_mode(0o755)).unwrap();
    nvcc
}

pub fn with_stand_in(data: &Path, line: &str) -> Ran {
    run(install(data, line).arg("--nvcc").arg(stand_in(data, "")))
}

/// Name and SHA-256 of each file.
pub fn hashes(manifest: &Value) -> BTreeMap<String, String> {
    let files = manifest["kernels"]["files"].as_array().unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    files.iter().map(|f| (text(&f["name"]), text(&f["sha256"]))).collect()
}

/// What lies in the folder for kernels, hidden things too.
pub fn left(data: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(data.join("gptoss/kernels")).into_iter().flatten();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// The folder of the driver whose GPU is this processor.
pub fn driver() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        compile(&root().join("kernels"), "driver.cpp", &["-fPIC", "-shared"], &dir.path().join("libcuda.so.1"));
        dir
    });
    folder.path()
}

/// Compiles `source` of kernels/host against the kernels in `kernels`.
pub fn compile(kernels: &Path, source: &str, flags: &[&str], out: &Path) {
    let built = Command::new("c++")
        .args(["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas"])
        .args(flags)
        .arg("-I")
        .arg(kernels)
        .arg("-o")
        .args([out, &kernels.join("host").join(source)])
        .output()
        .expect("a C++ compiler");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// A command that finds a driver whose GPU is this processor in `driver`, and a build of the kernels for it in `data`.
pub fn on_this_processor(data: &Path, driver: &Path, line: &str) -> Command {
    let mut command = command(line);
    command.env("XDG_DATA_HOME", data).env_remove("GPTOSS_KERNELS").env("LD_LIBRARY_PATH", driver);
    command
}
