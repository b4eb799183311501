# What `nix flake check` builds.
{
  runCommand,
  cargo,
  rustfmt,
  clippy,
  shellcheck,
  gptoss,
  kernels,
}:
{
  # Its check phase runs tests.
  tests = gptoss;

  format = runCommand "gptoss-format" { nativeBuildInputs = [ cargo rustfmt ]; } ''
    cp -r ${gptoss.src} source
    cd source
    cargo fmt --all --check
    touch $out
  '';

  lint = gptoss.overrideAttrs (old: {
    pname = "gptoss-lint";
    nativeBuildInputs = old.nativeBuildInputs ++ [ clippy shellcheck ];
    buildPhase = ''
      cargo clippy --release --workspace --all-targets --offline -j $NIX_BUILD_CORES -- -D warnings
      shellcheck -x ${./.}/*.sh ${./host-toolchain}/*.sh tests/*.sh kernels/*.sh ${../demo.sh} ${../.ci/run} ${../.ci/full}
    '';
    doCheck = false;
    installPhase = "touch $out";
    dontFixup = true;
  });

  # Every file of the build has a committed hash, and none is missing.
  kernel-hashes = runCommand "gptoss-kernel-hashes" { } ''
    bash ${./committed.sh} ${../kernels/golden-hashes.json} ${kernels}/*/
    touch $out
  '';

  # The tiny model, quantized: the hashes that tests commit.
  quantized = runCommand "gptoss-quantized" { nativeBuildInputs = [ gptoss ]; } ''
    gptoss-quant --quiet --threads $NIX_BUILD_CORES --model-in ${../tests/fixtures/tiny-gpt-oss} --output-dir $out/model \
      --algo rtn --experts w4a16 --mw w8a16 --container compressed-tensors > manifest.json
    bash ${./committed.sh} ${../tests/snapshots/survival__hashes-w4a16.snap} $out/model
  '';
}
