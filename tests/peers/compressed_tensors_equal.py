"""A quantized checkpoint decompressed by the compressed-tensors library, against our own dequantizer's BF16 of it.

usage: compressed_tensors_equal.py QUANTIZED DEQUANTIZED
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors import safe_open


def load(folder):
    index = json.loads((Path(folder) / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(f"{folder}/{shard}", "pt") as f:
            tensors.update({name: f.get_tensor(name) for name in f.keys()})
    assert tensors.keys() == index["weight_map"].keys()
    return tensors


quantized, dequantized = sys.argv[1:3]
raw = json.loads((Path(quantized) / "config.json").read_text())["quantization_config"]
raw.pop("quant_method")
config = QuantizationConfig.model_validate(raw)
have, want = load(quantized), load(dequantized)

modules = defaultdict(dict)
for name, tensor in have.items():
    module, _, local = name.rpartition(".")
    if local.startswith("weight"):
        modules[module][local] = tensor

counted = 0
for module, state in modules.items():
    if "weight_scale" not in state:
        continue
    assert not any(match_name(module, i) for i in config.ignore), module
    schemes = [s for s in config.config_groups.values() if any(match_name(module, t) for t in s.targets)]
    assert len(schemes) == 1, (module, len(schemes))
    compressor = BaseCompressor.get_value_from_registry(schemes[0].format)
    weight = compressor.decompress(state, schemes[0])["weight"]
    if ".experts." in module:
        base, _, rest = module.partition(".experts.")
        expert, projection = rest.split(".")
        fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
        ours = want[f"{base}.experts.{fused}"][int(expert)].T
        if fused == "gate_up_proj":
            ours = ours[projection == "up_proj" :: 2]
    else:
        ours = want[f"{module}.weight"]
    assert weight.shape == ours.shape, (module, weight.shape, ours.shape)
    assert torch.equal(weight, ours), (module, (weight - ours).abs().max())
    counted += 1
assert counted > 0
print(f"{counted} modules equal")
