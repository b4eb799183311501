//! The CUDA kernels without a GPU: each compiled for this processor and compared with plain loops, and launched over a driver whose GPU is this processor.

#[path = "support/kernels.rs"]
#[allow(dead_code, reason = "each test file uses its part")]
mod installing;
mod support;

use std::path::Path;
use std::process::Command;

use installing::{compile, driver, install, on_this_processor, stand_in, with_stand_in};
use serde_json::Value;
use support::{Ran, command, root, run};

/// GPUs that the emulated driver can be: compute capability and multiprocessors.
const AMPERE: &str = "8.6:4";
const HOPPER: &str = "9.0:132";
/// No test waits for the clock: the machine may have other things to do.
const PATIENT: &str = "gptoss-verify kernels --limit 600";

/// A folder for kernels with builds for both of these GPUs, by a compiler that only answers.
fn installed() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    with_stand_in(dir.path(), "--yes --quiet --arch 8.6;9.0a").manifest();
    dir
}

/// A driver over the kernels with `change` in place of what `file` has.
fn changed(file: &str, change: &str, to: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-rT").args([&root().join("kernels"), dir.path()]).status().unwrap();
    assert!(copied.success());
    let text = std::fs::read_to_string(dir.path().join(file)).unwrap();
    assert!(text.contains(change), "{change}");
    std::fs::write(dir.path().join(file), text.replace(change, to)).unwrap();
    compile(dir.path(), "driver.cpp", &["-fPIC", "-shared", "-O0"], &dir.path().join("libcuda.so.1"));
    dir
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

/// The launcher's own names, structures, grids and memory: only machine code is not run.
#[test]
fn every_kernel_is_launched_and_two_gpus_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let verify = |line: &str| run(&mut on_this_processor(dir.path(), driver(), line));

    let none = verify("gptoss-verify kernels");
    assert!(none.code == 2 && none.err.contains("no kernels are installed in"), "{}", none.err);
    assert!(none.err.contains("gptoss-kernel-install --yes --arch 8.6"), "{}", none.err);
    // Code of another major version does not run there.
    with_stand_in(dir.path(), "--yes --quiet --arch 10.0").manifest();
    let other = verify("gptoss-verify kernels");
    assert!(other.code == 2 && other.err.contains("compute capability 8.6"), "{}", other.err);
    let build = with_stand_in(dir.path(), "--yes --quiet --arch 8.0;8.6").manifest();

    let tested = verify(&format!("{PATIENT} --quiet"));
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
    let hopper = |line: &str| run(on_this_processor(dir.path(), driver(), line).env("GPTOSS_EMULATED_GPU", HOPPER));
    let other = hopper(&format!("{PATIENT} --quiet")).manifest();
    assert_eq!(other["notes"][0], "this processor ran code for 9.0a");
    let others = other["kernel_tests"].as_array().unwrap();
    assert_eq!(others.len(), tests.len());
    for (one, other) in tests.iter().zip(others) {
        assert_eq!(one["kernel"], other["kernel"]);
        assert_eq!((&one["digest"], other.get("failure")), (&other["digest"], None), "{one} {other}");
    }
    // Launches begin early where nothing forbids it: weights that were copied and waited for do not.
    let count = dir.path().join("count");
    let line = "gptoss-bench gemm --quiet --M 3 --K 64 --N 96 --iters 2 --on gpu --only w4a8";
    let mut early = on_this_processor(dir.path(), driver(), line);
    run(early.env("GPTOSS_EMULATED_GPU", HOPPER).env("GPTOSS_EMULATED_COUNT", &count)).manifest();
    let counted = std::fs::read_to_string(&count).unwrap();
    let (some, all) = counted.trim().split_once(" of ").unwrap();
    assert!(some == all && all.parse::<u32>().unwrap() > 60, "{counted}");

    // A damaged build is not run.
    let file = Path::new(build["volatile"]["output_path"].as_str().unwrap()).join("w4a8.sm_86.cubin");
    std::fs::write(&file, "no code").unwrap();
    let damaged = verify("gptoss-verify kernels");
    assert!(damaged.code == 2 && damaged.err.contains("damaged"), "{}", damaged.err);
}

