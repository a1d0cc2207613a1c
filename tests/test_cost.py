"""The cost model: the arithmetic, what it says of real folders, and `ropewalk inspect --device`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ropewalk.bench import devices
from ropewalk.bench.cost import Load, cost, models_table
from ropewalk.bench.devices import DEVICES, RESERVED
from ropewalk.bench.known_models import CONFIGS, known_model
from ropewalk.bench.model import packed_model
from ropewalk.bench.shapes import parse_packing
from ropewalk.bench.sizes import LONGEST, model_of_checkpoint, sizes_of
from ropewalk.cli import main
from ropewalk.errors import UsageError
from ropewalk.loader.inspect import open_model

RESULTS = Path(__file__).parents[1] / "bench/results/cost"

# Limits of a batch of one without context, worked out by hand before there was code for it. Two digits differ from
# those: of the 34B without groups 17.13 GB, which left out norms and the scales of the columns, 8 MB; and of the 34B
# in 3 bits 319 tokens/s on an H200, which left out norms, 1.6 MB: 4300 / 13.502 is 318.5 and just below.
TABLE = """
llama-2-13b:4b-g32      7.47  576  273  135  48
codellama-34b:4b-none  17.14  251  119   59   –
codellama-34b:4b-g128  17.65  244  116   57   –
codellama-34b:4b-g32   19.21  224  106   53   –
codellama-34b:3b-g128  13.50  318  151   75   –
mpt-30b:4b-g128        15.98  269  128   63   –
mixtral-8x7b:4b-g128    6.77  635  301    –   –
"""


def sizes_of_known(text):
    return sizes_of(known_model(text))


def inspect_json(capsys, *arguments):
    status = main(["inspect", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_the_table(capsys):
    rows = [line.split() for line in TABLE.strip().splitlines()]
    status = main(["inspect", *(row[0] for row in rows), "--device", "h200", "a100", "4090", "3060"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert status == 0
    lines, longest = lines[: len(rows)], lines[len(rows) :]
    assert longest[0] == "longest context of a sequence; calculated, not measured:"
    assert [line.split()[0] for line in longest[2:]] == [row[0] for row in rows]
    assert head == "tokens a second at most, with 0 tokens of context; calculated, not measured:"
    assert [line.split() for line in lines] == rows


def test_the_results_that_are_kept_are_those_of_the_command(capsys):
    kept = json.loads((RESULTS / "limits.json").read_text())
    models = [each["model"] for each in kept["models"]]
    assert models == [line.split()[0] for line in TABLE.strip().splitlines()]
    names = [device["name"] for device in kept["models"][0]["cost"]["devices"]]
    assert inspect_json(capsys, *models, "--device", *names) == kept
    for name, bits in (("airophin-16.json", "16"), ("airophin-8.json", "8")):
        kept = json.loads((RESULTS / name).read_text())
        options = ["--device", "h100", "4090", "--context", "4096", "16384", "--kv-bits", bits]
        assert inspect_json(capsys, kept["model"], *options) == kept


@pytest.mark.parametrize(("name", "kilobytes"), [("llama-2-13b", 819), ("codellama-34b", 197), ("mpt-30b", 1376)])
def test_cache_of_a_token(name, kilobytes):
    sizes = sizes_of_known(f"{name}:4b-g128")
    assert round(sizes.cache_bytes(1) / 1e3) == kilobytes
    assert sizes.cache_bytes(1000, 8) == 500 * sizes.cache_bytes(1)


@pytest.mark.parametrize(
    ("packing", "bits"),
    [("4b-g128", 4 + 16 / 128), ("3b-g32", 3 + 16 / 32), ("2b-g64-asym", 2 + 18 / 64), ("8b-g128-asym", 8 + 24 / 128)],
)
def test_bits_of_a_weight(packing, bits):
    weights = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    packed = sizes_of_known(f"llama-2-13b:{packing}").packed
    assert packed * 8 / weights == pytest.approx(bits, rel=1e-12)
    ordered = sizes_of_known("llama-2-13b:" + parse_packing(packing)._replace(desc_act=True).name).packed
    assert ordered - packed == 40 * 4 * (6 * 5120 + 13824)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(("tinyllama-1.1b", 1.1), ("llama-2-7b", 6.74), ("llama-2-13b", 13.0), ("llama-2-70b", 69.0)),
        *(("codellama-34b", 33.7), ("mistral-7b", 7.24), ("mixtral-8x7b", 46.7), ("mpt-7b", 6.65), ("mpt-30b", 30.0)),
    ],
)
def test_known_models_have_the_parameters_that_their_names_say(name, billions):
    sizes = sizes_of_known(f"{name}:float16")
    assert sizes.weights / 2e9 == pytest.approx(billions, abs=0.05)
    assert set(CONFIGS) >= {name}


def test_experts_are_read_where_they_are_chosen():
    sizes = sizes_of_known("mixtral-8x7b:float16")
    attention = 32 * 2 * (2 * 4096**2 + 2 * 4096 * 1024)
    experts = 32 * 2 * 8 * 3 * 4096 * 14336
    assert sizes.packed == attention + experts
    assert sizes.packed_read() == attention + experts / 4
    assert sizes.widest == 2 * 14336  # two experts at once


def test_a_window_ends_the_cache():
    sizes = sizes_of_known("mistral-7b:4b-g128")
    assert sizes.cache_bytes(32768) == sizes.cache_bytes(4096) == 4096 * sizes.cache_bytes(1)
    assert sizes_of_known("mixtral-8x7b:4b-g128").window is None


def test_memory_and_the_longest_context():
    sizes = sizes_of_known("llama-2-13b:4b-g32")
    assert sizes.memory(4096) == sizes.weights + sizes.cache_bytes(4096) + sizes.work_bytes(4096)
    assert sizes.memory(4096, 8) == sizes.memory(4096) - sizes.cache_bytes(2048)
    assert sizes.memory(4096, chunk=512) == sizes.memory(4096) - sizes.work_bytes(4096) + sizes.work_bytes(512)
    room = DEVICES["4090"].memory_bytes - RESERVED
    for kv_bits in (16, 8):
        longest = sizes.longest_context(room, kv_bits)
        assert sizes.memory(longest, kv_bits) <= room < sizes.memory(longest + 1, kv_bits)
    assert sizes.longest_context(sizes.weights) == 0
    assert replace(sizes, cached=0, hidden=0, widest=0).longest_context(room) == LONGEST


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-2-7b", {"intermediate_size": 640, "num_key_value_heads": 4}),
        ("codellama-34b", {"intermediate_size": 512, "num_key_value_heads": 1}),
        ("mpt-30b", {"d_model": 128, "n_heads": 8}),
    ],
)
def test_the_work_space_of_a_prompt_is_what_transformers_allocates(monkeypatch, name, sizes):
    """Of the same architecture made small, in bfloat16 on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    layers = "n_layers" if name.startswith("mpt") else "num_hidden_layers"
    sizes = sizes if "d_model" in sizes else {**sizes, "hidden_size": 256, "num_attention_heads": 4}
    config = {**CONFIGS[name], **sizes, layers: 2, "vocab_size": 64, "tie_word_embeddings": True}
    monkeypatch.setitem(CONFIGS, name, config)
    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
    ids = torch.arange(512)[None] % 64
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        cache = model(ids, use_cache=True).past_key_values
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held)
    known = sizes_of_known(f"{name}:float16")
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kept == known.cache_bytes(512)
    assert known.work_bytes(512) == pytest.approx(peak - kept, rel=0.1)


