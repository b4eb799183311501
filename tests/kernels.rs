//! The CUDA kernels without a GPU: run on this processor, compiled to the known bytes, their machine code looked at; and the
//! installer from outside.

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

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

/// A compiler that answers and writes a file, in no time: for what is not about code. Where its words are `broken`, it fails.
fn stand_in(folder: &Path, broken: &str) -> PathBuf {
    let nvcc = folder.join("nvcc");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n*--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\n{broken}\
         *) while [ \"$1\" != -o ]; do shift; done; printf %0200d 0 > \"$2\" ;;\nesac\n"
    );
    std::fs::write(&nvcc, script).unwrap();
    std::fs::set_permissions(&nvcc, std::fs::Permissions::from_mode(0o755)).unwrap();
    nvcc
}

fn with_stand_in(data: &Path, line: &str) -> Ran {
    run(install(data, line).arg("--nvcc").arg(stand_in(data, "")))
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
    compile(&kernels, "check.cpp", &[], &program);
    let ran: Ran = Command::new(&program).output().unwrap().into();
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(ran.out, "4094 launches gave what plain loops give\n");
}

/// The folder of the driver whose GPU is this processor.
fn driver() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        compile(&root().join("kernels"), "driver.cpp", &["-fPIC", "-shared"], &dir.path().join("libcuda.so.1"));
        dir
    });
    folder.path()
}

