"""A PEFT adapter on a packed base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropewalk.errors import MissingFileError, MissingPackageError
from ropewalk.loader.quant_linear import QuantLinear


def load_lora(model: Any, folder: str | Path) -> Any:
    """Return `model` with the LoRA adapter of a folder on top, as a PeftModel.

    Raises:
        MissingPackageError: PEFT is not installed.
        MissingFileError: no adapter in the folder.
    """
    try:
        from peft import PeftConfig, PeftModel
        from peft.tuners.lora.gptq import GPTQLoraLinear
    except ImportError as error:
        raise MissingPackageError(
            f"--lora: expected the package peft (pip install 'ropewalk[peft]'), {error}"
        ) from error
    folder = Path(folder).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise MissingFileError(folder, "a PEFT adapter (adapter_config.json)", "none")
    config: Any = PeftConfig.from_pretrained(str(folder))
    if hasattr(config, "_register_custom_module"):
        # PEFT's layer for GPTQ calls the base layer and adds to what comes out, which is all that is needed.
        config._register_custom_module({QuantLinear: GPTQLoraLinear})
    return PeftModel.from_pretrained(model, str(folder), config=config)
