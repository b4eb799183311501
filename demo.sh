#!/usr/bin/env bash
# The main job on the tiny gpt-oss in tests/fixtures, into target/demo: dequantize | quantize | verify, then what the
# quantized model says.
set -euo pipefail
cd "$(dirname "$0")"
. tests/need.sh

if ! command -v cargo >/dev/null; then
  echo "cargo is missing: install a Rust toolchain (rust-version in Cargo.toml says which)" >&2
  exit 1
fi
need 'cc --version' build-essential
cargo build --release --bins
target=$(realpath "${CARGO_TARGET_DIR:-target}")
PATH="$target/release:$PATH"
rm -rf "$target/demo"
mkdir "$target/demo"

gptoss-dequant --src tests/fixtures/tiny-gpt-oss --dst "$target"/demo/bf16 --format json |
  gptoss-quant --algo rtn --experts w4a16 --mw w8a16 --output-dir "$target"/demo/w4a16 --format json |
  gptoss-verify --format table
gptoss-verify quality "$target"/demo/w4a16 --against tests/fixtures/tiny-gpt-oss --text tests/fixtures/tiny-gpt-oss/test.jsonl \
  --max-seq-length 256 --num-calibration-samples 32 --format table
gptoss-run --model "$target"/demo/w4a16 --prompt 'A vector is' --max-tokens 40
du -sh tests/fixtures/tiny-gpt-oss/*.safetensors "$target"/demo/*/*.safetensors
