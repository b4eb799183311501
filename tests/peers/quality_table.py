"""Every row of golden/peer-quality.json (llm-compressor's own results on the tiny model) beside ours, with the tokens that
the router sends and with every token for every expert. Exits 1 where a calibrated row is above 1.0 of theirs or a data-free
row above 1.02.
Run: python tests/peers/quality_table.py BIN_FOLDER (after cargo build --release; BIN_FOLDER is target/release)"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[2]
bins = Path(sys.argv[1]).resolve()
tiny = root / "tests/fixtures/tiny-gpt-oss"
ALL = ["--few-tokens", "all-experts", "--few-tokens-threshold", "1"]
ROWS = {
    "rtn_w4a16": "--algo rtn --experts w4a16 --mw w4a16 --group-size 128",
    "rtn_w3a16": "--algo rtn --experts w3a16 --mw w3a16 --group-size 128",
    "rtn_w2a16_g32": "--algo rtn --experts w2a16 --mw w2a16 --group-size 32",
    "fp8": "--algo rtn --experts fp8 --mw fp8",
    "gptq_w4a16": "--experts w4a16 --mw w4a16 --group-size 128",
    "gptq_w4a16_g32": "--experts w4a16 --mw w4a16 --group-size 32",
    "gptq_w4a8": "--experts w4a8 --mw w4a8 --group-size 128 --kernels present",
    "gptq_w8a8": "--experts w8a8 --mw w8a8",
    "gptq_w3a16": "--experts w3a16 --mw w3a16 --group-size 128",
    "gptq_w2a16_g32": "--experts w2a16 --mw w2a16 --group-size 32",
    "gptq_mxfp4": "--experts mxfp4 --mw mxfp4",
    "sparse24": "--experts dense --mw dense --with-sparse --sparsity 0.5 --mask 2:4",
}
EXTRA = {
    "awq_w4a16": "--algo awq --experts w4a16 --mw w4a16 --group-size 128",
    "gptq_w4a16, mse": "--experts w4a16 --mw w4a16 --group-size 128 --observer mse",
    "gptq_w4a16, as published": "--experts w4a16 --mw w4a16 --group-size 128 --descent 0",
    "gptq_w4a16, not sequential": "--experts w4a16 --mw w4a16 --group-size 128 --no-sequential-update",
    "gptq_w4a16, router-weighted": "--experts w4a16 --mw w4a16 --group-size 128 --router-weighted",
    "wanda 2:4": "--experts dense --mw dense --with-sparse --sparsity 0.5 --mask 2:4 --sparse-algo wanda",
}


def manifest(*command):
    ran = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{command}: {ran.stderr}")
    return json.loads(ran.stdout)


def ours(flags):
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        text = ["--calib-jsonl", tiny / "calib.jsonl", "--nsamples", "128", "--max-seq-length", "256"]
        made = manifest(bins / "gptoss-quant", "-q", "--format", "json", "--model-in", tiny, "--output-dir", out, *text, *flags)
        judged = manifest(
            bins / "gptoss-verify", "quality", "-q", "--format", "json", out, "--against", tiny, "--text", tiny / "test.jsonl",
            "--nsamples", "128", "--max-seq-length", "256",
        )["quality"]
    return judged["reference"]["kl_mean"], judged["perplexity"], judged["reference"]["top1_agreement"], made["volatile"]["seconds"]


peers = {r["method"]: r for r in json.loads((root / "tests/golden/peer-quality.json").read_text())["results"]}
missed = []
print(f"{'row':28} {'KL':>9} {'theirs':>9} {'ratio':>6} {'perplexity':>10} {'theirs':>8} {'top-1':>6} {'seconds':>7}")
for row, flags in {**ROWS, **EXTRA}.items():
    runs = [(row, flags.split())]
    if row in ROWS and "rtn" not in row and row != "fp8":
        runs.append((f"{row}, every token", flags.split() + ALL))
    for name, flags in runs:
        kl, ppl, top, seconds = ours(flags)
        peer = peers.get(row)
        if peer is None:
            print(f"{name:28} {kl:9.6f} {'':9} {'':6} {ppl:10.4f} {'':8} {top:6.4f} {seconds:7.1f}", flush=True)
            continue
        ratio = kl / peer["kl"]
        print(f"{name:28} {kl:9.6f} {peer['kl']:9.6f} {ratio:6.3f} {ppl:10.4f} {peer['ppl']:8.4f} {top:6.4f} {seconds:7.1f}", flush=True)
        if ratio > (1.02 if flags[0] == "--algo" else 1.0):
            missed.append(name)
if missed:
    sys.exit(f"above llm-compressor's: {', '.join(missed)}")
