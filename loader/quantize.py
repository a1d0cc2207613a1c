"""Pack a float16 model, with GPTQ or by rounding to nearest.

GPTQModel does the arithmetic of GPTQ; this smooths its edges. It runs in a process of its own, since importing
it changes transformers and starts threads; its log goes to a file; the model it calibrates has the rotary
embedding that the checkpoint means; and what it writes is cleaned: tensors that are not packed stay bit for bit
what they were, layers bear the names of the checkpoints on the Hub, and the folder holds no paths of this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ropewalk
from ropewalk.errors import CheckpointError, MissingPackageError, RopewalkError, UsageError
from ropewalk.gptq.format import BITS
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.checkpoint import Checkpoint, open_checkpoint
from ropewalk.loader.load import load_tokenizer
from ropewalk.loader.rope import decide_rope
from ropewalk.loader.write import Work, check_out, publish, work_folder, write_json, write_weights

# What of the source folder is copied along, besides config.json and the weights.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "generation_config.json")

# Tokens of a window: GPTQModel 7.6 drops shorter ones, whatever it is told, and divides by the number that is left.
SHORTEST = 11

# Linear layers that choose experts: they are small, and one wrong choice costs more than they would save.
ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))
# An expert of a checkpoint that has them one by one. transformers makes one parameter of them all, so no nn.Linear.
_EXPERT = re.compile(r".+\.experts\.\d+\.\w+")
# What save_pretrained(save_original_format=False) of transformers 5 makes of them: [experts, out, in].
_STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
# model_type -> how the Hub calls the MLP of a layer, and gate, up and down of an expert.
_MIXTRAL = ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
_OTHERS = ("mlp", {name: name for name in _MIXTRAL[1]})
_EXPERT_NAMES = {"mixtral": _MIXTRAL, "qwen2_moe": _OTHERS, "qwen3_moe": _OTHERS}


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    desc_act: bool = True,
    static_groups: bool = False,
    sym: bool = True,
    damp_percent: float = 0.01,
    method: str = "gptq",
    text: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    rope: str = "auto",
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Quantize the linear layers of a model by GPTQ (Frantar et al. 2022, arXiv:2210.17323).

    Embeddings, the output embedding and the routers of a mixture stay as they are. An expert that fewer than 0.5 % of
    the calibration tokens reach is rounded to nearest by GPTQModel, with no act-order: a mixture needs more text.

    Args:
        model: folder of a model in float weights, with its tokenizer.
        out: folder to write, new or empty: model.safetensors, config.json, quantize_config.json, tokenizer.
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; -1 for all.
        desc_act: quantize inputs in order of their activation ("act-order").
        static_groups: fix the groups before that order, so that they stay consecutive.
        sym: symmetric codes; asymmetric ones are written in format v2.
        damp_percent: share of the mean diagonal added to the Hessian's.
        method: "gptq", or "rtn": rounding to nearest, which needs neither text nor gptqmodel and is worse.
        text: calibration text, or the path of a file with it; GPTQ needs it.
        samples: how many windows of the text are used, spread evenly over it.
        length: tokens of a window; by default the model's context, at most 2048.
        rope: as `ropewalk.load` takes it; the model is calibrated with it.
        device: "cpu", "cuda:0", …; by default the GPU if there is one.
        progress: called with (blocks done, blocks in all).

    Returns:
        the quantization config that was written.

    Raises:
        MissingPackageError: gptqmodel is not installed.
        CheckpointError: the model, the tokenizer or the out folder is not as it should be.
        UsageError: a setting out of range, or too little text.
        RopewalkError: GPTQModel failed; the message has its last words and the path of its log.
    """
    if bits not in BITS:
        raise UsageError(f"bits: expected {', '.join(map(str, BITS))}, found {bits}")
    if group_size < 1 and group_size != -1:
        raise UsageError(f"group_size: expected -1 or a positive number, found {group_size}")
    if method not in ("gptq", "rtn"):
        raise UsageError(f"method: expected gptq or rtn, found {method!r}")
    out = check_out(out)
    checkpoint = open_checkpoint(model)
    if checkpoint.quantize_config is not None:
        raise CheckpointError(checkpoint.folder, "float weights", f"{checkpoint.quantize_config.bits}-bit ones")
    config: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "static_groups": static_groups,
        "sym": sym,
        "damp_percent": damp_percent,
        "true_sequential": True,
        "checkpoint_format": "gptq" if sym else "gptq_v2",
    }
    with work_folder(out) as held:
        work = held.folder
        if method == "rtn":
            # Rounding to nearest treats every input alike; there is no order to follow.
            config = {k: v for k, v in config.items() if k not in ("damp_percent", "true_sequential")}
            config |= {"desc_act": False, "static_groups": False}
            tensors = _rounded(checkpoint, config)
        else:
            job = _job(checkpoint, config, text, samples, length, rope, device, work)
            _run_worker(job, held, progress)
            tensors = _merged(checkpoint, open_checkpoint(job["out"]))
        made_by = [f"ropewalk:{ropewalk.__version__}"] if method == "rtn" else _made_by()
        written = {**config, "quant_method": "gptq", "meta": {"quantizer": made_by}}
        _write_folder(checkpoint, tensors, written, work / "finished")
        open_checkpoint(work / "finished")
        publish(work / "finished", out)
    return written


