"""text-generation-webui: what is installed into its folder and taken out again, and the three ways to start it, on the
stand-in of `tests/webui_stand_in`.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from ropewalk.chat_templates import jinja
from ropewalk.cli import main
from ropewalk.patches.webui import options, start
from ropewalk.templates import TEMPLATES
from ropewalk.webui import install

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text().partition("### text-generation-webui\n")[2].partition("\n##")[0]


@pytest.fixture
def folder(webui_folder):
    return webui_folder


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_json(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def pth(tmp_path, monkeypatch):
    """Have the .pth file elsewhere than in the environment of the tests."""
    file = tmp_path / install.PTH
    monkeypatch.setattr(install, "_pth", lambda: file)
    return file


def test_installing_leaves_no_trace_once_it_is_undone(folder, pth, capsys):
    before = files_of(folder)
    folders = {path for path in folder.rglob("*") if path.is_dir()}
    done = run_json(capsys, "webui", "install", folder, "--at-start")
    extension = folder / "user_data/extensions/ropewalk"
    assert done["extension"] == str(extension)
    assert done["at_start"] == str(pth) and pth.is_file()
    assert {path.name for path in extension.iterdir()} == {"script.py", "requirements.txt", "settings.yaml"}
    added = {folder / path for path in files_of(folder).keys() - before.keys()}
    assert {Path(file) for file in done["files"]} == added | {pth}
    assert len(list((folder / "user_data/instruction-templates").iterdir())) == len(TEMPLATES)
    once = files_of(folder)
    assert run_json(capsys, "webui", "install", folder, "--at-start") == done
    assert files_of(folder) == once
    (extension / "__pycache__").mkdir()  # as running it makes
    (extension / "__pycache__/script.pyc").write_bytes(b"")
    undone = run_json(capsys, "webui", "uninstall", folder)
    assert undone["left"] == []
    assert set(undone["removed"]) == set(done["files"])
    assert files_of(folder) == before
    assert {path for path in folder.rglob("*") if path.is_dir()} == folders
    assert not pth.exists()
    assert run_json(capsys, "webui", "uninstall", folder)["removed"] == []


def test_what_is_not_ours_stays(folder, pth, capsys):
    install.install(folder)
    template = folder / "user_data/instruction-templates/Ropewalk-alpaca.yaml"
    template.write_text("instruction_template: mine\n")
    (folder / "user_data/extensions/ropewalk/notes.txt").write_text("mine")
    (folder / "user_data/settings.yaml").write_text("default_extensions: [ropewalk]\n")
    install.install(folder)
    assert template.read_text() == "instruction_template: mine\n"
    assert main(["webui", "uninstall", str(folder)]) == 0
    left = capsys.readouterr().err
    for text in ("Ropewalk-alpaca.yaml: was changed", "has files that ropewalk did not write", "name ropewalk"):
        assert text in left
    assert template.is_file()
    assert [path.name for path in (folder / "user_data/extensions/ropewalk").iterdir()] == ["notes.txt"]


def test_an_extension_of_somebody_else_is_not_touched(folder, capsys):
    other = folder / "user_data/extensions/ropewalk"
    other.mkdir()
    (other / "script.py").write_text("theirs = True\n")
    before = files_of(folder)
    assert main(["webui", "install", str(folder)]) == 2
    assert "expected nothing or an extension of ropewalk's, found another" in capsys.readouterr().err
    assert files_of(folder) == before


def test_a_portable_webui_has_its_data_beside_it(folder, pth):
    shutil.move(folder / "user_data", folder.parent / "user_data")
    done = install.install(folder)
    assert done["extension"] == str(folder.parent / "user_data/extensions/ropewalk")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["install", "/no/such"], "/no/such: expected text-generation-webui (server.py and modules/shared.py), found"),
        (["uninstall", "/no/such"], "/no/such: expected text-generation-webui"),
        (["run", "/no/such/server.py", "--model", "x"], "expected the server.py of text-generation-webui, found none"),
    ],
)
def test_where_there_is_no_webui(arguments, message, capsys):
    assert main(["webui", *arguments]) == 1
    assert message in capsys.readouterr().err


ENVIRONMENT = {**os.environ, "ROPEWALK_CPU_MODE": "exact"}
LOADED = {"loader": "Ropewalk", "model": "LlamaForCausalLM", "context": 1024}


def server(command, folder, **environment):
    """Run the stand-in's server.py; return what it says it has loaded, and what it has logged."""
    done = subprocess.run(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_launcher(folder):
    command = [sys.executable, "-m", "ropewalk", "webui", "run", folder / "server.py"]
    found, log = server([*command, "--loader", "ropewalk", "--model", "strand", "--rope", "linear:4"], folder.parent)
    assert found.items() >= LOADED.items()
    assert "rope linear" in log


def test_the_launcher_on_an_unknown_webui(folder):
    file = folder / "modules/models.py"
    file.write_text(file.read_text().replace("def load_model(model_name, loader=None)", "def load_model(name, x=None)"))
    command = [sys.executable, "-m", "ropewalk", "webui", "run", "server.py", "--loader", "Ropewalk"]
    done = subprocess.run([*command, "--model", "strand"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "expected modules.models.load_model(model_name, loader, ...), found name, x" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_launcher_on_an_older_webui_that_imports_its_models_first(folder):
    file = folder / "modules/shared.py"
    file.write_text("import modules.models\n" + file.read_text())
    file = folder / "modules/models.py"
    file.write_text(file.read_text().replace("from modules.models_settings import get_model_metadata", ""))
    command = [sys.executable, "-m", "ropewalk", "webui", "run", "server.py", "--loader", "Ropewalk"]
    done = subprocess.run([*command, "--model", "strand"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"ropewalk: text-generation-webui .*: expected .*, found none; nothing was replaced", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.fixture
def at_start(tmp_path, folder, pth):
    """Return an interpreter whose environment is this one with the .pth file of --at-start in it."""
    install.install(folder, at_start=True)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    here = Path(sysconfig.get_path("purelib"))
    (purelib / "a-rest.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n")
    shutil.copy(pth, purelib / install.PTH)
    return environment / "bin/python"


def test_at_start(folder, at_start):
    """The command that the model's owner types, exactly."""
    command = [at_start, "server.py", "--loader", "Ropewalk", "--model", "strand", "--extensions", "ropewalk"]
    found, log = server(command, folder)
    assert found.items() >= LOADED.items()
    assert {"rope", "cpu_mode", "loras"} <= set(found["elements"])
    assert log.count("loader Ropewalk added") == 1


def test_at_start_costs_nothing_elsewhere(folder, at_start, tmp_path):
    code = "import sys; print([m for m in sys.modules if m.startswith('ropewalk')])"
    (tmp_path / "server.py").write_text(code)  # somebody else's
    for command in (["-c", code], [tmp_path / "server.py"]):
        done = subprocess.run([at_start, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert "ropewalk.patches.webui.loading" not in done.stdout or command[0] != "-c"
    done = subprocess.run([at_start, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in ast.literal_eval(done.stdout) if name.startswith("ropewalk.")]


@pytest.mark.parametrize("installed", [True, False])
def test_the_extension_alone_and_as_a_clone(folder, installed, tmp_path):
    """The repository in extensions/ropewalk, where ropewalk is installed and where it is only this clone."""
    (folder / "extensions/ropewalk").symlink_to(ROOT)
    command = [sys.executable, "server.py", "--extensions", "ropewalk"]
    if not installed:
        # Without site there are no .pth files, and so nothing of the editable install.
        command[1:1] = ["-S"]
    settings = "from modules import shared; shared.settings['ropewalk-model'] = 'strand'"
    (folder / "modules/image_models.py").write_text(settings)
    server_file = folder / "server.py"
    server_file.write_text(
        server_file.read_text().replace("import json\n", "import json\nimport modules.image_models\n")
    )
    found, log = server(command, folder, PYTHONPATH="" if installed else sysconfig.get_path("purelib"))
    assert found["elements"]
    assert found.items() >= LOADED.items()
    assert "loader Ropewalk added" in log
    written = list((folder / "user_data/instruction-templates").iterdir())
    assert len(written) == len(TEMPLATES)
    assert install.uninstall(folder)["left"] == [
        f"{folder}/extensions/ropewalk: is a clone or a link that ropewalk did not make"
    ]
    assert not [path for path in written if path.exists()]


def test_a_hook_is_taken_away():
    before = list(sys.meta_path)
    start.hook()
    start.hook()
    assert len(sys.meta_path) == len(before) + 1
    start.unhook()
    assert sys.meta_path == before


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_say_what_the_models_were_trained_on(name):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = TEMPLATES[name]
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(jinja(template))
    first = {"role": "user", "content": "Hello {you}"}
    whole = compiled.render(messages=[first], add_generation_prompt=True)
    assert whole == template.conversation([("Hello {you}", None)])
    more = [first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why?"}]
    said = compiled.render(messages=[{"role": "system", "content": "Be brief."}, *more], add_generation_prompt=True)
    space = " " if template.turn.endswith((":", "]")) else ""
    assert said == template.conversation([("Hello {you}", f"{space}Hi"), ("Why?", None)], system="Be brief.")
    assert compiled.render(messages=more[:2], add_generation_prompt=False).endswith("Hi")


def test_templates_are_files_that_webui_reads(folder):
    yaml = pytest.importorskip("yaml")
    install.put_templates(folder / "user_data")
    for name, template in TEMPLATES.items():
        file = folder / f"user_data/instruction-templates/Ropewalk-{name}.yaml"
        assert yaml.safe_load(file.read_text()) == {"instruction_template": jinja(template)}
    extension = Path(install.install(folder)["extension"])
    settings = yaml.safe_load((extension / "settings.yaml").read_text())
    assert settings["default_extensions"] == ["ropewalk"]
    assert {f"ropewalk-{name}" for name in options.OURS} < set(settings)


def test_the_recipe_of_the_readme(folder, at_start):
    """Every command of the section runs as it stands, on the stand-in."""
    commands = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    commands = [shlex.split(line, comments=True) for line in commands]
    tried = 0
    for words in filter(None, commands):
        words = [str(folder) if word == "DIR" else "strand" if word == "FOLDER" else word for word in words]
        if words[:2] == ["ropewalk", "webui"]:
            command = [sys.executable, "-m", *words]
        elif words[:2] == ["python", "server.py"]:
            command = [at_start, *words[1:]]
        else:
            assert words[0] in ("pip", "git", "make", "curl"), words
            continue
        command = [str(word) for word in command]
        done = subprocess.run(
            [word for word in command if word not in ("--at-start",)],
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (words, done.stderr)
        tried += 1
    assert tried >= 4