/// Compiles `source` of kernels/host against the kernels in `kernels`.
fn compile(kernels: &Path, source: &str, flags: &[&str], out: &Path) {
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
fn on_this_processor(data: &Path, driver: &Path, line: &str) -> Command {
    let mut command = command(line);
    command.env("XDG_DATA_HOME", data).env_remove("GPTOSS_KERNELS").env("LD_LIBRARY_PATH", driver);
    command
}

/// The launcher's own names, structures, grids and memory: only machine code is not run. It is checked above.
#[test]
fn the_self_test_launches_every_kernel_and_sees_a_wrong_one() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = root().join("kernels");
    let verify = |line: &str| run(&mut on_this_processor(dir.path(), driver(), line));

    let none = verify("gptoss-verify kernels");
    assert!(none.code == 2 && none.err.contains("no kernels are installed in"), "{}", none.err);
    assert!(none.err.contains("gptoss-kernel-install --yes --arch 8.6"), "{}", none.err);
    // Code of another major version does not run there.
    with_stand_in(dir.path(), "--yes --quiet --arch 10.0").manifest();
    let other = verify("gptoss-verify kernels");
    assert!(other.code == 2 && other.err.contains("compute capability 8.6"), "{}", other.err);
    let build = with_stand_in(dir.path(), "--yes --quiet --arch 8.0;8.6").manifest();

    // No test waits for the clock: the machine may have other things to do.
    let patient = "gptoss-verify kernels --limit 600";
    let tested = verify(&format!("{patient} --quiet"));
    assert_eq!(tested.code, 0, "{}{}", tested.out, tested.err);
    let manifest = tested.manifest();
    assert_eq!(manifest["environment"]["gpus"][0]["name"], "this processor");
    assert_eq!(manifest["environment"]["kernels"].as_array().unwrap().len(), 2);
    assert_eq!(manifest["notes"][0], "this processor ran code for 8.6");
    let tests = manifest["kernel_tests"].as_array().unwrap();
    assert_eq!(tests.len(), 16);
    for test in tests {
        assert!(test["cases"].as_u64().unwrap() > 3 && test.get("failure").is_none(), "{test}");
        // Sums of tensor cores over bf16 and the exponential are free to differ, here by nothing.
        assert_eq!(test["same"], test["numbers"], "{test}");
    }

    let bench = "gptoss-bench gemm --M 3 --K 64 --N 96 --iters 2 --on gpu";
    let rows = verify(bench).manifest()["volatile"]["gemm"].clone();
    let names: Vec<&str> = rows.as_array().unwrap().iter().map(|r| r["kernel"].as_str().unwrap()).collect();
    assert_eq!(names, ["w4a8", "mxfp4_a8", "w8a8", "w4a16", "mxfp4_a16"]);
    let row = &rows[0];
    assert!(row["microseconds"].as_f64().unwrap() > 0.0 && row["copies"].as_u64().unwrap() >= 8, "{row}");

    // A GPU of another architecture with 33 times as many multiprocessors, whose launches begin early: the same bits.
    with_stand_in(dir.path(), "--yes --quiet --arch 9.0a").manifest();
    let hopper = |line: &str| run(on_this_processor(dir.path(), driver(), line).env("GPTOSS_EMULATED_GPU", "9.0:132"));
    let other = hopper(&format!("{patient} --quiet")).manifest();
    assert_eq!(other["notes"][0], "this processor ran code for 9.0a");
    for (one, other) in tests.iter().zip(other["kernel_tests"].as_array().unwrap()) {
        assert_eq!(one["kernel"], other["kernel"]);
        assert_eq!((&one["digest"], other.get("failure")), (&other["digest"], None), "{one} {other}");
    }
    // Launches begin early where nothing forbids it: weights that were copied and waited for do not.
    let count = dir.path().join("count");
    let line = "gptoss-bench gemm --quiet --M 3 --K 64 --N 96 --iters 2 --on gpu --only w4a8";
    let mut early = on_this_processor(dir.path(), driver(), line);
    run(early.env("GPTOSS_EMULATED_GPU", "9.0:132").env("GPTOSS_EMULATED_COUNT", &count)).manifest();
    let counted = std::fs::read_to_string(&count).unwrap();
    let (some, all) = counted.trim().split_once(" of ").unwrap();
    assert!(some == all && all.parse::<u32>().unwrap() > 60, "{counted}");

    // Many rows go to wgmma where there is one, and enough blocks for the GPU.
    for (gpu, n, m, block) in [
        ("9.0:4", 256, "64", "64x64"),
        ("9.0:4", 512, "64", "128x64"),
        ("9.0:16", 64, "64", "16x16"),
        ("9.0:4", 256, "32", "16x16"),
        ("8.6:4", 256, "64", "32x16"),
    ] {
        let line = format!("gptoss-bench gemm --quiet --M {m} --K 64 --N {n} --iters 1 --on gpu --only w4a8");
        let ran = run(on_this_processor(dir.path(), driver(), &line).env("GPTOSS_EMULATED_GPU", gpu)).manifest();
        let chosen = &ran["volatile"]["gemm"][0]["block"];
        assert_eq!(format!("{}x{}", chosen["rows"], chosen["tokens"]), block, "{gpu}, N {n}, M {m}");
    }

    // What one kernel does to its context, or never ends, is no matter of the others.
    for (variable, kernel, subject, flags, words) in [
        (
            "GPTOSS_EMULATED_CRASH",
            "w4a8_16x8",
            "w4a8",
            "--limit 600 --only mask,w4a8,chain",
            "an illegal memory access",
        ),
        // The others are far faster than the limit, however busy the machine is.
        (
            "GPTOSS_EMULATED_HANG",
            "mask_2_4",
            "mask_2_4",
            "--limit 5 --only quantize_a,mask,dequantize",
            "did not end within 5 s",
        ),
    ] {
        let line = format!("gptoss-verify kernels --quiet {flags}");
        let ran = run(on_this_processor(dir.path(), driver(), &line).env(variable, kernel));
        let tests: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(tests["kernel_tests"].as_array().unwrap().len(), if subject == "w4a8" { 4 } else { 3 });
        let failed: Vec<(&str, &str)> = tests["kernel_tests"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|t| Some((t["kernel"].as_str()?, t["failure"].as_str()?)))
            .collect();
        assert!(
            ran.code == 1 && failed.len() == 1 && failed[0].0 == subject && failed[0].1.contains(words),
            "{failed:?}"
        );
    }

    // A kernel that halves what it should give, and one that reads beyond its inputs.
    let broken = dir.path().join("broken");
    let (ampere, hopper) = ("8.6:4", "9.0:132");
    for (gpu, file, change, to, kernel, words) in [
        (ampere, "operands.cuh", "INT8_STEP = 0.5f", "INT8_STEP = 0.25f", "mxfp4_a8", "mxfp4_a8: "),
        // A bit more than rounding, and a limit that gates must not pass.
        (ampere, "gemm.cuh", "gate = gate > limit ? limit : gate;", "", "mxfp4_a16_experts", "mxfp4_a16_experts: "),
        (
            ampere,
            "mma.cuh",
            "int64_t(tile.expert) * p.n + tile.row + r + e, FloatType",
            "tile.row + r + e + (1 << 22), FloatType",
            "w4a16",
            "behind an array",
        ),
        (
            ampere,
            "gemm.cuh",
            "(int64_t(tile.expert) * p.n + tile.row) * a_row;",
            "(int64_t(tile.expert) * p.n + tile.row + 4096) * a_row;",
            "w8a8",
            "reads outside every array",
        ),
        // The inputs of a step ahead that is not there.
        (
            ampere,
            "mma.cuh",
            "g + i - GROUPS < ahead) read(g + i);",
            "ahead > 0) read(g + i);",
            "w4a8",
            "reads outside every array",
        ),
        // Tokens that nothing orders in front of the tensor cores, or that come before everybody is done with those before; operands that are not in order;
        // sums that are taken before they are there; chunks that are not swizzled.
        (hopper, "wgmma.cuh", "fence_async();", "", "w4a8", "was not fenced before a barrier"),
        (hopper, "wgmma.cuh", "sync_team<Layout::TEAMS>(team);", "", "w4a8", "was not fenced before a barrier"),
        (hopper, "wgmma.cuh", "slot == 0 ? MANY_STAGES - 1 : slot - 1", "slot", "w4a8", "before a barrier"),
        (hopper, "operands.cuh", "warpgroup_fence();", "", "w4a8", "without a fence in front of it"),
        (hopper, "wgmma.cuh", "warpgroup_wait<0>();", "", "mxfp4_a8_experts", "mxfp4_a8_experts: "),
        (hopper, "wgmma.cuh", "(place ^ (t % 8 * 16))", "place", "mxfp4_a8_experts", "blocks of 64x64"),
    ] {
        let copied = Command::new("cp").arg("-r").args([&kernels, &broken]).status().unwrap();
        assert!(copied.success());
        let text = std::fs::read_to_string(broken.join(file)).unwrap();
        assert!(text.contains(change), "{change}");
        std::fs::write(broken.join(file), text.replace(change, to)).unwrap();
        compile(&broken, "driver.cpp", &["-fPIC", "-shared", "-O0"], &broken.join("libcuda.so.1"));
        let line = format!("{patient} --only {kernel}");
        let ran = run(on_this_processor(dir.path(), &broken, &line).env("GPTOSS_EMULATED_GPU", gpu));
        assert!(ran.code == 1 && ran.err.contains(words), "{change}: {} {}", ran.code, ran.err);
        // What is wrong of a product is said by rows, tokens and columns.
        if !["array", "barrier", "fence"].iter().any(|w| words.contains(w)) {
            assert!(ran.out.contains("outputs are wrong; rows mod 16: "), "{change}: {}", ran.out);
        }
        std::fs::remove_dir_all(&broken).unwrap();
    }

    // One that does not wait for what it reads: seen where launches begin early, and only there.
    let copied = Command::new("cp").arg("-r").args([&kernels, &broken]).status().unwrap();
    assert!(copied.success());
    let text = std::fs::read_to_string(broken.join("combine_experts.cu")).unwrap();
    assert!(text.contains("  inputs_ready();\n"));
    std::fs::write(broken.join("combine_experts.cu"), text.replace("  inputs_ready();\n", "")).unwrap();
    compile(&broken, "driver.cpp", &["-fPIC", "-shared", "-O0"], &broken.join("libcuda.so.1"));
    for (gpu, flags, code) in [("8.6:4", "", 0), ("9.0:132", "", 1), ("9.0:132", "--no-early-launch", 0)] {
        let line = format!("{patient} --quiet --only chain {flags}");
        let ran = run(on_this_processor(dir.path(), &broken, &line).env("GPTOSS_EMULATED_GPU", gpu));
        assert_eq!(ran.code, code, "{gpu} {flags}: {} {}", ran.out, ran.err);
    }

    // A damaged build is not run.
    let file = Path::new(build["volatile"]["output_path"].as_str().unwrap()).join("w4a8.sm_86.cubin");
    std::fs::write(&file, "no code").unwrap();
    let damaged = verify("gptoss-verify kernels");
    assert!(damaged.code == 2 && damaged.err.contains("damaged"), "{}", damaged.err);
}

