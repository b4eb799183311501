# A build of the kernels; GPTOSS_KERNELS names it.
{
  lib,
  pins,
  cudaPackages,
  cutlassInclude,
  gptoss,
  toolkit,
  architectures ? pins.architectures,
  ...
}:
cudaPackages.backendStdenv.mkDerivation {
  pname = "gptoss-kernels";
  inherit (gptoss) version;
  dontUnpack = true;
  dontConfigure = true;
  # Nothing may touch the bytes.
  dontFixup = true;
  nativeBuildInputs = [ gptoss ];
  buildPhase = ''
    GPTOSS_KERNELS=$out HOME=$TMPDIR gptoss-kernel-install --yes --threads $NIX_BUILD_CORES \
      --arch '${lib.concatStringsSep ";" architectures}' --nvcc ${toolkit}/bin/nvcc --cutlass ${cutlassInclude} > /dev/null
  '';
  installPhase = ":";
}
