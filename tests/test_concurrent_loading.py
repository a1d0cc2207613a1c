"""Loading at the same time as others, in threads and in processes, gives what loading alone gives.

transformers and accelerate change things that all threads share while a model is built: torch's default dtype, methods
of nn.Module. `ropewalk.loader.skeleton.BUILDING` keeps builders apart; what comes after building must not mind them.
"""

import hashlib
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import ropewalk
from ropewalk import cpu
from ropewalk.loader import fill, skeleton

IDS = torch.arange(3, 60)[None]
SETTINGS = {"sym": False, "bits": 4}


def together(*functions):
    """Call functions in threads of their own that begin at once; return what they return."""
    barrier = threading.Barrier(len(functions))
    results, errors = [None] * len(functions), []

    def work(i):
        try:
            barrier.wait()
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    return results


def state_of(model):
    """All that a model computes with, what no file holds included."""
    derived = {name: buffer for name, buffer in model.named_buffers() if "rotary" in name}
    return {**model.state_dict(), **derived}


def same_model(found, expected):
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    ours, theirs = state_of(found), state_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("arch", "cache_packed"), [("airophin", False), ("airophin", True), ("mixtral", True)])
def test_threads_and_one_folder(tmp_path, make_checkpoint, arch, cache_packed):
    make_checkpoint(tmp_path, arch, **SETTINGS)
    alone = ropewalk.load(tmp_path)[0]
    for _ in range(2):
        for model in together(*[lambda: ropewalk.load(tmp_path, cache_packed=cache_packed)[0]] * 4):
            same_model(model, alone)
    assert [p.name for p in tmp_path.glob(".ropewalk/*")] == ["model.safetensors"] * cache_packed
    assert not list(tmp_path.glob(".ropewalk/.*"))


def test_threads_and_two_models_of_different_dtypes(tmp_path, make_checkpoint, make_plain):
    (tmp_path / "plain").mkdir()
    make_plain(tmp_path / "plain")
    make_checkpoint(tmp_path / "a", "airophin", **SETTINGS)
    make_checkpoint(tmp_path / "b", "qwen2", **SETTINGS)
    make_checkpoint(tmp_path / "c", "mpt", **SETTINGS)
    wanted = [("a", "float32"), ("b", "float16"), ("c", "bfloat16"), ("plain", "float16")]
    alone = [ropewalk.load(tmp_path / name, dtype=dtype)[0] for name, dtype in wanted]
    loads = [lambda name=name, dtype=dtype: ropewalk.load(tmp_path / name, dtype=dtype)[0] for name, dtype in wanted]
    for _ in range(4):
        for model, expected in zip(together(*loads), alone, strict=True):
            same_model(model, expected)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("airophin", "float32"),
        ("airophin", "float16"),
        ("qwen2", "float16"),
        ("mpt", "float32"),
        ("mixtral", "float32"),
    ],
)
def test_another_thread_that_builds_all_the_while(tmp_path, make_checkpoint, monkeypatch, arch, dtype):
    """From the moment a model is built, another thread has everything changed that building changes."""
    make_checkpoint(tmp_path, arch, **SETTINGS)
    alone = ropewalk.load(tmp_path, dtype=dtype)[0]
    built, changed, finished = threading.Event(), threading.Event(), threading.Event()
    real = fill.fill

    def filling(*arguments):
        built.set()
        assert changed.wait(300)
        return real(*arguments)

    monkeypatch.setattr(fill, "fill", filling)

    def build_all_the_while():
        assert built.wait(300)
        with skeleton.BUILDING, skeleton._empty_weights():
            torch.set_default_dtype(torch.bfloat16)
            changed.set()
            try:
                assert finished.wait(300)
            finally:
                torch.set_default_dtype(torch.float32)

    def load():
        try:
            return ropewalk.load(tmp_path, dtype=dtype)[0]
        finally:
            finished.set()

    model, _ = together(load, build_all_the_while)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    same_model(model, alone)


def test_adapters_are_put_on_while_nobody_builds(shipped, monkeypatch, tmp_path):
    from ropewalk.loader import load as module
    from ropewalk.loader import lora

    held = []
    monkeypatch.setattr(lora, "load_lora", lambda model, adapters: held.append(skeleton.BUILDING._is_owned()) or model)
    monkeypatch.setattr(module, "find_adapter", lambda adapter, **options: adapter)
    ropewalk.load(shipped, lora=tmp_path)
    assert held == [True]


def test_threads_and_the_first_use_of_the_kernels(tmp_path, make_checkpoint, monkeypatch):
    make_checkpoint(tmp_path, **SETTINGS)
    alone = ropewalk.load(tmp_path)[0]
    calls, real = [], cpu._find_or_build

    def slowly(build_it):
        calls.append(build_it)
        time.sleep(0.3)  # as if it were compiled
        return real(build_it)

    monkeypatch.setattr(cpu, "_find_or_build", slowly)
    monkeypatch.setattr(cpu, "_library", None)
    for model in together(*[lambda: ropewalk.load(tmp_path)[0]] * 3):
        same_model(model, alone)
    assert len(calls) == 1 or os.environ.get("ROPEWALK_CPU_KERNELS") == "0"


def test_processes(tmp_path, make_checkpoint):
    """Two of them that keep packed layers and one that does not, each with its own first use of the kernels."""
    make_checkpoint(tmp_path / "m", "codellama", **SETTINGS)
    alone = ropewalk.load(tmp_path / "m")[0](IDS).logits
    expected = hashlib.sha256(alone.detach().numpy().tobytes()).hexdigest()
    code = f"""
import hashlib, sys, torch, ropewalk, transformers
print("ready", flush=True)
sys.stdin.readline()
for _ in range(2):
    model, _ = ropewalk.load({str(tmp_path / "m")!r}, cache_packed=sys.argv[1] == "1")
    logits = model(torch.arange(3, 60)[None]).logits
    print(hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest(), flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, flag], **pipes) for flag in "110"]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=300)  # on a busy machine, too
        assert out.split() == [expected] * 2, err
    if cpu.load():
        assert [p.name for p in tmp_path.glob("m/.ropewalk/*")] == ["model.safetensors"]
    assert not list(tmp_path.glob("m/.ropewalk/.*"))
