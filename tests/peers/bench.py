"""Whole processes, in turn: gptoss-dequant, dd writing as many bytes, and (fewer times) transformers, on one synthetic
layer of gpt-oss-20b. Prints medians and the ratios of pairs.

usage: bench.py REPOSITORY FOLDER   (FOLDER is made, needs 6 GB, and is removed)
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS, PEER_RUNS = 9, 3
root, work = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
work.mkdir(parents=True)
layer = work / "layer"
subprocess.run([root / "target/release/examples/synthetic", layer], check=True)


def timed(command, **kwargs):
    """Seconds and peak resident bytes of a process, and what it printed."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **kwargs)
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, command
    return seconds, usage.ru_maxrss * 1024, out


def ours(i):
    dst = work / f"out-{i}"
    seconds, _, out = timed([root / "target/release/gptoss-dequant", "--quiet", "--src", layer, "--dst", dst, "--format", "json"])
    size = sum(f.stat().st_size for f in dst.iterdir())
    shutil.rmtree(dst)
    return seconds, size, json.loads(out)["volatile"]["peak_anonymous_bytes"]


def dd(i, size):
    file = work / f"dd-{i}"
    mib = -(-size // 2**20)
    seconds, _, _ = timed(["dd", "if=/dev/zero", f"of={file}", "bs=1M", f"count={mib}", "conv=fsync", "status=none"])
    file.unlink()
    return seconds / (mib * 2**20) * size


def peer():
    file = work / "peer.safetensors"
    seconds, peak, _ = timed([sys.executable, root / "tests/peers/transformers_layer.py", layer, file])
    file.unlink()
    return seconds, peak


try:
    _, size, _ = ours("warm")
    dd("warm", size)
    a, b, anonymous = [], [], 0
    for i in range(RUNS):
        seconds, size, anon = ours(i)
        a.append(seconds)
        anonymous = max(anonymous, anon)
        b.append(dd(i, size))
    peers = [peer() for _ in range(PEER_RUNS)]
finally:
    shutil.rmtree(work)

median = statistics.median
ratios = sorted(y / x for x, y in zip(a, b))
slow = median(p[0] for p in peers)
print(f"output {size / 1e9:.2f} GB, {RUNS} pairs, {PEER_RUNS} runs of the peer; medians (min to max)")
print(f"gptoss-dequant  {median(a):6.2f} s  ({min(a):.2f} to {max(a):.2f}), {anonymous / 1e6:.1f} MB anonymous memory")
print(f"dd, fsync       {median(b):6.2f} s  ({min(b):.2f} to {max(b):.2f})")
print(f"transformers    {slow:6.2f} s  ({min(p[0] for p in peers):.2f} to {max(p[0] for p in peers):.2f}), {max(p[1] for p in peers) / 1e9:.1f} GB memory")
print(f"of dd's rate    {median(ratios):6.2f}    ({ratios[0]:.2f} to {ratios[-1]:.2f})")
print(f"x transformers  {slow / median(a):6.1f}")

missed = [
    name
    for name, held in {
        "0.7 of dd's rate": median(ratios) >= 0.7,
        "10 x transformers": slow / median(a) >= 10,
        "1 GB of anonymous memory": anonymous < 1e9,
    }.items()
    if not held
]
if missed:
    sys.exit("missed: " + ", ".join(missed))
