# Rust; with CUDA also the pinned compiler, CUTLASS and the architectures.
{
  lib,
  mkShell,
  pins,
  cudaPackages,
  cargo,
  rustc,
  clippy,
  rustfmt,
  gptoss,
  toolkit ? null,
  cutlassInclude ? null,
  withCuda ? false,
  ...
}:
mkShell (
  {
    name = if withCuda then "gptoss-kernels-shell" else "gptoss-shell";
    # What it is built from, not the package itself.
    inputsFrom = [ gptoss ];
    packages = [
      cargo
      rustc
      clippy
      rustfmt
    ]
    ++ lib.optionals withCuda [
      toolkit
      cudaPackages.backendStdenv.cc
    ];
  }
  // lib.optionalAttrs withCuda {
    # As the kernels have it.
    hardeningDisable = [ "all" ];
    CUDA_HOME = toolkit;
    CUTLASS_HOME = cutlassInclude;
    # For our tools, and for the Makefile.
    TORCH_CUDA_ARCH_LIST = lib.concatStringsSep ";" pins.architectures;
    CUDA_ARCH = lib.concatStringsSep ";" pins.architectures;
  }
)