@pytest.mark.parametrize("packing", ["4b-g32", "3b-g128-act", "8b-none"])
def test_a_folder_costs_what_the_decode_benchmark_counts(tmp_path, packing):
    model = packed_model("tiny", parse_packing(packing), tmp_path, torch.device("cpu"), rounded=False)
    sizes = sizes_of(model_of_checkpoint(*open_model(model.folder)))
    for context in (0, 100):
        assert sizes.step_bytes(context) == model.step_bytes(context)
    assert sizes.packing == packing


@pytest.mark.parametrize("name", ["airophin", "mpt", "mixtral", "qwen2_moe", "qwen2"])
def test_a_folder_weighs_what_is_in_it(tmp_path, make_checkpoint, name):
    """Of symmetric zero points and orders that are none nothing is kept; all else is counted once."""
    make_checkpoint(tmp_path, name, sym=False)
    checkpoint, rope = open_model(tmp_path)
    sizes = sizes_of(model_of_checkpoint(checkpoint, rope))
    assert sizes.packing.endswith("-asym")
    stored = sum(entry.nbytes for entry in checkpoint.tensors.values())
    orders = sum(4 * layer.in_features for layer in checkpoint.layers.values() if "act" not in sizes.packing)
    plain = [checkpoint.tensors[tensor] for tensor in checkpoint.plain_tensors()]
    wide = sum(entry.nbytes for entry in plain if entry.dtype == torch.float32) // 2  # 16 bits are reckoned with
    assert sizes.weights == stored - orders - wide
    experts = [layer for layer in checkpoint.layers if ".experts." in layer]
    assert (sizes.packed_read() < sizes.packed) == bool(experts)


