"""`ropewalk doctor`: what is installed here, and what will be used."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ropewalk.errors import RopewalkError
from ropewalk.terminal import Output

REQUIRED = ("torch", "triton", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "ninja")
OPTIONAL = ("matplotlib", "peft", "gptqmodel", "auto_gptq", "vllm", "fschat", "kernels")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--build", action="store_true", help="build the kernels of the CPU now, if they are not yet")


def run(args: argparse.Namespace, out: Output) -> None:
    """Print what was found.

    Raises:
        RopewalkError: with --build, the kernels of the CPU cannot be had.
    """
    import torch

    import ropewalk
    from ropewalk import cpu as cpu_kernels
    from ropewalk.loader.inspect import kernels
    from ropewalk.patches import statuses

    packages = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    devices = [
        {"name": torch.cuda.get_device_name(i), "capability": "{}.{}".format(*torch.cuda.get_device_capability(i))}
        for i in range(torch.cuda.device_count())
    ]
    seconds = _build() if args.build else None
    built = {**cpu_kernels.status(), **({} if seconds is None else {"seconds": round(seconds, 1)})}
    cpu = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    problems = [f"{name} is missing" for name in REQUIRED if packages[name] is None and not _not_for_here(name)]
    found: dict[str, Any] = {
        "ropewalk": ropewalk.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": cpu,
        "gpus": devices,
        "compiler": built["compiler"],
        "kernels": kernels(),
        "cpu_kernels": built,
        "patches": statuses(),
        "problems": problems,
    }
    out.result(found)
    rows = [("ropewalk", f"{ropewalk.__version__}, Python {found['python']}, {found['platform']}")]
    rows += [(name, packages[name] or "missing") for name in REQUIRED]
    rows += [("also here", ", ".join(f"{name} {packages[name]}" for name in OPTIONAL if packages[name]) or "none")]
    rows += [("cpu", f"{cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}")]
    rows += [
        (
            "gpu",
            ", ".join(f"{d['name']} (sm_{d['capability'].replace('.', '')})" for d in devices)
            or "none that torch can use",
        )
    ]
    rows += [("compiler", built["compiler"] or "none")]
    rows += [("kernels", ", ".join(f"{device}: {kernel}" for device, kernel in found["kernels"].items()))]
    took = "" if seconds is None else f", built in {seconds:.1f} s" if seconds else ", built before"
    rows += [("cpu kernels", ": ".join(filter(None, (built["state"], built["library"] or built["why"]))) + took)]
    rows += [(f"patch {status['front_end']}", _patch(status)) for status in found["patches"]]
    rows += [("problem", text) for text in problems]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        out.say(f"{name.ljust(width)}  {text}")


def _patch(status: dict[str, Any]) -> str:
    if status["version"] is None:
        return f"{status['package']} is not installed"
    state = "applied in this process" if status["applied"] else "not applied"
    return f"{status['package']} {status['version']} (tested with {status['tested']}), {state}"


def _build() -> float:
    """Build the kernels of the CPU unless they are there; return the seconds it took, 0 for nothing to do."""
    from ropewalk import cpu

    before = cpu.status()["state"]
    start = time.perf_counter()
    if not cpu.load(notice=False):
        raise RopewalkError(f"no kernels for the CPU: {cpu.status()['why']}")
    return 0.0 if before in ("built", "loaded") else time.perf_counter() - start


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _not_for_here(name: str) -> bool:
    return name == "triton" and sys.platform != "linux"
