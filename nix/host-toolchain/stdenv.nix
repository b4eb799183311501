# Derivations that the host's own programs build. What they are is a part of each derivation, so another compiler is another hash.
{
  host,
  system,
}:
let
  common = {
    inherit system;
    hostFingerprint = host.fingerprint;
    hostPath = host.path;
    LC_ALL = "C";
    TZ = "UTC";
    SOURCE_DATE_EPOCH = "315532800";
  };
  notForTheBuilder = [
    "meta"
    "passthru"
    "cargoLock"
    "env"
    "nativeBuildInputs"
    "buildInputs"
    "packages"
    "inputsFrom"
  ];
in
rec {
  mkDerivation =
    all:
    let
      name = all.name or "${all.pname}-${all.version}";
      made = derivation (
        common
        // removeAttrs all notForTheBuilder
        // (all.env or { })
        // {
          inherit name;
          outputs = [ "out" ];
          builder = "/bin/bash";
          args = [
            "-e"
            ./stdenv/setup
          ];
          inputs = (all.nativeBuildInputs or [ ]) ++ (all.buildInputs or [ ]) ++ (all.packages or [ ]);
        }
      );
    in
    made
    // {
      inherit name;
      meta = all.meta or { };
      version = all.version or "";
    }
    // (all.passthru or { });

  stdenv = {
    inherit mkDerivation;
    hostPlatform = { inherit system; };
  };

  runCommand =
    name: more: text:
    mkDerivation (
      more
      // {
        inherit name;
        dontUnpack = true;
        buildPhase = text;
        installPhase = ":";
      }
    );

  writeShellScriptBin =
    name: text:
    runCommand name
      {
        inherit text;
        passAsFile = [ "text" ];
      }
      ''
        mkdir -p $out/bin
        { echo '#!/bin/bash'; cat $textPath; } > $out/bin/${name}
        chmod +x $out/bin/${name}
      '';

  nothing = name: runCommand name { } "mkdir -p $out";

  # makeWrapper, with the two flags that are used.
  makeWrapper = runCommand "make-wrapper" { } ''
    mkdir -p $out/bin
    cp ${./make-wrapper} $out/bin/makeWrapper
    chmod +x $out/bin/makeWrapper
  '';

  mkShell =
    all:
    mkDerivation (
      all
      // {
        name = all.name or "shell";
        dontUnpack = true;
        buildPhase = "mkdir -p $out";
        installPhase = ":";
        stdenv = builtins.path {
          name = "stdenv";
          path = ./stdenv;
        };
      }
    );

  # A file whose hash is known; its builder may use the network.
  fetch =
    {
      name,
      sha256,
      script,
    }:
    derivation (
      common
      // {
        inherit name script;
        builder = "/bin/bash";
        args = [
          "-e"
          "-c"
          "export PATH=$hostPath HOME=$PWD; eval \"$script\""
        ];
        outputHashMode = "flat";
        outputHashAlgo = "sha256";
        outputHash = sha256;
      }
    );
}
