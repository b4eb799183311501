# cudaPackages_13_0 from NVIDIA's wheels, which kernels/requirements.txt (here wheels.txt) pins by their hashes: the versions that nixpkgs has.
{
  make,
}:
let
  lines = builtins.filter builtins.isString (builtins.split "\n" (builtins.readFile ./wheels.txt));
  parsed = builtins.filter (parts: parts != null) (
    map (builtins.match "(nvidia-[a-z-]+)==([0-9.]+) --hash=sha256:([0-9a-f]+)") lines
  );
  wheels = builtins.listToAttrs (
    map (parts: {
      name = builtins.elemAt parts 0;
      value = {
        version = builtins.elemAt parts 1;
        sha256 = builtins.elemAt parts 2;
      };
    }) parsed
  );
  component =
    package:
    let
      inherit (wheels.${package}) version sha256;
      wheel = make.fetch {
        name = "${package}-${version}.whl";
        inherit sha256;
        script = ''
          python3 -m pip download --quiet --no-deps --no-cache-dir --only-binary :all: -d . ${package}==${version}
          cp *.whl $out
        '';
      };
    in
    make.runCommand "${package}-${version}" { inherit version; } ''
      mkdir -p $out wheel
      python3 -m zipfile -e ${wheel} wheel
      cp -r wheel/nvidia/cu13/. $out/
    ''
    // {
      inherit version;
      outputs = [ "out" ];
    };
in
{
  cuda_nvcc = component "nvidia-cuda-nvcc";
  libnvvm = component "nvidia-nvvm";
  cuda_crt = component "nvidia-cuda-crt";
  cuda_cudart = component "nvidia-cuda-runtime";
  cuda_cccl = component "nvidia-cuda-cccl";
  backendStdenv = { inherit (make) mkDerivation; };
}