/// The script for a machine with a GPU, from end to end; and killed in the middle of a step.
#[test]
fn the_script_for_a_gpu_leaves_what_it_measured_whatever_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = root().join("kernels");
    let packed = dir.path().join("packed");
    std::fs::create_dir_all(packed.join("bin")).unwrap();
    std::fs::create_dir_all(packed.join("kernels")).unwrap();
    std::fs::copy(kernels.join("check.sh"), packed.join("kernels/check.sh")).unwrap();
    for tool in ["gptoss-verify", "gptoss-bench"] {
        std::os::unix::fs::symlink(support::exe(tool), packed.join("bin").join(tool)).unwrap();
    }
    let mut store = install(dir.path(), "--yes --quiet --arch 9.0a");
    run(store.env("GPTOSS_KERNELS", packed.join("store")).arg("--nvcc").arg(stand_in(dir.path(), ""))).manifest();
    let script = |out: &Path| {
        let mut script = Command::new("bash");
        script.arg(packed.join("kernels/check.sh")).arg(out).env("QUICK", "1").env("LD_LIBRARY_PATH", driver());
        script.env("GPTOSS_EMULATED_GPU", "9.0:132").env_remove("GPTOSS_KERNELS");
        script
    };
    let tables = |out: &Path| {
        let tar = Command::new("tar")
            .arg("-xOf")
            .arg(out.join("results.tar"))
            .arg("results/gemm-4096.jsonl")
            .output()
            .unwrap();
        String::from_utf8(tar.stdout).unwrap()
    };
    let out = dir.path().join("whole");
    let ran = run(&mut script(&out));
    let log = std::fs::read_to_string(out.join("check.log")).unwrap();
    assert_eq!(ran.code, 0, "{} {log}", ran.err);
    // There is no cuBLAS here, so no ratio is known.
    for words in ["right in", "UNKNOWN: w4a8, 4096 x 4096, times cuBLAS", "s in all; "] {
        assert!(log.contains(words), "{words}: {log}");
    }
    assert!(tables(&out).lines().count() >= 6, "{log}");

    // Killed while it measures, once the first rows are in the tar.
    let out = dir.path().join("killed");
    let mut killed = script(&out).stderr(std::process::Stdio::null()).spawn().unwrap();
    while !(out.join("results.tar").exists() && tables(&out).contains("\"w4a8\"")) {
        assert!(killed.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    killed.kill().unwrap();
    assert_eq!(killed.wait().unwrap().code(), None, "it was over before");
    // Every row but the one that was being written is whole.
    let rows = tables(&out);
    let whole = rows.lines().filter(|row| serde_json::from_str::<Value>(row).is_ok()).count();
    assert!(whole > 0 && whole + 1 >= rows.lines().count(), "{rows}");
    assert!(std::fs::read_to_string(out.join("check.log")).unwrap().contains(": 4096 x 4096 "), "a log");
}

#[test]
fn without_a_driver_products_are_measured_here_and_kernels_are_not() {
    let data = tempfile::tempdir().unwrap();
    let none = run(command("gptoss-verify kernels").env("XDG_DATA_HOME", data.path()));
    assert!(none.code == 2 && none.err.contains("no CUDA driver"), "{}", none.err);
    let plot = data.path().join("speed.svg");
    let mut line = command("gptoss-bench gemm --M 1,8 --K 96 --N 64 --iters 3 --plot");
    let manifest = run(line.arg(&plot)).manifest();
    let rows = manifest["volatile"]["gemm"].as_array().unwrap();
    let of =
        |r: &Value| (r["m"].as_u64().unwrap(), r["kernel"].as_str().unwrap().to_owned(), r["group"].as_u64().unwrap());
    let kernels = [("f32", 0), ("w4a8", 32), ("mxfp4_a8", 32), ("w8a8", 32)];
    let want: Vec<_> = [1, 8].into_iter().flat_map(|m| kernels.map(|(k, g)| (m, k.to_owned(), g))).collect();
    assert_eq!(rows.iter().map(of).collect::<Vec<_>>(), want);
    for row in rows {
        assert!(row["speedup"].as_f64().unwrap() > 0.0 && row["gigabytes_per_second"].as_f64().unwrap() > 0.0, "{row}");
    }
    let drawn = std::fs::read_to_string(plot).unwrap();
    assert_eq!(drawn.matches("<circle").count(), 8);
    // The same by the other tool, for an expert layer.
    let line = "gptoss-verify --bench --M 2 --shapes gpt-oss-20b --layers experts,k_proj --only w4a8 --iters 1";
    let manifest = run(&mut command(line)).manifest();
    let rows = manifest["volatile"]["gemm"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    assert!(rows[1]["layer"] == "experts.gate_up_proj" && rows[1]["weights"].as_u64().unwrap() > 4, "{}", rows[1]);
    assert!(manifest["notes"][0].as_str().unwrap().contains("no CUDA driver"), "{}", manifest["notes"]);
    for (flags, words) in [("--M 2", "want --bench"), ("--bench env", "stand alone"), ("--M 2 kernels", "stand alone")]
    {
        let ran = run(&mut command(&format!("gptoss-verify {flags}")));
        assert!(ran.code == 2 && ran.err.contains(words), "{flags}: {}", ran.err);
    }
    // A plot that cannot be drawn does not cost what was measured.
    let line = "gptoss-bench gemm --M 1 --K 32 --N 32 --iters 1 --plot /no/such/folder/x.svg";
    let ran = run(&mut command(line));
    assert!(ran.code == 2 && ran.err.contains("cannot draw") && ran.out.contains("mxfp4_a8"), "{}", ran.err);
    for (flags, words) in [
        ("gemm --K 48", "--K 48: the kernels take multiples of 32"),
        ("gemm --shapes gpt-4", "wanted gpt-oss-20b or gpt-oss-120b"),
        ("gemm --M 0", "wanted a number from 1 to 1000000"),
        ("gemm --on gpu", "no CUDA driver"),
        ("gemm --only w4a8,nothing", "--only nothing: the kernels are f32, cublas-f16"),
        ("gemm --only cublas", "nothing was measured (no GPU was measured: there is no CUDA driver"),
        ("gemm --group 131072", "multiples of 32 up to 65536"),
        ("gemm --shapes gpt-oss-20b --layers router", "the layers are q_proj, k_proj"),
        ("gemm --K 960000 --N 1000000", "of memory on this processor"),
        ("gemm --plot x.bmp", "ends in .svg"),
        ("gemm --shapes gpt-oss-20b --K 32", "cannot be used with"),
    ] {
        let ran = run(&mut command(&format!("gptoss-bench {flags}")));
        assert!(ran.code == 2 && ran.err.contains(words), "{flags}: {}", ran.err);
    }
}

/// Where they are built, when, and by how many compilers does not show; the bytes are those that are committed.
#[test]
fn builds_have_the_committed_hashes_and_machine_code_for_tensor_cores() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // .ci/full and the flake's check build for all of them.
    let all = std::env::var_os("GPTOSS_ALL_ARCHS").is_some();
    let arch = if all { gptoss::kernels::arch::DEFAULT } else { "8.0+PTX;8.6;9.0a" };
    let built = with_nvcc(one.path(), &format!("--yes --quiet --arch {arch}")).manifest();
    let have = hashes(&built);
    let golden: Value =
        serde_json::from_slice(&std::fs::read(root().join("kernels/golden-hashes.json")).unwrap()).unwrap();
    assert_eq!(golden["nvcc"], built["kernels"]["nvcc"]);
    // The library has code of the host's compiler in it.
    for (name, hash) in have.iter().filter(|(name, _)| !name.ends_with(".so")) {
        assert_eq!(golden["files"][name], **hash, "{name}: README says how golden-hashes.json is made again");
    }
    assert_eq!(have.len(), if all { 84 } else { 48 } + 2);
    assert_eq!(built["kernels"]["cutlass"]["version"], "4.2.0");

    let again = with_nvcc(other.path(), "--yes --quiet --threads 3 --arch 9.0a").manifest();
    for (name, hash) in hashes(&again) {
        assert_eq!(have[&name], hash, "{name} in another folder");
    }

    let folder = PathBuf::from(built["volatile"]["output_path"].as_str().unwrap());
    for name in have.keys().filter(|n| n.ends_with(".cubin")) {
        machine_code(&folder.join(name));
    }

    // The library needs nothing but the C library, shows nothing but its functions, and answers.
    let question = "import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); l.gptoss_hopper_status.restype = ctypes.c_char_p; \
                    print(l.gptoss_hopper_status(0), l.gptoss_hopper_status(2), hasattr(l, '__cxa_throw'))";
    let library = folder.join("libgptoss_hopper.so");
    let ran: Ran = Command::new("python3").args(["-c", question]).arg(&library).output().unwrap().into();
    assert_eq!((ran.code, &ran.out[..]), (0, "b'Success' b'Error Invalid Data Type' False\n"), "{}", ran.err);
}

/// Instructions of the main loop for each KB of codes that a warp reads, at most, for each of `BLOCKS` on every architecture: the most that was counted, and a few percent, so that a loop that grows is seen. An H200 that reads at three quarters of its copy rate gives
/// each scheduler the time of about 340 instructions for a KB; with int8 inputs and 8 tokens the loop takes less than half of them.
/// Behind them those of the longest main loop of the last two blocks, which have one for each kind of group.
const BUDGETS: [(&str, [usize; 6], [usize; 2]); 5] = [
    ("mxfp4_a8", [164, 214, 140, 190, 648, 612], [648, 612]),
    ("w4a8", [132, 168, 112, 141, 428, 360], [670, 612]),
    ("w8a8", [64, 82, 50, 68, 200, 166], [328, 292]),
    ("w4a16", [256, 272, 218, 238, 548, 432], [700, 610]),
    ("mxfp4_a16", [232, 270, 206, 244, 634, 596], [634, 596]),
];

/// Rows and tokens of the blocks, how many of the rows a warp reads, and the registers that a thread may have with them, 40 more from 10.0 on
/// (kernels/common.cuh). The last two multiply by wgmma and are for 9.0a alone; with int8 inputs and codes of 4 bits they have 128 registers.
const BLOCKS: [(&str, usize, u32); 6] = [
    ("16x8", 16, 104),
    ("16x16", 16, 144),
    ("32x8", 32, 128),
    ("32x16", 32, 200),
    ("64x64", 16, 168),
    ("128x64", 16, 168),
];
/// Those that every architecture has.
const COMMON: usize = 4;

/// An instruction: its address, and its text.
type Code<'a> = Vec<(u64, &'a str)>;

