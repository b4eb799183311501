"""transformers loads a checkpoint without a missing or unexpected key, and its logits are near the golden ones.

usage: transformers_loads.py MODEL GOLDEN_LOGITS GREATEST_MEAN_KL [DTYPE]
"""

import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

folder, golden, bound = sys.argv[1], sys.argv[2], float(sys.argv[3])
dtype = sys.argv[4] if len(sys.argv) > 4 else "auto"
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with safe_open(golden, "pt") as f, torch.no_grad():
    have = model(f.get_tensor("input_ids")).logits.float().log_softmax(-1)
    want = f.get_tensor("logits").log_softmax(-1)
kl = torch.nn.functional.kl_div(have, want, log_target=True, reduction="none").sum(-1).mean().item()
assert 0 <= kl <= bound, (kl, bound)
print(f"loads, mean KL {kl:.2e}")
