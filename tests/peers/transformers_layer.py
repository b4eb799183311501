"""Dequantizes one layer's experts as transformers does, and saves them: the peer of gptoss-dequant in bench.py.

usage: transformers_layer.py SOURCE OUTPUT
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

source, output = Path(sys.argv[1]), sys.argv[2]
index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
tensors = {}
for name, shard in index.items():
    with safe_open(source / shard, "pt") as f:
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            scales = f.get_tensor(base + "_scales")
            tensors[base] = convert_moe_packed_tensors(f.get_tensor(name), scales).contiguous()
        elif not name.endswith("_scales"):
            tensors[name] = f.get_tensor(name)
save_file(tensors, output, metadata={"format": "pt"})
