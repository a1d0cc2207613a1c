"""text-generation-webui: the patch and what it does, on a stand-in for the modules that it touches.

`tests/webui_stand_in` is ours and small; with ROPEWALK_WEBUI=FOLDER its functions are compared with those of a real
webui. `make webui-browser` drives the real one.
"""

import ast
import json
import os
import re
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ropewalk
from ropewalk.errors import CheckpointError, HeaderError, MissingFileError, PatchError, UsageError
from ropewalk.patches import webui
from ropewalk.patches.webui import known, loading, options
from ropewalk.webui import install

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "tests/webui_stand_in"
REAL = os.environ.get("ROPEWALK_WEBUI")
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def modules(webui_folder, monkeypatch):
    """Return webui's modules, imported as server.py would; all is as it was afterwards."""
    monkeypatch.chdir(webui_folder)
    monkeypatch.setattr(sys, "argv", ["server.py"])
    monkeypatch.syspath_prepend(str(webui_folder))
    names = ("shared", "utils", "loaders", "models_settings", "models", "LoRA", "ui_model_menu", "sampler_hijack")
    found = SimpleNamespace(**{name: __import__(f"modules.{name}", fromlist=["x"]) for name in names})
    found.shared.generation_lock = object()
    yield found
    webui.revert()
    for name in [n for n in sys.modules if n == "gradio" or n.partition(".")[0] in ("modules", "extensions")]:
        del sys.modules[name]


@pytest.fixture
def patched(modules):
    webui.apply()
    return modules


def everything(modules):
    """Return all that webui's modules hold, and what is in their tables and arguments."""
    shared, loaders = modules.shared, modules.loaders
    held = {(m.__name__, name): id(value) for m in vars(modules).values() for name, value in vars(m).items()}
    tables = {name: {k: sorted(v) for k, v in getattr(loaders, name).items()} for name in known.TABLES}
    arguments = [dict(vars(n)) for n in (shared.args, shared.original_args, shared.args_defaults)]
    return held, tables, arguments, loaders.get_all_params(), loaders.list_all_samplers()


def test_applied_once_and_taken_back(modules):
    before = everything(modules)
    line = webui.apply()
    assert "loader Ropewalk added" in line
    after = everything(modules)
    assert webui.apply() == line
    assert everything(modules) == after
    assert webui.status()["applied"]
    changed = {name for name in before[0] if before[0][name] != after[0].get(name)}
    assert changed == {
        *((f"modules.{m}", "load_model") for m in ("models", "ui_model_menu")),
        *((f"modules.{m}", "get_model_metadata") for m in ("models", "models_settings", "ui_model_menu")),
        ("modules.models_settings", "infer_loader"),
        ("modules.LoRA", "add_lora_transformers"),
        ("modules.loaders", "list_model_elements"),
        ("modules.shared", "fix_loader_name"),
        *(("modules.ui_model_menu", name) for name in known.PAGE),
    }
    late = sys.modules["modules.late"] = type(sys)("modules.late")
    late.load_model = modules.models.load_model  # a module that was imported while ours was there
    assert webui.revert() == "text-generation-webui: as it was"
    assert everything(modules) == before
    assert id(late.load_model) == before[0]["modules.models", "load_model"]
    assert not webui.status()["applied"]


def test_the_page_is_patched_when_it_is_imported(modules):
    del sys.modules["modules.ui_model_menu"]
    webui.apply()
    menu = __import__("modules.ui_model_menu", fromlist=["x"])
    assert menu.load_model is modules.models.load_model
    assert "progress" in menu.load_model_wrapper.__code__.co_varnames
    finders = list(sys.meta_path)
    webui.revert()
    assert "progress" not in menu.load_model_wrapper.__code__.co_varnames
    assert len(sys.meta_path) <= len(finders)


