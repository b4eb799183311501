"""llama.cpp loads a GGUF file, tokenizes text as tokenizer.json does, and its logits are near ours.

usage: llama_logits.py MODEL.gguf TOKENIZER.json LOGITS.safetensors GREATEST_MEAN_KL
"""

import sys

import numpy as np
from llama_cpp import Llama
from safetensors import safe_open
from tokenizers import Tokenizer

path, tokenizer, logits, bound = *sys.argv[1:4], float(sys.argv[4])
model = Llama(path, n_ctx=512, n_batch=512, n_threads=2, logits_all=True, verbose=False)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


ours = Tokenizer.from_file(tokenizer)
texts = ["fn main() { println!(\"Hello\"); }\n", "Ünïcödé — 12345 tokens,\n\n\tand   spaces", "<|start|>user<|message|>hi<|end|>"]
for text in texts:
    want = ours.encode(text, add_special_tokens=False).ids
    have = model.tokenize(text.encode(), add_bos=False, special=True)
    assert have == want, (text, have, want)

kl = []
with safe_open(logits, "np") as f:
    ids, logits = f.get_tensor("input_ids"), f.get_tensor("logits")
for sequence, want in zip(ids, logits):
    model.reset()
    model.eval([int(i) for i in sequence])
    have, want = log_softmax(np.array(model.scores[: len(sequence)])), log_softmax(want)
    kl.append((np.exp(want) * (want - have)).sum(-1))
kl = float(np.mean(kl))
assert 0 <= kl <= bound, (kl, bound)
print(f"loads, tokens equal, mean KL {kl:.2e}")
