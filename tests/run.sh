#!/usr/bin/env bash
# Every test. Installs what they need: a C compiler for the linker, Python with the peers of tests/peers/requirements.txt
# in venv/ (4.8 GB: PyTorch comes with its CUDA libraries; llama.cpp is built from source; a CUDA compiler), and qemu-user.
# Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/need.sh

if ! command -v cargo >/dev/null; then
  echo "cargo is missing: install a Rust toolchain (rust-version in Cargo.toml says which)" >&2
  exit 1
fi
need 'cc --version && c++ --version && make --version' build-essential
need 'unshare --version' util-linux
need 'qemu-x86_64 --version' qemu-user

# Compiles while wheels are fetched.
cargo test --release --workspace --no-run "$@" &
compiled=$!
trap 'kill "$compiled" 2>/dev/null || true' EXIT

venv=${GPTOSS_PEERS:-$PWD/venv}
stamp="$(sha256sum tests/peers/requirements.txt | cut -d' ' -f1)"
if [ "$(cat "$venv/stamp" 2>/dev/null || true)" != "$stamp" ]; then
  need 'python3 -c "import ensurepip, venv"' python3 python3-venv
  echo "installing the Python peers into $venv" >&2
  python3 -m venv --clear "$venv"
  # The list is complete, and leaves out what only GPUs use. llama.cpp comes as source, and is compiled for any x86-64 with
  # AVX2: the environment may outlive this machine. It takes about four minutes.
  export CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"
  "$venv/bin/python" -m pip install --quiet --no-deps --no-cache-dir --disable-pip-version-check -r tests/peers/requirements.txt
  echo "$stamp" > "$venv/stamp"
fi

# The pinned CUDA compiler and CUTLASS (112 MB), for the kernels' builds; no GPU is needed.
stamp="$(sha256sum kernels/requirements.txt | cut -d' ' -f1)"
if [ "$(cat "$venv/cuda/stamp" 2>/dev/null || true)" != "$stamp" ]; then
  echo "installing the CUDA compiler into $venv/cuda" >&2
  rm -rf "$venv/cuda"
  "$venv/bin/python" -m pip install --quiet --no-deps --no-cache-dir --disable-pip-version-check --require-hashes \
    --target "$venv/cuda" -r kernels/requirements.txt
  echo "$stamp" > "$venv/cuda/stamp"
fi
export GPTOSS_PEERS="$venv"
wait "$compiled"
trap - EXIT

cargo test --release --workspace "$@"
