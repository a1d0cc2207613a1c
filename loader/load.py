"""`ropewalk.load`: from a name to a model of transformers that computes with packed weights."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ropewalk.errors import (
    CheckpointError,
    FormatError,
    MissingTensorsError,
    NotEnoughMemoryError,
    RopewalkError,
    UsageError,
)
from ropewalk.gptq.cpu_ops import check_mode
from ropewalk.loader import fill, packed_cache, peft_hook, place, skeleton
from ropewalk.loader import fuse as fusing
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.quant_linear import QuantLinear
from ropewalk.loader.rope import RopeDecision, decide_rope
from ropewalk.loader.rotary import rope_types
from ropewalk.loader.source import find_adapter, find_source

log = logging.getLogger("ropewalk")

Progress = Callable[[int, int], None]


@rope_types()
def load(
    model: str | Path,
    *,
    revision: str | None = None,
    weights: str | Path | None = None,
    rope: str = "auto",
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    lora: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    cpu_mode: str | None = None,
    fuse: str | Iterable[str] = "auto",
    bits: int | None = None,
    group_size: int | None = None,
    load_in_4bit: bool = False,
    cache_packed: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    progress: bool | Progress = True,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a local folder; a file of weights with its config.json beside it; or a name on the Hub, with
            `:branch` where the variants of a model are branches. Packed by GPTQ in any of the formats of
            `ropewalk.loader.encodings`, or in plain float16.
        revision: a branch, tag or commit of the Hub.
        weights: a file of weights that is elsewhere than the model's config.json and tokenizer.
        rope: "auto" follows the config and what it implies (see `ropewalk.loader.rope`); otherwise
            "none", "linear:2", "partial-ntk:factor=4,original=4096" and so on (`parse_rope`).
        device_map: a device, "auto", or module name -> device, as accelerate takes it; by default all on the GPU if
            there is one, else the CPU. Layers on the CPU compute there; "cpu-layers:4" has the last four do so.
        max_memory: device -> bytes or "10GiB", for "auto".
        dtype: of activations and of what is not packed; by default float32 on the CPU, float16 on a GPU.
        lora: a folder or Hub name with a PEFT adapter to put on top, several, or name -> folder.
        cpu_mode: of packed layers on the CPU: "int8" rounds activations to 8 bits in blocks of 32, "exact" does not
            (see `ropewalk.gptq.cpu_ops`); by default $ROPEWALK_CPU_MODE, or "int8".
        fuse: which steps of packed models are taken together: "auto" for all that can be, "none", or some of
            "qkv,gate-up,norm,attention" (see `ropewalk.loader.fuse`). $ROPEWALK_FUSE says what "auto" is.
        bits, group_size: of checkpoints that do not say how they are packed.
        load_in_4bit: have bitsandbytes pack a float16 model while it is loaded.
        cache_packed: keep packed layers on disk as the CPU computes with them, and map them from there the next time
            (see `ropewalk.loader.packed_cache`).
        token, cache_dir, local_files_only: for the Hub, as huggingface_hub takes them.
        progress: whether a terminal shows a bar; or what is called with (bytes read, bytes in all).
        kwargs: `attn_implementation`; for a float16 model anything that transformers' `from_pretrained` takes.

    Returns:
        (model, tokenizer): a normal transformers model in eval mode, whose `config.rope_parameters` tell
        the rotary embedding chosen; the tokenizer is None where the folder has none.

    Raises:
        CheckpointError, FormatError: a file at fault, found before the model is built.
        RopeError: an impossible rotary embedding.
        NotEnoughMemoryError: a device too small, found before anything is read where that can be foretold.
        UsageError: an argument that is not understood.
    """
    if cpu_mode is not None:
        check_mode(cpu_mode, "cpu_mode")
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    hub["progress"] = progress is not False
    adapters = None if lora is None else _adapters(lora, hub)
    source = find_source(model, revision=revision, **hub)
    file = source.file if weights is None else Path(weights).expanduser()
    checkpoint = open_checkpoint(source.folder, file=file, bits=bits, group_size=group_size)
    decision = decide_rope(checkpoint.config, rope, checkpoint.folder / "config.json")
    log.info("rope: %s, since %s", decision, decision.why)
    for warning in (*checkpoint.warnings, *decision.warnings):
        log.warning("%s: %s", checkpoint.folder.name, warning)
    if load_in_4bit:
        from ropewalk.loader import bitsandbytes

        if "quantization_config" in kwargs:
            raise UsageError("load_in_4bit: expected no quantization_config besides, found one")
        kwargs |= bitsandbytes.load_arguments(checkpoint, as_dtype(dtype, device_map))
    elif checkpoint.quantize_config is not None:
        _only_known(kwargs)
    skeleton.check_sizes(checkpoint)  # before transformers makes a config of them, as it does for a tokenizer, too
    tokenizer = load_tokenizer(checkpoint)  # first, so that a fault in its files is found before the model is built
    placement = {"device_map": device_map, "max_memory": max_memory, "dtype": dtype}
    if checkpoint.quantize_config is None:
        if str(device_map).startswith(place.CPU_LAYERS):
            raise UsageError(f"device_map: expected no {device_map} for a model without packed layers, found it")
        if cache_packed:
            log.info("cache_packed: nothing is kept of a model without layers that GPTQ packed")
        loaded = load_plain(checkpoint, decision, **placement, **kwargs)
    else:
        kwargs["cache_packed"] = cache_packed
        kwargs["fuse"] = fuse
        loaded = load_packed(checkpoint, decision, progress=progress, **placement, **kwargs)
        for layer in loaded.modules():
            if isinstance(layer, QuantLinear):
                layer.cpu_mode = cpu_mode
    if load_in_4bit:
        bitsandbytes.keep_ragged_layers(loaded)
    if adapters is not None:
        from ropewalk.loader.lora import load_lora

        with skeleton.BUILDING:  # PEFT makes layers, too
            loaded = load_lora(loaded, adapters)
    return loaded, tokenizer


