#!/usr/bin/env bash
# The flake's own expressions, evaluated and built in Nix's sandbox without nixpkgs: nix/host-toolchain stands in for it with the host's compilers.
# CUDA and CUTLASS 4.2.1 come as wheels, by their hashes. Wants Debian's packages below, cargo, and the network for wheels and crates.
#
#     nix/offline.sh            (FULL=1: all kernels are built twice, not those for 8.6 alone)
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/need.sh
need 'cc --version && c++ --version' build-essential
need 'nix --version' nix-bin
need 'patchelf --version' patchelf
need 'shellcheck --version' shellcheck
need 'PATH=/usr/bin:/bin python3 -m pip --version' python3-pip
need 'git --version' git

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
seen=$(nix/host-toolchain/fingerprint.sh)
cat >"$work/nix.conf" <<CONF
experimental-features = nix-command flakes
sandbox = relaxed
sandbox-paths = $seen
build-users-group =
substituters =
flake-registry =
CONF
export NIX_CONF_DIR=$work

/usr/bin/python3 -m pip download --quiet --no-deps --no-cache-dir --require-hashes -d "$work" -r nix/host-toolchain/cutlass.txt
# With their modes, for a Nix archive has them.
/usr/bin/python3 - "$work"/*.whl "$work/cutlass" <<'PYTHON'
import os, sys, zipfile
wheel, out = zipfile.ZipFile(sys.argv[1]), sys.argv[2]
part = "flashinfer/data/cutlass/"
for file in wheel.infolist():
    if file.filename.startswith(part + "include/") and not file.is_dir():
        path = os.path.join(out, file.filename[len(part):])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as to:
            to.write(wheel.read(file))
        os.chmod(path, 0o755 if file.external_attr >> 16 & 0o100 else 0o644)
PYTHON

# nix with nixpkgs and CUTLASS replaced; overrides come before what is asked for.
flake() {
  local verb=("$1")
  shift
  case ${verb[0]} in show | check) verb=(flake "${verb[@]}") ;; esac
  nix "${verb[@]}" --no-write-lock-file --override-input nixpkgs "path:$PWD/nix/host-toolchain" --override-input cutlass "path:${cutlass:-$work/cutlass}" "$@"
}
step() { echo "== $SECONDS s: $* ==" >&2; }
refused() {
  local why=$1
  shift
  # A store of its own: what is in the other one already would be taken from there.
  if flake eval --store "$work/empty" --raw "$@" >/dev/null 2>"$work/message"; then
    echo "not refused: $*" >&2
    exit 1
  fi
  if ! grep -q "$why" "$work/message"; then
    cat "$work/message" >&2
    exit 1
  fi
}

step "what builds see"
sandbox='no sandbox: this machine lets Nix make none'
# shellcheck disable=SC2016 # Nix's and the builder's variables
nix-build --no-out-link --expr 'derivation {
  name = "sandbox"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "[ $NIX_BUILD_TOP = /build ] && : > $out" ];
}' >/dev/null 2>&1 && sandbox="Nix's sandbox"
echo "$sandbox; $(find /nix/store -mindepth 1 -maxdepth 1 ! -name .links | wc -l) paths in the store" >&2

step "the lock is the flake's"
nix flake metadata --no-update-lock-file --json . >/dev/null

step "another CUTLASS, another compiler and another hash are refused"
cp -r "$work/cutlass" "$work/tampered"
echo >>"$work/tampered/include/cutlass/version.h"
cutlass=$work/tampered refused "mismatch" .#kernels.drvPath
mkdir "$work/changed"
git ls-files -z | xargs -0 cp --parents -t "$work/changed"
git -C "$work/changed" init --quiet
git -C "$work/changed" add --all
for change in 's/"13.0.88"/"13.0.48"/;nvcc 13.0.88 is not 13.0.48' 's/sha256-EyZQ/sha256-FyZQ/;mismatch'; do
  git -C "$work/changed" checkout --quiet .
  sed -i "${change%;*}" "$work/changed/nix/pins.nix"
  refused "${change#*;}" "$work/changed#kernels.drvPath"
done

step "show"
flake show .
flake eval --raw --apply "overlay: (overlay { } { stdenv.hostPlatform.system = \"$(uname -m)-linux\"; }).gptoss-kernels.name" .#overlays.default

step "build"
flake build -o "$work/gptoss" .#gptoss
readelf -d "$work/gptoss/bin/gptoss-verify" | grep -q "RUNPATH.*/run/opengl-driver/lib"
flake build -o "$work/cuda" .#gptoss-cuda

step "image: what it starts with, of its own config"
flake build -o "$work/image" .#image
python3 - "$work/image" <<'PYTHON'
import json, subprocess, sys
image = json.load(open(sys.argv[1]))
config = image["config"]
env = dict(word.split("=", 1) for word in config["Env"])
# Their bin folders are /bin there.
env["PATH"] = ":".join(package + "/bin" for package in image["contents"])
ran = subprocess.run(config["Entrypoint"] + config["Cmd"], env=env, text=True, capture_output=True)
print(ran.stdout, ran.stderr, sep="")
assert ran.returncode == 0 and "Usage: gptoss-quant" in ran.stdout and "hashes match" in ran.stderr
PYTHON

step "check: tests, lint, format, hashes of kernels and of a quantized model"
flake check .

step "run"
flake run . >&2
flake run .#gptoss-verify -- env --format table
flake run .#demo -- "$work/demo"
for model in 20b 120b; do
  while read -r recipe _; do
    flake run ".#$recipe" -- --dry-run --quiet --model-in "tests/fixtures/configs/gpt-oss-$model.json" --format table </dev/null
  done <nix/recipes.txt
done

step "develop"
flake develop .#default -c cargo --version
# shellcheck disable=SC2016 # the inner shell's variables
flake develop .#kernels -c bash -euo pipefail -c '
  cd '"$work"'
  nvcc --version | grep "V13.0.88"
  test -f "$CUTLASS_HOME/cutlass/cutlass.h"
  test "$TORCH_CUDA_ARCH_LIST" = "$CUDA_ARCH"
  echo "$CUDA_ARCH" | grep "9.0a"
  printf "#include <cuda_fp16.h>\n#include <cub/cub.cuh>\n__global__ void k() {}\n" > k.cu
  nvcc -arch=sm_80 -cubin -o k.cubin k.cu
  cuobjdump -sass k.cubin | grep EXIT
'

step "the same bytes again: another checkout, another number of threads"
git -C "$work/changed" checkout --quiet .
again=$work/changed#kernels
if [ "${FULL:-0}" = 0 ]; then
  # All of them take three minutes, and have just been compared with hashes that were made elsewhere.
  again=$work/changed#kernels-sm86
  flake build -o "$work/sm86" .#kernels-sm86
fi
flake build --rebuild --cores 3 "$again"
flake build --rebuild --cores 1 "$work/changed#checks.$(uname -m)-linux.quantized"

step "all of it went through, in $sandbox"
