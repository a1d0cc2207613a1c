"""Build and metadata of ropewalk.

The rule of the house: a folder at the root is `ropewalk.<folder>`, and `kernels/` is only the shelf on
which `ropewalk.rope`, `ropewalk.gptq` and `ropewalk.cpu` stand. `kernels/` has no `__init__.py`: as a package of that
name it would hide Hugging Face's `kernels` from whatever runs in this directory, and transformers with it.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).parent

# package -> folder; each folder needs an __init__.py, or an editable install does not find it.
FOLDERS = {
    "ropewalk": "src/ropewalk",
    "ropewalk.rope": "kernels/rope",
    "ropewalk.norm": "kernels/norm",
    "ropewalk.gptq": "kernels/gptq",
    "ropewalk.cpu": "kernels/cpu",
    "ropewalk.loader": "loader",
    "ropewalk.patches": "patches",
    "ropewalk.bench": "bench",
}

# Open ranges: with a CUDA build of torch installed, nothing of it is replaced. The versions that the
# tests run with are in constraints.txt.
REQUIRES = [
    "torch>=2.9",
    "triton>=3.5; sys_platform == 'linux'",
    "triton-windows>=3.5; sys_platform == 'win32'",
    "transformers>=5.6",
    "accelerate>=1.10",
    "safetensors>=0.6",
    "huggingface_hub>=1.0",
    "numpy>=1.26",
    "ninja",
    "tqdm",
]
EXTRAS = {
    "plot": ["matplotlib>=3.8"],
    "peft": ["peft>=0.18"],
    "datasets": ["datasets>=2.19"],
    "kv": ["hqq>=0.2.8"],
    "serve": ["fastapi", "uvicorn", "openai>=1.98", "pydantic>=2"],
    "bitsandbytes": ["bitsandbytes>=0.46.1"],
    "gptqmodel": ["gptqmodel>=7.6"],
    "vllm": ["vllm>=0.32"],
    "fastchat": ["fschat>=0.2.36", "peft>=0.18"],
    "test": [
        *("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "matplotlib>=3.8", "peft>=0.18"),
        *("bitsandbytes>=0.46.1", "packaging", "fastapi", "uvicorn", "openai>=1.98", "hqq>=0.2.8"),
    ],
    "lint": ["ruff", "mypy"],
}

version = re.search(r'^__version__ = "(.+)"$', (HERE / "src/ropewalk/__init__.py").read_text(), re.MULTILINE)
assert version is not None

packages = []
for package, folder in FOLDERS.items():
    packages.append(package)
    packages += [f"{package}.{name}" for name in find_packages(folder)]


def prebuilt(command):
    """Return the folder, below that in which a command gathers the package, for the compiled kernels."""
    return Path(command.get_finalized_command("build_py").build_lib, "ropewalk/cpu/prebuilt")


class BuildWithKernels(build_py):
    """Compiles the kernels of the CPU into the package where that can be done now; else first use does it."""

    def run(self):
        """Gather the modules; then compile, unless this install is editable or there is no torch."""
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(prebuilt(self), ignore_errors=True)  # build/ may hold an older one
        if os.environ.get("ROPEWALK_CPU_KERNELS") == "0" or not importlib.util.find_spec("torch"):
            return
        try:
            spec = importlib.util.spec_from_file_location("ropewalk_cpu_build", HERE / "kernels/cpu/build.py")
            build = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(build)
            build.make(HERE / "kernels/cpu", prebuilt(self))
        except Exception as error:  # whatever it is, an install must not fail from it
            shutil.rmtree(prebuilt(self), ignore_errors=True)
            self.warn(f"the kernels of the CPU were not compiled; first use will try again: {error}")


class WheelWithKernels(bdist_wheel):
    """Tags a wheel that holds compiled kernels with its platform. They are no Python module: any Python will do."""

    def run(self):
        """Build first; then the platform counts as if it had been named on the command line."""
        self.run_command("build")
        self.plat_name_supplied |= prebuilt(self).is_dir()
        super().run()


setup(
    name="ropewalk",
    version=version[1],
    description="Long-context rotary embeddings and packed GPTQ weights, fused, in the front ends people use",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir=FOLDERS,
    packages=packages,
    package_data={
        "ropewalk": ["py.typed", "models/*/*"],
        "ropewalk.gptq": ["tuned/*.json", "*.cu"],
        "ropewalk.cpu": ["*.cpp", "*.h"],
    },
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["ropewalk = ropewalk.cli:main"],
        "vllm.general_plugins": ["ropewalk = ropewalk.patches.vllm:register"],
    },
)
