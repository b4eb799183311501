#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one command: compares each with this processor, measures, and looks for wrong accesses and
# races. The most telling facts come first; each step has a limit of its own, and all together have one.
#
#     kernels/check.sh --pack DIR           here, where no GPU is needed: what is to be carried there, built with the pinned compiler
#     DIR/kernels/check.sh [OUT]            there: nothing is built or fetched
#     kernels/check.sh [OUT]                where this repository is built, with the kernels that are installed
#
# OUT (default: results) gets check.log and results.tar, with every table; the tar is written again after each step, so that whatever ends the run early, what was
# measured until then is there. Exit code 0: every kernel is right; what is slower than wanted is said at the end, and is no failure.
#
# SECONDS_IN_ALL (default 330) is how long it may take. QUICK=1 takes small shapes, and allows twenty times as long: for a GPU that is a processor
# (host/driver.cpp), and may have other things to do.
# shellcheck disable=SC2317 # functions that `step` calls by their names
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

pack() {
  local to
  mkdir -p "$1"
  to=$(realpath "$1")
  cd "$here"
  cargo build --release --workspace --bins
  mkdir -p "$to/bin" "$to/kernels"
  for tool in gptoss-kernel-install gptoss-verify gptoss-bench; do
    strip -o "$to/bin/$tool" "target/release/$tool"
  done
  cp kernels/check.sh kernels/golden-hashes.json "$to/kernels/"
  # For an A100, an H100 or H200, and a B200; CUDA_ARCH names others.
  rm -rf "$to/store"
  GPTOSS_KERNELS="$to/store" "$to/bin/gptoss-kernel-install" --yes --quiet --arch "${CUDA_ARCH:-8.0;9.0a;10.0}" >"$to/build.json"
  du -sh "$to" >&2
}

if [ "${1:-}" = --pack ]; then
  if [ -z "${2:-}" ]; then
    echo "kernels/check.sh --pack DIR: say where to" >&2
    exit 2
  fi
  pack "$2"
  exit
fi

binaries=$here/bin
[ -x "$binaries/gptoss-verify" ] || binaries=$here/target/release
for tool in gptoss-verify gptoss-bench; do
  if ! [ -x "$binaries/$tool" ]; then
    echo "$binaries/$tool is missing: kernels/check.sh --pack DIR where Rust is, or cargo build --release --workspace --bins here" >&2
    exit 2
  fi
done
[ -d "$here/store" ] && export GPTOSS_KERNELS="$here/store"
# cuBLAS: where the system has it, or with PyTorch's wheels. ncu and compute-sanitizer come with the toolkit.
for folder in /usr/local/cuda/lib64 $(python3 -c 'import sys; print(*[p + "/nvidia/cu13/lib" for p in sys.path if p])' 2>/dev/null || true); do
  if compgen -G "$folder/libcublas.so*" >/dev/null; then
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
  fi
done
[ -d /usr/local/cuda/bin ] && PATH="$PATH:/usr/local/cuda/bin"
mkdir -p "${1:-results}"
out=$(realpath "${1:-results}")
work=$(mktemp -d)
tables=$work/results
mkdir "$tables"
slow=1
[ "${QUICK:-0}" = 1 ] && slow=20
all=${SECONDS_IN_ALL:-$((330 * slow))}
failed=0

# What there is until now, under its name in one step.
keep() {
  cp "$work/log" "$out/check.log.new" && mv "$out/check.log.new" "$out/check.log"
  # Exit code 1: a table grew meanwhile.
  tar -C "$work" -cf "$out/results.tar.new" results 2>/dev/null || [ $? -eq 1 ]
  mv "$out/results.tar.new" "$out/results.tar"
}
say() { echo "$*" | tee -a "$work/log" >&2; }
running=
end() {
  [ -z "$running" ] || kill "$running" 2>/dev/null || true
  keep
  rm -rf "$work"
}
: >"$work/log"
trap end EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
keep

# Runs a step: its limit in seconds, its name, and a command whose output goes to the log. Says what came of it, and how long it took.
step() {
  local limit=$(($1 * slow)) name=$2 left=$((all - SECONDS)) code=0 began=$SECONDS
  shift 2
  if [ "$left" -lt 3 ]; then
    say "== $name: left out, the time is up"
    return 0
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  say "== $SECONDS s: $name (at most $limit s)"
  # shellcheck disable=SC2016 # that shell's own arguments
  timeout --kill-after=2 "$limit" bash -c '"$@"' bash "$@" >>"$work/log" 2>&1 &
  running=$!
  # Rows come one by one. A signal is answered between two looks.
  while kill -0 "$running" 2>/dev/null; do
    keep
    sleep 1 &
    wait $! || true
  done
  wait "$running" || code=$?
  running=
  case $code in
    0) ;;
    124 | 137) say "   stopped after $limit s" ;;
    *)
      say "   exit code $code"
      failed=1
      ;;
  esac
  say "   $((SECONDS - began)) s"
  keep
  return "$code"
}