/// Many rows go to wgmma where there is one, and enough blocks for the GPU.
#[test]
fn blocks_suit_the_launch_and_the_gpu() {
    let dir = installed();
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
}

/// What one kernel does to its context, or never ends, is no matter of the others.
#[test]
fn a_kernel_that_fails_takes_no_other_with_it() {
    let dir = installed();
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
}

#[test]
fn a_planted_fault_is_seen_and_named() {
    let dir = installed();
    for (gpu, file, change, to, kernel, words) in [
        (AMPERE, "operands.cuh", "INT8_STEP = 0.5f", "INT8_STEP = 0.25f", "mxfp4_a8", "mxfp4_a8: "),
        // A bit more than rounding, and a limit that gates must not pass.
        (AMPERE, "gemm.cuh", "gate = gate > limit ? limit : gate;", "", "mxfp4_a16_experts", "mxfp4_a16_experts: "),
        (
            AMPERE,
            "mma.cuh",
            "int64_t(tile.expert) * p.n + tile.row + r + e, FloatType",
            "tile.row + r + e + (1 << 22), FloatType",
            "w4a16",
            "behind an array",
        ),
        (
            AMPERE,
            "gemm.cuh",
            "(int64_t(tile.expert) * p.n + tile.row) * a_row;",
            "(int64_t(tile.expert) * p.n + tile.row + 4096) * a_row;",
            "w8a8",
            "reads outside every array",
        ),
        // The inputs of a step ahead that is not there.
        (
            AMPERE,
            "mma.cuh",
            "g + i - GROUPS < ahead) read(g + i);",
            "ahead > 0) read(g + i);",
            "w4a8",
            "reads outside every array",
        ),
        // Tokens that nothing orders in front of the tensor cores, or that come before everybody is done with those before; operands that are not in order;
        // sums that are taken before they are there; chunks that are not swizzled.
        (HOPPER, "wgmma.cuh", "fence_async();", "", "w4a8", "was not fenced before a barrier"),
        (HOPPER, "wgmma.cuh", "sync_team<Layout::TEAMS>(team);", "", "w4a8", "was not fenced before a barrier"),
        (HOPPER, "wgmma.cuh", "slot == 0 ? MANY_STAGES - 1 : slot - 1", "slot", "w4a8", "before a barrier"),
        (HOPPER, "operands.cuh", "warpgroup_fence();", "", "w4a8", "without a fence in front of it"),
        (HOPPER, "wgmma.cuh", "warpgroup_wait<0>();", "", "mxfp4_a8_experts", "mxfp4_a8_experts: "),
        (HOPPER, "wgmma.cuh", "(place ^ (t % 8 * 16))", "place", "mxfp4_a8_experts", "blocks of 64x64"),
    ] {
        let broken = changed(file, change, to);
        let line = format!("{PATIENT} --only {kernel}");
        let ran = run(on_this_processor(dir.path(), broken.path(), &line).env("GPTOSS_EMULATED_GPU", gpu));
        assert!(ran.code == 1 && ran.err.contains(words), "{change}: {} {}", ran.code, ran.err);
        // What is wrong of a product is said by rows, tokens and columns.
        if !["array", "barrier", "fence"].iter().any(|w| words.contains(w)) {
            assert!(ran.out.contains("outputs are wrong; rows mod 16: "), "{change}: {}", ran.out);
        }
    }
}

/// One that does not wait for what it reads: seen where launches begin early, and only there.
#[test]
fn a_kernel_that_does_not_wait_is_seen_where_launches_begin_early() {
    let dir = installed();
    let broken = changed("combine_experts.cu", "  inputs_ready();\n", "");
    for (gpu, flags, code) in [(AMPERE, "", 0), (HOPPER, "", 1), (HOPPER, "--no-early-launch", 0)] {
        let line = format!("{PATIENT} --quiet --only chain {flags}");
        let ran = run(on_this_processor(dir.path(), broken.path(), &line).env("GPTOSS_EMULATED_GPU", gpu));
        assert_eq!(ran.code, code, "{gpu} {flags}: {} {}", ran.out, ran.err);
    }
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
