//! Builds of the CUDA kernels: the known bytes, what their machine code is and how long its loops are, and the installer from outside.

#[path = "support/kernels.rs"]
#[allow(dead_code, reason = "each test file uses its part")]
mod installing;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use installing::{hashes, install, left, stand_in, toolkit, with_nvcc, with_stand_in};
use serde_json::Value;
use support::{Ran, command, root, run};

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

/// Instructions of a main loop for each KB of codes that a warp reads, at most, for each of `BLOCKS`: the most that was counted on any architecture, and a few
/// percent, so that a loop that grows is seen. A product has a loop for each kind of group: first the shortest, for groups of 64 or of multiples of 128
/// columns, then the longest, for groups of 32, whose scales have to be applied after every 32 columns. An H200 that reads at three quarters of its copy
/// rate gives each scheduler the time of about 340 instructions for a KB; with int8 inputs and 8 tokens the shortest takes less than half of them.
const BUDGETS: [(&str, [[usize; 6]; 2]); 5] = [
    ("mxfp4_a8", [[156, 214, 140, 188, 640, 606]; 2]),
    ("w4a8", [[132, 168, 112, 141, 422, 358], [252, 346, 212, 300, 662, 606]]),
    ("w8a8", [[62, 81, 50, 68, 197, 163], [125, 177, 104, 153, 324, 290]]),
    ("w4a16", [[234, 266, 216, 240, 542, 428], [345, 397, 294, 347, 694, 606]]),
    ("mxfp4_a16", [[226, 272, 206, 246, 626, 590]; 2]),
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

/// Instructions of the loops that ask for codes and multiply, and have no such loop inside, ascending.
fn main_loops(code: &Code) -> Vec<usize> {
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
    let is_inner = |&&(from, at, _): &&(u64, u64, usize)| {
        !all.iter().any(|&(f, a, _)| (f, a) != (from, at) && from <= f && a <= at)
    };
    let mut lengths: Vec<usize> = all.iter().filter(is_inner).map(|l| l.2).collect();
    lengths.sort();
    lengths
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
    let Some((_, budgets)) = BUDGETS.iter().find(|b| b.0 == kind) else {
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
        // Behind the loops over stages come those around them.
        let loops = main_loops(&code);
        let kinds = if kind.starts_with("mxfp4") { 1 } else { 4 };
        assert!(loops.len() >= kinds, "{name}: {kernel} has loops of {loops:?} instructions");
        for (length, wanted, which) in
            [(loops[0], budgets[0][block], "shortest"), (loops[kinds - 1], budgets[1][block], "longest")]
        {
            let instructions = length * 1024 / bytes;
            assert!(
                instructions <= wanted,
                "{name}: the {which} loop of {kernel} takes {instructions} instructions a KB"
            );
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
