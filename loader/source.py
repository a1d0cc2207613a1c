"""Where a model is: from what a user names (a folder, a file, user/name:branch) to a folder on this machine.

Nothing is read here but names; whether the files are any good is `ropewalk.loader.checkpoint`'s business.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from ropewalk.errors import MissingFileError, UsageError
from ropewalk.loader import hub
from ropewalk.loader.repository_files import ADAPTER, MODEL, OTHER_MODELS, WEIGHTS, Kind

log = logging.getLogger("ropewalk")


# GPTQ-for-LLaMa's weights as text-generation-webui had them in 2023: models/NAME-4bit-128g.safetensors.
OLD_NAME = re.compile(r"(?P<model>.+?)-\d+bit(?:[-.].*)?")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
REVISION = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)
# First parts that no user of the Hub can have, and that folders often have.
NO_USERS = ("models", "datasets", "spaces", "user_data")


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        folder: where config.json is (or should be: an existing folder is not looked into).
        file: the one weight file that was asked for; None to find the weights in the folder.
        name: as the user named it, for messages.
    """

    folder: Path
    file: Path | None
    name: str


def find_source(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    progress: bool = True,
) -> Source:
    """Find a model, and download it if it is one of the Hub; by the first rule that fits.

    1. A folder, or a file with weights and config.json beside it (or in the folder NAME beside
       NAME-4bit-128g.safetensors, as text-generation-webui had it in 2023).
    2. user/name:branch that text-generation-webui's download-model.py has fetched: the folder user_name_branch here,
       in models/ or in user_data/models/.
    3. user/name or user/name:branch of the Hub: what is needed of it, in the Hub's own cache. $HF_ENDPOINT, $HF_HOME,
       $HF_TOKEN and $HF_HUB_OFFLINE count as they do everywhere.

    Args:
        model: its name. A Path never becomes a request to the Hub.
        revision: a branch, a tag or a commit, instead of :branch.
        token: for private and gated repositories, as huggingface_hub takes it; by default that of `hf auth login`.
        cache_dir: instead of the Hub's cache in the user's home.
        local_files_only: take what the cache has, and ask nobody.
        progress: False for no bars; else huggingface_hub shows its own, unless its environment says not to.

    Returns:
        The folder and, for a single file, the file.

    Raises:
        MissingFileError: nothing of this name, or a file that is no model or lacks its config.json.
        HubError: the Hub does not give it, and the cache does not have it.
        UsageError: a revision that contradicts the name, or cannot be one; a token that cannot be one.
    """
    name = _checked_name(model, revision, token)
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # unlike Path.exists, it takes any text
        _refuse_revision(name, revision)
        if path.is_dir():
            return Source(path, _weights_beside(path), name)
        return Source(_folder_of(path), path, name)
    folder = _find_elsewhere(model, MODEL, revision, token, cache_dir, local_files_only, progress)
    return Source(
        folder,
        _weights_beside(folder),
        name if revision is None else f"{split_branch(name)[0]}:{revision}",
    )


def find_adapter(
    adapter: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    progress: bool = True,
) -> Path:
    """Return the folder of a PEFT adapter, by the rules of `find_source`; webui keeps adapters in loras/.

    Args:
        adapter: a folder with adapter_config.json, the file with the weights in it, or user/name:branch.
        revision, token, cache_dir, local_files_only, progress: as `find_source` takes them.

    Raises:
        MissingFileError: nothing of this name, or no adapter in it.
        HubError, UsageError: as in `find_source`.
    """
    name = _checked_name(adapter, revision, token)
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        _refuse_revision(name, revision)
    else:
        path = _find_elsewhere(adapter, ADAPTER, revision, token, cache_dir, local_files_only, progress)
    folder = path if path.is_dir() else path.parent
    if not (folder / ADAPTER.marker).is_file():
        raise MissingFileError(folder, ADAPTER.what, "none")
    return folder


def _checked_name(model: str | Path, revision: str | None, token: str | bool | None) -> str:
    """Return the name as text.

    Raises:
        UsageError: an empty one, or a revision or token that could not be one.
    """
    name = str(model)
    if not name:
        raise UsageError("model: expected a folder, a file or user/name, found an empty name")
    if revision is not None and not _is_revision(revision):
        raise UsageError(f"revision: expected a branch, a tag or a commit, found {revision!r}")
    branch = split_branch(name)[1]
    if revision is not None and branch is not None and branch != revision and not os.path.exists(name):
        raise UsageError(f"revision: expected one, found {branch!r} in {name} and {revision!r}")
    # What is wrong with a token must not be shown, and httpx would show it.
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise UsageError("token: expected one word of plain characters, found something else")
    return name