def _adapters(lora: Any, hub: Mapping[str, Any]) -> Any:
    """Return the adapters with a folder for each name, found before the model is loaded."""
    if isinstance(lora, Mapping):
        return {name: find_adapter(adapter, **hub) for name, adapter in lora.items()}
    if isinstance(lora, (str, Path)):
        return find_adapter(lora, **hub)
    return [find_adapter(adapter, **hub) for adapter in lora]


def _only_known(kwargs: Mapping[str, Any]) -> None:
    unknown = sorted(set(kwargs) - {"attn_implementation"})
    if unknown:
        raise UsageError(f"load: expected of a packed model only attn_implementation besides, found {unknown[0]}")


@rope_types()
def load_packed(
    checkpoint: Checkpoint,
    decision: RopeDecision,
    *,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool | Progress = False,
    cache_packed: bool = False,
    fuse: str | Iterable[str] = "auto",
    model_class: Any = None,
    **options: Any,
) -> Any:
    """Build the model of a checked checkpoint, read its tensors to their devices, and settle its rope.

    Args:
        model_class: a class of transformers; by default the causal language model of the config.
        options: `attn_implementation`. The others are those of `load`.

    Raises:
        as `load`. Whatever is raised, nothing of the model stays in memory.
    """
    from ropewalk.loader import quantizer

    placed_dtype = as_dtype(dtype, device_map)
    fusions = fusing.parse_fusions(fuse)
    built = skeleton.build(checkpoint, decision, placed_dtype, model_class, **options)
    placed = place.plan(built.model, device_map, max_memory, placed_dtype)
    total = checkpoint.nbytes()
    generation_config = _read_generation_config(built.model, checkpoint)
    try:
        device_of = place.device_of(placed)
        with (
            _Bar(progress, total) as bar,
            packed_cache.cached_layers(cache_packed, built, checkpoint, device_of) as cached,
        ):
            fill.fill(built, checkpoint, device_of, placed_dtype, bar.update, cached, fusing.groups_of(built.model, fusions))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        del built
        _let_go(error)
        gc.collect()
        gpus = {device for device in placed.values() if device.type == "cuda"}
        if gpus:
            torch.cuda.empty_cache()
        free = min((torch.cuda.mem_get_info(gpu)[0] for gpu in gpus), default=place.free_memory())
        raise NotEnoughMemoryError(" and ".join(sorted({str(d) for d in placed.values()})), total, free) from error
    model = built.model
    dtypes = {target: checkpoint.tensors[name].dtype for name, target in built.plain.items()}
    quantizer.attach(model, checkpoint, dtypes)
    if generation_config is not None:
        model.generation_config = generation_config
    quantizer.install_rope(model, decision)
    model.eval()
    fusing.fuse(model, fusions, placed)
    place.dispatch(model, placed)
    peft_hook.enable()
    return model


