#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one command: builds them for the GPU that is here, compares each with this processor,
# looks for wrong accesses and races, and measures. Nothing is fetched; Rust is not needed where the binaries came along.
#
#     kernels/check.sh [BINARIES [RESULTS]]
#
# BINARIES has gptoss-kernel-install, gptoss-verify and gptoss-bench (default: target/release). RESULTS is where tables go (default:
# kernels/results/ and the GPU's name). Exit code 0: everything is right; what is slower than wanted is said at the end, and no failure.
# SECONDS_FOR_SANITIZER (default 240) is how long compute-sanitizer may take; 0 leaves it out.
set -euo pipefail
cd "$(dirname "$0")/.."
binaries=$(realpath "${1:-target/release}")
for tool in gptoss-kernel-install gptoss-verify gptoss-bench; do
  if ! [ -x "$binaries/$tool" ]; then
    echo "$binaries/$tool is missing: cargo build --release --workspace --bins, and carry target/release along" >&2
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
if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
  export CUDA_HOME=/usr/local/cuda
fi

step() { echo "== $* ==" >&2; }
failed=0

step "the machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem --format=csv | tee "$results/gpu.txt"
"$binaries/gptoss-verify" env --format table | tee -a "$results/gpu.txt"

step "building the kernels"
"$binaries/gptoss-kernel-install" --yes >"$work/build.json"
"$binaries/gptoss-kernel-install" --list --format table | tee "$results/build.txt"
# The committed hashes are of the pinned compiler.
if [ -n "$(command -v python3)" ]; then
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

step "every kernel beside this processor"
"$binaries/gptoss-verify" kernels --model-shapes --format table | tee "$results/kernels.txt" || failed=1

if command -v compute-sanitizer >/dev/null && [ "${SECONDS_FOR_SANITIZER:-240}" != 0 ]; then
  : >"$results/sanitizer.txt"
  for tool in memcheck racecheck synccheck initcheck; do
    step "compute-sanitizer $tool"
    # Only what differs in kind: the products share their source.
    line="timeout $((${SECONDS_FOR_SANITIZER:-240} / 4)) compute-sanitizer --tool $tool --error-exitcode 9"
    code=0
    $line "$binaries/gptoss-verify" kernels --quiet --only quantize,mxfp4_a8,w4a16,fake,mask >"$work/out" 2>&1 || code=$?
    { echo "$tool: exit code $code"; grep -E '^=========' "$work/out" | tail -40 || true; } | tee -a "$results/sanitizer.txt"
    case $code in
      0) ;;
      124) echo "$tool was stopped after its time" | tee -a "$results/sanitizer.txt" ;;
      *) failed=1 ;;
    esac
  done
else
  echo "compute-sanitizer was not run" | tee "$results/sanitizer.txt"
fi

step "products: 4096 x 4096"
"$binaries/gptoss-bench" gemm --on gpu --quiet --M 1,2,4,8,16,32,64,128,256 --K 4096 --N 4096 --iters 50 >"$results/gemm-4096.json"
step "products: the layers of gpt-oss-20b"
"$binaries/gptoss-bench" gemm --on gpu --quiet --shapes gpt-oss-20b --iters 30 --plot "$results/gpt-oss-20b.svg" >"$results/gpt-oss-20b.json"
step "parts of K"
for splits in 1 2 3 4 6 8 12; do
  "$binaries/gptoss-bench" gemm --on gpu --quiet --only w4a8,mxfp4_a8 --M 1,16 --iters 30 --splits $splits --format table |
    grep -E '^gpu .*%' | sed "s/^/splits $splits /"
done | tee "$results/splits.txt"

if command -v python3 >/dev/null; then
  python3 - "$results" <<'PYTHON' | tee "$results/summary.txt"
import json, sys
rows = [r for name in ("gemm-4096", "gpt-oss-20b") for r in json.load(open(f"{sys.argv[1]}/{name}.json"))["volatile"]["gemm"]]
print(f"{'layer':22} {'M':>5} {'kernel':13} {'us':>9} {'10%':>9} {'90%':>9} {'TFLOP/s':>8} {'GB/s':>7} {'of copy':>7} {'ratio':>6}")
for r in rows:
    print(f"{r['layer']:22} {r['m']:5} {r['kernel']:13} {r['microseconds']:9.2f} {r['fast_microseconds']:9.2f} {r['slow_microseconds']:9.2f} "
          f"{r['teraflops']:8.1f} {r['gigabytes_per_second']:7.0f} {100 * r['bandwidth_share']:6.0f}% {r.get('speedup') or 0:6.2f}")
a8 = [r for r in rows if r["kernel"] in ("w4a8", "mxfp4_a8")]
def least(name, chosen, figure, wanted):
    values = [(r[figure], r) for r in chosen if r.get(figure)]
    if values:
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
