"""Write a checkpoint for programs that do not have this package: its rope in words that they read, its weights in
files that they read.

Weights that are standard already are not written again but copied; or hard-linked, two names of one file, which takes
no space. That is for those to choose who know that nobody writes into either: safetensors up to 0.7 and torch do when
they save over a file (newer safetensors puts another in its place), so that a model trained on and saved where it was
loaded from would take the original with it, in the Hub's cache maybe.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropewalk.loader.checkpoint import Checkpoint
from ropewalk.loader.convert import (
    Progress,
    check_space,
    check_written,
    config_of,
    encodings_of,
    is_as_rewritten,
    rewrite,
    write_companions,
    written_bytes,
)
from ropewalk.loader.inspect import open_model
from ropewalk.loader.portable_rope import portable
from ropewalk.loader.safetensors_file import read_header
from ropewalk.loader.write import SHARD_BYTES, check_out, publish, work_folder, write_index

_CHUNK = 1 << 26


def export(
    model: str | Path,
    out: str | Path,
    *,
    rope: str = "auto",
    link: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint so that transformers, vLLM and others load it as it is meant, without this package.

    Partial NTK, NTK-by-parts and NTK become `longrope`, exactly (see `ropewalk.loader.portable_rope`); types that
    others know keep their names. Weights in standard safetensors (float, GPTQ v1 and v2) are copied; all else
    (.pt and .bin, GPTQ-for-LLaMa's and Marlin's layers, …) is written as `ropewalk.convert` does.

    Args:
        model, revision, token, cache_dir, local_files_only: as `ropewalk.load` takes them.
        out: folder to write, new or empty.
        rope: "auto" or another, as `ropewalk.load` takes it.
        link: hard-link standard weights where the disk can, instead of copying them: see above.
        bits, group_size: of checkpoints that do not say how they are packed.
        progress: called with (bytes done, bytes in all).

    Returns:
        {"out", "files", "bytes", "weights", "from", "rope", "rope_written", "context", "quantize_config", "warnings"}:
        names of the files with tensors, and their bytes; "linked", "copied" or "written", and how layers lay on disk;
        the rope decided, with "why", and {"type", "note", "factors"} of what stands for it; how many positions that
        gives, None without rope; the quantization config written, or None; and what was odd.

    Raises:
        CheckpointError, FormatError: the source, or `out`, is not as it should be.
        RopeError: an impossible rotary embedding.
        RopewalkError: what was written is not what was meant; nothing is kept then.
        UsageError: an argument that is not understood.
    """
    folder = check_out(out)
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    checkpoint, decision = open_model(model, rope=rope, bits=bits, group_size=group_size, **where)
    written = portable(checkpoint, decision, asked=rope != "auto")
    format = checkpoint.quantize_config.checkpoint_format if checkpoint.quantize_config else None
    config = config_of(checkpoint, format)
    with work_folder(folder) as work:
        finished = work.folder / "finished"
        finished.mkdir()
        if _is_standard(checkpoint):
            files, weights = _place(checkpoint, finished, folder, link, progress)
        else:
            check_space(work.folder, folder, written_bytes(checkpoint))
            files, weights = rewrite(checkpoint, finished, format, SHARD_BYTES, progress), "written"
        sizes = sum(path.stat().st_size for path in files)
        write_companions(checkpoint, written.config, config, finished)
        check_written(checkpoint, finished, format)
        publish(finished, folder)
    return {
        "out": str(folder),
        "files": [path.name for path in files],
        "bytes": sizes,
        "weights": weights,
        "from": encodings_of(checkpoint),
        "rope": decision.as_dict(),
        "rope_written": {"type": written.type, "note": written.note, "factors": list(written.factors)},
        "context": written.context,
        "quantize_config": config,
        "warnings": [*checkpoint.warnings, *decision.warnings],
    }


def _is_standard(checkpoint: Checkpoint) -> bool:
    """Tell whether other programs read the files of a checkpoint: they hold what writing them anew would, and say that
    they are PyTorch's, without which transformers 4 refuses them.
    """
    if any(file.suffix != ".safetensors" or "format" not in read_header(file)[1] for file in checkpoint.files):
        return False
    formats = {layer.settings.checkpoint_format for layer in checkpoint.layers.values()}
    encodings = {layer.encoding for layer in checkpoint.layers.values()}
    return encodings <= {"gptq"} and len(formats) <= 1 and is_as_rewritten(checkpoint)


def _place(
    checkpoint: Checkpoint, folder: Path, out: Path, link: bool, progress: Progress | None
) -> tuple[list[Path], str]:
    """Copy or link the weights into a folder, a single file as model.safetensors, several with an index.

    Returns:
        The files there, and "linked" or "copied" (where one is, all count as copied).
    """
    sources = [file.resolve() for file in checkpoint.files]  # what lies in the Hub's cache is a symbolic link
    names = ["model.safetensors"] if len(sources) == 1 else [file.name for file in checkpoint.files]
    placed = [folder / name for name in names]
    left = [pair for pair in zip(sources, placed, strict=True) if not (link and _link(*pair))]
    total = sum(source.stat().st_size for source, _ in left)
    check_space(folder, out, total)
    done = 0
    for source, path in left:
        for count in _copy(source, path):
            done += count
            if progress is not None:
                progress(done, total)
    shards = [
        (path, [name for name, entry in checkpoint.tensors.items() if entry.file == file])
        for file, path in zip(checkpoint.files, placed, strict=True)
    ]
    write_index(shards, checkpoint.nbytes())
    return placed, "copied" if left else "linked"


def _link(source: Path, path: Path) -> bool:
    """Give a file a second name; tell whether the file system and the file's owner let us."""
    try:
        os.link(source, path)
    except OSError:  # another disk, no hard links there, or the file of another user
        return False
    return True


def _copy(source: Path, path: Path) -> Iterator[int]:
    """Copy a file within the kernel, which shares the blocks on file systems that can (btrfs, XFS); yield the numbers
    of bytes.
    """
    size = source.stat().st_size
    with source.open("rb") as file, path.open("wb") as copy:
        done = 0
        try:
            while done < size:
                count = os.copy_file_range(file.fileno(), copy.fileno(), min(_CHUNK, size - done))
                if count == 0:
                    break
                done += count
                yield count
        except (AttributeError, OSError):  # another system than Linux, or between two disks; a full one shows again
            file.seek(done)
            copy.seek(done)
        if done < size:
            shutil.copyfileobj(file, copy, _CHUNK)
            yield size - done