class _Bar:
    """Progress over bytes: a bar on a terminal, a function to call, or nothing."""

    def __init__(self, progress: bool | Progress, total: int):
        self._call = progress if callable(progress) else None
        self._show = progress is True and sys.stderr.isatty()
        self._done, self._total = 0, total
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        if self._show:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc="loading", unit="B", unit_scale=True, leave=False)
        return self

    def update(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        if self._call is not None:
            self._call(self._done, self._total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _let_go(error: BaseException | None) -> None:
    """Drop the frames that an error was raised in: they hold what had been read of the model, for as long as the
    error is looked at.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _read_generation_config(model: Any, checkpoint: Checkpoint) -> Any:
    """Return what generation_config.json says, or None where there is none.

    Raises:
        CheckpointError: one that transformers refuses.
    """
    from transformers import GenerationConfig

    file = checkpoint.folder / "generation_config.json"
    if not file.is_file() or not model.can_generate():
        return None
    try:
        return GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # whatever is raised for a file that is at fault
        expected = "a generation config that transformers can read"
        raise CheckpointError(file, expected, skeleton.first_line(error)) from error


@rope_types()
def load_plain(
    checkpoint: Checkpoint, decision: RopeDecision, *, dtype: torch.dtype | str | None, device_map: Any, **kwargs: Any
) -> Any:
    """Load float weights by transformers' `from_pretrained`, to which `kwargs` go, with the rope decided.

    Raises:
        CheckpointError: an architecture that transformers does not have, or what else it cannot load.
        MissingTensorsError: tensors that the model needs and the checkpoint lacks, or the reverse.
        FormatError: a tensor of another shape than the model's.
        NotEnoughMemoryError: as `load`.
    """
    from transformers import AutoModelForCausalLM

    from ropewalk.loader import quantizer

    if kwargs.get("max_memory") is None:
        kwargs.pop("max_memory", None)
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    config = skeleton.model_config(checkpoint, decision)
    if len(checkpoint.files) == 1:
        config.transformers_weights = checkpoint.files[0].name
    arguments = {
        "output_loading_info": True,
        "local_files_only": True,
        "trust_remote_code": False,  # or transformers would ask whether to run what the folder has
        "ignore_mismatched_sizes": True,  # it would not say which; we do
        "dtype": as_dtype(dtype, device_map),
        "device_map": device_map,
    }
    try:
        with skeleton.BUILDING:
            model, loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, config=config, **arguments | kwargs)
    except (RopewalkError, ImportError):  # one of ours, from a config; a package that is not installed
        raise
    except Exception as error:  # whatever transformers and safetensors raise for a checkpoint at fault
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        _let_go(error)
        if out_of_memory:
            gc.collect()
            raise NotEnoughMemoryError(str(device_map), checkpoint.nbytes(), place.free_memory()) from error
        expected = "a checkpoint that transformers can load"
        raise CheckpointError(checkpoint.folder, expected, skeleton.first_line(error)) from error
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights  # or it would be saved, and name a file that is not there
    _check_complete(checkpoint, loaded)
    quantizer.install_rope(model, decision)
    return model


def _check_complete(checkpoint: Checkpoint, loaded: dict[str, Any]) -> None:
    """Refuse a model with a weight that was not in the file, or a file with one that is not in the model."""
    unexpected = sorted(name for name in loaded["unexpected_keys"] if not name.endswith(skeleton.OLD_BUFFERS))
    missing = sorted(loaded["missing_keys"])
    mismatched = sorted(str(m[0] if isinstance(m, (tuple, list)) else m) for m in loaded["mismatched_keys"])
    if mismatched and mismatched[0] in checkpoint.tensors:
        entry = checkpoint.tensors[mismatched[0]]
        raise FormatError(entry.name, "the shape that config.json gives", list(entry.shape), str(entry.file))
    if missing:
        raise MissingTensorsError(checkpoint.folder, f"tensor {missing[0]}", _none_of(missing))
    if unexpected:
        found = f"{unexpected[0]}" + (f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else "")
        raise MissingTensorsError(checkpoint.folder, "only tensors that the model has", found)
    if mismatched:
        raise MissingTensorsError(checkpoint.folder, "shapes as config.json has them", f"others for {mismatched[0]}")


def _none_of(names: list[str]) -> str:
    return "none of that name" + (f" ({len(names)} missing)" if len(names) > 1 else "")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the folder's tokenizer, or None where it has no tokenizer files.

    Raises:
        CheckpointError: tokenizer files that cannot be read.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((checkpoint.folder / name).is_file() for name in names):
        log.warning("%s: no tokenizer files (%s)", checkpoint.folder.name, ", ".join(names))
        return None
    try:
        # Without trust_remote_code=False it would ask on the terminal whether to run code of the folder.
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer library raises
        expected = "a tokenizer that transformers can read, without code of its own"
        raise CheckpointError(checkpoint.folder, expected, skeleton.first_line(error)) from error


def as_dtype(dtype: torch.dtype | str | None, device_map: Any) -> torch.dtype:
    """Return a floating dtype from its name, or the default for where the model goes.

    Raises:
        UsageError: not a name of one.
    """
    if dtype is None:
        if device_map is None or device_map in place.PLANS:
            return torch.float16 if torch.cuda.is_available() else torch.float32
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        return torch.float32 if all(str(place) == "cpu" for place in places) else torch.float16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype: expected float32, float16 or bfloat16, found {dtype!r}")
    return found