def test_inspect_a_folder_on_devices(capsys, tmp_path):
    plot = tmp_path / "cost.png"
    found = inspect_json(capsys, "demo", "--device", "h100", "3060", "--context", "0", "1024", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert found["format"] == "gptq"  # what is in the folder is told as ever
    assert found["cost"]["packing"] == "4b-g32-act"
    assert found["cost"]["context"] == 1024
    h100, _ = found["cost"]["devices"]
    assert [row["context"] for row in h100["contexts"]] == [0, 1024]
    for row in h100["contexts"]:
        assert row["limit_tokens_per_s"] == pytest.approx(3099e9 / row["bytes_per_token"])
        assert row["fits"]
    assert h100["longest_context"] > 1024
    assert main(["inspect", "demo", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    assert "calculated, not measured:" in text
    assert "4b-g32-act" in text


def test_inspect_this_machine(capsys, monkeypatch):
    measure = devices.measured
    monkeypatch.setattr(devices, "measured", lambda name: measure(name, 0.01))
    (here,) = inspect_json(capsys, "demo", "--device", "cpu")["cost"]["devices"]
    assert here["source"] == "measured now"
    assert 0.1 < here["read_gb_per_s"] < 5000
    assert here["memory_bytes"] > 1e8


def test_several_models_and_one_that_is_here(capsys):
    found = inspect_json(capsys, "demo", "mpt-7b:4b-g128", "--device", "a100")["models"]
    assert [each["model"].split("/")[-1] for each in found] == ["strand-4m-pntk-1k-gptq", "mpt-7b:4b-g128"]
    costs = {each["model"]: each["cost"] for each in found}
    assert models_table(costs, 0).splitlines()[0].split() == ["GB", "a", "token", "a100", "(2040", "GB/s)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-2-13b"], "expected a packing after llama-2-13b"),
        (["llama-2-13b:5b-g128"], "expected a packing after llama-2-13b"),
        (["demo", "--context", "5"], "--device: expected one with --context"),
        (["demo", "--plot", "a.png"], "--device: expected one with --plot"),
        (["mpt-7b:4b-g128", "--plot", "nowhere/a.png"], "--plot: expected a folder to write to"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_packing_that_does_not_fit_and_a_device_that_is_none(monkeypatch):
    monkeypatch.setitem(CONFIGS, "odd", {**CONFIGS["llama-2-7b"], "intermediate_size": 11001})
    with pytest.raises(UsageError, match="MODEL: odd in 4b-g128"):
        sizes_of_known("odd:4b-g128")
    assert known_model("user/model:main") is None
    with pytest.raises(SystemExit):
        main(["inspect", "demo", "--device", "abacus"])


def test_what_does_not_fit_says_so():
    model = known_model("llama-2-70b:4b-g128")
    (row,) = cost(model, [DEVICES["4090"]], Load([0]))["devices"][0]["contexts"]
    assert not row["fits"]
    assert row["memory_bytes"] == sizes_of(model).memory(0)