def test_an_unknown_webui_is_left_alone(modules):
    before = everything(modules)
    modules.models_settings.infer_loader = lambda folder, settings: None
    with pytest.raises(PatchError, match=r"modules\.models_settings\.infer_loader\(model_name, .*found folder, settin"):
        webui.apply()
    modules.models_settings.infer_loader = None
    with pytest.raises(PatchError, match=r"a function modules\.models_settings\.infer_loader, found none"):
        webui.apply()
    webui.revert()
    assert {k: v for k, v in everything(modules)[0].items() if k[1] != "infer_loader"} == {
        k: v for k, v in before[0].items() if k[1] != "infer_loader"
    }
    assert everything(modules)[1:] == before[1:]


def test_outside_webui():
    with pytest.raises(PatchError, match="expected a process that runs it"):
        webui.apply()
    with pytest.raises(PatchError):
        ropewalk.patch("webui")
    assert webui.status() == {
        "package": "text-generation-webui",
        "version": None,
        "tested": known.TESTED,
        "applied": False,
    }


def test_the_version_is_what_git_says(webui_folder, monkeypatch):
    folder = webui_folder
    monkeypatch.chdir(folder)
    assert webui.status()["version"] == "of an unknown version"
    (folder / ".git/refs/heads").mkdir(parents=True)
    (folder / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (folder / ".git/refs/heads/main").write_text("1234567890\n")
    assert webui.status()["version"] == "12345678"
    (folder / ".git/packed-refs").write_text("# pack-refs with: peeled\n1234567890 refs/tags/v4.7.3\n")
    assert webui.status()["version"] == "4.7.3"


def test_a_packed_folder_chooses_the_loader(patched, make_checkpoint, make_plain):
    models = Path("user_data/models")
    infer = patched.models_settings.infer_loader
    make_checkpoint(models / "in-config", config_in="config.json")
    make_checkpoint(models / "unsaid")
    (models / "unsaid/quantize_config.json").unlink()
    (models / "of-2023").mkdir()
    (models / "of-2023/config.json").write_text("{}")
    (models / "of-2023/model-4bit-128g.pt").write_bytes(b"")
    for name in ("strand", "in-config", "unsaid", "of-2023"):
        assert patched.models_settings.get_model_metadata(name)["loader"] == "Ropewalk", name
    (models / "plain").mkdir()
    make_plain(models / "plain")
    (models / "awq").mkdir()
    (models / "awq/config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    (models / "gguf").mkdir()
    (models / "gguf/model.gguf").write_bytes(b"")
    assert [infer(name, {}) for name in ("plain", "awq", "gguf", "no-such")] == [
        *("Transformers", "Transformers", "llama.cpp"),
        None,
    ]


def load(modules, name="strand", loader=None):
    modules.models.unload_model()
    modules.shared.model, modules.shared.tokenizer = modules.models.load_model(name, loader)
    return modules.shared.model


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_loads_unloads_and_loads_again(patched, shipped):
    shared = patched.shared
    expected = logits(ropewalk.load(shipped)[0])
    model = load(patched)
    assert shared.args.loader == "Ropewalk"
    assert torch.equal(logits(model), expected)
    assert shared.tokenizer("In the beginning")["input_ids"]
    assert shared.settings["truncation_length"] == 1024
    assert patched.sampler_hijack.calls == ["hijacked"]
    assert shared.args.cpu == (not torch.cuda.is_available())
    gone = weakref.ref(model)
    del model
    patched.models.unload_model(keep_model_name=True)
    assert gone() is None  # nothing of ours holds it
    patched.models.reload_model()
    assert torch.equal(logits(shared.model), expected)


def test_other_loaders_stay_webuis(patched):
    model = load(patched, loader="Transformers")
    assert type(model).__name__ == "Theirs"
    assert patched.shared.args.loader == "Transformers"
    patched.LoRA.add_lora_to_model(["style"])
    assert patched.shared.lora_names == ["theirs", "style"]
    assert list(patched.ui_model_menu.load_lora_wrapper([])) == ["applied"]
    assert patched.ui_model_menu.update_truncation_length(77, {}) == 77
    assert list(patched.ui_model_menu.load_model_wrapper("strand", "Transformers", autoload=True)) == ["loaded"]


@pytest.mark.parametrize(
    ("settings", "context", "rope"),
    [
        ({}, 1024, "partial-ntk"),
        ({"ctx_size": 512}, 512, "partial-ntk"),
        ({"rope": "linear:4"}, 1024, "linear"),
        ({"rope": "none"}, 256, "default"),
        ({"rope": "yarn:factor=8,original=256"}, 2048, "yarn"),
    ],
)
def test_prompts_are_truncated_to_what_the_rope_gives(patched, settings, context, rope):
    shared = patched.shared
    metadata = patched.models_settings.get_model_metadata("strand")
    patched.models_settings.update_model_parameters(metadata)
    assert shared.args.ctx_size == 0
    for name, value in settings.items():
        setattr(shared.args, name, value)
    model = load(patched)
    assert model.config.rope_parameters["rope_type"] == rope
    assert shared.settings["truncation_length"] == context
    assert patched.ui_model_menu.update_truncation_length(8192, {}) == context


def test_a_float_model_loads_where_it_is_asked_for(patched, make_plain, shipped):
    folder = Path("user_data/models/plain")
    folder.mkdir()
    make_plain(folder)
    shutil.copy(shipped / "tokenizer.json", folder)
    shutil.copy(shipped / "tokenizer_config.json", folder)
    patched.shared.args.loader = "Ropewalk"
    before = patched.models_settings.get_model_metadata("plain")
    assert (before["loader"], before["ctx_size"]) == ("Transformers", 128)  # webui's own, for its own loaders
    model = load(patched, "plain", "Ropewalk")
    assert model.config.rope_parameters["rope_type"] == "partial-ntk"
    assert patched.shared.settings["truncation_length"] == 128


def test_settings_kept_for_a_model_count(patched):
    patched.shared.user_config["strand"] = {"rope": "none", "ctx_size": 128}
    metadata = patched.models_settings.get_model_metadata("strand")
    assert metadata["truncation_length_info"] == 256
    patched.models_settings.update_model_parameters(metadata)
    load(patched)
    assert patched.shared.settings["truncation_length"] == 128


def test_a_models_name_chooses_its_template(patched, make_checkpoint):
    name, models = "TheBloke_Airoboros-c34B-2.1-GPTQ", Path("user_data/models")
    make_checkpoint(models / name)
    metadata = patched.models_settings.get_model_metadata
    assert metadata(name)["instruction_template"] == "Alpaca"  # ours are not there
    install.put_templates(Path("user_data"))
    found = metadata(name)
    assert found["instruction_template"] == "Ropewalk-airoboros-2.1"
    assert "A chat." in found["instruction_template_str"]
    assert metadata("strand")["instruction_template"] == "Alpaca"
    patched.shared.user_config[name] = {"instruction_template": "Alpaca"}  # the user's own choice
    assert metadata(name)["instruction_template"] == "Alpaca"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-500])


