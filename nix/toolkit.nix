# The CUDA compiler and what it wants beside it, in one folder of real files: nvcc looks for its parts beside its real path.
{
  lib,
  runCommand,
  cudaPackages,
  ...
}:
let
  parts = [
    cudaPackages.cuda_nvcc
    cudaPackages.cuda_crt
    cudaPackages.libnvvm
    cudaPackages.cuda_cudart
    cudaPackages.cuda_cccl
  ];
  outputs = builtins.concatMap (part: map (name: part.${name}) (part.outputs or [ "out" ])) parts;
in
runCommand "cuda-toolkit-${cudaPackages.cuda_nvcc.version}" { } ''
  mkdir -p $out
  for part in ${lib.concatStringsSep " " (map toString outputs)}; do
    cp -rL --no-preserve=mode "$part"/. $out/
  done
  chmod +x $out/bin/* $out/nvvm/bin/*
''
