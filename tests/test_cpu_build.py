"""The C++ kernels of the CPU: built once, found again, never half, and done without where they cannot be had.

The library of most tests is one line of C++ without torch's headers, compiled in a blink.
"""

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from ropewalk import cpu
from ropewalk.cli import main
from ropewalk.cpu import build

TINY = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
OPERATOR = """
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>
at::Tensor twice(const at::Tensor& x) {
  at::Tensor y = at::empty_like(x);
  at::parallel_for(0, x.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y.mutable_data_ptr<float>()[i] = 2 * x.const_data_ptr<float>()[i];
  });
  return y;
}
TORCH_LIBRARY_IMPL(ropewalk_test_cpu_build, CPU, m) { m.impl("twice", &twice); }
"""
PROCESS = """
import sys
from pathlib import Path
from ropewalk import cpu
cpu.build.SOURCES = Path(sys.argv[1])
print(cpu.load(), cpu.status()["library"])
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Return a folder with a tiny source that `load` builds, in a process as good as new, with a cache of its own."""
    folder = tmp_path / "the sources"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(TINY)
    for name in ("CXX", "ROPEWALK_CPU_CFLAGS", "ROPEWALK_CPU_KERNELS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", folder)
    forget(monkeypatch)
    return folder


@pytest.fixture
def compiled(tmp_path, monkeypatch, sources):
    """Return a function that counts what the compiler was asked to do so far."""
    calls = tmp_path / "calls"
    compiler(tmp_path, monkeypatch, f'echo x >> {calls}; exec {shutil.which("c++")} "$@"')
    return lambda: len(calls.read_text().split()) if calls.exists() else 0


def compiler(tmp_path, monkeypatch, script):
    """Let $CXX be a script, which still says the version of the compiler that is here."""
    path = tmp_path / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {shutil.which("c++")} --version\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def forget(monkeypatch):
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_failure", None)


