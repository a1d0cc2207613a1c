"""Extensions, found as webui finds them."""

import importlib
import importlib.util
import sys

from modules import shared


def load_extensions():
    for name in shared.args.extensions:
        file = shared.user_data_dir / "extensions" / name / "script.py"
        if file.exists():
            spec = importlib.util.spec_from_file_location(f"user_ext_{name}", file)
            extension = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(extension)
        else:
            extension = importlib.import_module(f"extensions.{name}.script")
        for param in extension.params:
            extension.params[param] = shared.settings.get(f"{name}-{param}", extension.params[param])
        extension.setup()
