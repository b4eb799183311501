# What `nix flake check` builds beside the packages.
{
  runCommand,
  cargo,
  rustfmt,
  gptoss,
  kernels,
  src,
  ...
}:
{
  format = runCommand "gptoss-format" { nativeBuildInputs = [ cargo rustfmt ]; } ''
    cp -r ${src} source
    cd source
    cargo fmt --all --check
    touch $out
  '';

  # Every file of the build is one of golden-hashes.json; the library has code of the host's compiler in it.
  kernel-hashes = runCommand "gptoss-kernel-hashes" { } ''
    cd ${kernels}/*/
    for file in *.cubin *.ptx; do
      hash=$(sha256sum "$file" | cut -d' ' -f1)
      grep -q "\"$file\": \"$hash\"" ${../kernels/golden-hashes.json} || { echo "$file has the hash $hash"; exit 1; }
    done
    touch $out
  '';

  # The tiny model, quantized: the hashes that tests commit.
  quantized = runCommand "gptoss-quantized" { nativeBuildInputs = [ gptoss ]; } ''
    gptoss-quant --quiet --model-in ${../tests/fixtures/tiny-gpt-oss} --output-dir $out/model \
      --algo rtn --experts w4a16 --mw w8a16 --container compressed-tensors > manifest.json
    cd $out/model
    for file in *; do
      [ "$file" = gptoss-manifest.json ] && continue
      hash=$(sha256sum "$file" | cut -d' ' -f1)
      grep -q "$hash $file" ${../tests/snapshots/survival__hashes-w4a16.snap} || { echo "$file has the hash $hash"; exit 1; }
    done
  '';
}
