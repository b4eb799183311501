#!/usr/bin/env bash
# The whole suite ten times, each time in other circumstances: no test may depend on a clock, an address, the number of processors, or what the
# caller's environment has set. tests/run.sh comes first: it installs what the tests need.
#
#     tests/everywhere.sh [RESULTS]
#
# RESULTS (default: target/everywhere) gets a log of each run and results.txt; those that stand there without a failure are not done again. About 15 minutes each.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-target/everywhere}
mkdir -p "$results/home" "$results/a folder, ü"
results=$(realpath "$results")
export GPTOSS_PEERS="${GPTOSS_PEERS:-$PWD/venv}"
# Cargo's own places do not follow HOME.
export CARGO_HOME="${CARGO_HOME:-$HOME/.cargo}" RUSTUP_HOME="${RUSTUP_HOME:-$HOME/.rustup}"

# Busy processors, by fits and starts.
load() {
  while :; do
    for _ in 1 2 3; do
      timeout $((RANDOM % 20 + 5)) sh -c 'while :; do :; done' &
    done
    wait
    sleep $((RANDOM % 15))
  done
}
failed=0
# Runs the suite behind some words, where it was not run yet.
one() {
  local name=$1 code=0 began=$SECONDS
  shift
  if grep -q "^$name: 0 failures, exit code 0," "$results/results.txt" 2>/dev/null; then
    return
  fi
  "$@" cargo test --release --workspace --no-fail-fast >"$results/$name.log" 2>&1 || code=$?
  echo "$name: $(grep -cE '^test .* FAILED$' "$results/$name.log" || true) failures, exit code $code, $((SECONDS - began)) s" | tee -a "$results/results.txt"
  [ "$code" -eq 0 ] || failed=1
}
loaded() {
  load &
  local busy=$!
  one "$@"
  pkill -P "$busy" || true
  kill "$busy" || true
}
elsewhere=("TMPDIR=$results/a folder, ü" "HOME=$results/home")
seeds=(GPTOSS_CUTS_SEED=101 GPTOSS_FAULTS_SEED=102 GPTOSS_SURVIVAL_SEED=103 FUZZ=104)

one plain env
one folders env "${elsewhere[@]}"
one locale env LANG=de_DE.UTF-8 LC_ALL=tr_TR.UTF-8 TZ=Asia/Tokyo
one one-processor taskset -c 0
loaded load-without-aslr setarch -R
one target-folder env "CARGO_TARGET_DIR=$PWD/target" nice -n 10
one seeds env "${seeds[@]}"
loaded load-one-processor taskset -c 1
one few-files prlimit --nofile=256:256
one private bash -c 'umask 077; RUST_TEST_THREADS=1 exec "$@"' bash
exit $failed
