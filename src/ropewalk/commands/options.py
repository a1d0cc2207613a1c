"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.errors import MissingFileError, UsageError
from ropewalk.shipped import resolve
from ropewalk.terminal import Output

if TYPE_CHECKING:
    import torch


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional MODEL and how it is to be loaded."""
    parser.add_argument("model", metavar="MODEL", help="a folder with a checkpoint; `demo` is the one that ships")
    add_rope(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of activations")
    parser.add_argument("--lora", metavar="DIR", help="a PEFT adapter to put on top")
    add_cpu_mode(parser)
    add_threads(parser)


def add_rope(parser: argparse.ArgumentParser) -> None:
    """Add --rope."""
    parser.add_argument(
        "--rope",
        default="auto",
        metavar="ROPE",
        help="auto, none, linear:2, ntk:2.5, dynamic:2, yarn:4, partial-ntk:factor=4,original=4096, … (default: auto)",
    )


def add_cpu_mode(parser: argparse.ArgumentParser) -> None:
    """Add --cpu-mode."""
    parser.add_argument(
        "--cpu-mode",
        choices=("exact", "int8"),
        help="packed layers on the CPU: int8 rounds activations, exact does not (default: $ROPEWALK_CPU_MODE or int8)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")


def positive(text: str) -> int:
    """Parse a whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text}")
    return value


def check_rope(rope: str) -> None:
    """Refuse a --rope that no model could have, before anything is loaded.

    Raises:
        UsageError: with what was expected.
    """
    from ropewalk.errors import RopeError
    from ropewalk.loader.rope import parse_rope

    if rope != "auto":
        try:
            parse_rope(rope)
        except RopeError as error:
            raise UsageError(f"--rope: {error}") from None


def load(args: argparse.Namespace, out: Output) -> tuple[Any, Any]:
    """Load args.model as the options say; return (model, tokenizer).

    Raises:
        UsageError: an option out of range; what `ropewalk.load` raises.
    """
    import torch

    from ropewalk.loader.load import load as load_model

    check_rope(args.rope)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device and args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device: expected cpu, since torch finds no CUDA GPU here, found " + repr(args.device))
    try:
        device = torch.device(args.device) if args.device else None
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, found {args.device!r}") from None
    model, tokenizer = load_model(
        resolve(args.model),
        rope=args.rope,
        device_map=device,
        dtype=args.dtype,
        lora=getattr(args, "lora", None),
        cpu_mode=getattr(args, "cpu_mode", None),
    )
    if tokenizer is None:
        raise MissingFileError(args.model, "a tokenizer (tokenizer.json or tokenizer.model)", "none")
    return model, tokenizer


def read_text(path: str, what: str) -> str:
    """Return the text of a file, or of stdin for "-".

    Raises:
        MissingFileError: no such file.
        UsageError: not UTF-8, or empty.
    """
    import sys

    if path == "-":
        text = sys.stdin.read()
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise MissingFileError(
                file, f"a text file for {what}", "a folder" if file.is_dir() else "nothing of this name"
            )
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{what}: expected text in UTF-8, found {error}") from None
    if not text.strip():
        raise UsageError(f"{what}: expected some text, found none in {path}")
    return text


def rope_of(model: Any) -> dict[str, Any]:
    """Return a loaded model's rope as `--json` prints it."""
    parameters = getattr(model.config, "rope_parameters", None) or {"rope_type": "none"}
    return {
        "type": parameters.get("rope_type", "per-layer"),
        **{k: v for k, v in parameters.items() if k != "rope_type"},
    }


def choose_device(name: str | None) -> torch.device:
    """Return the device of --device.

    Raises:
        UsageError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, found {name!r}")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device: expected one of the {torch.cuda.device_count()} GPUs here, found {name!r}")
        torch.cuda.set_device(device)
    return device