/// The kernels of a listing of machine code.
fn listing(code: &str) -> BTreeMap<&str, Code<'_>> {
    let (mut kernels, mut name) = (BTreeMap::<&str, Code>::new(), "");
    for line in code.lines().map(str::trim) {
        if let Some(found) = line.strip_prefix("Function : ") {
            name = found;
        } else if let Some((at, rest)) = line.strip_prefix("/*").and_then(|l| l.split_once("*/"))
            && let (Ok(at), Some((text, _))) = (u64::from_str_radix(at, 16), rest.split_once(';'))
        {
            kernels.entry(name).or_default().push((at, text.trim()));
        }
    }
    kernels
}

/// Instructions of the shortest and of the longest loop that asks for codes and multiplies, and has no such loop inside.
fn main_loops(code: &Code) -> (usize, usize) {
    let target = |text: &str| {
        let text = text.split_once("BRA")?.1;
        u64::from_str_radix(text.rsplit_once("0x")?.1.split(|c: char| !c.is_ascii_hexdigit()).next()?, 16).ok()
    };
    let bodies = code.iter().filter_map(|&(at, text)| {
        let from = target(text).filter(|&to| to < at)?;
        let body: Vec<&str> = code.iter().filter(|(a, _)| (from..=at).contains(a)).map(|c| c.1).collect();
        let has = |what: &str| body.iter().any(|text| text.contains(what));
        (has("MMA") && has("LDGSTS")).then_some((from, at, body.len()))
    });
    let all: Vec<(u64, u64, usize)> = bodies.collect();
    let inner = |&&(from, at, _): &&(u64, u64, usize)| {
        !all.iter().any(|&(f, a, _)| (f, a) != (from, at) && from <= f && a <= at)
    };
    let lengths = || all.iter().filter(inner).map(|l| l.2);
    (lengths().min().expect("a product has such a loop"), lengths().max().unwrap_or(0))
}

