# Rust; with CUDA also the pinned compiler, CUTLASS and the architectures.
{
  lib,
  mkShell,
  pins,
  cutlassInclude,
  gptoss,
  toolkit,
  cargo,
  rustc,
  clippy,
  rustfmt,
  withCuda ? false,
  ...
}:
mkShell (
  {
    inputsFrom = [ gptoss ];
    packages = [
      cargo
      rustc
      clippy
      rustfmt
    ]
    ++ lib.optionals withCuda [
      toolkit
      gptoss
    ];
  }
  // lib.optionalAttrs withCuda {
    CUDA_HOME = toolkit;
    CUTLASS_HOME = cutlassInclude;
    TORCH_CUDA_ARCH_LIST = lib.concatStringsSep ";" pins.architectures;
  }
)
