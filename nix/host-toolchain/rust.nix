# buildRustPackage with the host's cargo. Cargo checks every crate against Cargo.lock.
{
  make,
}:
{
  buildRustPackage =
    all:
    let
      vendor = make.mkDerivation {
        name = "${all.pname}-vendor";
        inherit (all) src;
        # To fetch crates; a sandbox has no network otherwise.
        __noChroot = true;
        buildPhase = ''
          export CARGO_HOME=$NIX_BUILD_TOP/cargo
          cargo vendor --locked --versioned-dirs $out > /dev/null
        '';
        installPhase = ":";
      };
    in
    make.mkDerivation (
      all
      // {
        inherit vendor;
        buildPhase = ''
          export CARGO_HOME=$NIX_BUILD_TOP/cargo
          mkdir -p $CARGO_HOME
          printf '[source.crates-io]\nreplace-with = "vendor"\n[source.vendor]\ndirectory = "%s"\n' $vendor > $CARGO_HOME/config.toml
          export RUSTFLAGS="--remap-path-prefix=$NIX_BUILD_TOP=/build --remap-path-prefix=$vendor=/vendor"
          export CFLAGS="-ffile-prefix-map=$NIX_BUILD_TOP=/build"
          cargo build --release --locked --offline -j $NIX_BUILD_CORES $cargoBuildFlags
        '';
        installPhase = ''
          mkdir -p $out/bin
          find target/release -maxdepth 1 -type f -executable ! -name '*.so' -exec cp {} $out/bin/ \;
        '';
      }
    );
}
