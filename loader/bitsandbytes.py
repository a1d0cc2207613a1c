"""`load_in_4bit`: float16 checkpoints, quantized to 4 bits by bitsandbytes as they are loaded.

The codes are NF4 in blocks of 64, with their scales quantized once more (QLoRA's settings, arXiv:2305.14314).
bitsandbytes computes on GPUs, and from 0.46 on also on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch

from ropewalk.errors import MissingPackageError, UsageError
from ropewalk.loader.checkpoint import Checkpoint


def load_arguments(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """Return what makes transformers' `from_pretrained` quantize a checkpoint as it loads it.

    Args:
        checkpoint: opened.
        dtype: of activations, and so of the arithmetic.

    Raises:
        UsageError: the checkpoint is packed already.
        MissingPackageError: bitsandbytes is not installed, or older than transformers wants.
    """
    if checkpoint.quantize_config is not None:
        raise UsageError(
            f"load_in_4bit: expected float16 weights to quantize, found a checkpoint that is packed in "
            f"{checkpoint.quantize_config.bits} bits already ({checkpoint.folder}); load it without load_in_4bit"
        )
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise MissingPackageError(
            "load_in_4bit: expected the package bitsandbytes (pip install 'ropewalk[bitsandbytes]'), "
            f"found {_found_version()}"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def _found_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"version {version('bitsandbytes')}, which is too old for this transformers"
    except PackageNotFoundError:
        return "none"


def keep_ragged_layers(model: Any) -> None:
    """Let layers compute that bitsandbytes (0.50) cannot bring into its layout for CPUs with AVX512-BF16.

    It does that at the first call, for every layer on the CPU, and fails where a row does not fill its last block of
    64, or columns their last block of 32. Such a layer keeps the layout it has, which every CPU can compute with.

    Args:
        model: loaded with `load_arguments`.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            block = layer.weight.quant_state.blocksize if layer.weight.quant_state is not None else 64
            layer.support_avx512bf16_for_cpu = layer.in_features % block == 0 and layer.out_features % 32 == 0
