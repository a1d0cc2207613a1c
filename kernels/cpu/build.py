"""From the C++ sources of this folder to one shared library: compiler, flags, keys, and the user's cache.

setup.py loads this file by its path to build at install, so that it imports the standard library alone; torch
is imported where its version and folders are needed. torch.utils.cpp_extension.load is not used: its lock
outlives a killed process, it takes compiler and ninja from the environment of the whole process, and it needs
setuptools at run time.

Nothing of a library is trusted before its key file was read: that holds a digest of the bytes (half a file can
crash the process that maps it) and a key of all that the library depends on, so that another torch, other
sources or other flags mean another library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# resolve: in a strict editable install this file is a link to the one beside the sources.
SOURCES = Path(__file__).resolve().parent
LIBRARY = "ropewalk_cpu.so"
KEY_FILE = "key.json"
COMPILERS = ("c++", "g++", "clang++")
# No -march: the sources choose the level of the CPU when they run. C++20 is what torch's headers ask for.
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp", "-fvisibility=hidden")
LIBRARIES = ("-Wl,--as-needed", "-ltorch_cpu", "-lc10")
INSTALL_HINT = "install a C++ compiler, e.g. `apt install g++`, or name one in $CXX"
# Seconds after which another process that holds the lock is taken for stopped, and its leftovers for garbage.
PATIENCE = 1800

log = logging.getLogger("ropewalk")


class BuildError(Exception):
    """No library could be made; the message says why. It stays in ropewalk.cpu: `load` turns it into a notice."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


class CompileError(BuildError):
    """The compiler or the linker failed.

    Attributes:
        log: all that they said.
    """

    def __init__(self, log: str):
        self.log = log
        super().__init__(f"compiling failed: {first_error(log)}")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, and the first line of what it says of its version."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)}, {self.version}"


def find_compiler() -> Compiler:
    """Return the compiler of $CXX, or the first of COMPILERS that runs.

    Raises:
        NoCompilerError: there is none, or $CXX does not run.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        path = shutil.which(command[0])
        if path is None:
            continue
        with contextlib.suppress(OSError):
            done = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout:
                return Compiler((path, *command[1:]), done.stdout.splitlines()[0])
    looked = f"$CXX, {shlex.join(chosen)}," if chosen else f"any of {', '.join(COMPILERS)}"
    raise NoCompilerError(f"found no C++ compiler that runs ({looked} was looked for); {INSTALL_HINT}")


def find_ninja() -> str:
    """Return the path of the ninja of the Python package, or of the system's; no PATH needs to name the first.

    Raises:
        BuildError: there is neither.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("ninja") or ():
            path = Path(str(file.locate()))
            if file.name in ("ninja", "ninja.exe") and os.access(path, os.X_OK) and path.is_file():
                return str(path.resolve())
    if found := shutil.which("ninja"):
        return found
    raise BuildError("found no ninja; `pip install ninja`")


def flags() -> list[str]:
    """Return the flags for compiling and linking, with those of $ROPEWALK_CPU_CFLAGS at the end."""
    import torch

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [*FLAGS, abi, *shlex.split(os.environ.get("ROPEWALK_CPU_CFLAGS", ""))]


def key_of(sources: Path) -> str:
    """Return the key of what a library depends on, its compiler aside: bytes, torch, flags, platform."""
    import torch

    digest = hashlib.sha256()
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)} ".encode() + data)
    machine = (platform.system(), platform.machine(), platform.libc_ver())
    digest.update(repr((torch.__version__, torch.version.git_version, flags(), LIBRARIES, machine)).encode())
    return digest.hexdigest()[:16]


def intact(folder: Path, key: str) -> Path | None:
    """Return the library in `folder` if it is of this key and whole, byte by byte, else None."""
    try:
        found = json.loads((folder / KEY_FILE).read_text())
        if found["key"] == key and found["sha256"] == _sha256(folder / LIBRARY):
            return folder / LIBRARY
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def make(sources: Path, folder: Path, compiler: Compiler | None = None) -> Path:
    """Compile every *.cpp of `sources` into one library with its key file, in a folder that nobody else uses.

    Returns:
        The path of the library.

    Raises:
        NoCompilerError, CompileError, BuildError: as they say; `folder` is then to be thrown away.
    """
    _check_platform()
    compiler = compiler or find_compiler()
    ninja = find_ninja()
    key = key_of(sources)  # before the compiler reads them: what is edited meanwhile must not get this key
    work = folder / "work"
    work.mkdir(parents=True)
    (work / "build.ninja").write_text(_ninja_file(sources, compiler))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS", "").isdigit() else []
    done = subprocess.run(
        [ninja, "-v", *jobs],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},  # first_error looks for English words
    )
    if done.returncode != 0:
        raise CompileError(done.stdout.decode(errors="replace"))
    shutil.rmtree(work)
    about = {"key": key, "sha256": _sha256(folder / LIBRARY), "compiler": str(compiler)}
    (folder / KEY_FILE).write_text(json.dumps(about))
    return folder / LIBRARY


def caches() -> Iterator[Path]:
    """Yield the folders that may hold libraries, best first.

    The user's cache is $ROPEWALK_CACHE or `ropewalk` in $XDG_CACHE_HOME or ~/.cache. Where that cannot be
    written there is a folder of the user's own below the system's temporary one.
    """
    chosen = os.environ.get("ROPEWALK_CACHE")
    yield Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ropewalk")).expanduser()
    if not hasattr(os, "getuid"):
        return
    temporary = Path(tempfile.gettempdir(), f"ropewalk-{os.getuid()}")
    with contextlib.suppress(OSError):
        temporary.mkdir(mode=0o700, exist_ok=True)
        found = temporary.lstat()
        # Another user could have made it, to have us load a library of theirs.
        if found.st_uid == os.getuid() and found.st_mode & 0o170777 == 0o040700:
            yield temporary


