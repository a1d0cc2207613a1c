"""Where a model is: from what a user names (a folder, a file, user/name:branch) to a folder on this machine.

Nothing is read here but names; whether the files are any good is `ropewalk.loader.checkpoint`'s business.
What comes from the Hub stays in its own cache, whose snapshots are links to blobs: paths are handed on as they
are, since the place that a link leads to has no config.json beside it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from ropewalk.errors import HubError, MissingFileError, UsageError

log = logging.getLogger("ropewalk")

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
OTHER_MODELS = (".gguf", ".ggml", ".json", ".onnx", ".h5", ".msgpack")

# What a model needs besides its weights, by pattern; all of it at the root of a repository.
SIDE_FILES = (
    *("config.json", "quantize_config.json", "quant_config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "tekken.json"),
    *("*.model", "*.tiktoken", "*.jinja"),
)
NEVER = (".py", ".gguf", ".ggml", ".msgpack", ".h5", ".onnx")
# Weights by their suffix, but not of the model; consolidated.safetensors has Mistral's own names, a second time.
NOT_WEIGHTS = ("adapter_model.*", "training_args.*", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*")
TWICE = "consolidated*"
SHARD = re.compile(r".+-\d{5}-of-\d{5}\.\w+")

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


@dataclass(frozen=True)
class _Kind:
    """What is looked for.

    Attributes:
        what: for messages.
        marker: the file that shows that a folder has one.
        shelves: where text-generation-webui keeps them, below the current folder.
        choose: from the names in a repository to those that are needed.
    """

    what: str
    marker: str
    shelves: tuple[str, ...]
    choose: Callable[[Iterable[str]], list[str]]


@dataclass(frozen=True)
class _Request:
    """A repository of the Hub, and how it is to be asked."""

    name: str
    repo: str
    revision: str | None
    kind: _Kind
    token: str | bool | None
    cache_dir: Path
    local_files_only: bool
    progress: bool


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
    return Source(folder, _weights_beside(folder), name if revision is None else f"{_split(name)[0]}:{revision}")


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
    branch = _split(name)[1]
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


def _split(name: str) -> tuple[str, str | None]:
    r"""Return user/name and branch of user/name:branch; the colon of C:\models is none."""
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
        raise MissingFileError(file, f"{MODEL.what}, or a file of the kinds {', '.join(WEIGHTS)}", f"a file{kind}")
    old = OLD_NAME.fullmatch(file.stem)
    folders = [file.parent, *([file.parent / old["model"]] if old else []), file.parent / file.stem]
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
    kind: _Kind,
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
    base, branch = _split(name)
    branch = branch if revision is None else revision
    looked = list(_webui_folders(base, branch, kind))
    for folder in looked:
        if os.path.isdir(folder):
            return folder
    if not isinstance(model, Path) and _is_hub_name(base, name):
        return _download(_request(base, branch, kind, token, cache_dir, local_files_only, progress))
    others = [str(folder) for folder in looked if str(folder) != name]
    nor = f", nor a folder {' or '.join(others)}" if others else ""
    raise MissingFileError(name, f"{kind.what}, or a name of the Hub (user/name:branch)", f"nothing of this name{nor}")


def _webui_folders(base: str, branch: str | None, kind: _Kind) -> Iterable[Path]:
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


def choose_model_files(names: Iterable[str]) -> list[str]:
    """Return the files of a repository that a model needs; without weights it has no file in it that `is_weights`.

    Args:
        names: paths in the repository.
    """
    flat = _at_the_root(names)
    side = [name for name in flat if any(fnmatchcase(name, pattern) for pattern in SIDE_FILES)]
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
        weights = [name for name in flat if is_weights(name) and name.endswith(suffixes)]
        indices = [name for name in flat if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        shards = [name for name in weights if SHARD.fullmatch(name)] if indices else []
        chosen = shards or [name for name in weights if not fnmatchcase(name, TWICE)] or weights
        if chosen:
            return list(dict.fromkeys([*side, *indices, *chosen]))
    return side


def choose_adapter_files(names: Iterable[str]) -> list[str]:
    """Return the files of a repository that a PEFT adapter needs."""
    flat = _at_the_root(names)
    weights = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in flat][:1]
    return [*(name for name in flat if name == ADAPTER.marker), *weights]


def is_weights(name: str) -> bool:
    """Tell whether a file of a repository may hold weights of a model, by its name."""
    return name.endswith(WEIGHTS) and not any(fnmatchcase(name, pattern) for pattern in NOT_WEIGHTS)


def _at_the_root(names: Iterable[str]) -> list[str]:
    """Return what is in no folder, since original/ and onnx/ hold the same weights once more; and no code."""
    return sorted(n for n in names if "/" not in n and "\\" not in n and n[:1] != "." and not n.endswith(NEVER))


MODEL = _Kind(
    "a folder with a model (config.json and .safetensors)",
    "config.json",
    ("models", "user_data/models"),
    choose_model_files,
)
ADAPTER = _Kind(
    "a PEFT adapter (adapter_config.json)", "adapter_config.json", ("loras", "user_data/loras"), choose_adapter_files
)


def _request(
    repo: str,
    revision: str | None,
    kind: _Kind,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool | None,
    progress: bool,
) -> _Request:
    """Gather a request.

    Raises:
        HubError: a name that the Hub cannot have.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    shown = repo if revision is None else f"{repo}:{revision}"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        letters = "letters, digits, -, _ and ., neither -- nor .. in it, no .git at its end"
        found = "nothing here, and a name that it cannot have"
        raise HubError(shown, f"{kind.what}, or a name of the Hub ({letters})", found) from None
    cache = Path(os.path.expanduser(cache_dir or constants.HF_HUB_CACHE))
    return _Request(shown, repo, revision, kind, token, cache, bool(local_files_only), progress)


