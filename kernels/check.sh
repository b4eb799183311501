#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one command: builds them for the GPU that is here, compares each with this processor,
# measures, and looks for wrong accesses and races. Nothing is fetched; Rust is not needed where the binaries came along.
#
#     kernels/check.sh [BINARIES [RESULTS]]
#
# BINARIES has gptoss-kernel-install, gptoss-verify and gptoss-bench (default: target/release; `strip` makes them a quarter smaller).
# RESULTS is where tables go (default: kernels/results/ and the GPU's name). nvcc is looked for in CUDA_HOME, PATH and /usr/local/cuda,
# CUTLASS in CUTLASS_HOME (its include/ as tar.xz is 1 MB). Exit code 0: everything is right; what is slower than wanted is said at the
# end, and no failure. How long it takes was not seen yet (ten minutes were guessed); what matters most comes first, so that it may be stopped.
# SECONDS_FOR_SANITIZER (default 180) is how long compute-sanitizer may take in all; 0 leaves it out. WITHOUT_CUTLASS=1 leaves out the
# library for Hopper.
set -euo pipefail
cd "$(dirname "$0")/.."
binaries=$(realpath "${1:-target/release}")
for tool in gptoss-kernel-install gptoss-verify gptoss-bench; do
  if ! [ -x "$binaries/$tool" ]; then
    echo "$binaries/$tool is missing: cargo build --release --workspace --bins, and carry the three along" >&2
    exit 2
  fi
done
if ! command -v nvidia-smi >/dev/null; then
  echo "nvidia-smi is missing: there is no GPU here to check" >&2
  exit 2
fi
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
results=${2:-kernels/results/$(echo "$gpu" | tr -cs 'A-Za-z0-9' '-' | sed 's/-$//')}
mkdir -p "$results"
results=$(realpath "$results")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export GPTOSS_KERNELS="$work/kernels"

# cuBLAS: where the system has it, or with PyTorch's wheels.
for folder in /usr/local/cuda/lib64 $(python3 -c 'import sys; print(*[p + "/nvidia/cu13/lib" for p in sys.path if p])' 2>/dev/null || true); do
  if compgen -G "$folder/libcublas.so*" >/dev/null; then
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
  fi
done
if [ -d /usr/local/cuda/bin ]; then
  PATH="$PATH:/usr/local/cuda/bin"
fi
# The GPU that is here, whatever the shell was made for.
unset TORCH_CUDA_ARCH_LIST

step() { echo "== $* ==" >&2; }
failed=0

step "the machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem --format=csv | tee "$results/gpu.txt"
"$binaries/gptoss-verify" env --format table | tee -a "$results/gpu.txt"

step "building the kernels"
"$binaries/gptoss-kernel-install" --yes >"$work/build.json"
"$binaries/gptoss-kernel-install" --list --format table | tee "$results/build.txt"
# The committed hashes are of the pinned compiler.
if command -v python3 >/dev/null; then
  python3 - "$work/build.json" <<'PYTHON' | tee -a "$results/build.txt"
import json, sys
build = json.load(open(sys.argv[1]))["kernels"]
golden = json.load(open("kernels/golden-hashes.json"))
if build["nvcc"] != golden["nvcc"]:
    print(f"nvcc {build['nvcc']} is not the pinned {golden['nvcc']}, so hashes are not compared")
else:
    other = [f["name"] for f in build["files"] if golden["files"].get(f["name"], f["sha256"]) != f["sha256"]]
    known = sum(f["name"] in golden["files"] for f in build["files"])
    print(f"{known - len(other)} of {known} files have the committed hashes" + (f"; others: {other}" if other else ""))
PYTHON
fi
if nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | grep -q '^9\.0' && ! grep -q libgptoss_hopper.so "$work/build.json"; then
  echo "the library for Hopper is not built: CUTLASS_HOME names no CUTLASS" | tee -a "$results/build.txt"
  [ "${WITHOUT_CUTLASS:-0}" = 1 ] || failed=1
fi

step "every kernel beside this processor, small shapes"
"$binaries/gptoss-verify" kernels --format table | tee "$results/kernels.txt" || failed=1

# Measures into NAME.json, with the rest of the arguments.
measure() {
  local name=$1
  shift
  "$binaries/gptoss-bench" gemm --on gpu --quiet "$@" >"$results/$name.json" || { echo "measuring $name failed" >&2; failed=1; }
}
step "products: 4096 x 4096"
measure gemm-4096 --M 1,2,4,8,16,32,64,128,256 --K 4096 --N 4096 --iters 50
step "products: the layers of gpt-oss-20b"
for layer in experts q_proj k_proj o_proj; do
  measure "gpt-oss-20b-$layer" --shapes gpt-oss-20b --layers "$layer" --iters 30 --plot "$results/gpt-oss-20b-$layer.svg"
