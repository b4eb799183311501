# Packages, apps, checks and shells of one system.
{
  self,
  nixpkgs,
  cutlass,
  system,
}:
let
  # nix/host-toolchain, which stands in for nixpkgs on machines without network, has a CUTLASS of its own.
  pins = import ./pins.nix // (nixpkgs.lib.standIn or { });
  pkgs = import nixpkgs {
    inherit system;
    config = {
      allowUnfree = true;
      cudaSupport = true;
      cudaCapabilities = map (lib.removeSuffix "+PTX") pins.architectures;
      cudaForwardCompat = false;
    };
  };
  inherit (nixpkgs) lib;
  cudaPackages = pkgs.${pins.cudaSet};
  cutlassInclude = builtins.path {
    name = "cutlass-include";
    path = cutlass + "/include";
    sha256 = pins.cutlassInclude;
  };
  toolkit = pkgs.callPackage ./toolkit.nix { inherit cudaPackages; };
  shared = {
    inherit
      pins
      cudaPackages
      cutlassInclude
      toolkit
      ;
  };
  call = file: more: pkgs.callPackage file (shared // more);
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../rustfmt.toml
      ../bins
      ../lib
      ../kernels
      ../tests
    ];
  };
  gptoss = call ./package.nix { inherit src; };
  kernels = call ./kernels.nix { inherit gptoss; };
  gptoss-cuda = call ./cuda.nix { inherit gptoss kernels; };
  image = call ./image.nix { inherit gptoss kernels; };

  binaries = [
    "gptoss-dequant"
    "gptoss-quant"
    "gptoss-kernel-install"
    "gptoss-verify"
    "gptoss-bench"
    "gptoss-run"
  ];
  # A line of recipes.txt is a name and flags.
  recipes = map (line: builtins.match "([^ ]+) (.*)" line) (
    builtins.filter (line: builtins.isString line && line != "") (builtins.split "\n" (builtins.readFile ./recipes.txt))
  );
  script = name: text: {
    type = "app";
    program = "${pkgs.writeShellScriptBin name text}/bin/${name}";
  };
  binary = name: {
    inherit name;
    value = {
      type = "app";
      program = "${gptoss}/bin/${name}";
    };
  };
  # nix run .#w4a16-awq-all -- --model-in DIR [more flags]
  recipe = parts: {
    name = builtins.head parts;
    value = script (builtins.head parts) ''exec ${gptoss}/bin/gptoss-quant ${builtins.elemAt parts 1} "$@"'';
  };
in
assert lib.assertMsg (
  cudaPackages.cuda_nvcc.version == pins.nvcc
) "nvcc ${cudaPackages.cuda_nvcc.version} is not the pinned ${pins.nvcc}";
{
  packages = {
    inherit
      gptoss
      gptoss-cuda
      kernels
      image
      ;
    default = gptoss;
  };
  apps =
    builtins.listToAttrs (map binary binaries ++ map recipe recipes)
    // {
      default = script "gptoss-help" ''for t in ${lib.concatStringsSep " " binaries}; do echo "nix run .#$t -- --help"; done'';
      dequant = script "dequant" ''exec ${gptoss}/bin/gptoss-dequant "$@"'';
      verify = script "verify" ''exec ${gptoss}/bin/gptoss-verify "$@"'';
    };
  checks = {
    inherit gptoss kernels;
  }
  // call ./checks.nix { inherit gptoss kernels src; };
  devShells = {
    default = call ./shell.nix { inherit gptoss; };
    kernels = call ./shell.nix {
      inherit gptoss;
      withCuda = true;
    };
  };
}
