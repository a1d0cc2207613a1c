"""Options that several commands share."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.errors import MissingFileError, UsageError
from ropewalk.shipped import resolve
from ropewalk.terminal import Output

if TYPE_CHECKING:
    import torch


def add_model(parser: argparse.ArgumentParser, several: bool = False, default: str | None = None) -> None:
    """Add the positional MODEL, one or several with several ropes, and how it is to be loaded."""
    add_source(parser, several, default)
    add_packing(parser)
    add_rope(parser, several)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    place.add_argument(
        "--device-map",
        type=device_map,
        metavar="MAP",
        help="spread over devices: auto, cpu, cuda:1, … or a JSON object from the names of modules to devices",
    )
    parser.add_argument(
        "--max-memory", type=max_memory, metavar="SIZES", help="what --device-map auto may use: 0=10GiB,cpu=20GiB"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of activations")
    parser.add_argument("--load-in-4bit", action="store_true", help="pack a float16 model to 4 bits while it is loaded")
    parser.add_argument(
        "--cache-packed",
        action="store_true",
        help="keep packed layers on disk as the CPU computes with them, beside the model; loading them again is faster",
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="DIR",
        help="a PEFT adapter to put on top, a folder or user/name of the Hub; may be repeated, also as NAME=DIR",
    )
    add_cpu_mode(parser)
    parser.add_argument(
        "--fuse",
        metavar="STEPS",
        help="which steps of a packed model are taken together: auto, none, or some of qkv,gate-up,norm,act-order,"
        "attention (default: $ROPEWALK_FUSE or auto)",
    )
    add_threads(parser)


def add_source(
    parser: argparse.ArgumentParser, several: bool = False, default: str | None = None, more: str = ""
) -> None:
    """Add the positional MODEL, one or several, needed unless there is a default, and --revision.

    Args:
        more: what else a MODEL may be.
    """
    parser.add_argument(
        "model",
        nargs=("+" if default is None else "*") if several else None,
        default=default and [default],
        metavar="MODEL",
        help="a folder with a checkpoint, a file of weights, or user/name:branch of the Hub; `demo` is the one that "
        "ships, `needle` the one of the repository that finds needles" + more,
    )
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit of the Hub, instead of :branch")


def add_packing(parser: argparse.ArgumentParser) -> None:
    """Add what a checkpoint may fail to say of itself."""
    parser.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 8), help="of a packed checkpoint that does not say (default: as it says)"
    )
    parser.add_argument("--group-size", type=group_size, metavar="N", help="the same; -1 is no groups")


def add_rope(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add --rope."""
    parser.add_argument(
        "--rope",
        nargs="+" if several else None,
        default=["auto"] if several else "auto",
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


def add_out(parser: argparse.ArgumentParser, picture: str) -> None:
    """Add --plot and --out."""
    parser.add_argument("--plot", metavar="FILE", help=f"draw {picture} to a PNG")
    parser.add_argument("--out", metavar="FILE", help="write the JSON object to a file too")


def check_out(args: argparse.Namespace) -> None:
    """Refuse a --plot or --out that cannot be written, before the work and not after it.

    Raises:
        UsageError: a folder that is not there.
    """
    for option, file in (("--out", args.out), ("--plot", args.plot)):
        if file and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"{option}: expected a folder to write to, found none for {file}")


def write_out(args: argparse.Namespace, out: Output, result: Mapping[str, Any]) -> None:
    """Print the JSON object with --json, and write it with --out."""
    out.result(result)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.note(f"results: {args.out}")


def add_sampling(parser: argparse.ArgumentParser, temperature: float, max_new_tokens: int) -> None:
    """Add how text is generated, with defaults."""
    parser.add_argument(
        "--max-new-tokens", type=positive, default=max_new_tokens, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)g)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="0 is all (default: 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(2, 3, 4, 8),
        help="keep keys and values in so many bits, by transformers' quantized cache (needs the package hqq)",
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `ropewalk.generation.generate` takes of them, without the strings that end a text.

    Raises:
        UsageError: one out of range.
    """
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p: expected above 0 and at most 1, found {args.top_p:g}")
    if args.top_k < 0:
        raise UsageError(f"--top-k: expected 0 or more, found {args.top_k}")
    if args.repetition_penalty <= 0:
        raise UsageError(f"--repetition-penalty: expected above 0, found {args.repetition_penalty:g}")
    if not args.temperature >= 0:
        raise UsageError(f"--temperature: expected 0 or more, found {args.temperature:g}")
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "kv_bits")
    return {name: getattr(args, name) for name in names}


def positive(text: str) -> int:
    """Parse a whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text}")
    return value