def _write_folder(
    source: Checkpoint, tensors: Iterable[tuple[str, Tensor]], config: dict[str, Any], folder: Path
) -> None:
    folder.mkdir()
    write_weights(tensors, folder)
    write_json(folder / "quantize_config.json", {**config, "model_file_base_name": "model"})
    write_json(folder / "config.json", {**source.config, "quantization_config": config})
    for pattern in COMPANIONS:
        for file in source.folder.glob(pattern):
            shutil.copy2(file, folder)


def _rounded(source: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the source's tensors with the linear layers of the blocks rounded to nearest."""
    linear = _linear_layers(source)
    for name, tensor in _tensors(source):
        layer = name.removesuffix(".weight")
        if layer == name or not (layer in linear or _EXPERT.fullmatch(layer)):
            yield name, tensor
            continue
        packed = quantize_rtn(
            tensor,
            bits=config["bits"],
            group_size=config["group_size"],
            sym=config["sym"],
            checkpoint_format=config["checkpoint_format"],
        )
        for part, value in packed.items():
            yield f"{layer}.{part}", value


def _linear_layers(source: Checkpoint) -> set[str]:
    """Return the names of the linear layers that are packed: all but routers and the output embedding; no experts."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[source.config["model_type"]].from_dict(_own_code(source.config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    return {name for name in linear if name.rpartition(".")[2] not in ROUTERS}


def _tensors(source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the source's tensors under the names of the Hub, experts one by one.

    Raises:
        CheckpointError: stacked experts of a family whose order is not known here.
    """
    with source.reader() as reader:
        for name in source.tensors:
            stacked = _STACKED.fullmatch(name)
            if stacked is None:
                yield _published(name, source), reader.read(name)
                continue
            model_type = source.config["model_type"]
            if model_type not in _EXPERT_NAMES:
                known = ", ".join(_EXPERT_NAMES)
                raise CheckpointError(
                    source.tensors[name].file, f"experts one by one, or those of {known}", f"{name} of {model_type}"
                )
            tensor = reader.read(name)
            halves = ("gate_proj", "up_proj") if stacked[2] == "gate_up_proj" else ("down_proj",)
            for expert, weight in enumerate(tensor):
                for part, half in zip(halves, weight.chunk(len(halves)), strict=True):
                    # A view would keep all experts in memory until the file is written.
                    yield _published(f"{stacked[1]}.{expert}.{part}.weight", source), half.clone()


def _published(name: str, source: Checkpoint) -> str:
    """Return the name that checkpoints on the Hub have for what transformers 5 and GPTQModel may call otherwise."""
    mlp, parts = _EXPERT_NAMES.get(source.config["model_type"], _OTHERS)
    name = re.sub(r"(\.layers\.\d+)\.mlp\.(?=gate\.|experts\.)", rf"\1.{mlp}.", name)
    return re.sub(
        r"(\.experts\.\d+)\.(gate_proj|up_proj|down_proj)\b", lambda found: f"{found[1]}.{parts[found[2]]}", name
    )


def _own_code(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that asks for transformers' own code where it brings Python of its time along, as MPT's does."""
    return {k: v for k, v in config.items() if k != "auto_map"}


def _job(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    text: str | Path | None,
    samples: int,
    length: int | None,
    rope: str,
    device: str | None,
    work: Path,
) -> dict[str, Any]:
    """Return what the worker is to do, with everything checked that can be."""
    if text is None:
        raise UsageError("text: expected calibration text for GPTQ, found none")
    if samples < 1 or (length is not None and length < SHORTEST):
        raise UsageError(
            f"calibration: expected at least 1 sample of at least {SHORTEST} tokens, found {samples} of {length}"
        )
    gpus = torch.cuda.device_count()
    if device not in (None, "cpu", *(f"cuda:{i}" for i in range(gpus))):
        raise UsageError(f"device: expected cpu or one of {gpus} GPUs, found {device!r}")
    if importlib.util.find_spec("gptqmodel") is None:
        raise MissingPackageError(
            "quantize: expected the package gptqmodel (pip install 'ropewalk[gptqmodel]'), found none"
        )
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise CheckpointError(checkpoint.folder, "a tokenizer, for the calibration text", "none")
    decision = decide_rope(checkpoint.config, rope)
    return {
        "source": str(_stand_in(checkpoint, decision.parameters, work / "source")),
        "out": str(work / "packed"),
        "config": config,
        "windows": _windows(tokenizer, text, samples, length or min(_context(checkpoint), 2048)),
        "device": device,
    }


def _made_by() -> list[str]:
    return [f"gptqmodel:{version('gptqmodel')}", f"ropewalk:{ropewalk.__version__}"]


def _context(checkpoint: Checkpoint) -> int:
    return checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("max_seq_len") or 2048


def _windows(tokenizer: Any, text: str | Path, samples: int, length: int) -> list[list[int]]:
    """Return windows of tokens, evenly spread over the text."""
    if isinstance(text, Path):
        text = text.read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < length:
        raise UsageError(f"calibration text: expected at least {length} tokens, found {len(ids)}")
    samples = min(samples, len(ids) // length)
    step = (len(ids) - length) / max(samples - 1, 1)
    return [ids[round(i * step) : round(i * step) + length] for i in range(samples)]


def _stand_in(checkpoint: Checkpoint, rope_parameters: dict[str, Any], folder: Path) -> Path:
    """Make a folder with the checkpoint's files in it, but no Python, and a config that names its rotary embedding."""
    folder.mkdir()
    for file in checkpoint.folder.iterdir():
        # Where a tokenizer brings code, GPTQModel would run it unasked.
        if file.is_file() and file.name != "config.json" and file.suffix != ".py":
            try:
                (folder / file.name).symlink_to(file.resolve())
            except OSError:  # Windows without the right to make links
                shutil.copy2(file, folder)
    config = {k: v for k, v in _own_code(checkpoint.config).items() if k != "rope_scaling" or not rope_parameters}
    write_json(folder / "config.json", {**config, "rope_parameters": rope_parameters} if rope_parameters else config)
    return folder


def _run_worker(job: dict[str, Any], held: Work, progress: Callable[[int, int], None] | None) -> None:
    """Run GPTQModel in a process of its own; raise with its last words if it fails."""
    work = held.folder
    environment = dict(os.environ)
    # With the one worker that it takes by default on two cores it stops with an error; more than cores do no harm.
    environment.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    environment["TMPDIR"] = str(work)
    log_path = work / "gptqmodel.log"
    with log_path.open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "ropewalk.loader.gptqmodel_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd=work,  # GPTQModel leaves a folder of logs where it runs
            # It keeps the folder locked as long as it lives, also where this process is killed.
            pass_fds=() if held.lock is None else (held.lock,),
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with worker.stdin:
                worker.stdin.write(json.dumps(job))
        except BrokenPipeError:
            pass  # it died at once; its log says why
        finished = False
        try:
            for line in worker.stdout:
                message = json.loads(line)
                finished = finished or message.get("finished", False)
                if progress is not None and "block" in message:
                    progress(message["block"], message["blocks"])
            status = worker.wait()
        finally:
            worker.kill()
            worker.wait()
    if status != 0 or not finished:
        kept = Path(tempfile.gettempdir()) / f"ropewalk-gptqmodel-{os.getpid()}.log"
        shutil.copy(log_path, kept)
        words = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
        raise RopewalkError(f"GPTQModel failed ({words[-1] if words else f'exit status {status}'}); its log: {kept}")


def _merged(source: Checkpoint, packed: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the packed layers as GPTQModel made them and all other tensors as the source has them.

    GPTQModel works in another dtype on the CPU and would write those rounded, and it has names of its own for experts.
    """
    layers = {_published(name, source): layer for name, layer in packed.layers.items()}
    missing = set(layers)
    for name, tensor in _tensors(source):
        stem, _, last = name.rpartition(".")
        if stem in layers and last == "weight":
            missing.discard(stem)
        elif not name.endswith("rotary_emb.inv_freq"):
            yield name, tensor
    if missing:
        raise RopewalkError(
            f"GPTQModel: expected the layers of {source.folder} to be packed under their names, found "
            f"{min(missing)}, of which the source has no weight"
        )
    with packed.reader() as reader:
        for name, layer in layers.items():
            for part, tensor in reader.read_layer(layer).items():
                if part != "bias":  # the source's, above
                    # The reader's memory is used again for the next layer, before this one is written.
                    yield f"{name}.{part}", tensor.to(torch.float16 if part == "scales" else tensor.dtype, copy=True)