def _download(request: _Request) -> Path:
    """Return the folder in the Hub's cache, with all that is needed of a repository in it.

    Raises:
        HubError: it cannot be had.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    if request.local_files_only or constants.HF_HUB_OFFLINE:
        folder, found = _look_into_cache(request)
        if folder is None:
            why = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "only local files are allowed"
            raise HubError(request.name, f"it in the Hub's cache {request.cache_dir}, since {why}", found)
        return folder
    api = HfApi(token=request.token)
    try:
        # A first request of our own: unlike snapshot_download's, it does not wait for ever.
        info = api.model_info(
            request.repo, revision=request.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT, files_metadata=True
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except RevisionNotFoundError as error:
        raise HubError(request.name, *_explain(error, request, api)) from error
    except _failures() as error:
        folder, found = _look_into_cache(request)
        expected, problem = _explain(error, request, api)
        if folder is None:
            raise HubError(request.name, expected, f"{problem}, and {found}") from error
        log.warning("%s: expected %s, found %s; the files in the cache are used", request.name, expected, problem)
        return folder
    names = _check_names(request, sizes)
    _check_space(request, {name: sizes[name] for name in names}, info.sha)
    try:
        folder = Path(
            snapshot_download(
                request.repo,
                revision=request.revision,
                token=request.token,
                cache_dir=request.cache_dir,
                allow_patterns=[escape(name) for name in names],
                tqdm_class=None if request.progress else _silent(),
            )
        )
    except _failures() as error:
        expected, problem = _explain(error, request, api)
        raise HubError(request.name, expected, f"{problem}, before all of it was here") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = f"no {missing[0]} any more: it has changed meanwhile, try once more"
        raise HubError(request.name, f"the files that the Hub has just listed in {folder}", found)
    return folder


def _check_names(request: _Request, names: Iterable[str]) -> list[str]:
    """Return the files to download.

    Raises:
        HubError: no model, or no adapter, in the repository.
    """
    names = list(names)
    chosen = request.kind.choose(names)
    marker, weights = request.kind.marker, [name for name in chosen if name.endswith(WEIGHTS)]
    if marker in chosen and weights:
        return chosen
    if ADAPTER.marker in names and request.kind is MODEL:
        found = "a PEFT adapter, which goes on top of a model (lora=, --lora)"
    else:
        listed = [name for name in sorted(names) if not name.startswith(".")]
        found = ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") or "an empty one"
    expected = f"a repository with {marker}" if marker not in chosen else "weights in .safetensors, .bin or .pt files"
    raise HubError(request.name, expected, found)


def _check_space(request: _Request, sizes: dict[str, int], commit: str | None) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        HubError: with what is needed and what is free.
    """
    from huggingface_hub import try_to_load_from_cache

    needed = sum(
        size
        for name, size in sizes.items()
        if not isinstance(try_to_load_from_cache(request.repo, name, request.cache_dir, commit), str)
    )
    place = request.cache_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free and needed > free:  # some network file systems say 0, whatever they have
        raise HubError(request.name, f"{needed / 1e9:.1f} GB free for it in {place}", f"{free / 1e9:.1f} GB")