def group_size(text: str) -> int:
    """Parse a group size, for argparse."""
    if text == "-1":
        return -1
    try:
        return positive(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"expected -1 or a whole number from 1 on, found {text!r}") from None


def device_map(text: str) -> str | dict[str, int | str]:
    """Parse a --device-map, for argparse."""
    if re.fullmatch(r"auto|balanced|balanced_low_0|sequential|cpu|cuda(:\d+)?", text):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and value and all(type(place) in (int, str) for place in value.values()):
        return value
    raise argparse.ArgumentTypeError(
        f"expected auto, balanced, sequential, cpu, cuda:N or a JSON object from modules to devices, found {text!r}"
    )


def max_memory(text: str) -> dict[int | str, str]:
    """Parse a --max-memory, for argparse: "0=10GiB,cpu=20GiB" is {0: "10GiB", "cpu": "20GiB"}."""
    sizes: dict[int | str, str] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+|cpu|disk)\s*=\s*(\d+(?:\.\d+)?\s*[KMG]i?B)\s*", part)
        place = int(match[1]) if match and match[1].isdecimal() else match and match[1]
        if not match or place is None or place in sizes:
            raise argparse.ArgumentTypeError(f"expected sizes such as 0=10GiB,cpu=20GiB, each once, found {text!r}")
        sizes[place] = match[2].replace(" ", "")
    return sizes


def adapters(given: Sequence[str]) -> str | dict[str, str] | list[str]:
    """Return what `ropewalk.load` takes for all the values of --lora: one folder, several, or names and folders.

    Raises:
        UsageError: a name that cannot be one or comes twice, or names for some only.
    """
    named = [(*match.groups(), text) for text in given if (match := _named_adapter(text))]
    if not named:
        return given[0] if len(given) == 1 else list(given)
    if len(named) < len(given):
        raise UsageError(f"--lora: expected NAME=DIR for all or for none, found {', '.join(given)}")
    names = [name for name, _, _ in named]
    for name, folder, text in named:
        if names.count(name) > 1 or not folder:
            raise UsageError(f"--lora: expected NAME=DIR with a name of its own, found {text!r}")
    return {name: folder for name, folder, _ in named}


def _named_adapter(text: str) -> re.Match[str] | None:
    """Match NAME=DIR; a folder whose own name has a = in it is none."""
    return None if Path(text).expanduser().exists() else re.fullmatch(r"([\w-]+)=(.*)", text)


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


def chosen(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return those of the options that were given, by name."""
    values: Mapping[str, Any] = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def load(args: argparse.Namespace, out: Output) -> tuple[Any, Any]:
    """Load args.model as the options say; return (model, tokenizer).

    Raises:
        UsageError: an option out of range; what `ropewalk.load` raises.
    """
    import torch

    from ropewalk.loader.load import load as load_model

    check_rope(args.rope)
    names = (
        "revision",
        "bits",
        "group_size",
        "max_memory",
        "load_in_4bit",
        "cache_packed",
        "cpu_mode",
        "fuse",
        "dtype",
    )
    options = chosen(args, names)
    if getattr(args, "lora", None):
        options["lora"] = adapters(args.lora)
    if args.threads:
        torch.set_num_threads(args.threads)
    places = getattr(args, "device_map", None)
    if places is None:
        places = _device(args.device)
    elif isinstance(places, str) and places.startswith("cuda"):
        _device(places, "--device-map")
    model, tokenizer = load_model(resolve(args.model), rope=args.rope, device_map=places, **options)
    if tokenizer is None:
        raise MissingFileError(args.model, "a tokenizer (tokenizer.json or tokenizer.model)", "none")
    return model, tokenizer


def _device(name: str | None, option: str = "--device") -> torch.device | None:
    """Return the device that is named, or None for torch's choice.

    Raises:
        UsageError: no such device.
    """
    import torch

    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"{option}: expected cpu, since torch finds no CUDA GPU here, found {name!r}")
    try:
        return torch.device(name) if name else None
    except RuntimeError:
        raise UsageError(f"{option}: expected cpu, cuda or cuda:N, found {name!r}") from None


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
        if device.index is not None:  # before torch 2.13 another call than this one is wanted for the current GPU
            torch.cuda.set_device(device)
    return device
