"""Build and metadata of ropewalk.

The rule of the house: a folder at the root is `ropewalk.<folder>`, and `kernels/` is only the shelf on
which `ropewalk.rope` and `ropewalk.gptq` stand. `kernels/` has no `__init__.py`: as a package of that name
it would hide Hugging Face's `kernels` from whatever runs in this directory, and transformers with it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# package -> folder; each folder needs an __init__.py, or an editable install does not find it.
FOLDERS = {
    "ropewalk": "src/ropewalk",
    "ropewalk.rope": "kernels/rope",
    "ropewalk.gptq": "kernels/gptq",
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
    "gptqmodel": ["gptqmodel>=7.6"],
    "test": ["pytest>=8", "hypothesis>=6.100", "matplotlib>=3.8", "peft>=0.18", "packaging"],
    "lint": ["ruff", "mypy"],
}

version = re.search(r'^__version__ = "(.+)"$', (HERE / "src/ropewalk/__init__.py").read_text(), re.MULTILINE)
assert version is not None

packages = []
for package, folder in FOLDERS.items():
    packages.append(package)
    packages += [f"{package}.{name}" for name in find_packages(folder)]

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
    package_data={"ropewalk": ["py.typed", "models/*/*"], "ropewalk.gptq": ["tuned/*.json"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ropewalk = ropewalk.cli:main"]},
)
