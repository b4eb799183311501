# `import nixpkgs { system; config; }`, as far as this project's flake goes.
{
  system,
  config ? { },
  overlays ? [ ],
}:
let
  lib = import ./lib.nix;
  host = builtins.fromJSON (builtins.readFile ./host.json);
  make = import ./stdenv.nix { inherit host system; };
  pkgs = rec {
    inherit lib config;
    inherit (make)
      stdenv
      runCommand
      writeShellScriptBin
      mkShell
      ;
    callPackage =
      file: more:
      let
        f = import file;
      in
      f (builtins.intersectAttrs (builtins.functionArgs f) pkgs // more);
    rustPlatform = import ./rust.nix { inherit make; };
    cudaPackages_13_0 = import ./cuda.nix { inherit make; };
    autoAddDriverRunpath = make.nothing "auto-add-driver-runpath";
    makeWrapper = make.makeWrapper;
    # What goes into an image, as a file that says so.
    dockerTools.streamLayeredImage =
      all: make.runCommand "${all.name}-image" { text = builtins.toJSON all; } ''printf '%s' "$text" > $out'';
    # The host's are in PATH already.
    bashInteractive = make.nothing "bash";
    coreutils = make.nothing "coreutils";
    cacert = make.nothing "cacert";
    cargo = make.nothing "cargo";
    rustc = make.nothing "rustc";
    clippy = make.nothing "clippy";
    rustfmt = make.nothing "rustfmt";
  };
in
pkgs
