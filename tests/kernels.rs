//! The CUDA kernels without a GPU: run on this processor, compiled to the known bytes, their machine code looked at; and the
//! installer from outside.

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::{Ran, command, root, run};

/// The pinned toolkit, which tests/run.sh installs.
fn toolkit() -> PathBuf {
    let peers = std::env::var_os("GPTOSS_PEERS").map_or_else(|| root().join("venv"), PathBuf::from);
    let cuda = peers.join("cuda/nvidia/cu13");
    assert!(cuda.join("bin/nvcc").is_file(), "{} is missing: tests/run.sh installs it", cuda.display());
    cuda
}

/// The installer, with a folder of its own for kernels and no compiler but a named one.
fn install(data: &Path, line: &str) -> Command {
    let mut command = command(&format!("gptoss-kernel-install {line}"));
    command.env("XDG_DATA_HOME", data).env("PATH", "/usr/bin:/bin");
    for name in ["GPTOSS_KERNELS", "CUDA_HOME", "VIRTUAL_ENV", "TORCH_CUDA_ARCH_LIST"] {
        command.env_remove(name);
    }
    command
}

fn with_nvcc(data: &Path, line: &str) -> Ran {
    run(install(data, line).arg("--nvcc").arg(toolkit().join("bin/nvcc")))
}

/// Name and SHA-256 of each file.
fn hashes(manifest: &Value) -> BTreeMap<String, String> {
    let files = manifest["kernels"]["files"].as_array().unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    files.iter().map(|f| (text(&f["name"]), text(&f["sha256"]))).collect()
}

/// What lies in the folder for kernels, hidden things too.
fn left(data: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(data.join("gptoss/kernels")).into_iter().flatten();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn every_kernel_gives_what_plain_loops_give_on_this_processor() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("check");
    let kernels = root().join("kernels");
    let built = Command::new("c++")
        .args(["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas"])
        .arg("-I")
        .arg(&kernels)
        .arg("-o")
        .args([&program, &kernels.join("host/check.cpp")])
        .output()
        .expect("a C++ compiler");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let ran: Ran = Command::new(&program).output().unwrap().into();
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(ran.out, "2046 launches gave what plain loops give\n");
}

/// Where they are built, when, and by how many compilers does not show; the bytes are those that are committed.
#[test]
fn builds_have_the_committed_hashes_and_machine_code_for_tensor_cores() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // .ci/full builds for all of them.
    let all = std::env::var_os("GPTOSS_ALL_ARCHS").is_some();
    let arch = if all { "--arch 8.0+PTX;8.6;8.9;9.0a;10.0;12.0" } else { "--arch 8.0+PTX;8.6;9.0a" };
    let built = with_nvcc(one.path(), &format!("--yes --quiet {arch}")).manifest();
    let have = hashes(&built);
    let golden: Value =
        serde_json::from_slice(&std::fs::read(root().join("kernels/golden-hashes.json")).unwrap()).unwrap();
    assert_eq!(golden["nvcc"], built["kernels"]["nvcc"]);
    for (name, hash) in &have {
        assert_eq!(golden["files"][name], **hash, "{name}: README says how golden-hashes.json is made again");
    }
    assert_eq!(have.len(), if all { 77 } else { 44 });

    let again = with_nvcc(other.path(), "--yes --quiet --threads 1 --arch 9.0a").manifest();
    for (name, hash) in hashes(&again) {
        assert_eq!(have[&name], hash, "{name} in another folder");
    }

    let folder = PathBuf::from(built["volatile"]["output_path"].as_str().unwrap());
    for name in have.keys().filter(|n| n.ends_with(".cubin")) {
        machine_code(&folder.join(name));
    }
}