sizes=(--K 4096 --N 4096)
few=1,4,16
crowd=64,256
many=$few,$crowd
iters=20
[ "${QUICK:-0}" = 1 ] && sizes=(--K 64 --N 96) && few=1,2 && crowd=3 && many=$few && iters=2

verify() {
  local limit=()
  [ "$slow" = 1 ] || limit=(--limit $((20 * slow)))
  "$binaries/gptoss-verify" kernels "$@" "${limit[@]}" --format table
}
# Rows are in NAME.jsonl as soon as they are measured.
measure() {
  local name=$1
  shift
  "$binaries/gptoss-bench" gemm --on gpu --quiet --rows "$tables/$name.jsonl" "$@" >"$tables/$name.json"
  grep -A20 '"notes"' "$tables/$name.json" | grep '^    "' || true
}
# A command with its table in NAME.txt as well.
table() {
  local name=$1 code=0
  shift
  "$@" >"$tables/$name.txt" 2>&1 || code=$?
  cat "$tables/$name.txt"
  return "$code"
}
machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm --format=csv 2>/dev/null || true
  "$binaries/gptoss-verify" env --format table
  python3 - "$here/build.json" "$here/kernels/golden-hashes.json" <<'PYTHON' 2>/dev/null || true
import json, sys
build, golden = json.load(open(sys.argv[1]))["kernels"], json.load(open(sys.argv[2]))
other = [f["name"] for f in build["files"] if golden["files"].get(f["name"], f["sha256"]) != f["sha256"]]
print(f"kernels by nvcc {build['nvcc']}, committed hashes of {golden['nvcc']}; others than committed: {other}")
PYTHON
}
# After a wrong kernel: the same under memcheck, and without early launches.
why() {
  local name
  for name in $(sed -n 's/^\([a-z0-9_]*\) *WRONG.*/\1/p' "$tables/kernels.txt" | head -2); do
    echo "-- $name without early launches"
    "$binaries/gptoss-verify" kernels --one "$name" --no-early-launch --format table || true
    if command -v compute-sanitizer >/dev/null; then
      echo "-- $name under memcheck"
      timeout 40 compute-sanitizer --tool memcheck "$binaries/gptoss-verify" kernels --one "$name" --quiet 2>&1 | grep '^=========' | head -40 || true
    fi
  done
}
# Only what differs in kind: the products share their source. Every allocation is filled, so initcheck would have nothing to find.
sanitize() {
  local tool=$1 name code=0
  for name in group quantize_activations mxfp4_a8_experts w4a16; do
    [ "$name" = group ] && name=chain
    timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 "$binaries/gptoss-verify" kernels --one "$name" --quiet >"$work/sanitized" 2>&1 || code=$?
    echo "$tool, $name: exit code $code"
    grep -E '^=========' "$work/sanitized" | head -20 || true
    [ "$code" -ne 9 ] || return 9
  done
}
profile() {
  local kernel m
  for kernel in w4a8 mxfp4_a8; do
    for m in 1 256; do
      timeout 20 ncu --clock-control none --set basic --launch-skip 40 --launch-count 2 -k "regex:^$kernel" "$binaries/gptoss-bench" gemm --on gpu --quiet \
        --only "$kernel" --M "$m" --iters 2 2>&1 | grep -E 'Duration|Throughput|Registers|Occupancy|Warp Cycles' || true
    done
  done
}
blocks() {
  local block
  for block in 16x8 32x8 16x16 32x16; do
    echo "-- blocks of $block"
    measure "blocks-$block" --only w4a8,mxfp4_a8 --M "${few%%,*},${few##*,}" --iters "$iters" --block "$block" "$@"
  done
  # For many tokens; those of 64 are for 9.0a alone.
  for block in 32x16 64x64 128x64; do
    echo "-- blocks of $block, many tokens"
    measure "blocks-many-$block" --only w4a8,mxfp4_a8,w4a16 --M "$crowd" --iters "$iters" --block "$block" "$@" || true
  done
}
export -f verify measure table machine why sanitize profile blocks
export binaries tables here work few crowd iters slow


