"""Whole processes, in turn: llm-compressor's GPTQ and gptoss-quant --algo gptq on the tiny model, with the same samples and
settings; ours as it comes, and with all tokens through all experts, as theirs. Checks the quality of what the first runs
wrote, then prints medians and ratios.

usage: bench_calibrated.py REPOSITORY FOLDER [PAIRS]   (FOLDER is made and removed; a run of theirs takes over a minute)

PYTHONPATH names the folder with the packages of requirements-bench.txt, $GPTOSS_BIN that of our binaries where it is not
target/release.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

SAMPLES, LENGTH = 128, 256
root, work = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
pairs = int(sys.argv[3]) if len(sys.argv) > 3 else 3
binaries = Path(os.environ.get("GPTOSS_BIN", root / "target/release"))
tiny = root / "tests/fixtures/tiny-gpt-oss"
bf16 = work / "bf16"
environment = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # Not LLM_COMPRESSOR_LOG_DISABLED: 0.14.0.1 fails with it, for want of a log level of its own.
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    # In favour of theirs where cores are shared. oneshot on 16 windows, three alternating pairs beside other work: 65 to
    # 79 s by default, 15 to 17 s so. With less beside it, one run each: 17.2 and 17.5 s.
    "OMP_WAIT_POLICY": "passive",
}


def timed(command):
    """Wall seconds, processor seconds, peak resident megabytes of a process, and what it printed."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, (command, (work / "log").read_text()[-2000:])
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, out


def compressor(output):
    script = root / "tests/peers/llm_compressor.py"
    return [sys.executable, script, bf16, tiny / "calib.jsonl", "W4A16", str(SAMPLES), str(LENGTH), output]


def gptoss(output, *more):
    flags = f"""--quiet --format json --algo gptq --experts w4a16 --mw w4a16 --group-size 128
        --num-calibration-samples {SAMPLES} --max-seq-length {LENGTH} --threads 2"""
    calibration = ["--model-in", tiny, "--calib-jsonl", tiny / "calib.jsonl", "--output-dir", output]
    return [binaries / "gptoss-quant", *flags.split(), *calibration, *more]


def every_token(output):
    return gptoss(output, "--few-tokens", "all-experts", "--few-tokens-threshold", "1")


def divergence(output):
    """Mean KL divergence of a quantized model from its source on text that calibration did not see."""
    text = ["--text", tiny / "test.jsonl", "--num-calibration-samples", str(SAMPLES), "--max-seq-length", str(LENGTH)]
    command = [binaries / "gptoss-verify", "quality", output, "--against", tiny, *text, "--quiet", "--format", "json"]
    return json.loads(timed(command)[3])["quality"]["reference"]["kl_mean"]


runs = {"llm-compressor": compressor, "gptoss-quant": gptoss, "all tokens to all experts": every_token}
figures = {name: [] for name in runs}
quality = {}
oneshot = []
work.mkdir(parents=True)
try:
    with open(work / "log", "wb") as log:
        timed([binaries / "gptoss-dequant", "--quiet", "--src", tiny, "--dst", bf16])
        for pair in range(pairs):
            for name, command in runs.items():
                output = work / "out"
                *figure, said = timed(command(output))
                figures[name].append(figure)
                if name == "llm-compressor":
                    oneshot.append(json.loads(said.splitlines()[-1])["seconds_oneshot"])
                if pair == 0:
                    quality[name] = divergence(output)
                shutil.rmtree(output)
finally:
    shutil.rmtree(work)

median = statistics.median
theirs = figures["llm-compressor"]
print(f"{SAMPLES} windows of {LENGTH} tokens, {pairs} pairs; medians (min to max); KL is from the source, on test.jsonl")
missed = []
for name, runs_of_it in figures.items():
    wall, processor, memory = zip(*runs_of_it)
    faster = median(t[0] / o[0] for t, o in zip(theirs, runs_of_it))
    busier = median(t[1] / o[1] for t, o in zip(theirs, runs_of_it))
    less = median(o[2] / t[2] for t, o in zip(theirs, runs_of_it))
    print(f"{name:25}  {median(wall):6.2f} s  ({min(wall):.2f} to {max(wall):.2f})", end="")
    print(f", {median(processor):6.2f} s of processor, {median(memory):5.0f} MB memory, KL {quality[name]:.6f}", end="")
    if name == "llm-compressor":
        print(f"; oneshot alone {median(oneshot):.2f} s")
        continue
    print(f"; x {faster:.1f} of time, {busier:.1f} of processor, {less:.3f} of the memory")
    held = {
        f"10 x llm-compressor ({faster:.1f})": faster >= 10,
        f"a fifth of its memory ({less:.3f})": less <= 1 / 5,
        f"no worse by a tenth ({quality[name]:.6f})": quality[name] <= 1.1 * quality["llm-compressor"],
    }
    missed += [f"{name}: {what}" for what, holds in held.items() if not holds]
if missed:
    sys.exit("missed: " + "; ".join(missed))
