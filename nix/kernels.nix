# A build of the kernels; GPTOSS_KERNELS names it.
{
  lib,
  cudaPackages,
  cutlassInclude,
  gptoss,
  toolkit,
  architectures,
  ...
}:
cudaPackages.backendStdenv.mkDerivation {
  pname = "gptoss-kernels";
  inherit (gptoss) version;
  dontUnpack = true;
  dontConfigure = true;
  # Nothing may touch the bytes, nor what the compiler sees.
  dontFixup = true;
  hardeningDisable = [ "all" ];
  env = {
    NIX_DONT_SET_RPATH = "1";
    NIX_NO_SELF_RPATH = "1";
  };
  nativeBuildInputs = [ gptoss ];
  buildPhase = ''
    GPTOSS_KERNELS=$out HOME=$TMPDIR gptoss-kernel-install --yes --threads $NIX_BUILD_CORES \
      --arch '${lib.concatStringsSep ";" architectures}' --nvcc ${toolkit}/bin/nvcc --cutlass ${cutlassInclude} > /dev/null
  '';
  installPhase = "true";
}
