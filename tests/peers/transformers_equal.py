"""Our BF16 output against transformers: every tensor bit for bit, and the logits of a model loaded from our folder.

usage: transformers_equal.py SOURCE OURS GOLDEN_LOGITS
"""

import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

source, ours, golden = sys.argv[1:4]

theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
loaded, info = AutoModelForCausalLM.from_pretrained(
    ours, dtype=torch.bfloat16, output_loading_info=True
)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
mine = loaded.state_dict()

assert theirs.keys() == mine.keys(), theirs.keys() ^ mine.keys()
for name, want in theirs.items():
    have = mine[name]
    assert want.dtype == have.dtype == torch.bfloat16, (name, want.dtype, have.dtype)
    assert want.shape == have.shape, (name, want.shape, have.shape)
    # As integers, so that -0 and 0 differ.
    assert torch.equal(want.view(torch.int16), have.view(torch.int16)), name
print(f"{len(mine)} tensors equal")

model = AutoModelForCausalLM.from_pretrained(
    ours, dtype=torch.float32, attn_implementation="eager"
).eval()
assert model.config.to_dict().get("quantization_config") is None
with safe_open(golden, "pt") as f, torch.no_grad():
    logits = model(f.get_tensor("input_ids")).logits
    worst = (logits - f.get_tensor("logits")).abs().max().item()
assert worst <= 1e-4, worst
print(f"logits within {worst:.2e}")
