# buildRustPackage with the host's cargo. Cargo checks every crate against Cargo.lock.
{
  make,
  cargo,
  rustc,
}:
{
  buildRustPackage =
    all:
    let
      vendor = make.mkDerivation {
        name = "${all.pname}-vendor";
        inherit (all) src;
        nativeBuildInputs = [ cargo ];
        # To fetch crates; a sandbox has no network otherwise.
        __noChroot = true;
        buildPhase = ''
          export CARGO_HOME=$NIX_BUILD_TOP/cargo
          cargo vendor --locked --versioned-dirs $out > /dev/null
        '';
        installPhase = "true";
        dontFixup = true;
      };
      # nixpkgs sets cargo up in a hook, so that phases that are replaced have it too.
      setup = make.runCommand "cargo-setup" { } ''
        mkdir -p $out/nix-support
        cat > $out/nix-support/setup-hook <<HOOK
        export CARGO_HOME=\''${NIX_BUILD_TOP:-/tmp}/cargo
        if [ -n "\''${NIX_BUILD_TOP:-}" ] && [ -z "\''${IN_NIX_SHELL:-}" ]; then
          mkdir -p \$CARGO_HOME
          printf '[source.crates-io]\nreplace-with = "vendor"\n[source.vendor]\ndirectory = "%s"\n[net]\noffline = true\n' ${vendor} > \$CARGO_HOME/config.toml
        else
          unset CARGO_HOME
        fi
        HOOK
      '';
    in
    make.mkDerivation (
      {
        buildPhase = "cargo build --release --locked -j $NIX_BUILD_CORES $cargoBuildFlags";
        checkPhase = "cargo test --release --locked -j $NIX_BUILD_CORES $cargoTestFlags";
        installPhase = ''
          mkdir -p $out/bin
          find target/release -maxdepth 1 -type f -executable ! -name '*.so' -exec cp {} $out/bin/ \;
        '';
      }
      // all
      // {
        nativeBuildInputs = [
          setup
          cargo
          rustc
        ]
        ++ (all.nativeBuildInputs or [ ]);
      }
    );
}
