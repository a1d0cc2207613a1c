"""Regular and editable installs work from the repository's root, with Hugging Face's `kernels` there and not.

A package named `kernels` in the working directory hides the real one and breaks `import transformers`; the
folder `kernels/` has no `__init__.py` for that reason, and this is the proof.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# `make test` puts Hugging Face's `kernels` there, out of the way of everything else.
WITH_KERNELS = Path(os.environ.get("ROPEWALK_WITH_KERNELS", Path(sys.prefix) / "with-kernels"))

CHECK = """
import sys
import transformers
from transformers import LlamaForCausalLM
import ropewalk, ropewalk.rope, ropewalk.gptq.ops, ropewalk.loader, ropewalk.patches, ropewalk.bench.perplexity
import importlib.util
spec = importlib.util.find_spec("kernels")
real = spec is not None and spec.origin is not None
assert real == (sys.argv[1] == "with"), spec
assert (ropewalk.shipped.FOLDER / "model.safetensors").is_file() if hasattr(ropewalk, "shipped") else True
from ropewalk.shipped import FOLDER
assert (FOLDER / "model.safetensors").is_file()
print(ropewalk.__file__)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Return a copy of what git would give a user, so that nothing is built into the tree under test."""
    copy = tmp_path_factory.mktemp("repository")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module", params=["regular", "editable", "strict"])
def python(request, repository, tmp_path_factory):
    """Return the interpreter of an environment with ropewalk installed, and the rest of this one's packages."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    # A folder named in a .pth file is searched, but its own .pth files, this environment's ropewalk, are not.
    (purelib / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    how = {
        "regular": ["."],
        "editable": ["-e", "."],
        "strict": ["-e", ".", "--config-settings", "editable_mode=strict"],
    }[request.param]
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet", "--ignore-installed"]
    environment = {**os.environ, "ROPEWALK_CPU_KERNELS": "0"}  # compiled by a test of its own, and faster
    subprocess.run(
        [*pip, "--no-deps", "--no-index", "--no-build-isolation", *how], cwd=repository, env=environment, check=True
    )
    return interpreter


def run(python, repository, *arguments, kernels):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if kernels:
        environment["PYTHONPATH"] = str(WITH_KERNELS)
    done = subprocess.run([python, *arguments], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kernels", [False, True], ids=["without kernels", "with kernels"])
def test_imports_from_the_root(python, repository, kernels):
    if kernels and not (WITH_KERNELS / "kernels" / "__init__.py").is_file():
        pytest.skip(f"no package `kernels` in {WITH_KERNELS}; `make test` puts it there")
    run(python, repository, "-c", "import transformers; from transformers import LlamaForCausalLM", kernels=kernels)
    where = run(python, repository, "-c", CHECK, "with" if kernels else "without", kernels=kernels)
    assert Path(where.strip()).name == "__init__.py"


def test_pytest_from_the_root(python, repository):
    out = run(
        python, repository, "-m", "pytest", "-q", "tests/test_templates.py", "-p", "no:cacheprovider", kernels=False
    )
    assert "passed" in out


def test_the_command(python, repository):
    out = run(python, repository, "-m", "ropewalk", "--version", kernels=False)
    assert out.startswith("ropewalk ")
    command = python.parent / "ropewalk"
    done = subprocess.run([command, "--version"], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == out


def test_a_wheel_holds_the_kernels_that_could_be_compiled(repository, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "*.cpp"))
    (copy / "kernels/cpu/tiny.cpp").write_text("int tiny;\n")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    names = {}
    # The second finds in build/ what the first left there.
    for compiler in ("c++", "no-such-compiler"):
        out = tmp_path / compiler
        environment = {**os.environ, "CXX": compiler, "ROPEWALK_CPU_KERNELS": "1"}
        subprocess.run([*pip, "-w", str(out), "."], cwd=copy, env=environment, check=True)
        (wheel,) = out.iterdir()
        with zipfile.ZipFile(wheel) as file:
            file.extractall(out / "site")
        names[compiler] = wheel.name
        assert (out / "site/ropewalk/cpu/tiny.cpp").is_file()
        assert list((out / "site/ropewalk/cpu").glob("*.h"))
    assert names["no-such-compiler"].endswith("-py3-none-any.whl")
    assert not (tmp_path / "no-such-compiler/site/ropewalk/cpu/prebuilt").exists()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert names["c++"].endswith(f"-py3-none-{platform}.whl")
    prebuilt = tmp_path / "c++/site/ropewalk/cpu/prebuilt"
    assert sorted(path.name for path in prebuilt.iterdir()) == ["key.json", "ropewalk_cpu.so"]
    code = "from ropewalk import cpu; print(cpu.load(), cpu.status()['library'], sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "c++/site"), "ROPEWALK_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["True", str(prebuilt / "ropewalk_cpu.so")]
    assert not (tmp_path / "cache").exists()
