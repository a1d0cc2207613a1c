"""Which files of a folder hold the weights, and which tensors are in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ropewalk.errors import CheckpointError, HeaderError, MissingFileError, TensorEntryError
from ropewalk.loader.pickle_file import SUFFIXES, read_pickle
from ropewalk.loader.quantize_config import read_json
from ropewalk.loader.safetensors_file import TensorEntry, read_header

# Pickles that lie beside weights and are none.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|adapter_model|consolidated)\b.*")
# llama-7b-4bit-128g, 4bit-128g, 4bit, gptq_model-4bit--1g, x-4bit-128g.act-order
_NAME = re.compile(r"(?:^|[-_.])(?P<bits>[2348])-?bits?(?:[-_.](?P<group_size>-1|\d+)g)?(?=$|[-_.])", re.IGNORECASE)


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights.

    Attributes:
        files: the files.
        index: the index that names them, where there is one.
        weight_map: what it says: tensor name -> name of the file.
    """

    files: list[Path]
    index: Path | None = None
    weight_map: dict[str, str] | None = None


def bits_and_group_in(name: str) -> tuple[int | None, int | None]:
    """Return the bits and the group size that the name of a file tells of, as GPTQ-for-LLaMa's users wrote them."""
    found = _NAME.search(name)
    if not found:
        return None, None
    return int(found["bits"]), int(found["group_size"]) if found["group_size"] else None


def find_weights(folder: Path, base_names: Iterable[str] = (), file: str | Path | None = None) -> WeightFiles:
    """Return the files that hold the weights of a folder, by the first rule that finds some.

    Args:
        base_names: what the configs call the file, without its suffix.
        file: the file that was asked for; one of several shards stands for them all.

    Raises:
        MissingFileError: none, or a shard that is not there.
        HeaderError: an index that is none.
        CheckpointError: several files, and nothing that says which.
    """
    if file is not None:
        return _asked_for(folder, file)
    stems = [PurePosixPath(name).name for name in base_names]
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model"), (".pt", "model")):
        for name in dict.fromkeys([*stems, stem]):
            index = folder / f"{name}{suffix}.index.json"
            if name in stems and is_file(folder / f"{name}{suffix}"):
                return WeightFiles([folder / f"{name}{suffix}"])
            if is_file(index):
                return _shards(folder, index)
            if is_file(folder / f"{name}{suffix}"):
                return WeightFiles([folder / f"{name}{suffix}"])
        indexes = sorted(filter(is_file, folder.glob(f"*{suffix}.index.json")))
        if len(indexes) == 1:
            return _shards(folder, indexes[0])
        if suffix == ".safetensors":
            found = _one_of(folder, sorted(filter(is_file, folder.glob("*.safetensors"))))
            if found:
                return found
    pickles = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not _NOT_WEIGHTS.fullmatch(p.name))
    pickles = list(filter(is_file, pickles))
    found = _one_of(folder, pickles)
    if found is None:
        raise MissingFileError(folder, "weights in .safetensors, .pt or .bin files", listing(folder))
    return found


def is_file(path: Path) -> bool:
    """Tell whether there is an ordinary file of this name; of a name that cannot be, there is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def listing(folder: Path) -> str:
    """Return what is in a folder, in short."""
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "an empty folder"


def _one_of(folder: Path, found: list[Path]) -> WeightFiles | None:
    """Return the only file, or the only one whose name tells how it is packed."""
    found = [path for path in found if not _NOT_WEIGHTS.fullmatch(path.name)] or found
    named = [path for path in found if bits_and_group_in(path.stem)[0] is not None]
    if len(named or found) == 1:
        return WeightFiles(named or found)
    if found:
        suffix = found[0].suffix
        expected = f"one {suffix} file or an index of several (or the name of the one to load)"
        raise CheckpointError(folder, expected, ", ".join(p.name for p in found[:8]))
    return None


def _asked_for(folder: Path, file: str | Path) -> WeightFiles:
    file = Path(file)
    file = file if file.is_file() or file.is_absolute() else folder / file
    if not file.is_file():
        raise MissingFileError(file, "a file with weights", "nothing of this name")
    if file.name.endswith(".index.json"):
        return _shards(file.parent, file)
    for index in sorted(filter(is_file, file.parent.glob(f"*{file.suffix}.index.json"))):
        shards = _shards(file.parent, index)
        if file.name in {path.name for path in shards.files}:
            return shards
    return WeightFiles([file])


def _shards(folder: Path, index: Path) -> WeightFiles:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(index, "a weight_map from tensor names to files", repr(weight_map)[:80])
    names = dict.fromkeys(name if isinstance(name, str) else repr(name) for name in weight_map.values())
    for name in names:
        if len(PurePosixPath(name).parts) != 1 or "\\" in name or name.startswith(".") or ":" in name:
            raise HeaderError(index, "names of files in the same folder", repr(name)[:80])
        if Path(name).suffix not in (".safetensors", *SUFFIXES):
            raise HeaderError(index, "names of files in the same folder, .safetensors, .pt or .bin", repr(name))
        if not is_file(folder / name):
            raise MissingFileError(index, f"the shard {name[:255]} beside it", "no such file")
    return WeightFiles([folder / name for name in names], index, weight_map)


def read_tensors(weights: WeightFiles) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return (tensor name -> entry, over all files; warnings).

    Raises:
        TensorEntryError: a tensor in two files, or in another one than the index says, or in none.
        CheckpointError: one of its kinds, for a file that cannot be read.
    """
    tensors: dict[str, TensorEntry] = {}
    warnings: list[str] = []
    for file in weights.files:
        if file.suffix == ".safetensors":
            found = read_header(file)[0]
        else:
            found, odd = read_pickle(file)
            warnings += odd
        for name, entry in found.items():
            if name in tensors:
                other = tensors[name].file.name
                raise TensorEntryError(f"{file}: {name}", "every tensor once", f"it in {other} as well")
            tensors[name] = entry
    if weights.weight_map is not None:
        _check_index(weights, tensors)
    return tensors, warnings


def _check_index(weights: WeightFiles, tensors: dict[str, TensorEntry]) -> None:
    said = weights.weight_map or {}
    for name, file in said.items():
        if name not in tensors:
            raise TensorEntryError(f"{weights.index}: {name}", f"it in {file}", "it in none of the shards")
        if tensors[name].file.name != file:
            raise TensorEntryError(f"{weights.index}: {name}", f"it in {file}", f"it in {tensors[name].file.name}")
    for name, entry in tensors.items():
        if name not in said:
            raise TensorEntryError(
                f"{entry.file}: {name}", f"a tensor that {weights.index} lists", "one that it does not"
            )
