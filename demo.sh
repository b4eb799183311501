#!/usr/bin/env bash
# The main job on the tiny gpt-oss in tests/fixtures: dequantize | quantize | verify, then what the quantized model says.
#
#     demo.sh [TOOLS [OUT]]      (default: compiles the tools, and writes into target/demo)
set -euo pipefail
tools=${1:+$(realpath "$1")} out=${2:+$(realpath -m "$2")}
cd "$(dirname "$0")"
if [ -z "$tools" ]; then
  . tests/need.sh
  if ! command -v cargo >/dev/null; then
    echo "cargo is missing: install a Rust toolchain (rust-version in Cargo.toml says which)" >&2
    exit 1
  fi
  need 'cc --version' build-essential
  cargo build --release --bins
  target=$(realpath "${CARGO_TARGET_DIR:-target}")
  tools=$target/release
  out=$target/demo
  rm -rf "$out"
fi
out=${out:-$(mktemp -d)}
mkdir -p "$out"
echo "into $out" >&2
PATH="$tools:$PATH"

gptoss-dequant --src tests/fixtures/tiny-gpt-oss --dst "$out/bf16" --format json |
  gptoss-quant --algo rtn --experts w4a16 --mw w8a16 --output-dir "$out/w4a16" --format json |
  gptoss-verify --format table
gptoss-verify quality "$out/w4a16" --against tests/fixtures/tiny-gpt-oss --text tests/fixtures/tiny-gpt-oss/test.jsonl \
  --max-seq-length 256 --num-calibration-samples 32 --format table
gptoss-run --model "$out/w4a16" --prompt 'A vector is' --max-tokens 40
du -sh tests/fixtures/tiny-gpt-oss/*.safetensors "$out"/*/*.safetensors
