# The tools.
{
  lib,
  rustPlatform,
  autoAddDriverRunpath,
  src,
  ...
}:
rustPlatform.buildRustPackage {
  pname = "gptoss";
  version = (lib.importTOML ../Cargo.toml).workspace.package.version;
  inherit src;
  cargoLock.lockFile = ../Cargo.lock;
  # libcuda.so.1 is where NixOS has the driver.
  nativeBuildInputs = [ autoAddDriverRunpath ];
  # As the tests have it, so that nothing is compiled twice.
  cargoBuildFlags = [
    "--workspace"
    "--bins"
  ];
  # The tests that want nothing but the tools, and take a minute; tests/run.sh brings Python's peers and a CUDA compiler for the others.
  doCheck = true;
  cargoTestFlags = [
    "--workspace"
    "--lib"
  ]
  ++ map (name: "--test=${name}") [
    "golden"
    "forward"
    "dequant"
    "quant"
    "verify"
    "run"
  ];
  # cargo-auditable wraps cargo, and clippy with it.
  auditable = false;
  meta = {
    description = "Makes gpt-oss models smaller and faster, and proves what it did";
    license = lib.licenses.mit;
    mainProgram = "gptoss-quant";
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