/// Products run on tensor cores, nothing spills, and no kernel has more registers than lets three blocks of 128 threads run side by
/// side.
fn machine_code(cubin: &Path) {
    let name = cubin.file_name().unwrap().to_str().unwrap();
    let dump = |flag: &str| {
        let bin = toolkit().join("bin");
        let path = format!("{}:/usr/bin:/bin", bin.display());
        let ran: Ran =
            Command::new(bin.join("cuobjdump")).arg(flag).arg(cubin).env("PATH", path).output().unwrap().into();
        assert_eq!(ran.code, 0, "{}", ran.err);
        ran.out
    };
    let code = dump("-sass");
    let kind = name.split('.').next().unwrap();
    let (int8, bf16) = (["w4a8", "mxfp4_a8", "w8a8"].contains(&kind), ["w4a16", "mxfp4_a16"].contains(&kind));
    let product = int8 || bf16;
    assert_eq!(code.contains("IMMA.16832.S8.S8"), int8, "{name}");
    assert_eq!(code.contains("HMMA.16816.F32.BF16"), bf16, "{name}");
    // Copies to shared memory that pass registers by.
    assert_eq!(code.contains("LDGSTS"), product, "{name}");
    assert!(!code.contains("LDL") && !code.contains("STL"), "{name} keeps something in local memory");
    let mut kernels = 0;
    for word in dump("-res-usage").split_whitespace() {
        if let Some(registers) = word.strip_prefix("REG:") {
            assert!(registers.parse::<u32>().unwrap() <= 168, "{name}: {registers} registers");
            kernels += 1;
        }
    }
    // A product for four numbers of tokens, and the same over experts; dequantization both ways.
    let wanted = match kind {
        _ if product => 8,
        "dequantize_mxfp4" => 2,
        _ => 1,
    };
    assert_eq!(kernels, wanted, "{name}");
}

#[test]
fn what_is_installed_is_listed_checked_and_taken_away() {
    let data = tempfile::tempdir().unwrap();
    let first = with_nvcc(data.path(), "--yes --quiet --arch 8.6").manifest();
    let id = first["kernels"]["id"].as_str().unwrap().to_owned();
    assert_eq!(left(data.path()), std::slice::from_ref(&id));
    let again = with_nvcc(data.path(), "--yes --arch sm_86");
    assert!(again.err.contains("is installed already"), "{}", again.err);
    assert_eq!(again.manifest()["kernels"], first["kernels"]);

    let list = run(&mut install(data.path(), "--list"));
    let listed: Value = serde_json::from_str(&list.out).unwrap();
    assert_eq!((list.code, &listed[0]["damage"]), (0, &Value::Array(Vec::new())));
    let table = run(&mut install(data.path(), "--list --format table"));
    assert!(table.out.contains(&id) && table.out.contains("hashes match"), "{}", table.out);

    let file = data.path().join("gptoss/kernels").join(&id).join("w4a8.sm_86.cubin");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let list = run(&mut install(data.path(), "--list --format table"));
    assert!(
        list.code == 1 && list.out.contains("damaged") && list.out.contains("w4a8.sm_86.cubin has SHA-256"),
        "{list:?}"
    );
    // A damaged build is built again.
    assert_eq!(with_nvcc(data.path(), "--yes --quiet --arch 8.6").manifest()["kernels"], first["kernels"]);
    assert_eq!(run(&mut install(data.path(), "--list")).code, 0);

    let wrong = run(&mut install(data.path(), "--uninstall zz"));
    assert!(
        wrong.code == 2 && wrong.err.contains("begins with \"zz\"") && wrong.err.contains("--list"),
        "{}",
        wrong.err
    );
    assert_eq!(run(install(data.path(), "--uninstall").arg(&id[..6])).code, 0);
    assert!(left(data.path()).is_empty());
    let none = run(&mut install(data.path(), "--list --format table"));
    assert!(none.code == 0 && none.out.starts_with("no kernels in "), "{none:?}");
}

