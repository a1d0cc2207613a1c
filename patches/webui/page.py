"""The Model tab: our options in it, how far loading is, and errors as sentences."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any

from ropewalk.errors import RopewalkError
from ropewalk.patches.webui import known, loading
from ropewalk.patches.webui.options import LORAS, NAME, OURS
from ropewalk.patches.webui.rebind import Rebindings


def check(menu: Any) -> None:
    """See that webui's module of the Model tab is as it is known here.

    Raises:
        PatchError: it is not.
    """
    for name, arguments in known.PAGE.items():
        known.expect_function(menu, name, arguments)


def apply(menu: Any, replaced: Rebindings) -> None:
    """Replace the functions of that module."""
    for name, wrap in {
        "create_ui": _create_ui,
        "load_model_wrapper": _load_model_wrapper,
        "load_lora_wrapper": _load_lora_wrapper,
        "update_truncation_length": _update_truncation_length,
    }.items():
        replaced.rebind(menu, name, wrap(getattr(menu, name)))


def _shared() -> Any:
    return importlib.import_module("modules.shared")


def _create_ui(original: Any) -> Any:
    @functools.wraps(original)
    def create_ui() -> None:
        original()
        gr: Any = importlib.import_module("gradio")
        shared = _shared()
        args, elements = shared.args, shared.gradio
        column = elements["ctx_size"].parent
        above = column.parent
        with column:
            for name, (_, text) in OURS.items():
                label, value = name.replace("_", "-"), getattr(args, name)
                if name == "cpu_mode":
                    elements[name] = gr.Dropdown(label=label, choices=["int8", "exact"], value=value, info=text)
                elif name == "cpu_layers":
                    elements[name] = gr.Slider(label=label, minimum=0, maximum=256, step=1, value=value, info=text)
                else:
                    elements[name] = gr.Textbox(label=label, value=value, info=text)
        elements["ctx_size"].info += f" {NAME}: 0 = what the model was made for."
        column.parent = above  # entering it again has made the whole tab its parent
        elements[LORAS] = elements["lora_menu"]

    return create_ui


def _load_model_wrapper(original: Any) -> Any:
    gr: Any = importlib.import_module("gradio")

    @functools.wraps(original)
    def load_model_wrapper(
        selected_model: str,
        loader: str,
        progress: Any = gr.Progress(),  # noqa: B008 - gradio looks for one in the defaults
        autoload: bool = False,
    ) -> Iterator[str]:
        if loader != NAME or not autoload or selected_model in (None, "", "None"):
            yield from original(selected_model, loader, autoload=autoload)
            return
        shared, models = _shared(), importlib.import_module("modules.models")
        yield f"Loading {_plain(selected_model)}..."
        with _Told(f"Failed to load {selected_model}") as told:
            models.unload_model()

            def show(done: int, total: int) -> None:
                progress(done / max(total, 1), desc=f"Loading {_size(done)} of {_size(total)}")

            with loading.progress_to(show):
                shared.model, shared.tokenizer = models.load_model(selected_model, loader)
        if told.error:
            yield told.error
            return
        length = shared.settings["truncation_length"]
        yield f"Successfully loaded {_plain(selected_model)}.\n\n- {_plain(loading.describe(shared.model, length))}"

    del load_model_wrapper.__wrapped__  # gradio is to see our arguments
    return load_model_wrapper


def _load_lora_wrapper(original: Any) -> Any:
    @functools.wraps(original)
    def load_lora_wrapper(selected_loras: list[str]) -> Iterator[str]:
        shared = _shared()
        if shared.model is None or not loading.is_ours(shared.model):
            yield from original(selected_loras)
            return
        names = ", ".join(selected_loras) or "none"
        yield f"Applying to {_plain(shared.model_name)}: {_plain(names)}..."
        with _Told("Failed to apply the LoRAs") as told:
            importlib.import_module("modules.LoRA").add_lora_to_model(selected_loras)
        yield told.error or f"Successfully applied the LoRAs: {_plain(', '.join(shared.lora_names) or 'none')}."

    return load_lora_wrapper


def _update_truncation_length(original: Any) -> Any:
    @functools.wraps(original)
    def update_truncation_length(current_length: int, state: dict[str, Any]) -> Any:
        shared = _shared()
        if shared.model is not None and loading.is_ours(shared.model):
            return shared.settings["truncation_length"]
        return original(current_length, state)

    return update_truncation_length


class _Told:
    """Keeps what went wrong inside as a sentence for the page; the log gets the traceback of what is not expected."""

    def __init__(self, what: str):
        self._what, self.error = what, ""

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        if isinstance(error, (RopewalkError, OSError, MemoryError)):
            self.error = _plain(f"{self._what}: {error}")
        else:
            logger = importlib.import_module("modules.logging_colors").logger
            logger.exception(self._what)
            self.error = _plain(f"{self._what}: unexpected {type(error).__name__}: {error} (the log shows where)")
        return True


def _plain(text: str) -> str:
    """Return text as Markdown shows it unchanged, on one line."""
    return re.sub(r"([\\`*_<>\[\]#~$|])", r"\\\1", " ".join(str(text).split()))


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