step 20 "the machine" table machine machine || true
step 15 "clock, copies, cuBLAS" measure baseline --only cublas-f16 --M 1 --iters 5 "${sizes[@]}" || true
step 60 "every kernel beside this processor" table kernels verify || step 90 "what is wrong" table why why || true
if [ "${QUICK:-0}" != 1 ]; then
  step 40 "chains of launches on the shapes of gpt-oss" table chain verify --model-shapes --only chain || true
fi
step 40 "4096 x 4096" measure gemm-4096 --only cublas,w4a8,mxfp4_a8,w4a16 --M "$many" --iters "$iters" "${sizes[@]}" || true
if [ "${QUICK:-0}" != 1 ]; then
  step 60 "experts of gpt-oss-20b, and a whole layer of them" measure experts-20b --shapes gpt-oss-20b --layers experts.gate_up --only cublas-f16,mxfp4_a8,mxfp4_a16 \
    --M "$few,$crowd" --iters 20 --whole-layer || true
fi
command -v ncu >/dev/null && { step 40 "ncu" table ncu profile || true; }
step 35 "blocks beside each other" table blocks blocks "${sizes[@]}" || true
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step 60 "$tool" table "$tool" sanitize "$tool" || true
  done
fi
if [ "${QUICK:-0}" != 1 ]; then
  step 120 "every kernel on the shapes of gpt-oss" table kernels-model-shapes verify --model-shapes || true
  step 600 "all layers of gpt-oss-20b" measure gpt-oss-20b --shapes gpt-oss-20b --iters 10 --whole-layer || true
fi

summary() {
  python3 - "$tables" <<'PYTHON'
import glob, json, os, sys
rows = []
for path in sorted(glob.glob(f"{sys.argv[1]}/*.jsonl")):
    name = os.path.basename(path)[:-6]
    for line in open(path):
        try:
            rows.append((name, json.loads(line)))
        except ValueError:
            print(f"{name}: a row is cut")
print(f"{'table':14} {'layer':24} {'M':>5} {'kernel':19} {'us':>9} {'10%':>9} {'90%':>9} {'TFLOP/s':>8} {'GB/s':>7} {'of copy':>7} {'ratio':>6}")
for name, r in rows:
    print(f"{name:14} {r['layer']:24} {r['m']:5} {r['kernel']:19} {r['microseconds']:9.2f} {r['fast_microseconds']:9.2f} {r['slow_microseconds']:9.2f} "
          f"{r['teraflops']:8.1f} {r['gigabytes_per_second']:7.0f} {100 * r['bandwidth_share']:6.0f}% {r.get('speedup') or 0:6.2f}")
def least(what, table, kernel, tokens, figure, wanted, layer=""):
    found = [(r[figure], r) for name, r in rows if name == table and r["kernel"] == kernel and r["m"] in tokens and layer in r["layer"] and r.get(figure)]
    if not found:
        print(f"UNKNOWN: {what}, wanted {wanted}: nothing was measured")
        return
    value, row = min(found, key=lambda v: v[0])
    print(f"{'reached' if value >= wanted else 'MISSED'}: {what}: at least {value:.2f}, wanted {wanted} (M = {row['m']})")
few = (1, 2, 4, 8, 16)
least("w4a8, 4096 x 4096, times cuBLAS FP16 at M = 1..16 (2.2 on an H100)", "gemm-4096", "w4a8", few, "speedup", 2.0)
least("w4a8, 4096 x 4096, times cuBLAS FP16 at M = 256", "gemm-4096", "w4a8", (256,), "speedup", 1.3)
least("mxfp4_a8, experts of gate_up, times cuBLAS FP16 at M = 4..16", "experts-20b", "mxfp4_a8", (4, 16), "speedup", 2.7, "gate_up")
least("mxfp4_a8, experts of gate_up, share of the copy rate at M = 4..16", "experts-20b", "mxfp4_a8", (4, 16), "bandwidth_share", 0.75, "gate_up")
least("mxfp4_a8, experts, times cuBLAS FP16 at M = 256", "gpt-oss-20b", "mxfp4_a8", (256,), "speedup", 2.0, "experts.gate_up")
PYTHON
}
if command -v python3 >/dev/null; then
  summary >"$tables/summary.txt" || true
  cat "$tables/summary.txt" >>"$work/log"
  grep -E '^(reached|MISSED|UNKNOWN)' "$tables/summary.txt" >&2 || true
fi
say "== $SECONDS s in all; $out has check.log and results.tar"
exit $failed
