"""FastChat, the real package, with our functions in it; its programs are in test_fastchat_programs.py."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import ropewalk
from ropewalk.cli import main
from ropewalk.errors import MissingPackageError, PatchError, UsageError
from ropewalk.patches import fastchat as patch
from ropewalk.templates import TEMPLATES

pytest.importorskip("fastchat", reason="pip install 'ropewalk[fastchat]'")

PROMPT = "And the LORD said unto Moses,"
PARTIAL = {"rope_type": "partial-ntk", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture
def patched():
    ropewalk.patch("fastchat")
    yield patch
    ropewalk.unpatch("fastchat")


@pytest.fixture
def packed_folder(tmp_path, make_checkpoint, shipped):
    """Return (folder, dequantized weights) of a small airophin with a tokenizer."""
    folder = tmp_path / "model"
    weights = make_checkpoint(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, folder)
    return folder, weights


def logits(model):
    ids = torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits


def check(model, folder, weights, reference_model):
    found, expected = logits(model), logits(reference_model(folder, weights, PARTIAL))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert sum(isinstance(layer, ropewalk.QuantLinear) for layer in model.modules()) == 14


def flags(ckpt, bits=16, group_size=-1, act_order=False):
    from fastchat.modules.gptq import GptqConfig

    return GptqConfig(ckpt=str(ckpt), wbits=bits, groupsize=group_size, act_order=act_order)


def test_a_packed_folder_loads_by_fastchats_own_function(patched, packed_folder, reference_model, caplog):
    from fastchat.model import load_model

    folder, weights = packed_folder
    model, tokenizer = load_model(str(folder), device="cpu", gptq_config=flags(folder))
    check(model, folder, weights, reference_model)
    assert tokenizer.bos_token
    assert "nothing to do" not in caplog.text
    again, _ = load_model(str(folder), device="cpu", load_8bit=True, dtype=torch.bfloat16)
    assert again.dtype is torch.bfloat16
    assert "--load-8bit: nothing to do, since ropewalk loads model as its files have it" in caplog.text
    with pytest.raises(UsageError, match="--device: expected cpu or cuda"):
        load_model(str(folder), device="npu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device: expected cpu, since"):
            load_model(str(folder))
    shutil.move(folder / "tokenizer.json", folder / "gone")
    with pytest.raises(ropewalk.errors.MissingFileError, match="a tokenizer"):
        load_model(str(folder), device="cpu")


def test_names_of_the_hub_with_their_branches(patched, packed_folder, reference_model, tmp_path, monkeypatch):
    from fastchat.model import load_model

    folder, weights = packed_folder
    (tmp_path / "models").mkdir()
    shutil.copytree(folder, tmp_path / "models" / "user_model_gptq-4bit-32g")  # as download-model.py calls it
    monkeypatch.chdir(tmp_path)
    model, _ = load_model("user/model:gptq-4bit-32g", device="cpu")
    check(model, folder, weights, reference_model)
    asked = []
    monkeypatch.setattr("ropewalk.loader.load.load", lambda name, **options: asked.append((name, options)) or (1, 2))
    load_model("user/model:gptq-4bit-32g", device="cpu", revision="main")
    load_model("user/model-GPTQ", device="cpu", revision="gptq-3bit")
    usual = {"device_map": "cpu", "dtype": None}
    assert asked == [
        ("user/model:gptq-4bit-32g", usual),
        ("user/model-GPTQ", {**usual, "revision": "gptq-3bit"}),
    ]


@pytest.mark.parametrize("where", ["a file", "its folder"])
def test_gptq_ckpt(patched, packed_folder, reference_model, tmp_path, where):
    from fastchat.model import load_model

    folder, weights = packed_folder
    elsewhere = tmp_path / "weights"
    elsewhere.mkdir()
    file = elsewhere / "any.pt"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    (folder / "quantize_config.json").unlink()
    config = flags(file if where == "a file" else elsewhere, 4, 32, True)
    model, _ = load_model(str(folder), device="cpu", gptq_config=config)
    check(model, folder, weights, reference_model)


@pytest.mark.parametrize("act_order", [False, True])
def test_fastchats_own_loader_finds_the_stand_in_of_gptq_for_llama(packed_folder, reference_model, act_order):
    from fastchat.modules.gptq import load_gptq_quantized

    folder, weights = packed_folder
    ropewalk.patch("gptq_for_llama")
    before = list(sys.path)
    try:
        model, _ = load_gptq_quantized(str(folder), flags(folder / "model.safetensors", 4, 32, act_order))
    finally:
        sys.path[:] = before
        ropewalk.unpatch("gptq_for_llama")
    check(model, folder, weights, reference_model)


def test_several_gpus_as_fastchat_means_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model_adapter = SimpleNamespace(get_gpu_memory=lambda count: [24.0, 10.0][:count])
    assert patch._places(model_adapter, "cuda", 1, None) == {"device_map": "cuda"}
    assert patch._places(model_adapter, "cpu", 2, None) == {"device_map": "cpu"}
    both = {"device_map": "sequential", "max_memory": {0: "20GiB", 1: "8GiB"}}  # it takes 85 % of each
    assert patch._places(model_adapter, "cuda", 2, None) == both
    assert patch._places(model_adapter, "cuda", 2, "13Gib")["max_memory"] == {0: "13Gib", 1: "13Gib"}


def test_which_models_are_ours(patched, packed_folder, tmp_path, make_plain):
    from fastchat.model.model_adapter import get_model_adapter

    def name(path):
        return type(get_model_adapter(str(path))).__name__

    folder, _ = packed_folder
    plain = tmp_path / "plain"
    plain.mkdir()
    make_plain(plain)
    assert name(folder) == name(plain) == name(folder / "model.safetensors") == "RopewalkAdapter"
    config = json.loads((plain / "config.json").read_text())
    for changes, adapter in (
        ({"original_max_position_embeddings": None}, "BaseModelAdapter"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "BaseModelAdapter"),
    ):
        other = tmp_path / f"other{len(changes)}{next(iter(changes))}"
        other.mkdir()
        (other / "config.json").write_text(json.dumps({**config, **changes}))
        assert name(other) == adapter
    assert name("lmsys/vicuna-7b-v1.5") == "VicunaAdapter"
    assert name("TheBloke/Airoboros-c34B-2.1-GPTQ") == "RopewalkAdapter"
    assert name("user/model:gptq-4bit-32g-actorder_True") == "RopewalkAdapter"
    (folder / "adapter_config.json").write_text("{}")
    assert name(folder) == "PeftModelAdapter"


def test_a_lora_on_a_packed_base(patched, packed_folder, tmp_path):
    from fastchat.model import load_model
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.gptq import GPTQLoraLinear

    folder, _ = packed_folder
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({ropewalk.QuantLinear: GPTQLoraLinear})
    base, _ = ropewalk.load(folder)
    tuned = get_peft_model(base, config)
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": str(folder)}))
    model, _ = load_model(str(tmp_path / "adapter"), device="cpu")
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert torch.allclose(logits(model), logits(tuned), atol=1e-4)
    patched.load_with(lora=tmp_path / "adapter")  # as `ropewalk fastchat --lora` does
    assert torch.allclose(logits(load_model(str(folder), device="cpu")[0]), logits(tuned), atol=1e-4)


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("bhenrym14/airophin-13b-pntk-16k-GPTQ", "airoboros"),
        ("TheBloke/airoboros-33B-gpt4-1.4-GPTQ", "airoboros"),
        ("models/TheBloke_airoboros-mpt-30b-gpt4-1p4-GPTQ_gptq-4bit-32g-actorder_True", "airoboros"),
        ("TheBloke/airoboros-l2-13b-gpt4-2.0-GPTQ", "airoboros"),
        ("TheBloke/airoboros-l2-13b-gpt4-m2.0-GPTQ", "airoboros"),
        ("TheBloke/Airoboros-c34B-2.1-GPTQ:gptq-3bit-128g-actorder_True", "airoboros-2.1"),
        ("/models/TheBloke_Airoboros-c34B-2.1-GPTQ/gptq_model-4bit-32g.safetensors", "airoboros-2.1"),
        ("TheBloke/Airoboros-c34b-2.2.1-GPTQ", "airoboros-2.1"),
        ("TheBloke/Spicyboros-13B-2.2-GPTQ", "airoboros-2.1"),
        ("TheBloke/airoboros-m-7B-3.1.2-GPTQ", "airoboros_v3"),
        ("TheBloke/OpenAssistant-Llama2-13B-Orca-8K-3319-GPTQ", "orca-8k"),
        ("TheBloke/Llama-2-13B-chat-GPTQ", "llama-2"),
        ("TheBloke/vicuna-13B-v1.5-16K-GPTQ", "vicuna_v1.1"),
        ("TheBloke/Mistral-7B-Instruct-v0.2-GPTQ", "mistral"),
    ],
)
def test_the_template_follows_the_models_name(patched, path, template):
    from fastchat.model import get_conversation_template

    assert get_conversation_template(path).name == template


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_reads_as_the_template_has_it(patched, name):
    from fastchat.conversation import Conversation, get_conv_template

    if name in ("alpaca", "llama-2"):
        assert name not in patched._templates  # FastChat has these
        return
    template, conversation = TEMPLATES[name], get_conv_template(name)
    for system in (None, "Be brief."):
        if system is not None:
            conversation.set_system_message(system)
        conversation.messages = []
        # the API's process builds it anew from what the worker says of it
        sent = dict(vars(conversation))
        for each in (conversation, Conversation(**sent | {"messages": []})):
            turns = [("Hello", "Good day."), ("Who are you?", None)]
            for user, answer in turns:
                each.append_message(each.roles[0], user)
                each.append_message(each.roles[1], answer)
            space = " " if template.assistant.endswith(":") else ""  # the model begins its answer with it
            turns[0] = ("Hello", f"{space}Good day.")
            assert each.get_prompt() == template.conversation(turns, system)
            assert set(each.stop_str or ()) == set("".join(template.stop))


def test_context_lengths(patched, shipped):
    from fastchat.utils import get_context_length
    from transformers import LlamaConfig, MptConfig, T5Config

    def length(**config):
        return get_context_length(LlamaConfig(**config))

    plain = {"rope_type": "default", "rope_theta": 10000.0}
    assert length(max_position_embeddings=4096, rope_parameters=plain) == 4096
    airophin = {"rope_type": "partial-ntk", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert length(max_position_embeddings=16384, rope_parameters=airophin | {"rope_theta": 1e4}) == 16384
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert length(max_position_embeddings=4096, rope_parameters=linear) == 16384  # vicuna-13b-v1.5-16k
    assert length(max_position_embeddings=8192, rope_parameters=linear | {"factor": 2.0}) == 8192  # scaled already
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert length(max_position_embeddings=32768, rope_parameters=yarn) == 131072
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    assert length(max_position_embeddings=131072, rope_parameters=llama3) == 131072
    assert get_context_length(MptConfig(max_seq_len=8192)) == 8192
    assert get_context_length(T5Config()) == 2048
    assert get_context_length(SimpleNamespace(seq_length=32768)) == 32768  # ChatGLM's name for it, as FastChat reads it
    assert get_context_length(ropewalk.load(shipped)[0].config) == 1024


def test_more_new_tokens_than_the_context_holds(patched, shipped, caplog):
    from fastchat.model.model_adapter import get_generate_stream_function

    model, tokenizer = ropewalk.load(shipped)
    asked = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 2048, "echo": True}
    stream = get_generate_stream_function(model, str(shipped))(model, tokenizer, asked, "cpu", context_len=1024)
    assert next(stream)["text"].startswith(PROMPT)  # nothing of it was cut
    assert "expected less than the context of 1024, found 2048; 512 are generated" in caplog.text


def test_without_the_patch_fastchat_fails_for_every_llama():
    """What is cured: the day this fails, FastChat or transformers has changed."""
    from fastchat.utils import get_context_length
    from transformers import LlamaConfig

    with pytest.raises(KeyError, match="factor"):
        get_context_length(LlamaConfig())


def test_applying_twice_and_reverting(tmp_path):
    import fastchat.model
    from fastchat import conversation, utils
    from fastchat.model import model_adapter
    from fastchat.protocol.openai_api_protocol import CompletionStreamResponse
    from fastchat.serve import inference

    owners = [(model_adapter, "load_model"), (model_adapter, "get_model_adapter"), (utils, "get_context_length")]
    owners += [
        (inference, "generate_stream"),
        (inference, "load_model"),
        (inference, "get_context_length"),
        (fastchat.model, "load_model"),
    ]

    def now():
        return [getattr(owner, name) for owner, name in owners]

    before, templates = now(), dict(conversation.conv_templates)
    said = patch.apply()
    assert said.startswith("fschat 0.2.36: GPTQ checkpoints load with ropewalk")
    during = now()
    assert not any(a is b for a, b in zip(before, during, strict=True))
    assert patch.apply() == said
    assert all(a is b for a, b in zip(now(), during, strict=True))
    assert patch.status() == {"package": "fschat", "version": "0.2.36", "tested": "0.2.36", "applied": True}
    reply = CompletionStreamResponse(id="1", object="text_completion", model="m", choices=[])
    assert json.loads(reply.json(exclude_unset=True, ensure_ascii=False))["model"] == "m"
    patch.revert()
    assert all(a is b for a, b in zip(now(), before, strict=True))
    assert conversation.conv_templates == templates
    assert not patch.status()["applied"]
    assert "json" not in vars(CompletionStreamResponse)


def test_another_fastchat_is_left_alone(monkeypatch):
    from fastchat.model import model_adapter

    monkeypatch.setattr(model_adapter, "load_model", lambda path, place: None)
    stays = model_adapter.get_model_adapter
    with pytest.raises(
        PatchError, match=r"fschat 0.2.36: expected load_model\(model_path, device, .*found path, place"
    ):
        patch.apply()
    assert model_adapter.get_model_adapter is stays
    assert not patch.status()["applied"]


def test_without_fastchat(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastchat"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastchat", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ropewalk\[fastchat\]'"):
        patch.apply()
    assert main(["fastchat", "cli"]) == 1
    assert "ropewalk fastchat: fastchat: expected it installed" in capsys.readouterr().err
