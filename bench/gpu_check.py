"""What only the device can show: a second run and a CUDA graph give the same bits, and the right ones.

    python -m ropewalk.bench.gpu_check [--device cuda] [--small] [--workers N]

Packed layers of every bit width, group size, order and zero point, gate and up in one, rotations, norms. With --small
at sizes for which compute-sanitizer has the patience, and without graphs, which torch cannot capture with its allocator
out of the sanitizer's way. Nearly all of the time goes into compiling, which several workers share. Prints a line for
each failure and one at the end; exits with 1 if there was a failure.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional
from torch.nn.functional import linear

from ropewalk.bench.peers.ours import Ropewalk
from ropewalk.bench.peers.rotary import Inputs, RopewalkInPlace, RotaryPeer
from ropewalk.bench.peers.rotary import Ropewalk as RopewalkRotary
from ropewalk.bench.peers.weight import random_weight
from ropewalk.bench.report import largest_error, verdict
from ropewalk.bench.rope import Heads, make_inputs
from ropewalk.bench.timing import Rotation
from ropewalk.gptq.layout import row_order, to_execution
from ropewalk.gptq.reference import gated
from ropewalk.norm.ops import DTYPES
from ropewalk.norm.reference import rms_norm
from ropewalk.rope.reference import rope


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cases (default: 1)")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of a worker
    args = parser.parse_args(arguments)
    if args.part is None and args.workers > 1:
        return _share(args)
    torch.manual_seed(0)
    device = torch.device(args.device)
    count, failures = 0, 0
    mine = slice(args.part or 0, None, args.workers)
    with torch.inference_mode():
        for name, fault in itertools.chain(
            *(part(device, args.small, mine) for part in (_matmuls, _gate_ups, _rotations, _norms))
        ):
            count += 1
            if fault:
                failures += 1
                print(f"{name}: {fault}")
    print(f"{count} cases on {device}, {failures} failures")
    return 1 if failures else 0


def _share(args: argparse.Namespace) -> int:
    """Run the cases in several processes; return the exit status."""
    command = [sys.executable, "-m", "ropewalk.bench.gpu_check", "--device", args.device]
    command += ["--workers", str(args.workers), *(["--small"] if args.small else [])]
    workers = [
        subprocess.Popen([*command, "--part", str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(args.workers)
    ]
    count, failures, broken = 0, 0, 0
    for worker in workers:
        lines = worker.communicate()[0].splitlines()
        summary = re.fullmatch(r"(\d+) cases on .*, (\d+) failures", lines[-1]) if lines else None
        if summary is None:
            broken += 1
            print(*lines, f"a worker ended with {worker.returncode} before its last case", sep="\n")
            continue
        print(*lines[:-1], sep="\n", end="\n" if lines[1:] else "")
        count, failures = count + int(summary[1]), failures + int(summary[2])
    print(f"{count} cases on {args.device}, {failures} failures")
    return 1 if failures or broken else 0


def _matmuls(device: torch.device, small: bool, mine: slice) -> Iterator[tuple[str, str]]:
    """Yield the name of each case of every weight that is ours to check, and what is wrong with it, or ""."""
    k, n = (256, 192) if small else (1024, 768)
    ms = (1, 17) if small else (1, 2, 5, 8, 16, 33, 64, 200, 1024)
    groups = (-1, 32) if small else (-1, 32, 64, 128)
    settings = list(itertools.product((2, 3, 4, 8), groups, (False, True), (False, True)))[:: 3 if small else 1]
    for bits, group_size, desc_act, sym in settings[mine]:
        weight = random_weight(k, n, bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, device=device)
        dense = weight.dense().t().contiguous()
        # In turns, or most of the time would go into compiling.
        for dtype in ((torch.bfloat16, torch.float16)[desc_act ^ sym],):
            run = Ropewalk().prepare(weight.clone(), dtype)
            for m in ms:
                x = torch.randn(m, k, device=device).to(dtype)
                expected = linear(x.float(), dense)
                largest = float(expected.abs().max())
                tolerance = 2 * largest_error(linear(x, dense.to(dtype)), expected) + 1e-5 * largest
                name = f"{k}x{n}, {bits} bits, group {group_size}, order {desc_act}, sym {sym}, {dtype}, M={m}"
                yield name, _fault(partial(run, x), expected, tolerance, small)


def _gate_ups(device: torch.device, small: bool, mine: slice) -> Iterator[tuple[str, str]]:
    """Yield the name of each case of gate and up in one that is ours to check, and what is wrong with it, or ""."""
    k, n = (256, 192) if small else (1024, 768)
    ms = (1, 17) if small else (1, 2, 8, 16, 33, 200, 1024)
    for bits, desc_act in list(itertools.product((2, 3, 4, 8), (False, True)))[mine]:
        weight = random_weight(k, n, bits=bits, group_size=64, desc_act=desc_act, sym=not desc_act, device=device)
        dense = weight.dense().t().contiguous()
        order = row_order(weight.g_idx, 64)
        zeros = weight.zeros() if desc_act else None
        packed = (to_execution(weight.qweight, bits, order), weight.scales, zeros, order, None, bits, 64)
        dtype = (torch.bfloat16, torch.float16)[desc_act]
        for m in ms:
            x = torch.randn(m, k, device=device).to(dtype) / 8
            exact = gated(linear(x.float(), dense))
            torchs = gated(linear(x, dense.to(dtype)))
            tolerance = 2 * largest_error(torchs, exact) + 1e-5 * float(exact.abs().max())
            name = f"gate and up, {k}x{n}, {bits} bits, order {desc_act}, {dtype}, M={m}"
            yield name, _fault(partial(torch.ops.ropewalk.packed_gate_up, x, *packed), exact, tolerance, small)


def _rotations(device: torch.device, small: bool, mine: slice) -> Iterator[tuple[str, str]]:
    """Yield the name of each case that is ours to check, and what is wrong with it, or ""."""
    shapes = [Heads(4, 2, 64)] if small else [Heads(40, 40, 128), Heads(64, 8, 128), Heads(3, 1, 80)]
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for heads, tokens, dtype in list(itertools.product(shapes, (1, 7, 300), dtypes))[mine]:
        inputs = make_inputs(heads, tokens, dtype, device)
        exact = torch.cat(
            [t.flatten() for t in rope(inputs.q.float(), inputs.k.float(), inputs.inv_freq, inputs.position_ids)]
        )
        largest = float(exact.abs().max())
        tolerance = 2 * largest_error(exact.to(dtype), exact) + 1e-5 * largest
        for peer in (RopewalkRotary(), RopewalkInPlace()):
            name = f"{peer.name}, {heads}, {dtype}, {tokens} tokens"
            first, second = _rotated(peer, inputs), _rotated(peer, inputs)
            if not torch.equal(first, second):
                yield name, "a second run gives other bits"
            elif not small and (note := Rotation([peer.prepare(inputs.clone())], device).note):
                yield name, note
            elif verdict(largest_error(first, exact), tolerance, largest) != "ok":
                yield name, f"off by {largest_error(first, exact):.3g}, expected at most {tolerance:.3g}"
            else:
                yield name, ""


def _norms(device: torch.device, small: bool, mine: slice) -> Iterator[tuple[str, str]]:
    """Yield the name of each case that is ours to check, and what is wrong with it, or ""."""
    channels = (96, 9000) if small else (96, 4096, 5120, 8192, 13824, 32768)
    for k, tokens, dtype, ordered in list(itertools.product(channels, (1, 7, 300), DTYPES, (False, True)))[mine]:
        x, y, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((tokens, k), (tokens, k), (k,)))
        order = torch.randperm(k, device=device).int() if ordered else None
        # The norm of the sum as it was rounded, which is exactly torch's.
        normed = functional.rms_norm((x + y).double(), (k,), weight.double(), 1e-5)
        exact = torch.cat([(x + y).double(), normed if order is None else normed[:, order.long()]])
        largest = float(exact.abs().max())
        tolerance = 2 * largest_error(torch.cat([x + y, rms_norm(x + y, weight, 1e-5, order)]), exact) + 1e-5 * largest
        name = f"add_rms_norm, {tokens}x{k}, {dtype}, order {ordered}"

        def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
            return torch.cat(torch.ops.ropewalk.add_rms_norm(x, y, weight, 1e-5, order))

        fault = _fault(partial(run, x, y, weight, order), exact, tolerance, small)
        same = torch.equal(run(x, y, weight, order)[:tokens], x + y)
        yield name, fault or ("" if same else "the sum is not torch's")


def _fault(call: Callable[[], torch.Tensor], exact: torch.Tensor, tolerance: float, small: bool) -> str:
    """Return what is wrong with a call whose result is to be within `tolerance` of `exact`, or ""."""
    first, second = call(), call()
    error = largest_error(first, exact)
    if not torch.equal(first, second):
        return "a second run gives other bits"
    if not small and (fault := _graph(call, first, exact.device)):
        return fault
    if verdict(error, tolerance, float(exact.abs().max())) != "ok":
        return f"off by {error:.3g}, expected at most {tolerance:.3g}"
    return ""


def _graph(call: Callable[[], torch.Tensor], expected: torch.Tensor, device: torch.device) -> str:
    """Return what is wrong with a call that a CUDA graph replays, or ""."""
    rotation = Rotation([call], device)
    same = torch.equal(rotation.result(), expected)
    return rotation.note or ("" if same else "a CUDA graph gives other bits")


def _rotated(peer: RotaryPeer, inputs: Inputs) -> torch.Tensor:
    return torch.cat([t.flatten() for t in peer.prepare(inputs.clone())()])


if __name__ == "__main__":
    sys.exit(main())
