"""The extension of text-generation-webui, for a clone of this repository or a link to one: extensions/ropewalk."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

if importlib.util.find_spec("ropewalk") is None:
    # Not installed: the folders of the repository are the package, as setup.py maps them.
    sys.path.append(str(ROOT / "src"))
    import ropewalk

    ropewalk.__path__ += [str(ROOT), str(ROOT / "kernels")]

from ropewalk.webui.extension import params, setup  # noqa: E402, F401