done
step "blocks"
for block in 16x8 32x8 16x16 32x16; do
  "$binaries/gptoss-bench" gemm --on gpu --quiet --only w4a8,mxfp4_a8 --M 1,16 --iters 30 --block $block --format table |
    grep -E '^gpu .*%' | sed "s/^/blocks of $block /" || true
done | tee "$results/blocks.txt"

step "every kernel beside this processor, shapes of gpt-oss"
"$binaries/gptoss-verify" kernels --model-shapes --format table | tee "$results/kernels-model-shapes.txt" || failed=1

seconds=${SECONDS_FOR_SANITIZER:-180}
if [ "$seconds" -lt 3 ]; then
  echo "compute-sanitizer was left out" | tee "$results/sanitizer.txt"
elif ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer is missing, so nothing was looked at with it" | tee "$results/sanitizer.txt"
  failed=1
else
  : >"$results/sanitizer.txt"
  # Every allocation is filled, so initcheck would have nothing to find.
  for tool in memcheck racecheck synccheck; do
    step "compute-sanitizer $tool"
    code=0
    # Only what differs in kind: the products share their source.
    timeout $((seconds / 3)) compute-sanitizer --tool $tool --error-exitcode 9 \
      "$binaries/gptoss-verify" kernels --quiet --only quantize,mxfp4_a8,w4a16,fake,mask >"$work/out" 2>&1 || code=$?
    echo "$tool: exit code $code" | tee -a "$results/sanitizer.txt"
    case $code in
      0) grep -E '^========= (ERROR|RACECHECK) SUMMARY' "$work/out" | tee -a "$results/sanitizer.txt" || true ;;
      124) echo "$tool was stopped after its time" | tee -a "$results/sanitizer.txt" ;;
      *)
        { grep -E '^=========' "$work/out" | head -40 || true; tail -20 "$work/out"; } | tee -a "$results/sanitizer.txt"
        failed=1
        ;;
    esac
  done
fi

step "products: the head of gpt-oss-20b"
measure gpt-oss-20b-lm_head --shapes gpt-oss-20b --layers lm_head --iters 10 --plot "$results/gpt-oss-20b-lm_head.svg"

if command -v python3 >/dev/null; then
  python3 - "$results" <<'PYTHON' | tee "$results/summary.txt"
import glob, json, sys
rows = []
for path in sorted(glob.glob(f"{sys.argv[1]}/g*-*.json")):
    try:
        manifest = json.load(open(path))
    except ValueError:
        print(f"{path} is not whole")
        continue
    rows += manifest["volatile"]["gemm"]
    for note in manifest.get("notes", []):
        print("note:", note)
print(f"{'layer':22} {'M':>5} {'kernel':13} {'us':>9} {'10%':>9} {'90%':>9} {'TFLOP/s':>8} {'GB/s':>7} {'of copy':>7} {'ratio':>6}")
for r in rows:
    print(f"{r['layer']:22} {r['m']:5} {r['kernel']:13} {r['microseconds']:9.2f} {r['fast_microseconds']:9.2f} {r['slow_microseconds']:9.2f} "
          f"{r['teraflops']:8.1f} {r['gigabytes_per_second']:7.0f} {100 * r['bandwidth_share']:6.0f}% {r.get('speedup') or 0:6.2f}")
a8 = [r for r in rows if r["kernel"] in ("w4a8", "mxfp4_a8")]
def least(name, chosen, figure, wanted):
    values = [(r[figure], r) for r in chosen if r.get(figure)]
    if not values:
        print(f"UNKNOWN: {name}, wanted {wanted}: nothing was measured")
    else:
        value, row = min(values, key=lambda v: v[0])
        state = "reached" if value >= wanted else "MISSED"
        print(f"{state}: {name}: at least {value:.2f}, wanted {wanted} ({row['kernel']}, {row['layer']}, M = {row['m']})")
few = [r for r in a8 if r["m"] <= 16]
least("times cuBLAS FP16 at M = 1..16, 4096 x 4096", [r for r in few if r["layer"] == "4096x4096"], "speedup", 2.2)
least("times cuBLAS FP16 at M = 1..16, experts", [r for r in few if r["layer"].startswith("experts")], "speedup", 2.2)
least("share of the copied bandwidth at M = 1..16, experts", [r for r in few if r["layer"].startswith("experts")], "bandwidth_share", 0.75)
least("times cuBLAS FP16 at M = 256", [r for r in a8 if r["m"] == 256], "speedup", 1.0)
PYTHON
fi
echo "the tables are in $results" >&2
exit $failed