def start(sources):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, sources], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def notices(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_built_once_and_found_by_the_next_process(sources, compiled):
    assert cpu.status()["state"] == "not built"
    assert cpu.load()
    assert compiled() == 2  # one source, and the link
    assert cpu.load()
    status = cpu.status()
    assert status["state"] == "loaded"
    assert ctypes.CDLL(status["library"]).answer() == 42
    process = start(sources)
    assert process.communicate()[0].split(maxsplit=1) == ["True", status["library"] + "\n"]
    assert compiled() == 2


def test_processes_and_threads_at_once_build_once(sources, compiled):
    processes = [start(sources) for _ in range(2)]
    assert [process.communicate()[0].split()[0] for process in processes] == ["True", "True"]
    assert compiled() == 2
    (sources / "tiny.cpp").write_text(TINY + "// changed\n")
    found = []
    threads = [threading.Thread(target=lambda: found.append(cpu.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert compiled() == 4


def test_a_killed_build_is_in_nobodys_way(tmp_path, monkeypatch, sources):
    began = tmp_path / "began"
    compiler(tmp_path, monkeypatch, f"touch {began}; exec sleep 300")
    process = start(sources)
    try:
        while not began.exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)  # its compiler lives on, as it does after a real one
        process.wait()
        left = list((tmp_path / "cache").glob("*.tmp-*"))
        assert len(left) == 1
        compiler(tmp_path, monkeypatch, f'exec {shutil.which("c++")} "$@"')
        assert cpu.load()
        assert left[0].exists()  # how should anyone know that nobody is at it?
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    os.utime(left[0], (0, 0))
    build.build(sources, anew=True)
    assert not left[0].exists()


def test_what_makes_another_library(monkeypatch, sources):
    keys = [build.key_of(sources)]
    assert build.key_of(sources) == keys[0]
    (sources / "tiny.cpp").write_text(TINY + "\n")
    keys.append(build.key_of(sources))
    (sources / "tiny.h").write_text("")
    keys.append(build.key_of(sources))
    monkeypatch.setenv("ROPEWALK_CPU_CFLAGS", "-DSOMETHING")
    keys.append(build.key_of(sources))
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    keys.append(build.key_of(sources))
    assert len(set(keys)) == 5
    build.build(sources)
    assert build.cached(sources)
    monkeypatch.setattr(build, "find_compiler", lambda: build.Compiler(("c++",), "another version"))
    assert not build.cached(sources)


def damage(folder, how):
    """Replace the library, which another process may have mapped, by something else."""
    library = folder / build.LIBRARY
    data = library.read_bytes()
    library.unlink()
    if how == "truncated":
        library.write_bytes(data[: len(data) // 2])
    elif how == "not a library":
        library.write_text("#!/bin/sh\n")
        about = json.loads((folder / build.KEY_FILE).read_text())
        (folder / build.KEY_FILE).write_text(json.dumps({**about, "sha256": build._sha256(library)}))
    elif how == "no key":
        library.write_bytes(data)
        (folder / build.KEY_FILE).write_text("[]")


@pytest.mark.parametrize("how", ["truncated", "not a library", "no key", "missing"])
def test_a_damaged_library_is_built_again(sources, compiled, how):
    library = build.build(sources)
    damage(library.parent, how)
    assert cpu.load()
    assert compiled() == 4
    assert ctypes.CDLL(str(library)).answer() == 42
    assert sorted(path.name for path in library.parent.iterdir()) == [build.KEY_FILE, build.LIBRARY]
    assert len([path for path in library.parent.parent.iterdir() if path.is_dir()]) == 1


def test_no_compiler_is_one_notice_that_says_what_to_install(tmp_path, monkeypatch, sources, caplog):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert not cpu.load()
    assert not cpu.load()
    (notice,) = notices(caplog)
    for words in ("plain torch, much slower", "found no C++ compiler", "apt install g++"):
        assert words in notice
    status = cpu.status()
    assert status == {"state": "no compiler", "library": None, "compiler": None, "why": status["why"]}
    assert "apt install g++" in status["why"]


def test_a_compiler_that_does_not_run_is_none(monkeypatch, sources, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    assert not cpu.load()
    assert "$CXX, no-such-compiler --fast," in notices(caplog)[0]


def test_a_library_serves_without_the_compiler_that_made_it(tmp_path, monkeypatch, sources):
    build.build(sources)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu.status()["state"] == "built"
    assert cpu.load()


def test_what_does_not_compile_is_one_notice_with_the_first_error(monkeypatch, sources, compiled, caplog):
    (sources / "tiny.cpp").write_text(TINY + "int wrong = nothing;\nint too = nothing_either;\n")
    assert not cpu.load()
    assert not cpu.load()
    assert compiled() == 1
    (notice,) = notices(caplog)
    assert "tiny.cpp:2:13: error: " in notice
    assert "nothing_either" not in notice
    said = notice.split("(all of it: ")[1].rstrip(")")
    with open(said) as file:
        assert "nothing_either" in file.read()
    here = cpu.status()
    forget(monkeypatch)
    assert cpu.status() == here  # another process sees it, too
    assert here["state"] == "failed"
    assert "tiny.cpp:2:13: error: " in here["why"]
    (sources / "tiny.cpp").write_text(TINY)
    assert cpu.load()


def test_another_system(monkeypatch, sources, caplog):
    monkeypatch.setattr("platform.system", lambda: "Plan 9")
    assert not cpu.load()
    assert "for Linux so far, and this is Plan 9" in notices(caplog)[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[1/2] c++ -c a.cpp\nFAILED: a.o\na.cpp:1:9: fatal error: no.h: No such file\n", 2),
        ("c++: error: unrecognized command-line option '--foo'\n", 0),
        ("/usr/bin/ld: a.o: in function `f':\na.cpp:(.text+0x5): undefined reference to `g'\ncollect2: error: ld\n", 1),
        ("/usr/bin/ld: cannot find -lgomp\ncollect2: error: ld returned 1 exit status\n", 0),
        ("one\n  Killed\n\n", 1),
    ],
)
def test_the_first_error(text, line):
    assert build.first_error(text) == text.splitlines()[line].strip()


def test_off(monkeypatch, sources, compiled, caplog):
    monkeypatch.setenv("ROPEWALK_CPU_KERNELS", "0")
    assert not cpu.load()
    assert compiled() == 0
    assert notices(caplog) == []
    assert cpu.status()["state"] == "off"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, sources, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROPEWALK_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cpu.load()
    folder = tmp_path / f"ropewalk-{os.getuid()}"
    assert folder in build.build(sources).parents
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # now anyone may have put something there
    forget(monkeypatch)
    assert not cpu.load()
    assert "found no folder to build in" in notices(caplog)[0]


def test_a_read_only_cache_is_read(monkeypatch, sources, compiled):
    library = build.build(sources)
    monkeypatch.setattr(build, "build", None)
    assert cpu.load()
    assert cpu.status()["library"] == str(library)


def test_the_library_of_the_install_goes_first(tmp_path, monkeypatch, sources, compiled):
    library = build.make(sources, sources / "prebuilt")
    assert cpu.load()
    assert cpu.status()["library"] == str(library)
    assert not (tmp_path / "cache").exists()
    (sources / "tiny.cpp").write_text(TINY + "// newer\n")
    forget(monkeypatch)
    assert cpu.load()
    assert str(tmp_path / "cache") in cpu.status()["library"]


def test_importing_compiles_and_loads_nothing(tmp_path, sources):
    code = "import sys, ropewalk.cpu; assert 'torch' not in sys.modules; import ropewalk.gptq.ops, ropewalk.rope.ops"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "cache").exists()


def test_ninja_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert os.access(build.find_ninja(), os.X_OK)
    monkeypatch.setattr(build.metadata, "files", lambda name: None)
    with pytest.raises(build.BuildError, match="pip install ninja"):
        build.find_ninja()


def test_a_user_at_a_terminal_is_told(monkeypatch, sources, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(build.log, "isEnabledFor", lambda level: False)
    assert cpu.load()
    assert capsys.readouterr().err.startswith("ropewalk: building the CPU kernels (once")


@pytest.mark.usefixtures("two_threads")
def test_an_operator_on_torchs_own_threads(sources):
    (sources / "tiny.cpp").write_text(OPERATOR)
    library = torch.library.Library("ropewalk_test_cpu_build", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    assert cpu.load()
    x = torch.randn(1000)
    assert torch.equal(torch.ops.ropewalk_test_cpu_build.twice(x), 2 * x)
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) == 1  # and not the compiler's beside that of torch


def test_doctor_builds(capsys, sources):
    assert main(["doctor", "--build", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cpu_kernels"]
    assert found["state"] == "loaded"
    assert found["seconds"] > 0
    assert main(["doctor", "--build"]) == 0
    assert f"loaded: {found['library']}, built before" in capsys.readouterr().out


def test_doctor_says_why_not(monkeypatch, capsys, sources):
    monkeypatch.setenv("ROPEWALK_CPU_CFLAGS", "--no-such-flag")
    assert main(["doctor", "--build"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("ropewalk doctor: no kernels for the CPU: compiling failed: ")
    assert "--no-such-flag" in captured.err
    assert main(["doctor"]) == 0
    assert "failed: compiling failed: " in capsys.readouterr().out
