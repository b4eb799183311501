//! What the end-to-end tests share: the tools as processes, the fixture, small changes to checkpoints.
#![allow(dead_code, reason = "each test file uses its part")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod faults;
pub mod mutate;
pub mod parquet;
pub mod random;
pub mod synthetic;
pub mod tensors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The trained tiny gpt-oss: MXFP4, two shards.
pub fn tiny() -> PathBuf {
    root().join("tests/fixtures/tiny-gpt-oss")
}

/// Names and flags of nix/recipes.txt.
pub fn recipes() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(root().join("nix/recipes.txt")).expect("the recipes are there");
    let parts = text.lines().map(|l| l.split_once(' ').expect("a recipe has a name and flags"));
    parts.map(|(name, flags)| (name.to_owned(), flags.to_owned())).collect()
}

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("bins lies in the repository").to_path_buf()
}

/// A tool's path.
pub fn exe(tool: &str) -> &'static str {
    match tool {
        "gptoss-dequant" => env!("CARGO_BIN_EXE_gptoss-dequant"),
        "gptoss-quant" => env!("CARGO_BIN_EXE_gptoss-quant"),
        "gptoss-run" => env!("CARGO_BIN_EXE_gptoss-run"),
        "gptoss-bench" => env!("CARGO_BIN_EXE_gptoss-bench"),
        "gptoss-kernel-install" => env!("CARGO_BIN_EXE_gptoss-kernel-install"),
        "gptoss-verify" => env!("CARGO_BIN_EXE_gptoss-verify"),
        other => panic!("no tool {other}"),
    }
}

/// A path as a word of a command line: a temporary folder may have any name.
pub fn word(path: &Path) -> String {
    shlex::try_quote(path.to_str().expect("paths of tests are UTF-8")).expect("it has no zero byte").into_owned()
}

/// The words of a command line, as a shell splits it.
pub fn words(line: &str) -> Vec<String> {
    shlex::split(line).unwrap_or_else(|| panic!("no command line: {line}"))
}

/// A command line that never reads the test's own standard input and never meets the real hub.
pub fn command(line: &str) -> Command {
    let mut words = words(line).into_iter();
    let mut command = Command::new(exe(&words.next().expect("a tool")));
    command.args(words).stdin(Stdio::null()).env_remove("HF_TOKEN").env("HF_ENDPOINT", "http://127.0.0.1:9");
    command
}

/// What a run left.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl From<Output> for Ran {
    fn from(o: Output) -> Self {
        let text = |b: Vec<u8>| String::from_utf8(b).expect("the tools write UTF-8");
        Self { code: o.status.code().unwrap_or(-1), out: text(o.stdout), err: text(o.stderr) }
    }
}

impl Ran {
    /// The manifest on standard output.
    pub fn manifest(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.err);
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}", self.out))
    }
}

/// Runs to the end.
pub fn run(command: &mut Command) -> Ran {
    command.output().expect("the tool starts").into()
}

/// Runs with `input` on standard input.
pub fn run_with(command: &mut Command, input: &str) -> Ran {
    use std::io::Write;
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut pipe = child.stdin.take().expect("piped");
    // A tool that fails before it reads closes the pipe: that is its business.
    let _ = pipe.write_all(input.as_bytes());
    drop(pipe);
    child.wait_with_output().expect("the tool ends").into()
}

/// Every file of a folder with its bytes.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries
        .map(|e| e.expect("the folder can be listed"))
        .map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).expect("a file")))
        .collect()
}

/// Fails with the first difference between two folders.
pub fn assert_same(a: &Path, b: &Path) {
    let (x, y) = (files(a), files(b));
    assert_eq!(x.keys().collect::<Vec<_>>(), y.keys().collect::<Vec<_>>());
    for (name, bytes) in &x {
        assert!(bytes == &y[name], "{name} differs between {} and {}", a.display(), b.display());
    }
}

/// A copy of the tiny model that can be changed.
pub fn tiny_copy(dir: &Path) -> PathBuf {
    copy_folder(&tiny(), &dir.join("model"))
}

/// Copies a flat folder.
pub fn copy_folder(from: &Path, to: &Path) -> PathBuf {
    std::fs::create_dir_all(to).expect("can be made");
    for (name, bytes) in files(from) {
        std::fs::write(to.join(name), bytes).expect("there is room");
    }
    to.to_path_buf()
}

/// One safetensors file, taken apart.
pub struct Shard {
    /// The header's JSON.
    pub header: serde_json::Map<String, Value>,
    /// The data.
    pub data: Vec<u8>,
}

impl Shard {
    /// Reads a file that is in order.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("readable");
        let n = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + n]).expect("JSON");
        Self { header, data: bytes[8 + n..].to_vec() }
    }

    /// Writes it, whatever it says.
    pub fn write(&self, path: &Path) {
        let mut json = Value::Object(self.header.clone()).to_string();
        json += &" ".repeat(json.len().next_multiple_of(8) - json.len());
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend_from_slice(&self.data);
        std::fs::write(path, bytes).expect("there is room");
    }

    /// The bytes of a tensor.
    pub fn tensor(&mut self, name: &str) -> &mut [u8] {
        let o = &self.header[name]["data_offsets"];
        let at = |i: usize| o[i].as_u64().expect("a number") as usize;
        let (start, end) = (at(0), at(1));
        &mut self.data[start..end]
    }
}

/// Changes a JSON file in place.
pub fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).expect("readable")).expect("JSON");
    change(&mut value);
    std::fs::write(path, value.to_string()).expect("there is room");
}
