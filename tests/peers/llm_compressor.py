"""llm-compressor's GPTQ on a BF16 gpt-oss: the peer of gptoss-quant in bench_calibrated.py. It needs the packages of
requirements-bench.txt on PYTHONPATH.

Every linear layer but lm_head and the router, computed in f32 on two threads; all tokens go through all experts, as
oneshot does where nobody says otherwise. The last line printed is JSON: seconds of oneshot alone and of the process so
far, and the peak resident memory.

usage: llm_compressor.py MODEL CALIBRATION_JSONL SCHEME SAMPLES LENGTH [OUTPUT]   (SCHEME: such as W4A16)
"""

import json
import resource
import sys
import time

import psutil
import torch

torch.set_num_threads(2)

from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, calibration, scheme, samples, length = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
output = sys.argv[6] if len(sys.argv) > 6 else None


def windows(tokenizer):
    """The documents, each with the separator behind it, one behind the other and cut: gptoss's --packing pack."""
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = []
    with open(calibration) as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"] + [separator]
            if len(ids) >= samples * length:
                break
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:samples]
    assert len(windows) == samples, len(windows)
    return windows


tokenizer = AutoTokenizer.from_pretrained(folder)
text = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows(tokenizer)]
with load_quantizable_moe():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

recipe = GPTQModifier(
    targets="Linear",
    scheme=scheme,
    ignore=["lm_head", "re:.*router$"],
    block_size=128,
    dampening_frac=0.01,
    actorder="static",
)
start = time.perf_counter()
oneshot(model=model, dataset=torch.utils.data.DataLoader(text, batch_size=1), recipe=recipe)
seconds = time.perf_counter() - start
quantized = sum(hasattr(m, "weight_scale") for m in model.modules())
config = model.config
assert quantized == config.num_hidden_layers * (4 + 3 * config.num_local_experts), quantized
if output:
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
result = {
    "seconds_oneshot": round(seconds, 3),
    "seconds_total": round(time.time() - psutil.Process().create_time(), 3),
    "maxrss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
}
print(json.dumps(result))
