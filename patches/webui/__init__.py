"""text-generation-webui: a loader named Ropewalk, in its list of loaders, its page, its API and its command line.

What is replaced, in every module that has imported it, all of it given back by `revert`:

    models.load_model                     loads with ropewalk where the loader is Ropewalk
    models_settings.infer_loader          chooses it for a folder that GPTQ packed
    models_settings.get_model_metadata    the context that the rope decision gives
    LoRA.add_lora_transformers            adapters on packed layers, checked before the model is touched
    loaders.list_model_elements           our options beside the others (`options.py`)
    shared.fix_loader_name                knows the name
    ui_model_menu                         the page (`page.py`), now if it is imported, else when it is

A loader of that name is in the tables of the module `loaders`, too, and our options are in `shared.args`.

webui loads its model before it imports an extension, so an extension that calls `apply` serves the page and the API
only. For `--loader Ropewalk --model X` the hook of `start.py` has to be there before webui's first import.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from ropewalk.errors import PatchError
from ropewalk.patches.webui import known, loading, options, page
from ropewalk.patches.webui.rebind import Rebindings
from ropewalk.patches.webui.watch import watch

log = logging.getLogger("ropewalk")

NAME = options.NAME
_replaced = Rebindings()


def apply() -> str:
    """Give the webui of this process the loader; return one line that says what was done.

    Raises:
        PatchError: not inside webui, or one whose functions are not as they are known here; nothing is changed then.
    """
    if "modules.shared" not in sys.modules:
        raise PatchError(known.PACKAGE, "a process that runs it (ropewalk webui run server.py)", "none of its modules")
    if not _replaced:
        modules = {name: importlib.import_module(f"modules.{name}") for name in known.SIGNATURES}
        known.check(modules)
        menu = sys.modules.get("modules.ui_model_menu")
        if menu is not None:
            page.check(menu)
        _replace(modules)
        if menu is not None:
            page.apply(menu, _replaced)
        else:
            _replaced.also(watch({"modules.ui_model_menu": _page_was_imported}))
    return f"{known.PACKAGE}: loader {NAME} added; it is chosen for folders that GPTQ packed"


def _replace(modules: dict[str, Any]) -> None:
    shared, loaders = modules["shared"], modules["loaders"]
    loaders.loaders_and_params[NAME] = list(options.PARAMETERS)
    # Sampling is transformers', whoever loads the model.
    loaders.loaders_samplers[NAME] = set(loaders.loaders_samplers["Transformers"])
    _replaced.also(lambda: [getattr(loaders, table).pop(NAME, None) for table in known.TABLES])
    _replaced.also(options.add_to(shared))
    wrappers = {
        ("models", "load_model"): loading.load_model,
        ("models_settings", "infer_loader"): loading.infer_loader,
        ("models_settings", "get_model_metadata"): loading.get_model_metadata,
        ("LoRA", "add_lora_transformers"): loading.add_lora_transformers,
        ("loaders", "list_model_elements"): options.list_model_elements,
        ("shared", "fix_loader_name"): options.fix_loader_name,
    }
    for (module, function), wrap in wrappers.items():
        _replaced.rebind(modules[module], function, wrap(getattr(modules[module], function)))
    for cached in ("get_all_params", "list_all_samplers"):
        clear = getattr(getattr(loaders, cached), "cache_clear", lambda: None)
        clear()  # it may have been asked before there was a loader more
        _replaced.also(clear)


def _page_was_imported(menu: Any) -> None:
    try:
        page.check(menu)
    except PatchError as error:
        log.error("%s", error)  # the API and the command line work all the same
    else:
        page.apply(menu, _replaced)


def revert() -> str:
    """Give webui back what was replaced. A model that is loaded stays, and can be unloaded."""
    _replaced.restore()
    return f"{known.PACKAGE}: as it was"


def status() -> dict[str, Any]:
    """Return {"package", "version", "tested", "applied"}; the version is that of the webui which this process runs
    or in whose folder it was started, and None where there is none.
    """
    return {"package": known.PACKAGE, "version": known.version(), "tested": known.TESTED, "applied": bool(_replaced)}
