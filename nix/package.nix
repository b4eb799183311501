# The tools.
{ lib, rustPlatform, src, ... }:
rustPlatform.buildRustPackage {
  pname = "gptoss";
  version = (builtins.fromTOML (builtins.readFile ../Cargo.toml)).workspace.package.version;
  inherit src;
  cargoLock.lockFile = ../Cargo.lock;
  cargoBuildFlags = [ "--package=gptoss-tools" "--bins" ];
  # The tests want Python's peers and a CUDA compiler, and run by tests/run.sh.
  doCheck = false;
  meta = {
    description = "Makes gpt-oss models smaller and faster, and proves what it did";
    license = lib.licenses.mit;
    mainProgram = "gptoss-quant";
    platforms = [ "x86_64-linux" "aarch64-linux" ];
  };
}