def _is_revision(text: str) -> bool:
    """Tell whether a text can be a revision; it becomes part of paths in the cache."""
    return REVISION.fullmatch(text) is not None and ".." not in text


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"revision: expected none for what is on this machine ({name}), found {revision!r}")


def split_branch(name: str) -> tuple[str, str | None]:
    r"""Return user/name and branch of user/name:branch, or the name and None; the colon of C:\models is none."""
    head, colon, branch = name.rpartition(":")
    if not colon or len(head) < 2 or not _is_revision(branch):
        return name, None
    return head, branch


def _folder_of(file: Path) -> Path:
    """Return the folder with the config.json of a weight file.

    Raises:
        MissingFileError: none, or a file of another kind.
    """
    if file.suffix.lower() not in WEIGHTS or not file.is_file():
        kind = f" of the kind {file.suffix}" if file.suffix else ""
        raise MissingFileError(
            file,
            f"{MODEL.what}, or a file of the kinds {', '.join(WEIGHTS)}",
            f"a file{kind}",
        )
    old = OLD_NAME.fullmatch(file.stem)
    folders = [
        file.parent,
        *([file.parent / old["model"]] if old else []),
        file.parent / file.stem,
    ]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    beside = " or ".join(str(folder) for folder in dict.fromkeys(folders[1:]))
    raise MissingFileError(file, f"the model's config.json beside it, or in {beside}", "none")


def _weights_beside(folder: Path) -> Path | None:
    """Return the weights of a folder that has none itself and one file beside it, as of 2023 (see OLD_NAME)."""
    if any(entry.suffix in WEIGHTS for entry in folder.iterdir()):
        return None
    whole = folder.absolute()
    beside = whole.parent.glob(f"{escape(whole.name)}-*") if whole.name else iter(())
    found = [(match["model"], file) for file in beside if (match := OLD_NAME.fullmatch(file.stem)) and file.is_file()]
    for suffix in (".safetensors", ".pt"):
        files = [file for model, file in found if model == whole.name and file.suffix == suffix]
        if files:
            return files[0] if len(files) == 1 else None
    return None


def _find_elsewhere(
    model: str | Path,
    kind: Kind,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool | None,
    progress: bool,
) -> Path:
    """Follow the rules for a name that is no path: webui's folders, then the Hub.

    Raises:
        MissingFileError: neither.
        HubError: a name for the Hub, which does not give it.
    """
    name = str(model)
    base, branch = split_branch(name)
    branch = branch if revision is None else revision
    looked = list(_webui_folders(base, branch, kind))
    for folder in looked:
        if os.path.isdir(folder):
            return folder
    if not isinstance(model, Path) and _is_hub_name(base, name):
        return hub.download(hub.make_request(base, branch, kind, token, cache_dir, local_files_only, progress))
    others = [str(folder) for folder in looked if str(folder) != name]
    nor = f", nor a folder {' or '.join(others)}" if others else ""
    raise MissingFileError(
        name,
        f"{kind.what}, or a name of the Hub (user/name:branch)",
        f"nothing of this name{nor}",
    )


def _webui_folders(base: str, branch: str | None, kind: Kind) -> Iterable[Path]:
    """Yield where download-model.py of text-generation-webui would have put user/name:branch."""
    path = Path(os.path.expanduser(base))
    if (branch and "/" in branch) or any(part == ".." or "\\" in part for part in path.parts):
        return
    suffix = f"_{branch}" if branch and branch != "main" else ""
    if path.is_absolute():
        if len(path.parts) > 3 and path.parents[1].name in kind.shelves:
            yield path.parents[1] / ("_".join(path.parts[-2:]) + suffix)
        return
    for shelf in sorted(kind.shelves, key=len, reverse=True):
        if path.is_relative_to(shelf) and path != Path(shelf):
            path = path.relative_to(shelf)
            break
    if len(path.parts) in (1, 2):
        for shelf in (".", *kind.shelves):
            yield Path(shelf) / ("_".join(path.parts) + suffix)


def _is_hub_name(base: str, name: str) -> bool:
    """Tell whether a name without its branch may be asked of the Hub: user/name, and nothing that looks like a path."""
    if not HUB_NAME.fullmatch(base) or ".." in name or base.endswith((*WEIGHTS, *OTHER_MODELS)):
        return False
    return base.split("/")[0] not in NO_USERS