def test_a_faulty_model_is_refused(patched):
    truncate(Path("user_data/models/strand/model.safetensors"))
    with pytest.raises(CheckpointError, match="the file is truncated"):
        load(patched)
    assert (patched.shared.model, patched.shared.model_name) == (None, "None")
    with pytest.raises(MissingFileError, match="expected a folder with a model, found nothing of this name"):
        load(patched, "no-such", "Ropewalk")
    patched.shared.generation_lock = None  # while webui starts, its page comes up all the same
    assert patched.models.load_model("strand") == (None, None)


def test_a_model_without_a_tokenizer_is_refused(patched):
    Path("user_data/models/strand/tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match="expected a tokenizer"):
        load(patched)


@pytest.fixture
def adapters(patched, shipped):
    """Write three adapters for the small model, the last one damaged."""
    peft = pytest.importorskip("peft")
    for number, name in enumerate(("style", "tone", "damaged")):
        config = peft.LoraConfig(r=2 + number, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(ropewalk.load(shipped)[0], config)
        torch.manual_seed(number)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(f"user_data/loras/{name}")
    truncate(Path("user_data/loras/damaged/adapter_model.safetensors"))
    return patched


def test_loras_come_add_up_and_go(adapters):
    modules, shared = adapters, adapters.shared
    bare = logits(load(modules))

    def with_loras(*names):
        modules.LoRA.add_lora_to_model(list(names))
        assert shared.lora_names == [name for name in names if name != "None"]
        return logits(shared.model)

    style, tone, both = with_loras("style"), with_loras("tone"), with_loras("style", "tone")
    assert not any(torch.equal(a, b) for a, b in ((style, bare), (tone, bare), (both, style), (both, tone)))
    assert torch.equal(with_loras("None"), bare)
    assert torch.equal(with_loras("style"), style)
    shared.args.loras = ["style"]  # with the model
    assert torch.equal(logits(load(modules)), style)
    assert shared.lora_names == ["style"]
    gone = weakref.ref(shared.model)
    modules.models.unload_model()
    assert gone() is None


def test_a_faulty_lora_leaves_the_model(adapters):
    bare = logits(load(adapters))
    with pytest.raises((HeaderError, CheckpointError)):
        adapters.LoRA.add_lora_to_model(["damaged"])
    assert adapters.shared.lora_names == []
    assert torch.equal(logits(adapters.shared.model), bare)
    said = list(adapters.ui_model_menu.load_lora_wrapper(["damaged"]))
    assert said[-1].startswith("Failed to apply the LoRAs: user")
    assert "Traceback" not in said[-1]
    with pytest.raises(MissingFileError, match="expected a folder with a PEFT adapter"):
        adapters.LoRA.add_lora_to_model(["no-such"])
    assert list(adapters.ui_model_menu.load_lora_wrapper(["style"]))[-1] == "Successfully applied the LoRAs: style."


def test_a_faulty_lora_at_the_start_is_said_in_the_log(adapters, caplog):
    load(adapters)
    adapters.shared.generation_lock = None
    adapters.LoRA.add_lora_to_model(["damaged"])
    assert "Failed to apply the LoRAs: user_data/loras/damaged" in caplog.text
    assert adapters.shared.lora_names == []
    adapters.models.unload_model()
    adapters.LoRA.add_lora_to_model(["style"])  # nor is there a model where loading one failed
    assert adapters.shared.model is None


def test_the_page_has_our_options(patched):
    menu, elements = patched.ui_model_menu, patched.shared.gradio
    menu.create_ui()
    column = elements["ctx_size"].parent
    assert [elements[name].parent for name in options.OURS] == [column] * len(options.OURS)
    assert column.parent.label == "Model"
    assert elements["rope"].value == "auto"
    assert elements["cpu_mode"].rest["choices"] == ["int8", "exact"]
    assert elements["loras"] is elements["lora_menu"]
    assert elements["ctx_size"].info.endswith("Ropewalk: 0 = what the model was made for.")
    assert set(patched.loaders.loaders_and_params["Ropewalk"]) <= set(elements)
    assert set(patched.loaders.loaders_and_params["Ropewalk"]) <= set(patched.loaders.get_all_params())
    assert set(options.OURS) <= set(patched.loaders.list_model_elements())


def test_the_page_tells_how_far_loading_is_and_what_went_wrong(patched):
    gradio, wrapper = sys.modules["gradio"], patched.ui_model_menu.load_model_wrapper
    assert next(wrapper("strand", "Ropewalk")).startswith("strand: 1024")
    progress = gradio.Progress()
    said = list(wrapper("strand", "Ropewalk", progress, autoload=True))
    assert said[0] == "Loading strand..."
    assert said[-1].startswith("Successfully loaded strand.\n\n- rope partial-ntk (rope\\_theta 10000, factor 4, ")
    shares = [share for share, _ in progress.told]
    assert shares == sorted(shares) and len(shares) > 3 and shares[-1] == 1
    assert progress.told[-1][1] == "Loading 4.0 MB of 4.0 MB"
    patched.shared.args.rope = "linear:0"
    failed = list(wrapper("strand", "Ropewalk", progress, autoload=True))[-1]
    assert failed == "Failed to load strand: factor: expected a number above 0, found 0"
    patched.shared.args.rope = "auto"
    truncate(Path("user_data/models/strand/model.safetensors"))
    failed = list(wrapper("strand", "Ropewalk", progress, autoload=True))[-1]
    assert "the file is truncated" in failed and "Traceback" not in failed
    assert (patched.shared.model, patched.shared.model_name) == (None, "None")


def test_an_unexpected_error_is_a_sentence_in_the_page(patched, monkeypatch):
    monkeypatch.setattr("ropewalk.loader.load.load", lambda *a, **k: 1 / 0)
    said = list(patched.ui_model_menu.load_model_wrapper("strand", "Ropewalk", autoload=True))
    assert said[-1] == ("Failed to load strand: unexpected ZeroDivisionError: division by zero (the log shows where)")


DEFAULTS = {
    "rope": "auto",
    "cpu_mode": "int8",
    "device_map": "",
    "cpu_layers": 0,
    "gpu_split": None,
    "cpu_memory": 0,
    "cpu": False,
    "bf16": False,
    "load_in_4bit": False,
    "attn_implementation": "sdpa",
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"rope": "", "cpu_mode": "exact"}, {"cpu_mode": "exact"}),
        ({"cpu": True, "gpu_split": "20"}, {"device_map": "cpu"}),
        ({"device_map": " cuda:1 "}, {"device_map": "cuda:1"}),
        ({"device_map": '{"": "cpu"}'}, {"device_map": {"": "cpu"}}),
        (
            {"gpu_split": "20,7.5", "cpu_memory": 30.0},
            {"device_map": "auto", "max_memory": {0: "20GiB", 1: "7.5GiB", "cpu": "30GiB"}},
        ),
        ({"bf16": True, "load_in_4bit": True}, {"dtype": "bfloat16", "load_in_4bit": True}),
        ({"cpu_layers": 3}, {"device_map": "cpu-layers:3"}),
    ],
)
def test_webuis_options_are_ours(given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = loading._options(SimpleNamespace(**{**DEFAULTS, **given}))
    assert found == {"rope": "auto", "cpu_mode": "int8", "attn_implementation": "sdpa", **expected}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu_split": "20,x"}, "gpu-split: expected sizes in GiB such as 20,7, found 'x'"),
        ({"gpu_split": "-1"}, "found '-1'"),
        ({"device_map": '{"a"'}, "device_map: expected a JSON object"),
        ({"cpu": True, "device_map": "auto"}, "since cpu is chosen, found 'auto'"),
        ({"cpu_layers": 2, "device_map": "auto"}, "cpu_layers: expected neither device_map nor memory sizes"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        loading._options(SimpleNamespace(**{**DEFAULTS, **given}))


def functions(file):
    """Return the functions of a file with their arguments."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            defaults = [ast.dump(value) for value in node.args.defaults]
            found[node.name] = ([argument.arg for argument in node.args.args], defaults)
    return found


@pytest.mark.skipif(not REAL, reason="ROPEWALK_WEBUI=FOLDER names a webui to compare the stand-in with")
@pytest.mark.parametrize("file", sorted(path.name for path in (STAND_IN / "modules").glob("*.py")))
def test_the_stand_in_is_like_a_real_webui(file):
    real = functions(Path(REAL, "modules", file))
    for name, arguments in functions(STAND_IN / "modules" / file).items():
        assert real[name] == arguments, f"{file}: {name}"
    if file == "loaders.py":
        tables = {
            target.id
            for node in ast.parse(Path(REAL, "modules", file).read_text()).body
            if isinstance(node, ast.Assign)
            for target in node.targets
        }
        assert set(known.TABLES) <= tables