#[test]
fn what_cannot_be_built_says_why_and_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let refused = |line: &str, nvcc: Option<&Path>, words: &[&str]| {
        let mut command = install(data.path(), line);
        nvcc.map(|path| command.arg("--nvcc").arg(path));
        let ran = run(&mut command);
        assert_eq!((ran.code, &ran.out[..]), (2, ""), "{line}: {}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{line}: {word:?} in {}", ran.err);
        }
        assert!(left(data.path()).is_empty(), "{line}");
    };
    let nvcc = toolkit().join("bin/nvcc");
    refused("--yes", None, &["no CUDA compiler", "CUDA_HOME (not set)", "PATH", "pip install", "--nvcc"]);
    refused("--yes", Some(Path::new("/no/such/nvcc")), &["cannot find the compiler /no/such/nvcc"]);
    refused("--yes", Some(Path::new("/bin/true")), &["is no CUDA compiler"]);
    refused("--yes --arch 7.0", Some(&nvcc), &["--arch", "\"7.0\"", "9.0a"]);
    refused("--arch 8.6", Some(&nvcc), &["--yes"]);
    refused("--list --uninstall x", None, &["cannot be used with"]);

    // A compiler that stops in the middle: its words are shown, and what it made before is gone.
    let broken = data.path().join("nvcc");
    let script = "#!/bin/sh\ncase \"$*\" in\n*--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\n\
                  *w8a8*) echo 'w8a8.cu(7): error: expected a \";\"' >&2; exit 2 ;;\n*-o*) while [ \"$1\" != -o ]; do shift; done; : > \"$2\" ;;\nesac\n";
    std::fs::write(&broken, script).unwrap();
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755)).unwrap();
    refused("--yes --arch 8.6", Some(&broken), &["w8a8 does not compile for 8.6", "expected a \";\""]);

    // What a killed build left goes with the next one; what a living one has does not.
    let folder = data.path().join("gptoss/kernels");
    let (dead, living) = (folder.join(".x.partial-a"), folder.join(".x.partial-b"));
    std::fs::create_dir_all(&dead).unwrap();
    std::fs::create_dir_all(&living).unwrap();
    let held = std::fs::File::open(&living).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    with_nvcc(data.path(), "--yes --quiet --arch 8.6").manifest();
    assert!(!dead.exists() && living.exists());
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    // No file may be larger than 64 KiB, which sources fit and machine code does not.
    let line = "ulimit -f 64; trap '' XFSZ; exec \"$0\" --yes --quiet --arch 8.6 --nvcc \"$1\"";
    let mut shell = Command::new("bash");
    shell.args(["-c", line]).arg(support::exe("gptoss-kernel-install")).arg(toolkit().join("bin/nvcc"));
    let ran: Ran = shell.env("XDG_DATA_HOME", data.path()).env_remove("GPTOSS_KERNELS").output().unwrap().into();
    assert_eq!((ran.code, &ran.out[..]), (2, ""), "{}", ran.err);
    assert!(ran.err.contains("does not compile for 8.6"), "{}", ran.err);
    assert!(left(data.path()).is_empty());
}

#[test]
fn the_environment_is_for_a_shell() {
    let data = tempfile::tempdir().unwrap();
    let ran = with_nvcc(data.path(), "--print-env --arch 9.0a;8.6");
    let home = toolkit().canonicalize().unwrap();
    let want = format!(
        "export GPTOSS_KERNELS='{}/gptoss/kernels'\nexport CUDA_HOME='{}'\nexport TORCH_CUDA_ARCH_LIST='8.6;9.0a'\n",
        data.path().display(),
        home.display()
    );
    assert_eq!((ran.code, ran.out), (0, want));
    // What it prints is what it takes.
    let mut command = install(data.path(), "--print-env");
    let ran = run(command.env("CUDA_HOME", &home).env("TORCH_CUDA_ARCH_LIST", "8.6;9.0a"));
    assert!(ran.code == 0 && ran.out.contains("'8.6;9.0a'"), "{ran:?}");
    // pip's, in an active virtual environment; `gptoss-verify env` finds the same.
    let packages = data.path().join("venv/lib/python3.11/site-packages");
    std::fs::create_dir_all(&packages).unwrap();
    std::os::unix::fs::symlink(home.parent().unwrap(), packages.join("nvidia")).unwrap();
    let venv = data.path().join("venv");
    let ran = run(install(data.path(), "--print-env --arch 8.6").env("VIRTUAL_ENV", &venv));
    assert!(ran.code == 0 && ran.out.contains(&format!("CUDA_HOME='{}'", home.display())), "{ran:?}");
    let mut env = support::command("gptoss-verify env --quiet");
    env.env("PATH", "/usr/bin:/bin").env_remove("CUDA_HOME").env("VIRTUAL_ENV", &venv);
    assert_eq!(run(&mut env).manifest()["environment"]["nvcc"]["version"], "13.0.88");
    let bad = run(install(data.path(), "--print-env").env("TORCH_CUDA_ARCH_LIST", "5.2").env("CUDA_HOME", &home));
    assert!(bad.code == 2 && bad.err.contains("TORCH_CUDA_ARCH_LIST: \"5.2\""), "{}", bad.err);
}
