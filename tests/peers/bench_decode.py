"""Text beside llama.cpp, on the same GGUF file, in one run: a model of 20b's layer shapes with random weights, MXFP4 experts and
Q8_0 for everything else, four layers, 32768 tokens. The two take turns; medians and ratios.

usage: bench_decode.py BINARIES FOLDER [ROUNDS [THREADS]]
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

VOCAB, CONTEXT, TOKENS, PROMPT = 32768, 64, 64, 512


def write_tokenizer(folder):
    """A byte-level BPE of as many tokens as the model has: single bytes, then pairs."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = sorted(chr(b) for b in printable) + [chr(256 + i) for i in range(len(others))]
    vocab, merges = {c: i for i, c in enumerate(letters)}, []
    special = ["<|endoftext|>", "<|return|>"]
    for a, b in ((a, b) for a in letters for b in letters):
        if len(vocab) == VOCAB - len(special):
            break
        vocab[a + b] = len(vocab)
        merges.append([a, b])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(vocab) + i, "content": t, **plain} for i, t in enumerate(special)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    tokenizer |= {"pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level}
    tokenizer |= {"model": model | {"vocab": vocab, "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"eos_token": "<|return|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make(binaries, folder):
    source, out = folder / "synthetic", folder / "gguf"
    subprocess.run([binaries / "examples/synthetic", source, "4", "32", str(VOCAB)], check=True)
    write_tokenizer(source)
    flags = "--algo rtn --container gguf --experts keep --mw q8_0 --lm-head q8_0 --embed-tokens q8_0 --quiet --force"
    command = [binaries / "gptoss-quant", *flags.split(), "--model-in", source, "--output-dir", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def ours(binaries, model, threads):
    def row(*words):
        command = [binaries / "gptoss-bench", *words, "--quiet", "--sweep", str(threads), "--model", model]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(text)["volatile"]["bench"][0]

    decode = row("decode", "--context", str(CONTEXT), "--tokens", str(TOKENS))
    prefill = row("prefill", "--tokens", str(PROMPT))
    share = decode["gigabytes_per_second"] / decode["read_gigabytes_per_second"]
    return decode["tokens_per_second"], prefill["tokens_per_second"], share


def theirs(model):
    vocab = model.n_vocab()
    ids = [i * 7919 % vocab for i in range(max(PROMPT, CONTEXT + TOKENS))]
    rates = []
    for _ in range(3):
        model.reset()
        start = time.perf_counter()
        model.eval(ids[:PROMPT])
        rates.append(PROMPT / (time.perf_counter() - start))
    model.reset()
    model.eval(ids[:CONTEXT])
    steps = []
    for token in ids[CONTEXT : CONTEXT + TOKENS]:
        start = time.perf_counter()
        model.eval([token])
        steps.append(time.perf_counter() - start)
    return 1 / statistics.median(steps), statistics.median(rates)


def main():
    from llama_cpp import Llama

    binaries, folder = Path(sys.argv[1]), Path(sys.argv[2])
    rounds, threads = (int(sys.argv[i]) if len(sys.argv) > i else 0 for i in (3, 4))
    rounds, threads = rounds or 3, threads or 2
    folder.mkdir(parents=True, exist_ok=True)
    out = make(binaries, folder)
    model = Llama(
        str(out / "model.gguf"), n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    own, peer = [], []
    for _ in range(rounds):
        peer.append(theirs(model))
        own.append(ours(binaries, out, threads))
    decode, prefill, share = (statistics.median(values) for values in zip(*own))
    their_decode, their_prefill = (statistics.median(values) for values in zip(*peer))
    print(f"{threads} threads, medians of {rounds} alternating rounds, tokens/s")
    print(f"{'':10} {'ours':>8} {'llama.cpp':>10} {'ratio':>6}")
    print(f"{'decode':10} {decode:8.1f} {their_decode:10.1f} {decode / their_decode:6.2f}   {share:.0%} of the bytes that plain reads get")
    print(f"{'prefill':10} {prefill:8.1f} {their_prefill:10.1f} {prefill / their_prefill:6.2f}")
    missed = [n for n, ratio in (("decode", decode / their_decode), ("prefill", prefill / their_prefill)) if ratio < 1]
    if missed:
        sys.exit(f"slower than llama.cpp: {', '.join(missed)}")


main()
