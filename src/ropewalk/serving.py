"""`transformers serve` in this process, with the patch on: its own server, handlers and options.

What is ours is small and sits in the server's model manager: the name `demo`, names with a branch as ropewalk has them
(user/name:branch), a chat template by name, and a sentence for who asks a model without one to chat.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from ropewalk.chat_templates import chat_template
from ropewalk.errors import MissingPackageError, PatchError, RopewalkError, UsageError
from ropewalk.loader.source import HUB_NAME, find_source, split_branch
from ropewalk.patches.replace import Replacements, expect_arguments, installed
from ropewalk.shipped import resolve
from ropewalk.templates import TEMPLATES

log = logging.getLogger("ropewalk")

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
# Methods of transformers' ModelManager that ours extend, and the arguments that they begin with.
METHODS = {
    "process_model_name": ["model_id"],
    "_load_processor": ["self", "model_id_and_revision"],
    "_load_model": ["self", "model_id_and_revision"],
}
# Of transformers' Serve: how it takes the model, and what only its own tests use.
_MODEL, _HIDDEN = "force_model", "non_blocking"


def options() -> dict[str, tuple[Any, Any, str]]:
    """Return name -> (type, default, help) of the options of `transformers serve`, as its signature has them.

    Raises:
        PatchError: a transformers that has it otherwise.
    """
    from transformers.cli.serve import Serve

    hints = typing.get_type_hints(Serve.__init__, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(Serve.__init__).parameters.items():
        if name in ("self", _MODEL, _HIDDEN):
            continue
        plain, *about = typing.get_args(hints.get(name, str)) or (hints.get(name, str),)
        kinds = [kind for kind in typing.get_args(plain) or (plain,) if kind is not type(None)]
        text = next((getattr(note, "help", None) for note in about if getattr(note, "help", None)), "")
        found[name] = (kinds[0], parameter.default, " ".join((text or "").split()))
    if not {"host", "port"} <= set(found) or _MODEL not in hints:
        raise PatchError(
            f"transformers {installed('transformers')}", f"serve with {_MODEL}, host and port", list(hints)
        )
    return found


def check_packages() -> None:
    """See that what the server needs is installed.

    Raises:
        MissingPackageError: it is not.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"expected the packages {', '.join(PACKAGES)} (pip install 'ropewalk[serve]'), found no {missing[0]}"
        )


def serve(model: str | None, template: str | None = None, **arguments: Any) -> None:
    """Load a model and answer requests until the process is told to end.

    Args:
        model: as transformers takes it, or "demo", or user/name:branch; None for whatever requests ask for.
        template: a name of `ropewalk.templates`, in place of the chat template that the model has or lacks.
        arguments: by the names of `options`.

    Raises:
        MissingPackageError: what the server needs is not installed.
        UsageError: an unknown template or log level.
        CheckpointError, RopewalkError: a model that cannot be loaded, or settings that transformers refuses.
        PatchError: a transformers whose server is not as it is known here.
    """
    if template is not None and template not in TEMPLATES:
        raise UsageError(f"--template: expected one of {', '.join(TEMPLATES)}, found {template!r}")
    check_packages()
    from transformers.cli.serve import Serve
    from transformers.utils.logging import log_levels

    from ropewalk.patches import patch

    level = str(arguments.get("log_level", "warning")).lower()
    if level not in log_levels:
        raise UsageError(f"--log-level: expected one of {', '.join(log_levels)}, found {level!r}")
    if model is not None:
        model = _found(model)
    patch("transformers", "peft")
    # It logs requests to stdout, where --json has its object.
    with _our_manager(template), contextlib.redirect_stdout(sys.stderr):
        try:
            Serve(**{_MODEL: model}, **arguments)
        except ValueError as error:  # options that it refuses, and models
            raise error if isinstance(error, RopewalkError) else RopewalkError(str(error)) from error


def _found(model: str) -> str:
    """Return the name as it is where transformers finds it, else that of the folder that is meant.

    Raises:
        MissingFileError: nothing of this name, which cannot be one of the Hub.
    """
    name, _ = split_branch(model)
    if model.endswith(".gguf") or os.path.exists(resolve(model)) or HUB_NAME.fullmatch(name.partition("@")[0]):
        return model
    return str(find_source(model).folder)


@contextlib.contextmanager
def _our_manager(template: str | None) -> Iterator[None]:
    """Have the server make a model manager of ours."""
    from transformers.cli.serving import model_manager

    for name, first in METHODS.items():
        method = getattr(model_manager.ModelManager, name, lambda: None)
        expect_arguments("transformers", f"ModelManager.{name}", method, first)
    replaced = Replacements()
    replaced.put(model_manager, "ModelManager", manager_class(model_manager.ModelManager, template))
    try:
        yield
    finally:
        replaced.restore()


def manager_class(base: Any, template: str | None) -> Any:
    """Return transformers' ModelManager with our names and chat templates.

    Args:
        base: that class.
        template: a name of `ropewalk.templates`, or None.
    """

    class Manager(base):
        @staticmethod
        def process_model_name(model_id: str) -> str:
            """Return the name that a model is kept under, its branch as transformers writes it: user/name@branch."""
            name, branch = split_branch(model_id)
            return base.process_model_name(model_id if branch is None else f"{name}@{branch}")

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            """Return what /v1/models lists: the one model that is served, or those in the Hub's cache."""
            from huggingface_hub import CacheNotFound

            if self.force_model is not None:
                return [{"owned_by": "local", "id": self.force_model, "object": "model", "created": 0}]
            try:
                found: list[dict[str, Any]] = base.get_gen_models(cache_dir)
            except CacheNotFound:
                return []
            return found

        def _load_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            processor = super()._load_processor(_shipped(model_id_and_revision), *args, **kwargs)
            tokenizer = getattr(processor, "tokenizer", processor)
            if template is not None:
                processor.chat_template = tokenizer.chat_template = chat_template(template, tokenizer)
            elif not getattr(processor, "chat_template", None):
                name = model_id_and_revision.removesuffix("@main")
                log.warning("%s", _no_template(name))
                processor.apply_chat_template = _refuse(name)
            return processor

        def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            return super()._load_model(_shipped(model_id_and_revision), *args, **kwargs)

    return Manager


def _shipped(model_id_and_revision: str) -> str:
    """Return the name with the folder of the model that ships in place of `demo`."""
    name, at, revision = model_id_and_revision.partition("@")
    folder = resolve(name)
    return model_id_and_revision if folder == name else f"{folder}{at}{revision}" if at else str(folder)


def _no_template(name: str) -> str:
    return (
        f"{name}: expected a chat template for /v1/chat/completions, found none; start the server with --template "
        f"({', '.join(TEMPLATES)}), or ask /v1/completions"
    )


def _refuse(name: str) -> Callable[..., Any]:
    def apply_chat_template(*args: Any, **kwargs: Any) -> Any:
        from fastapi import HTTPException

        raise HTTPException(status_code=400, detail=_no_template(name))

    return apply_chat_template
