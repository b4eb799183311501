# Packages, apps, checks and shells of one system.
{
  nixpkgs,
  cutlass,
  system,
}:
let
  inherit (nixpkgs) lib;
  pins = import ./pins.nix;
  pkgs = import nixpkgs {
    inherit system;
    overlays = [ ];
    config = {
      allowUnfree = true;
      cudaSupport = true;
      cudaCapabilities = map (lib.removeSuffix "+PTX") pins.architectures;
      # nixpkgs wants this for 9.0a, whose code runs nowhere else.
      cudaForwardCompat = false;
    };
  };
  cudaPackages = pkgs.${pins.cudaSet};
  cutlassInclude = builtins.path {
    name = "cutlass-${pins.cutlass}-include";
    path = cutlass + "/include";
    sha256 = pins.cutlassInclude;
  };
  toolkit = call ./toolkit.nix { };
  call = file: more: pkgs.callPackage file ({ inherit pins cudaPackages; } // more);

  # Also what the tests read, for the package runs some of them.
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
  demoSource = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../demo.sh
      ../tests/fixtures/tiny-gpt-oss
    ];
  };
  gptoss = call ./package.nix { inherit src; };
  kernelsFor = architectures: call ./kernels.nix { inherit gptoss toolkit cutlassInclude architectures; };
  kernels = kernelsFor pins.architectures;
  gptoss-cuda = call ./gptoss-cuda.nix { inherit gptoss kernels; };
  image = call ./image.nix { inherit gptoss kernels; };

  binaries = [
    "gptoss-dequant"
    "gptoss-quant"
    "gptoss-kernel-install"
    "gptoss-verify"
    "gptoss-bench"
    "gptoss-run"
  ];
  alone = name: pkgs.runCommand "${name}-${gptoss.version}" { meta.mainProgram = name; } ''
    mkdir -p $out/bin
    ln -s ${gptoss}/bin/${name} $out/bin/
  '';
  # "8.0+PTX" is kernels-sm80, "9.0a" kernels-sm90a.
  perArchitecture = builtins.listToAttrs (
    map (architecture: {
      name = "kernels-sm" + builtins.replaceStrings [ "." "+PTX" ] [ "" "" ] architecture;
      value = kernelsFor [ architecture ];
    }) pins.architectures
  );

  app = description: name: text: {
    type = "app";
    program = "${pkgs.writeShellScriptBin name text}/bin/${name}";
    meta = { inherit description; };
  };
  # A line of recipes.txt is a name and flags.
  recipes = builtins.listToAttrs (
    map
      (line: rec {
        name = builtins.head (builtins.split " " line);
        # Weights for W4A8 want its kernels.
        value =
          let
            tools = if lib.hasInfix "w4a8" line then gptoss-cuda else gptoss;
          in
          app "The recipe of that name: --model-in DIR, --calib-jsonl FILE, ..." name
            ''exec ${tools}/bin/gptoss-quant ${lib.removePrefix name line} "$@"'';
      })
      (builtins.filter (line: builtins.isString line && line != "") (builtins.split "\n" (builtins.readFile ./recipes.txt)))
  );
in
{
  packages =
    lib.genAttrs binaries alone
    // perArchitecture
    // {
      inherit
        gptoss
        gptoss-cuda
        kernels
        image
        ;
      default = gptoss;
    };
  apps =
    lib.genAttrs binaries (name: app "The tool of that name" name ''exec ${gptoss}/bin/${name} "$@"'')
    // recipes
    // {
      default = app "What there is to run" "gptoss-help" ''
        echo "nix run .#NAME -- FLAGS, with one of these names (--help has the flags):"
        printf '  %s\n' ${lib.concatStringsSep " " (binaries ++ builtins.attrNames recipes ++ [ "dequant" "verify" "demo" ])}
      '';
      dequant = app "MXFP4 to BF16" "dequant" ''exec ${gptoss}/bin/gptoss-dequant "$@"'';
      verify = app "A checkpoint against its manifest" "verify" ''exec ${gptoss}/bin/gptoss-verify "$@"'';
      demo = app "The main job on a tiny gpt-oss" "demo" ''
        PATH="${pkgs.coreutils}/bin:$PATH" exec ${pkgs.runtimeShell} ${demoSource}/demo.sh ${gptoss}/bin "$@"
      '';
    };
  checks = import ./checks.nix {
    inherit (pkgs)
      runCommand
      cargo
      rustfmt
      clippy
      shellcheck
      ;
    inherit gptoss kernels;
  };
  devShells = {
    default = call ./shell.nix { inherit gptoss; };
    kernels = call ./shell.nix {
      inherit gptoss toolkit cutlassInclude;
      withCuda = true;
    };
  };
}
