"""Files of ours in a webui's folder: the extension, the instruction templates, and what starts with Python."""

from __future__ import annotations

import json
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ropewalk import __version__
from ropewalk.chat_templates import jinja
from ropewalk.errors import MissingFileError, MissingPackageError, UsageError
from ropewalk.patches.webui import known
from ropewalk.patches.webui.options import NAME, OURS

EXTENSION = "ropewalk"
# The first line of every file that is written; no file without it is ever touched.
MARK = "# Written by ropewalk; `ropewalk webui uninstall` removes it."
PTH = "ropewalk_webui.pth"
# Python runs a line of a .pth file that begins with "import" whenever it starts; this one then looks at its arguments.
PTH_LINE = (
    "import sys; any(a.endswith('server.py') for a in sys.orig_argv) and "
    "__import__('importlib.util').util.find_spec('ropewalk') and "
    "__import__('ropewalk.patches.webui.start', fromlist=['start']).hook_if_webui()"
)

SCRIPT = f'''{MARK}
"""The loader {NAME}: GPTQ models with long context."""

from ropewalk.webui.extension import params, setup  # noqa: F401
'''


def install(folder: Path, at_start: bool = False) -> dict[str, Any]:
    """Put the extension and the instruction templates into a webui's folder. Doing it twice changes nothing.

    Args:
        folder: the one with server.py.
        at_start: whether this Python is to add the loader whenever it runs webui's server.py.

    Returns:
        {"webui", "extension", "files", "at_start"}: the folder, the folder of the extension, what was written, and
        the .pth file or None.

    Raises:
        MissingFileError: no webui there.
        UsageError: files of somebody else where ours would be.
        MissingPackageError: at_start, and ropewalk is not installed in this Python.
    """
    folder = _webui(folder)
    user_data = _user_data(folder)
    # A clone or a link of the repository stays as it is.
    extension = next((path for path in _places(folder) if (path / "script.py").is_file() and not _is_ours(path)), None)
    written = []
    if extension is None:
        extension = _places(folder)[0]
        if extension.exists() and any(extension.iterdir()) and not _is_ours(extension):
            raise UsageError(f"{extension}: expected nothing or an extension of ropewalk's, found other files")
        extension.mkdir(parents=True, exist_ok=True)
        texts = {"script.py": SCRIPT, "requirements.txt": _requirements(), "settings.yaml": _settings()}
        written += [_write(extension / name, text) for name, text in texts.items()]
    elif not _is_repository(extension):
        raise UsageError(f"{extension}: expected nothing or an extension of ropewalk's, found another")
    written += put_templates(user_data)
    pth = _put_pth() if at_start else None
    return {
        "webui": str(folder),
        "extension": str(extension),
        "files": [str(path) for path in [*written, *([pth] if pth else [])]],
        "at_start": str(pth) if pth else None,
    }


def put_templates(user_data: Path) -> list[Path]:
    """Write the instruction templates; return their files. One that was changed stays as it is."""
    folder = user_data / "instruction-templates"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {folder / f"{NAME}-{name}.yaml": f"{MARK}\n{text}" for name, text in templates().items()}
    return [_write(path, text) for path, text in texts.items() if not path.exists() or _has_mark(path)]


def templates() -> dict[str, str]:
    """Return webui's YAML of each of `ropewalk.templates.TEMPLATES`."""
    from ropewalk.templates import TEMPLATES

    return {name: f"instruction_template: {json.dumps(jinja(each))}\n" for name, each in TEMPLATES.items()}


def uninstall(folder: Path) -> dict[str, Any]:
    """Remove what `install` and the extension have written, and nothing else.

    Returns:
        {"webui", "removed", "left"}: the folder, the files removed, and sentences on what still speaks of ropewalk
        and is not ours to remove.

    Raises:
        MissingFileError: no webui there.
    """
    folder = _webui(folder)
    removed: list[Path] = []
    left: list[str] = []
    for extension in _places(folder):
        if _is_ours(extension):
            removed += _remove(extension.iterdir())
            shutil.rmtree(extension / "__pycache__", ignore_errors=True)
            if any(extension.iterdir()):
                left.append(f"{extension}: has files that ropewalk did not write")
            else:
                extension.rmdir()
        elif extension.exists() or extension.is_symlink():
            left.append(f"{extension}: is a clone or a link that ropewalk did not make")
    user_data = _user_data(folder)
    ours = list((user_data / "instruction-templates").glob(f"{NAME}-*.yaml"))
    removed += _remove(ours)
    left += [f"{path}: was changed" for path in ours if path.exists()]
    removed += _remove([_pth()])
    for settings in (user_data / "settings.yaml", user_data / "models/config-user.yaml"):
        if settings.is_file() and "ropewalk" in settings.read_text(encoding="utf-8").lower():
            left.append(f"{settings}: your settings name ropewalk; webui cannot load with it any more")
    return {"webui": str(folder), "removed": [str(path) for path in removed], "left": left}


def _webui(folder: Path) -> Path:
    folder = folder.expanduser()
    if not known.is_webui(folder):
        found = "neither" if folder.is_dir() else "no such folder"
        raise MissingFileError(folder, f"{known.PACKAGE} (server.py and modules/shared.py)", found)
    return folder.resolve()


def _user_data(folder: Path) -> Path:
    """Return where webui keeps what is the user's: in its folder or, where it is portable, beside it."""
    beside = folder.parent / "user_data"
    return beside if beside.is_dir() and not (folder / "user_data").is_dir() else folder / "user_data"


def _places(folder: Path) -> list[Path]:
    return [_user_data(folder) / "extensions" / EXTENSION, folder / "extensions" / EXTENSION]


def _is_ours(extension: Path) -> bool:
    return not extension.is_symlink() and _has_mark(extension / "script.py")


def _is_repository(extension: Path) -> bool:
    return (extension / "src/ropewalk/webui").is_dir()


def _has_mark(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _remove(paths: Any) -> list[Path]:
    removed = [path for path in sorted(paths) if path.is_file() and _has_mark(path)]
    for path in removed:
        path.unlink()
    return removed


def _pth() -> Path:
    return Path(sysconfig.get_paths()["purelib"], PTH)


def _put_pth() -> Path:
    try:
        distribution(EXTENSION)
    except PackageNotFoundError:
        raise MissingPackageError(
            "--at-start: expected ropewalk to be installed in webui's Python (pip install), found only its folder"
        ) from None
    return _write(_pth(), f"{MARK}\n{PTH_LINE}\n")


def _requirements() -> str:
    """Return the requirement by which pip installs what runs now, from where it was installed."""
    origin = None
    try:
        text = distribution(EXTENSION).read_text("direct_url.json")
        origin = json.loads(text)["url"] if text else None
    except (PackageNotFoundError, ValueError, KeyError):
        origin = None
    return f"{MARK}\n" + (f"{EXTENSION} @ {origin}\n" if origin else f"{EXTENSION}=={__version__}\n")


def _settings() -> str:
    """Return settings.yaml: the extension on, and its options as they are by default."""
    lines = [
        MARK,
        "# For webui: copy what you need into user_data/settings.yaml, or start it with --settings and this file.",
        f"default_extensions: [{EXTENSION}]",
        f"{EXTENSION}-model: ''  # loaded when webui has started, where no --model is given",
    ]
    for name, (default, text) in OURS.items():
        lines += [f"# {text}", f"{EXTENSION}-{name}: {json.dumps(default)}"]
    return "\n".join(lines) + "\n"
