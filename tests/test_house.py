"""The rules of the house: nothing imports upwards, importing costs nothing, and the root shadows nobody."""

import ast
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ropewalk

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A module may import from its own floor and those below; `errors` and `templates` lie under them all.
FLOORS = [("rope", "norm", "gptq", "cpu"), ("loader",), ("patches",), ("bench",), ("face",)]
FOLDERS = {
    "kernels/rope": "rope",
    "kernels/norm": "norm",
    "kernels/gptq": "gptq",
    "kernels/cpu": "cpu",
    "loader": "loader",
    "patches": "patches",
    "bench": "bench",
    "src/ropewalk": "face",
}
# What the lowest floor may need from outside.
KERNELS_MAY_IMPORT = {"torch", "triton", "numpy", "cuda", "ropewalk", *sys.stdlib_module_names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(module):
    parts = module.split(".")
    if parts[0] != "ropewalk":
        return None
    if len(parts) == 1 or parts[1] in ("errors", "templates", "__version__"):
        return None
    return parts[1] if parts[1] in {"rope", "norm", "gptq", "cpu", "loader", "patches", "bench"} else "face"


def rank(floor):
    return next(i for i, names in enumerate(FLOORS) if floor in names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_imports_upwards(folder):
    mine = FOLDERS[folder]
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            floor = floor_of(module)
            # The face may use everything; bench stands beside it and may too.
            if floor is not None and mine != "bench":
                assert rank(floor) <= rank(mine), f"{path.relative_to(ROOT)} imports {module}"
            if mine in FLOORS[0]:
                assert module.split(".")[0] in KERNELS_MAY_IMPORT, f"{path.relative_to(ROOT)} imports {module}"


def test_every_mapped_folder_is_a_package_and_the_shelf_is_not():
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_importing_the_package_is_free():
    heavy = ("torch", "numpy", "transformers", "triton", "safetensors")
    code = f"import sys, ropewalk, ropewalk.errors, ropewalk.cli; print([m for m in {heavy} if m in sys.modules])"
    assert run("-c", code).strip() == "[]"


def test_the_face():
    names = {
        "load",
        "patch",
        "unpatch",
        "inspect",
        "quantize",
        "QuantLinear",
        "RopewalkRotaryEmbedding",
        "LlamaPartNTKScaledRotaryEmbedding",
        "errors",
        "__version__",
    }
    assert names <= set(ropewalk.__all__)
    assert names <= set(dir(ropewalk))
    for name in names:
        assert getattr(ropewalk, name) is not None
    from ropewalk import errors, load  # noqa: F401

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ropewalk.nothing


@pytest.mark.parametrize(
    ("torch", "triton"), [("2.9.1+cu128", "3.5.1"), ("2.13.0+cu130", "3.7.1"), ("2.14.1+cu130", "3.8.0")]
)
def test_a_cuda_torch_that_is_installed_satisfies_the_requirements(torch, triton):
    """Open ranges: pip replaces neither torch nor the triton that it pins."""
    installed = {"torch": torch, "triton": triton}
    needed = [Requirement(text) for text in requires("ropewalk") or []]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": "", "sys_platform": "linux"})]
    assert {r.name for r in needed} >= {"torch", "triton", "transformers", "safetensors", "accelerate", "ninja"}
    for requirement in needed:
        if requirement.name in installed:
            assert requirement.specifier.contains(installed[requirement.name], prereleases=True)
            assert not any(s.operator in ("==", "<", "<=", "~=") for s in requirement.specifier)
