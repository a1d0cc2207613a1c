"""Tables of loaders."""

import functools
from collections import OrderedDict

loaders_and_params = OrderedDict({"llama.cpp": ["ctx_size"], "Transformers": ["cpu", "bf16", "load_in_4bit"]})
loaders_samplers = {"llama.cpp": {"top_k"}, "Transformers": {"temperature", "top_p", "top_k"}}


@functools.cache
def list_all_samplers():
    return sorted(set().union(*loaders_samplers.values()))


@functools.cache
def get_all_params():
    return sorted(set().union(*loaders_and_params.values()))


@functools.cache
def list_model_elements():
    return ["loader", "ctx_size", "gpu_split", "cpu_memory", "cpu", "bf16", "load_in_4bit", "attn_implementation"]
