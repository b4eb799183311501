#!/usr/bin/env bash
# The flake's own expressions, evaluated and built without nixpkgs: nix/host-toolchain stands in for it with the host's compilers, and a wheel for
# CUTLASS. Wants Debian's nix-bin (2.8) or newer, cargo, c++, python3 with pip, and venv/cuda as tests/run.sh makes it.
#
#     nix/offline.sh [FOLDER-OF-WHEELS]      (default: venv/cuda)
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=$(realpath "${1:-${GPTOSS_PEERS:-venv}/cuda}")
nix/host-toolchain/fingerprint.sh
conf=$(mktemp -d)
trap 'rm -rf "$conf"' EXIT
cat >"$conf/nix.conf" <<'CONF'
experimental-features = nix-command flakes
sandbox = false
build-users-group =
substituters =
flake-registry =
CONF
export NIX_CONF_DIR=$conf
here=(--no-write-lock-file --override-input nixpkgs "path:$PWD/nix/host-toolchain" --override-input cutlass "path:$wheels/cutlass_library/source")
step() { echo "== $* ==" >&2; }

step "the lock is the flake's"
nix flake metadata --no-update-lock-file --json . >/dev/null
step "show"
nix flake show "${here[@]}" .
step "build"
nix build "${here[@]}" -o "$conf/gptoss" .#gptoss
nix build "${here[@]}" -o "$conf/kernels" .#kernels
nix build "${here[@]}" -o "$conf/cuda" .#gptoss-cuda
step "run"
nix run "${here[@]}" .#gptoss-verify -- env --format table
nix run "${here[@]}" .#w8a8-gptq-all -- --dry-run --quiet --model-in tests/fixtures/configs/gpt-oss-20b.json --format table
step "check"
nix flake check "${here[@]}" .
step "develop"
# shellcheck disable=SC2016 # the inner shell's variable
nix develop "${here[@]}" .#kernels -c bash -c 'nvcc --version | tail -2; echo "$TORCH_CUDA_ARCH_LIST"'
step "the same bytes again"
nix build "${here[@]}" --rebuild .#kernels
nix build "${here[@]}" --rebuild .#checks.x86_64-linux.quantized
step "another CUTLASS is refused"
other=$(mktemp -d)
mkdir -p "$other/include/cutlass"
echo "#define CUTLASS_MAJOR 4" >"$other/include/cutlass/version.h"
if nix eval --no-write-lock-file --override-input nixpkgs "path:$PWD/nix/host-toolchain" --override-input cutlass "path:$other" \
  --raw .#kernels.drvPath 2>"$conf/refused"; then
  echo "a CUTLASS with another hash was taken" >&2
  exit 1
fi
grep -q "mismatch" "$conf/refused"
rm -rf "$other"
echo "all of it went through" >&2