/// Products run on tensor cores, nothing spills, and neither loops nor registers grow.
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
    // Warp-group products of both kinds, fed by the bulk copy engine.
    for instruction in ["IGMMA.64x128x32.S8.S8", "QGMMA.64x128x32.F32.E4M3.E4M3", "UTMALDG"] {
        assert_eq!(code.contains(instruction), kind == "hopper_gemm", "{name}");
    }
    let (int8, bf16) = (["w4a8", "mxfp4_a8", "w8a8"].contains(&kind), ["w4a16", "mxfp4_a16"].contains(&kind));
    let product = int8 || bf16;
    assert_eq!(code.contains("IMMA.16832.S8.S8"), int8, "{name}");
    assert_eq!(code.contains("HMMA.16816.F32.BF16"), bf16, "{name}");
    // Those of warpgroups, with the weights in registers.
    let hopper = name.contains("sm_90a");
    let from_registers = |what: &str| {
        let operands = code.lines().filter_map(|l| l.split_once(what)).map(|(_, o)| o.trim_start());
        // Sums, then the weights, then a descriptor.
        operands.filter(|o| o.split(", ").nth(1).is_some_and(|a| a.starts_with('R') && a != "RZ")).count()
    };
    assert_eq!(from_registers("IGMMA.64x64x32.S8.S8") > 0, hopper && int8, "{name}");
    assert_eq!(from_registers("HGMMA.64x64x16.F32.BF16") > 0, hopper && bf16, "{name}");
    // A product is on its way while the codes of the next one are decoded: nvcc did not wait for each.
    let several = ["w4a8", "w8a8", "w4a16"].contains(&kind);
    assert!(!product || code.contains("WARPGROUP.DEPBAR.LE gsb0, 0x1") == (hopper && several), "{name}");
    // Copies to shared memory that pass registers by.
    assert_eq!(code.contains("LDGSTS"), product, "{name}");
    assert!(!code.contains("LDL") && !code.contains("STL"), "{name} keeps something in local memory");
    let usage = dump("-res-usage");
    let mut registers = BTreeMap::new();
    let words = usage.split_whitespace().collect::<Vec<_>>();
    for pair in words.iter().enumerate().filter(|(_, w)| **w == "Function") {
        let after = &words[pair.0 + 1..];
        let count = after.iter().find_map(|w| w.strip_prefix("REG:")).unwrap().parse::<u32>().unwrap();
        registers.insert(after[0].trim_end_matches(':'), count);
    }
    // A product for each block, and the same over experts; dequantization both ways.
    let wanted = match kind {
        _ if product => 2 * if hopper { BLOCKS.len() } else { COMMON },
        "dequantize_mxfp4" | "hopper_gemm" => 2,
        _ => 1,
    };
    assert_eq!(registers.len(), wanted, "{name}: {registers:?}");
    let Some((_, budgets, longest)) = BUDGETS.iter().find(|b| b.0 == kind) else {
        assert!(registers.values().all(|&r| r <= 168), "{name}: {registers:?}");
        return;
    };
    for (kernel, code) in listing(&code) {
        let block = BLOCKS.iter().position(|b| kernel.ends_with(&format!("_{}", b.0))).unwrap();
        let (_, rows, most) = BLOCKS[block];
        let most = match block {
            COMMON.. if ["w4a8", "mxfp4_a8"].contains(&kind) => 128,
            _ if name.contains("sm_1") => most + 40,
            _ => most,
        };
        assert!(registers[kernel] <= most, "{name}: {kernel} has {} registers", registers[kernel]);
        // A stage has 128 columns.
        let bytes = rows * 128 * if kind == "w8a8" { 8 } else { 4 } / 8;
        let (least, most) = main_loops(&code);
        let (least, most) = (least * 1024 / bytes, most * 1024 / bytes);
        assert!(least <= budgets[block], "{name}: {kernel} takes {least} instructions a KB");
        if block >= COMMON {
            let wanted = longest[block - COMMON];
            assert!(most <= wanted, "{name}: {kernel} takes {most} instructions a KB with other groups");
        }
    }
}

