# The CUDA compiler, with the runtime's headers and libraries beside it: nixpkgs keeps them in packages of their own, which its nvcc does not know of
# outside of its own builds.
{
  lib,
  runCommand,
  runtimeShell,
  pins,
  cudaPackages,
  ...
}:
let
  inherit (cudaPackages) cuda_nvcc;
  nvcc = lib.getExe' cuda_nvcc "nvcc";
  outputs = part: map (name: part.${name}) (lib.subtractLists [ "stubs" "dev" ] part.outputs);
  parts = builtins.concatMap outputs [
    cudaPackages.cuda_cudart
    cudaPackages.cuda_crt
  ];
  # The name changes in nixpkgs.
  cccl = "${lib.getOutput "include" (cudaPackages.cccl or cudaPackages.cuda_cccl)}/include";
in
assert lib.assertMsg (
  cuda_nvcc.version == pins.nvcc
) "nvcc ${cuda_nvcc.version} is not ${pins.nvcc}, which nix/pins.nix pins: the kernels would have other bytes";
runCommand "cuda-toolkit-${cuda_nvcc.version}" { } ''
  mkdir -p $out/bin $out/include $out/lib
  for part in ${lib.concatStringsSep " " (map toString parts)}; do
    for folder in include lib; do
      if [ -d $part/$folder ]; then
        cp -rL --no-preserve=mode $part/$folder/. $out/$folder/
      fi
    done
  done
  # The stubs of the driver are in one output with the rest in some versions; a program must not find them.
  rm -rf $out/lib/stubs
  # CUTLASS includes cccl/cuda/..., as NVIDIA's own layout has it; nixpkgs takes that folder away, or makes it a link to its parent.
  if [ -d ${cccl}/cccl ]; then ln -s ${cccl}/cccl $out/include/cccl; else ln -s ${cccl} $out/include/cccl; fi
  ln -s $(dirname ${nvcc})/* ${lib.getBin cudaPackages.cuda_cuobjdump}/bin/* ${lib.getBin cudaPackages.cuda_nvdisasm}/bin/* $out/bin/
  # nvcc looks for its parts beside the path that it was called by.
  rm $out/bin/nvcc
  printf '#!%s\nexec %s -I%s/include "$@"\n' ${runtimeShell} ${nvcc} $out > $out/bin/nvcc
  chmod +x $out/bin/nvcc
''
