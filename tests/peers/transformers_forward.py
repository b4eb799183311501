"""Our first layer, whose attention rounds its activations, is transformers' with compressed-tensors' rounding.

usage: transformers_forward.py QUANTIZED DEQUANTIZED GOLDEN_LOGITS OUR_STATES

DEQUANTIZED holds QUANTIZED's weights as plain floats, OUR_STATES the raw f32 hidden states behind the first layer, of the
first row of GOLDEN_LOGITS' input_ids. Later layers are no measure: where another order of sums moves a value across a
rounding boundary or a token to another expert, the difference grows from layer to layer.
"""

import json
import re
import sys

import numpy
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors import safe_open
from transformers import AutoModelForCausalLM

quantized, dequantized, golden, ours = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32, attn_implementation="eager").eval()
with open(quantized + "/config.json") as f:
    config = QuantizationConfig.model_validate(json.load(f)["quantization_config"])


def rounding(args):
    def hook(module, inputs):
        (x,) = inputs
        scale, zero = compute_dynamic_scales_and_zp(x, args, module)
        return (fake_quantize(x, scale, zero, args),)

    return hook


with safe_open(golden, "pt") as f:
    ids = f.get_tensor("input_ids")[:1]


def states():
    with torch.no_grad():
        return model.model(ids, output_hidden_states=True).hidden_states[1][0]


plain = states()
hooks = 0
for scheme in config.config_groups.values():
    for target in scheme.targets:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and re.match(target.removeprefix("re:"), name):
                module.register_forward_pre_hook(rounding(scheme.input_activations))
                hooks += 1
assert hooks == 4 * model.config.num_hidden_layers, hooks

want = states()
have = torch.from_numpy(numpy.fromfile(ours, dtype="<f4")).view(want.shape)


def rms(difference):
    return difference.pow(2).mean().sqrt().item()


moved, apart = rms(want - plain), rms(want - have)
assert 0 < apart < moved / 50, (apart, moved)
print(f"forward agrees: {apart:.2e} apart, {moved:.2e} moved by the rounding")