#[test]
fn what_is_installed_is_listed_checked_and_taken_away() {
    let data = tempfile::tempdir().unwrap();
    let first = with_stand_in(data.path(), "--yes --quiet --arch 8.6").manifest();
    let id = first["kernels"]["id"].as_str().unwrap().to_owned();
    assert_eq!(left(data.path()), std::slice::from_ref(&id));
    let again = with_stand_in(data.path(), "--yes --arch sm_86");
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
    assert_eq!(with_stand_in(data.path(), "--yes --quiet --arch 8.6").manifest()["kernels"], first["kernels"]);
    assert_eq!(run(&mut install(data.path(), "--list")).code, 0);

    // A manifest that cannot be read is no reason to be silent, and goes by its folder's name.
    let other = data.path().join("gptoss/kernels/beef");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("manifest.json"), "{").unwrap();
    let list = run(&mut install(data.path(), "--list --format table"));
    assert!(
        list.code == 1 && list.out.contains("beef  damaged: ") && list.out.contains("is not a manifest"),
        "{list:?}"
    );
    assert_eq!(run(&mut install(data.path(), "--uninstall beef")).code, 0);

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
    refused("--list --arch 8.6", None, &["cannot be used with"]);
    refused("--yes --arch 9.0a --cutlass /no/such", Some(&nvcc), &["--cutlass: there is no include/cutlass/version.h"]);

    // A compiler that stops in the middle: its words are shown, and what it made before is gone.
    let words = "*w8a8*) echo 'w8a8.cu(7): error: expected a \";\"' >&2; exit 2 ;;\n";
    let broken = stand_in(data.path(), words);
    refused("--yes --arch 8.6", Some(&broken), &["w8a8 does not compile for 8.6", "expected a \";\""]);

    // What a killed build left goes with the next one; what a living one has does not.
    let folder = data.path().join("gptoss/kernels");
    let (dead, living) = (folder.join(".x.partial-a"), folder.join(".x.partial-b"));
    std::fs::create_dir_all(&dead).unwrap();
    std::fs::create_dir_all(&living).unwrap();
    let held = std::fs::File::open(&living).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    with_stand_in(data.path(), "--yes --quiet --arch 8.6").manifest();
    assert!(!dead.exists() && living.exists());
}