def _look_into_cache(request: _Request) -> tuple[Path | None, str]:
    """Return the folder in the cache if all that is needed is there, or None and what there is."""
    from huggingface_hub import try_to_load_from_cache

    marker = try_to_load_from_cache(request.repo, request.kind.marker, request.cache_dir, request.revision)
    if not isinstance(marker, str):
        return None, "nothing of it in the cache"
    folder = Path(marker).parent
    # A link whose blob is not there is no file: what a killed download left counts as missing.
    here = [entry.name for entry in folder.iterdir() if entry.is_file()]
    listed = _cached_names(request)
    needed = request.kind.choose(listed or here)
    missing = [name for name in needed if name not in here]
    if listed is None:
        missing += [shard for name in needed if name.endswith(".index.json") for shard in _shards(folder / name)]
        missing = [name for name in missing if name not in here]
    if not any(name.endswith(WEIGHTS) for name in needed):
        missing.append("the weights")
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return None, f"only a part of it in the cache (no {missing[0]}{others}), as a download that was ended leaves it"
    return folder, ""


def _cached_names(request: _Request) -> list[str] | None:
    """Return the names in a repository as the cache remembers them, or None."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # before huggingface_hub 2
        return None
    try:
        files = get_cached_repo_tree(request.repo, revision=request.revision, cache_dir=request.cache_dir)
    except CachedRepoTreeNotFoundError:
        return None
    return [file.path for file in files]


def _shards(index: Path) -> Sequence[str]:
    """Return the files that an index names; none for one that cannot be read, which is found out later."""
    try:
        return [
            str(name) for name in dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _failures() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises when the Hub does not do what it should."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its base is the HTTP library's own error, of httpx up to huggingface_hub 1 and of httpx2 from then on.
    # ValueError and the others: an answer that is not the Hub's, such as the log-in page of a network.
    return (HfHubHTTPError.__bases__[0], OSError, ValueError, TypeError, KeyError, AssertionError)


def _explain(error: Exception, request: _Request, api: Any) -> tuple[str, str]:
    """Return what was expected of the Hub, with what to do about it, and what was found.

    Raises:
        OSError: `error` itself, where it is the disk's and not the Hub's.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it only says that there was another
    place = f"{constants.ENDPOINT}/{request.repo}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, hub.GatedRepoError):
        return (
            f"access to {place} (accept its terms there, then {log_in})",
            "a gated repository that does not let us in",
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"a folder of this name or the repository {place} (if it is private, {log_in})", "neither"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"a revision of {place}{_branches(request, api)}", f"no {request.revision or 'main'!r}"
    if isinstance(error, hub.LocalTokenNotFoundError):
        return f"a token ({log_in})", "none"
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"access to {place} (check the token: {log_in})", f"a refusal ({status})"
        later = " (try again later)" if status == 429 or status >= 500 else ""
        return f"an answer of the Hub at {constants.ENDPOINT}{later}", f"error {status}"
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    text = " ".join(str(error).split())[:160]
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"an answer of the Hub at {constants.ENDPOINT} (check the connection, or HF_ENDPOINT)", found


def _branches(request: _Request, api: Any) -> str:
    """Return the branches that there are, for a message, or nothing."""
    try:
        names = [branch.name for branch in api.list_repo_refs(request.repo).branches]
    except _failures():
        return ""
    return f" ({', '.join(names[:20])}{', …' if len(names) > 20 else ''})" if names else ""


def _silent() -> Any:
    """Return a progress bar that shows nothing; huggingface_hub takes a class."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
