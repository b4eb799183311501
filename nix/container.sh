#!/usr/bin/env bash
# The container without a Docker engine: hadolint and docker-compose read Dockerfile and compose.yaml, buildah runs every step of the Dockerfile and
# then what containers start with. The two base images are made here, of Debian's packages and this machine's Rust. Wants root, and as much of Debian
# as is installed below.
#
#     nix/container.sh [TARGET]      (default: target; compiled crates that are there are not compiled again)
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/need.sh
if [ "$(id -u)" != 0 ]; then
  echo "this wants root: buildah and mmdebstrap make file systems with other people's files in them" >&2
  exit 1
fi
need 'buildah --version' buildah
need 'mmdebstrap --version' mmdebstrap
need 'docker-compose --version' docker-compose
need 'python3 -c "import ensurepip, venv"' python3 python3-venv

target=$(realpath "${1:-${CARGO_TARGET_DIR:-target}}")
work=$(mktemp -d)
export STORAGE_DRIVER=${STORAGE_DRIVER:-overlay} BUILDAH_ISOLATION=chroot TMPDIR=$work
image() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }
finish() {
  image umount --all >/dev/null 2>&1 || true
  image rm --all >/dev/null 2>&1 || true
  rm -rf --one-file-system "$work"
}
trap finish EXIT
step() { echo "== $SECONDS s: $* ==" >&2; }

step "hadolint"
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check --require-hashes -r nix/hadolint.txt
"$work/venv/bin/hadolint" Dockerfile

step "docker-compose"
for words in "" "CONTAINER_RUNTIME=nvidia GPUS=0,1 CUDA_ARCH=9.0a INSTALL_KERNELS=1"; do
  # shellcheck disable=SC2086 # words
  env $words docker-compose -f compose.yaml config >"$work/compose"
done
grep -q "runtime: nvidia" "$work/compose"
grep -q "NVIDIA_VISIBLE_DEVICES: 0,1" "$work/compose"
grep -q "CUDA_ARCH: 9.0a" "$work/compose"

step "base images"
rust=$(sed -n 's/^ARG RUST=//p' Dockerfile)
cargo=${CARGO_HOME:-$HOME/.cargo}
toolchain=$(dirname "$(dirname "$(rustup which rustc 2>/dev/null || command -v rustc)")")
mmdebstrap --quiet --variant=minbase bookworm "$work/debian.tar"
base=$(image from scratch)
image add --quiet "$base" "$work/debian.tar" / >/dev/null
# Where this machine trusts more than Debian does, so does the image.
if [ -d /usr/local/share/ca-certificates ]; then image copy --quiet "$base" /usr/local/share/ca-certificates /usr/local/share/ca-certificates >/dev/null; fi
image commit --quiet "$base" docker.io/library/debian:bookworm-slim >/dev/null
image run "$base" -- sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends ca-certificates gcc g++ libc6-dev' >/dev/null
image copy --quiet "$base" "$toolchain" /usr/local/cargo >/dev/null
image config --env PATH=/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env CARGO_HOME="$cargo" "$base"
if [ -d "$target/release/deps" ]; then
  # What is compiled is fresh where its sources lie where they lay, and are no newer.
  image copy --quiet "$base" "$cargo/registry" "$cargo/registry" >/dev/null
fi
image commit --quiet "$base" "docker.io/library/rust:$rust-bookworm" >/dev/null
image rm "$base" >/dev/null
if [ -d "$target/release/deps" ]; then
  mkdir -p "$work/warm/release" "$work/empty"
  cp -a "$target"/release/{.fingerprint,build} "$work/warm/release/"
  # Crates, not the programs.
  mkdir "$work/warm/release/deps"
  find "$target/release/deps" -maxdepth 1 \( -name '*.rlib' -o -name '*.rmeta' -o -name '*.so' -o -name '*.d' \) -exec cp -a -t "$work/warm/release/deps" {} +
  printf 'FROM rust:%s-bookworm\nRUN --mount=type=cache,id=gptoss-target,target=/src/target cp -a /warm/. /src/target/\n' "$rust" |
    image build --quiet --volume "$work/warm:/warm:ro" -f - "$work/empty" >/dev/null
  rm -rf "$work/warm"
fi

step "build"
image build --format docker --build-arg INSTALL_KERNELS=1 --build-arg CUDA_ARCH=8.6 --tag gptoss .

step "run"
made=$(image from gptoss)
[ "$(image inspect --type image --format '{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.WorkingDir}}' gptoss)" = "[gptoss-entrypoint] /models" ]
mkdir "$work/models"
chown 1000:1000 "$work/models"
# As compose has it after nix/setup-storage.sh: a user of this machine, and kernels in a folder of their own.
inside() {
  image run --user 1000:1000 --volume "$work/models:/models" --volume "$PWD/tests/fixtures:/fixtures:ro" "$made" -- gptoss-entrypoint "$@" 2>"$work/err" || {
    cat "$work/err" >&2
    return 1
  }
}
inside gptoss-verify env --format table
cat "$work/err"
# It verifies first: the kernels of the image have their hashes, and there is no GPU.
grep -q "  8\.6  hashes match" "$work/err"
grep -q "kernels were not run: there is no GPU" "$work/err"
# shellcheck disable=SC2016 # the inner shell's variable
inside bash -c 'cp -r "$GPTOSS_KERNELS"/*/ kernels' >/dev/null
nix/committed.sh kernels/golden-hashes.json "$work/models/kernels" part
# What it writes has the committed hashes.
inside gptoss-quant --quiet --model-in /fixtures/tiny-gpt-oss --output-dir /models/w4a16 --algo rtn --experts w4a16 --mw w8a16 \
  --container compressed-tensors >/dev/null
nix/committed.sh tests/snapshots/survival__hashes-w4a16.snap "$work/models/w4a16"

step "all of it went through"
