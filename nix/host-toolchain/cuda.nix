# cudaPackages_13_0 from NVIDIA's wheels, which kernels/requirements.txt (here wheels.txt) pins by their hashes: the versions that nixpkgs has, laid out
# as nixpkgs lays them out.
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
  # `layout` runs where the wheel's files are.
  component =
    package: layout:
    let
      inherit (wheels.${package}) version sha256;
      wheel = make.fetch {
        name = "${package}-${version}.whl";
        inherit sha256;
        script = ''
          /usr/bin/python3 -m pip download --quiet --no-deps --no-cache-dir --only-binary :all: -d . ${package}==${version}
          cp *.whl $out
        '';
      };
    in
    make.runCommand "${package}-${version}" { inherit version; } ''
      /usr/bin/python3 -m zipfile -e ${wheel} wheel
      cd wheel/nvidia/cu13
      find . -path '*/bin/*' -type f -exec chmod +x {} +
      ${layout}
    ''
    // {
      outputs = [ "out" ];
    };
  plain = "cp -r . $out";
in
rec {
  # Includes nothing of the runtime; `nvcc` is a wrapper, and NVVM is inside.
  cuda_nvcc = component "nvidia-cuda-nvcc" ''
    cp -r . $out
    cp -r ${libnvvm} $out/nvvm
    sed -i -e 's,$(TOP)/$(_TARGET_DIR_)/include/cccl,${cuda_cccl}/include,' -e "s,\$(TOP)/\$(_TARGET_DIR_)/include,$out/include," $out/bin/nvcc.profile
    mv $out/bin/nvcc $out/bin/.nvcc-wrapped
    printf '#!/bin/bash\nexec -a "$0" %s/bin/.nvcc-wrapped "$@"\n' $out > $out/bin/nvcc
    chmod +x $out/bin/nvcc
  '';
  libnvvm = component "nvidia-nvvm" "cp -r nvvm $out";
  cuda_cccl = component "nvidia-cuda-cccl" ''
    mkdir $out
    cp -r include/cccl $out/include
    ln -s . $out/include/cccl
  '';
  cuda_crt = component "nvidia-cuda-crt" plain;
  cuda_cudart = component "nvidia-cuda-runtime" plain;
  cuda_cuobjdump = component "nvidia-cuda-cuobjdump" plain;
  cuda_nvdisasm = component "nvidia-cuda-nvdisasm" plain;
  backendStdenv = make.stdenv;
}
