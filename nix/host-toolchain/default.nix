# `import nixpkgs { system; config; overlays; }`, as far as this project's flake goes.
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
      makeWrapper
      autoAddDriverRunpath
      coreutils
      ;
    # As nixpkgs' callPackage, a set that it gives has `override` in it.
    callPackage =
      file: more:
      let
        f = import file;
        made = f (builtins.intersectAttrs (builtins.functionArgs f) pkgs // more);
      in
      made // { override = changed: callPackage file (more // changed); };
    rustPlatform = import ./rust.nix { inherit make cargo rustc; };
    cargo = make.links "cargo" host.rust "cargo";
    rustc = make.links "rustc" host.rust "rustc rustdoc";
    clippy = make.links "clippy" host.rust "cargo-clippy clippy-driver";
    rustfmt = make.links "rustfmt" host.rust "cargo-fmt rustfmt";
    shellcheck = make.links "shellcheck" "/usr/bin" "shellcheck";
    cudaPackages_13_0 = import ./cuda.nix { inherit make; };
    runtimeShell = "/bin/bash";
    bashInteractive = make.links "bash" "/bin" "bash";
    cacert = make.runCommand "cacert" { } "mkdir -p $out";
    # What goes into an image, as a file that says so.
    dockerTools.streamLayeredImage =
      all: make.runCommand "${all.name}-image" { text = builtins.toJSON all; } ''printf '%s' "$text" > $out'';
  };
in
pkgs
