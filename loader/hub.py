"""A repository of the Hub: asked for, downloaded into the Hub's own cache, or found there.

What the cache holds are links to blobs: paths are handed on as they are, since the place that a link leads to has no
config.json beside it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from ropewalk.errors import HubError
from ropewalk.loader.repository_files import ADAPTER, MODEL, WEIGHTS, Kind

log = logging.getLogger("ropewalk")


@dataclass(frozen=True)
class Request:
    """A repository of the Hub, and how it is to be asked."""

    name: str
    repo: str
    revision: str | None
    kind: Kind
    token: str | bool | None
    cache_dir: Path
    local_files_only: bool
    progress: bool


def make_request(
    repo: str,
    revision: str | None,
    kind: Kind,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool | None,
    progress: bool,
) -> Request:
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
    return Request(shown, repo, revision, kind, token, cache, bool(local_files_only), progress)


def download(request: Request) -> Path:
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
            raise HubError(
                request.name,
                f"it in the Hub's cache {request.cache_dir}, since {why}",
                found,
            )
        return folder
    api = HfApi(token=request.token)
    try:
        # A first request of our own: unlike snapshot_download's, it does not wait for ever.
        info = api.model_info(
            request.repo,
            revision=request.revision,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            files_metadata=True,
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except RevisionNotFoundError as error:
        raise HubError(request.name, *_explain(error, request, api)) from error
    except _failures() as error:
        folder, found = _look_into_cache(request)
        expected, problem = _explain(error, request, api)
        if folder is None:
            raise HubError(request.name, expected, f"{problem}, and {found}") from error
        log.warning(
            "%s: expected %s, found %s; the files in the cache are used",
            request.name,
            expected,
            problem,
        )
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


def names(request: Request) -> list[str]:
    """Return the names of the files in a repository: from the Hub, or from its cache where it is not to be asked or
    does not answer; none where neither has them.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if not (request.local_files_only or constants.HF_HUB_OFFLINE):
        try:
            info = HfApi(token=request.token).model_info(
                request.repo, revision=request.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            return [file.rfilename for file in info.siblings or ()]
        except _failures() as error:
            log.debug("%s: %s", request.name, error)
    listed = _cached_names(request)
    marker = try_to_load_from_cache(request.repo, request.kind.marker, request.cache_dir, request.revision)
    here = [entry.name for entry in Path(marker).parent.iterdir()] if isinstance(marker, str) else []
    return listed or here


def _check_names(request: Request, names: Iterable[str]) -> list[str]:
    """Return the files to download.

    Raises:
        HubError: no model, or no adapter, in the repository.
    """
    names = list(names)
    chosen = request.kind.choose(names)
    marker, weights = (
        request.kind.marker,
        [name for name in chosen if name.endswith(WEIGHTS)],
    )
    if marker in chosen and weights:
        return chosen
    if ADAPTER.marker in names and request.kind is MODEL:
        found = "a PEFT adapter, which goes on top of a model (lora=, --lora)"
    else:
        listed = [name for name in sorted(names) if not name.startswith(".")]
        found = ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") or "an empty one"
    expected = f"a repository with {marker}" if marker not in chosen else "weights in .safetensors, .bin or .pt files"
    raise HubError(request.name, expected, found)


def _check_space(request: Request, sizes: dict[str, int], commit: str | None) -> None:
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
        raise HubError(
            request.name,
            f"{needed / 1e9:.1f} GB free for it in {place}",
            f"{free / 1e9:.1f} GB",
        )


def _look_into_cache(request: Request) -> tuple[Path | None, str]:
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
        return (
            None,
            f"only a part of it in the cache (no {missing[0]}{others}), as a download that was ended leaves it",
        )
    return folder, ""


def _cached_names(request: Request) -> list[str] | None:
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
    return (
        HfHubHTTPError.__bases__[0],
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AssertionError,
    )


def _explain(error: Exception, request: Request, api: Any) -> tuple[str, str]:
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
        return (
            f"a folder of this name or the repository {place} (if it is private, {log_in})",
            "neither",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return (
            f"a revision of {place}{_branches(request, api)}",
            f"no {request.revision or 'main'!r}",
        )
    if isinstance(error, hub.LocalTokenNotFoundError):
        return f"a token ({log_in})", "none"
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return (
                f"access to {place} (check the token: {log_in})",
                f"a refusal ({status})",
            )
        later = " (try again later)" if status == 429 or status >= 500 else ""
        return f"an answer of the Hub at {constants.ENDPOINT}{later}", f"error {status}"
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    text = " ".join(str(error).split())[:160]
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return (
        f"an answer of the Hub at {constants.ENDPOINT} (check the connection, or HF_ENDPOINT)",
        found,
    )


def _branches(request: Request, api: Any) -> str:
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
