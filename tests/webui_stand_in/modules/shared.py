"""Arguments and what is loaded."""

import argparse
import copy
import sys
from pathlib import Path

user_data_dir = Path("user_data")
model = tokenizer = None
model_name = "None"
is_seq2seq = is_multimodal = False
lora_names = []
generation_lock = None
gradio = {}

parser = argparse.ArgumentParser(conflict_handler="resolve")
for flag in ("--loader", "--model", "--gpu-split"):
    parser.add_argument(flag, type=str)
for flag in ("--extensions", "--lora"):
    parser.add_argument(flag, type=str, nargs="+")
for flag in ("--cpu", "--bf16", "--load-in-4bit"):
    parser.add_argument(flag, action="store_true")
parser.add_argument("--model-dir", type=str, default=str(user_data_dir / "models"))
parser.add_argument("--lora-dir", type=str, default=str(user_data_dir / "loras"))
parser.add_argument("--attn-implementation", type=str, default="sdpa")
parser.add_argument("--ctx-size", type=int, default=0)
parser.add_argument("--cpu-memory", type=float, default=0)
args = parser.parse_args()
original_args = copy.deepcopy(args)
args_defaults = parser.parse_args([])
provided_arguments = [given.lstrip("-").replace("-", "_") for given in sys.argv[1:] if given.startswith("--")]
settings = {"truncation_length": 8192, "instruction_template_str": ""}
user_config = {}


def fix_loader_name(name):
    return {"transformers": "Transformers", "llama.cpp": "llama.cpp"}.get(name.lower()) if name else name


args.loader = fix_loader_name(args.loader)