def cached(sources: Path) -> Path | None:
    """Return the whole library that a cache holds for these sources and the compiler that is here, or None.

    Where no compiler is left, one made by any will do.
    """
    key = key_of(sources)
    try:
        name = _name(key, find_compiler())
    except NoCompilerError:
        name = f"cpu-{key}-*"
    for cache in caches():
        found = sorted(cache.glob(name))
        for folder in found:
            if library := intact(folder, key):
                return library
    return None


def build(sources: Path, *, anew: bool = False) -> Path:
    """Return a library in the cache, built now unless another process was faster.

    Args:
        sources: the folder of the sources.
        anew: build even where the cache holds a whole one: it could not be loaded.

    Raises:
        NoCompilerError, CompileError, BuildError: as they say; the message names a file with all that
            the compiler said.
    """
    _check_platform()
    compiler = find_compiler()
    name = _name(key_of(sources), compiler)
    why = "no folder"
    for cache in caches():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = (cache / f"{name}.lock").open("w")
        except OSError as error:
            why = str(error)
            continue
        with lock:
            _announce()
            _hold(lock.fileno())
            if not anew and (library := cached(sources)):
                return library
            return _build_in(cache, name, sources, compiler)
    raise BuildError(f"found no folder to build in: {why}; name one in $ROPEWALK_CACHE")


def earlier_failure(sources: Path) -> str | None:
    """Return what the last build of these sources by this compiler failed from, or None if it did not."""
    with contextlib.suppress(NoCompilerError, OSError):
        name = _name(key_of(sources), find_compiler())
        for said in (cache / f"{name}.log" for cache in caches()):
            if said.is_file():
                return _and_all_of_it(CompileError(said.read_text(errors="replace")), said)
    return None


def first_error(text: str) -> str:
    """Return the first line of a compiler's or linker's words that tells of an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = (line for line in lines if re.search(r"\berror:|undefined reference|cannot find", line))
    return next(errors, lines[-1] if lines else "the compiler said nothing")


def _check_platform() -> None:
    system = platform.system()
    if system != "Linux":
        raise BuildError(f"ropewalk's kernels for the CPU are for Linux so far, and this is {system}")


def _build_in(cache: Path, name: str, sources: Path, compiler: Compiler) -> Path:
    """Build in a private folder of the cache's file system, then rename: nobody sees half of it."""
    _sweep(cache)
    private = Path(tempfile.mkdtemp(prefix=f"{name}.tmp-", dir=cache))
    said = cache / f"{name}.log"
    try:
        make(sources, private / "new", compiler)
        said.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a damaged one, out of the way
            (cache / name).rename(private / "old")
        (private / "new").rename(cache / name)
    except CompileError as error:
        said.write_text(error.log)
        raise BuildError(_and_all_of_it(error, said)) from error
    except OSError as error:
        raise BuildError(f"building in {cache} failed: {error}") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return cache / name / LIBRARY


def _and_all_of_it(error: CompileError, said: Path) -> str:
    return f"{error} (all of it: {said})"


def _name(key: str, compiler: Compiler) -> str:
    return f"cpu-{key}-{hashlib.sha256(compiler.version.encode()).hexdigest()[:8]}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _announce() -> None:
    text = "building the CPU kernels (once, a minute or so)"
    log.info(text)
    if sys.stderr.isatty() and not (log.isEnabledFor(logging.INFO) and log.hasHandlers()):
        print(f"ropewalk: {text}", file=sys.stderr, flush=True)


def _hold(descriptor: int) -> None:
    """Wait for the lock, which the kernel takes from a process that ends, however it ends.

    Without it (some network file systems have none, and its holder may be stopped) two build the same thing at
    the same time, and the last to rename wins; nothing breaks.
    """
    import fcntl

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return


def _sweep(cache: Path) -> None:
    """Remove what killed builds left behind, once no living one can still be at it."""
    for folder in cache.glob("cpu-*.tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > PATIENCE:
                shutil.rmtree(folder, ignore_errors=True)


def _ninja_file(sources: Path, compiler: Compiler) -> str:
    """Return the build.ninja of one library, to be run in a folder beside which the library shall lie."""
    import torch

    files = sorted(sources.resolve().glob("*.cpp"))
    if not files:
        raise BuildError(f"found no *.cpp in {sources}")
    home = Path(torch.__file__).parent
    headers = [home / "include", home / "include/torch/csrc/api/include"]
    compile_ = [*compiler.command, *flags(), *(word for path in headers for word in ("-isystem", str(path)))]
    # torch's wheels bring a libgomp of their own, under one name or another. Ours must be the same one, or the
    # threads of two OpenMP runtimes fight for the cores and torch.set_num_threads reaches only one of them.
    gomp = [str(path) for path in sorted((home / "lib").glob("libgomp*.so*"))]
    libraries = [f"-L{home / 'lib'}", LIBRARIES[0], *gomp, *LIBRARIES[1:]]
    link = [*compiler.command, "-shared", *flags()]
    lines = [
        "rule compile",
        f"  command = {_escape(shlex.join(compile_))} -c $in -o $out",
        "rule link",
        f"  command = {_escape(shlex.join(link))} $in -o $out {_escape(shlex.join(libraries))}",
        *(f"build {path.stem}.o: compile {_escape_path(path)}" for path in files),
        f"build ../{LIBRARY}: link {' '.join(f'{path.stem}.o' for path in files)}",
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _escape_path(path: Path) -> str:
    return _escape(str(path)).replace(" ", "$ ").replace(":", "$:")
