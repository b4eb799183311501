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

  # Every file of the build is one of golden-hashes.json, and none of those is missing; the library has code of the host's compiler in it.
  kernel-hashes = runCommand "gptoss-kernel-hashes" { } ''
    cd ${kernels}/*/
    for file in *.cubin *.ptx; do
      hash=$(sha256sum "$file" | cut -d' ' -f1)
      grep -q "\"$file\": \"$hash\"" ${../kernels/golden-hashes.json} || { echo "$file has the hash $hash"; exit 1; }
    done
    [ "$(ls *.cubin *.ptx | wc -l)" = "$(grep -c '": "[0-9a-f]\{64\}"' ${../kernels/golden-hashes.json})" ]
    touch $out
  '';

  # The tiny model, quantized: the hashes that tests commit.
  quantized = runCommand "gptoss-quantized" { nativeBuildInputs = [ gptoss ]; } ''
    gptoss-quant --quiet --threads $NIX_BUILD_CORES --model-in ${../tests/fixtures/tiny-gpt-oss} --output-dir $out/model \
      --algo rtn --experts w4a16 --mw w8a16 --container compressed-tensors > manifest.json
    grep '^[0-9a-f]\{64\} ' ${../tests/snapshots/survival__hashes-w4a16.snap} | sort > hashes
    (cd $out/model && rm gptoss-manifest.json && sha256sum * | sed 's/  / /' | sort) > have
    diff hashes have
  '';
}
