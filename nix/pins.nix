# What a build of the kernels means; everything else reads it here.
{
  cudaSet = "cudaPackages_13_0";
  nvcc = "13.0.88";
  # Architectures, as in TORCH_CUDA_ARCH_LIST; the default of gptoss-kernel-install (lib/src/kernels/arch.rs).
  architectures = [ "8.0+PTX" "8.6" "8.9" "9.0a" "10.0" "12.0" ];
  cutlass = "4.2.1";
  # Of include/ at v4.2.1, as a Nix archive: another tree is refused.
  cutlassInclude = "sha256-EyZQ+KHUoHTIaretIH5qss/8Ci1OSyJeUDcHpV81JZ8=";
}
