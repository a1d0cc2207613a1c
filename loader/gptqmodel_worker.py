"""The process in which GPTQModel runs: a job as JSON on stdin, its progress as lines of JSON on stdout.

    python -m ropewalk.loader.gptqmodel_worker < job.json

Everything that GPTQModel prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> int:
    """Do the job; return the exit status."""
    job = json.load(sys.stdin)
    # What is printed to stdout, from Python or beneath it, ends on stderr; the lines of JSON keep the real one.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=lines, flush=True)

    from ropewalk.loader.rotary import register_rope_types

    register_rope_types()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    config = dict(job["config"])
    config["format"] = config.pop("checkpoint_format")
    # GPTQModel's own grouping by activation excludes act-order, and it does not switch it off by itself.
    config["act_group_aware"] = False
    device = job["device"] or ("cuda:0" if torch.cuda.is_available() else "cpu")
    # Its choice for the CPU is bfloat16, which would round a float16 model's weights before packing them.
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = GPTQModel.load(job["source"], QuantizeConfig(**config), device=device, dtype=dtype)
    blocks = model.model.config.get_text_config().num_hidden_layers

    class Callback:
        def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:
            if submodule_finalized:
                tell(block=layer_idx + 1, blocks=blocks)

    model.layer_callback = Callback()
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["windows"]]
    tokenizer = AutoTokenizer.from_pretrained(job["source"], trust_remote_code=False)
    model.quantize(calibration, tokenizer=tokenizer, batch_size=1)
    model.save(job["out"])
    tell(finished=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
