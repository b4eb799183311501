# Derivations that the host's own programs build. What they are is a part of each derivation, so another compiler is another hash.
{
  host,
  system,
}:
let
  common = {
    inherit system;
    hostFingerprint = host.fingerprint;
    LC_ALL = "C";
    TZ = "UTC";
    SOURCE_DATE_EPOCH = "315532800";
  };
  notForTheBuilder = [
    "meta"
    "cargoLock"
    "env"
    "nativeBuildInputs"
    "buildInputs"
    "packages"
    "inputsFrom"
  ];
  inputsOf = all: (all.nativeBuildInputs or [ ]) ++ (all.buildInputs or [ ]) ++ (all.packages or [ ]);
in
rec {
  # Programs of the host, alone in a folder.
  links =
    name: folder: programs:
    derivation (
      common
      // {
        inherit name folder programs;
        builder = "/bin/bash";
        args = [
          "-e"
          "-c"
          "export PATH=/usr/bin:/bin; mkdir -p $out/bin; for program in $programs; do ln -s $folder/$program $out/bin/$program; [ -e $out/bin/$program ]; done"
        ];
      }
    );
  coreutils = links "coreutils" "/usr/bin" (
    "[ basename cat chmod comm cp cut date dirname du echo env expr head id install ln ls mkdir mktemp mv nproc od printf pwd readlink realpath rm "
    + "rmdir seq sha256sum sleep sort stat tail tee test touch tr true uname wc yes"
  );
  cc = links "cc" "/usr/bin" "cc c++ gcc g++ cpp ld as ar ranlib strip nm objcopy objdump readelf";
  # What every build has in its PATH in nixpkgs, and no more.
  commonPath = map (one: "${one}/bin") [
    coreutils
    (links "common" "/usr/bin" "find xargs cmp diff sed grep awk tar gzip bzip2 xz make bash sh patch")
    cc
  ];

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
          hostPath = builtins.concatStringsSep ":" commonPath;
          inputs = inputsOf all ++ builtins.concatMap (from: from.itsInputs) (all.inputsFrom or [ ]);
        }
      );
    in
    made
    // {
      inherit name;
      pname = all.pname or name;
      meta = all.meta or { };
      version = all.version or "";
      itsInputs = inputsOf all;
      nativeBuildInputs = all.nativeBuildInputs or [ ];
      overrideAttrs = change: mkDerivation (all // change (all // { nativeBuildInputs = all.nativeBuildInputs or [ ]; }));
    };

  stdenv = {
    inherit mkDerivation;
    hostPlatform = { inherit system; };
    inherit cc;
  };

  runCommand = name: more: buildCommand: mkDerivation (more // { inherit name buildCommand; });

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

  # makeWrapper, with the one flag that is used.
  makeWrapper = runCommand "make-wrapper" { } ''
    mkdir -p $out/bin
    cp ${./make-wrapper} $out/bin/makeWrapper
    chmod +x $out/bin/makeWrapper
  '';

  # As nixpkgs has it: a hook that runs when everything else is done.
  autoAddDriverRunpath = runCommand "auto-add-driver-runpath" { } ''
    mkdir -p $out/nix-support
    cp ${./auto-add-driver-runpath} $out/nix-support/setup-hook
  '';

  mkShell =
    all:
    mkDerivation (
      all
      // {
        name = all.name or "shell";
        buildCommand = "mkdir -p $out";
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
          "export PATH=/usr/bin:/bin HOME=$PWD; eval \"$script\""
        ];
        outputHashMode = "flat";
        outputHashAlgo = "sha256";
        outputHash = sha256;
        __noChroot = true;
      }
    );
}