/// A compiler that is none of pip's has no CUTLASS beside it: the library is left out, and that is said.
#[test]
fn without_cutlass_the_library_is_left_out() {
    let data = tempfile::tempdir().unwrap();
    let build = |flags: &str| with_stand_in(data.path(), &format!("--yes {flags}"));
    let ran = build("--arch 9.0a");
    assert!(ran.err.contains("CUTLASS is not found") && ran.err.contains("nvidia-cutlass==4.2.0.0"), "{}", ran.err);
    let built = ran.manifest();
    assert_eq!((hashes(&built).len(), built["kernels"].get("cutlass")), (12, None));
    // Done again it is left out too, even where CUTLASS would be found; a file that is not the same is named.
    let home = data.path().join("home");
    std::fs::create_dir_all(home.join("bin")).unwrap();
    std::fs::copy(stand_in(data.path(), ""), home.join("bin/nvcc")).unwrap();
    let again = |folder: &str| {
        let mut verify = command("gptoss-verify reproduce --quiet --work-dir");
        verify.arg(data.path()).arg(folder).env("CUDA_HOME", &home);
        run(verify.env("CUTLASS_HOME", toolkit().join("../../cutlass_library/source")))
    };
    let folder = built["volatile"]["output_path"].as_str().unwrap();
    let verdict = again(folder).manifest()["verdict"].clone();
    assert_eq!((&verdict["passed"], &verdict["tensors"]), (&true.into(), &12.into()), "{verdict}");
    support::edit(&Path::new(folder).join("manifest.json"), |m| m["kernels"]["files"][2]["sha256"] = "00".into());
    let lied = again(folder);
    assert!(lied.code == 1 && lied.out.contains("\"hash\"") && lied.out.contains("wanted 00"), "{lied:?}");
    // Elsewhere than on Hopper nobody misses it.
    assert!(!build("--arch 8.6").err.contains("CUTLASS"));
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
    // PyTorch's containers name every GPU that they serve.
    let mut command = install(data.path(), "--print-env");
    let ran = run(command.env("CUDA_HOME", &home).env("TORCH_CUDA_ARCH_LIST", "7.5 8.0 Hopper"));
    assert!(ran.code == 0 && ran.out.contains("'8.0;9.0;9.0+PTX'") && ran.err.contains("7.5 is left out"), "{ran:?}");
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
