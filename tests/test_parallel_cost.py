"""The cost model of several GPUs: shares that add up to the model, what goes over links, refusals, the command."""

import itertools
import json
import math
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from ropewalk.bench.cost import Load, cost
from ropewalk.bench.devices import DEVICES, LINKS, Link
from ropewalk.bench.known_models import CONFIGS, known_model
from ropewalk.bench.parallel import (
    Parallel,
    all_gather_seconds,
    all_reduce_seconds,
    part_of,
    round_seconds,
    send_seconds,
    stages_of,
)
from ropewalk.bench.shapes import parse_packing
from ropewalk.bench.sizes import experts_touched, is_tied, kv_heads, model_of_checkpoint, sizes_of
from ropewalk.cli import main
from ropewalk.errors import UsageError
from ropewalk.loader.inspect import open_model

H100 = DEVICES["h100"]
DOCUMENT = (Path(__file__).parents[1] / "docs/scaling.md").read_text()
# A command behind a dollar, which may go on over lines, and what it prints up to an empty line.
SHOWN = re.findall(r"^    \$ (ropewalk (?:.*\\\n)*.*)\n((?:    .+\n)+)", DOCUMENT, flags=re.M)
PACKINGS = ["float16", "4b-g128", "4b-g32-act", "3b-g128-act-asym", "8b-none-act-asym", "2b-g64-asym"]


@cache
def known(name):
    return known_model(f"{name}:4b-g128")


def packed(name, packing):
    packing = None if packing == "float16" else parse_packing(packing)
    parts = [part if part.packing is None else part._replace(packing=packing) for part in known(name).parts]
    return known(name)._replace(parts=parts)


def ranks_of(model, parallel, device=H100, link=None):
    return [sizes for stage in stages_of(model, parallel, device, link) for sizes in stage.ranks]


def held_several_times(model, parallel):
    """Count the bytes that more than one GPU holds, beyond the first, part by part."""
    n, kv = parallel.tensor, kv_heads(model.config.get_text_config())
    total = 0
    for part in model.parts:
        name = part.name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        expert, row = ".experts." in part.name, name in ("o_proj", "out_proj", "down_proj", "w2")
        if expert and parallel.experts:
            continue
        if name in ("embed_tokens", "wte", "lm_head"):
            continue
        plain = len(part.shape) == 1 and (row or "norm" in name or name == "shared_expert_gate")
        if plain or name in ("gate", "shared_expert_gate"):  # norms, routers, biases of rows
            total += (n - 1) * part.nbytes
            continue
        order = 4 * part.shape[1] if part.packing and part.packing.act_order else 0
        if row and part.packing:
            columns, rows = part.shape
            each = columns * 2 + (0 if part.packing.sym else columns * part.packing.bits // 8)  # of a group
            whole, size = part.packing.group_size, math.gcd(part.packing.group_size, rows // n)
            if whole == -1:  # whose scales every row needs
                total += (n - 1) * each
            elif (order and not expert and ".mlp." not in part.name) or (size < whole and size % 32):
                total += (n - 1) * order  # by columns
            else:  # by rows, sorted ones that need no order; scales of whole groups, and of parts of them
                total += (rows // size - -(-rows // whole)) * each - order
        else:
            total += (n - 1) * order
        if name in ("k_proj", "v_proj") and n > kv:
            total += (part.nbytes - order) * (n // kv - 1)
    if parallel.pipeline > 1 and is_tied(model):
        total += sizes_of(model).head
    return total


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_shares_add_up_to_the_model(name, packing):
    model = packed(name, packing)
    whole = sizes_of(model)
    for parallel in (Parallel(2), Parallel(8, 3)):
        ranks = ranks_of(model, parallel)
        assert len(ranks) == parallel.gpus
        assert sum(sizes.weights for sizes in ranks) == whole.weights + held_several_times(model, parallel)
        kept = max(parallel.tensor // kv_heads(model.config), 1)  # GPUs with the same heads of keys and values
        assert sum(sizes.cache_bytes(1000) for sizes in ranks) == kept * whole.cache_bytes(1000)
        assert sum(sizes.layers for sizes in ranks) == parallel.tensor * whole.layers


@pytest.mark.parametrize("packing", ["float16", "4b-g128", "4b-g128-act"])
def test_experts_are_dealt_out_whole(packing):
    model = packed("mixtral-8x7b", packing)
    whole = sizes_of(model)
    for tensor in (2, 8):
        parallel = Parallel(tensor, experts=True)
        ranks = ranks_of(model, parallel)
        assert {sizes.experts for sizes in ranks} == {whole.experts // tensor}
        assert sum(sizes.weights for sizes in ranks) == whole.weights + held_several_times(model, parallel)
    uneven = [
        sizes.experts for sizes in ranks_of(packed("mixtral-8x7b", packing)._replace(), Parallel(1, experts=True))
    ]
    assert uneven == [whole.experts]


def test_experts_that_do_not_divide_go_to_the_first(monkeypatch):
    monkeypatch.setitem(CONFIGS, "odd", {**CONFIGS["mixtral-8x7b"], "num_local_experts": 6, "num_hidden_layers": 2})
    model = known_model("odd:4b-g128")
    ranks = ranks_of(model, Parallel(4, experts=True))
    one = sizes_of(model).experts // 6
    assert [sizes.experts // one for sizes in ranks] == [2, 2, 1, 1]


@pytest.mark.parametrize("name", ["airophin", "mpt", "mixtral", "qwen2_moe", "qwen2"])
def test_shares_of_a_folder_add_up(tmp_path, make_checkpoint, name):
    """Biases, routers, shared experts, and the names that files have."""
    make_checkpoint(tmp_path, name, sym=False, group_size=16)
    model = model_of_checkpoint(*open_model(tmp_path))
    embeddings = [
        part.shape for part in model.parts if part.name.endswith(("embed_tokens.weight", "wte.weight", "head.weight"))
    ]
    padding = sum(2 * (-rows % 64) * width for rows, width in embeddings)
    got = sum(sizes.weights for sizes in ranks_of(model, Parallel(2)))
    assert got == sizes_of(model).weights + padding + held_several_times(model, Parallel(2))


@pytest.mark.parametrize(
    ("family", "kv_heads", "experts", "weighed"),
    [("llama", 1, (False,), 657152), ("mixtral", 2, (False, True), 2873600)],
)
def test_shares_are_those_of_vllm(monkeypatch, family, kv_heads, experts, weighed):
    """What each of two CPU ranks of vLLM 0.32 held of such models in 16 bits, which have one head of keys and values
    for two ranks and a vocabulary that is filled up: bytes of its layers and parameters, and the shape of its cache.
    """
    config = {**CONFIGS["mixtral-8x7b" if family == "mixtral" else "llama-2-7b"], "num_hidden_layers": 3}
    config |= {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "vocab_size": 200}
    config |= {"num_key_value_heads": kv_heads, "num_local_experts": 6}
    monkeypatch.setitem(CONFIGS, "small", config)
    for dealt_out in experts:
        for sizes in ranks_of(known_model("small:float16"), Parallel(2, experts=dealt_out)):
            assert sizes.weights == weighed
            assert sizes.cached == 64  # [blocks, 1, 128, 64]


def test_one_gpu_is_the_model():
    for name in ("codellama-34b", "mixtral-8x7b", "mpt-7b"):
        model = packed(name, "4b-g128-act")
        (stage,) = stages_of(model, Parallel(), DEVICES["4090"])
        assert stage.ranks == (sizes_of(model),)
        assert stage.link_seconds(8) == 0


def test_every_gpu_holds_its_part_of_act_order():
    """But for 4 bytes a row of each layer, which say the order."""
    for name in ("airophin-13b", "codellama-34b"):
        whole = sizes_of(packed(name, "4b-g32-act")).weights
        for sizes in ranks_of(packed(name, "4b-g32-act"), Parallel(8)):
            assert whole / 8 < sizes.weights < 1.01 * whole / 8


def test_groups_of_which_parts_are_too_small_are_cut_by_columns():
    """11008 rows of llama-2-7b's down are 10.75 groups of 128 for each of eight GPUs, whose quarters are 32 rows, and
    5.375 for each of 16.
    """
    gathers = {n: len(stages_of(packed("llama-2-7b", "4b-g128"), Parallel(n), H100)[0].gathered) for n in (2, 8, 16)}
    assert gathers == {2: 1, 8: 1, 16: 33}  # the logits, and 32 blocks


def test_the_blocks_of_a_stage_are_as_vllm_has_them():
    """What vllm.distributed.utils.get_pp_indices of vLLM 0.32 gives."""
    for name, pipeline, layers in [
        *[("tinyllama-1.1b", 4, [5, 6, 6, 5]), ("llama-2-13b", 3, [13, 14, 13]), ("llama-2-7b", 5, [6, 6, 7, 7, 6])],
        *[("tinyllama-1.1b", 3, [7, 8, 7]), ("codellama-34b", 2, [24, 24]), ("tinyllama-1.1b", 5, [4, 4, 5, 5, 4])],
    ]:
        stages = stages_of(known(name), Parallel(1, pipeline), H100)
        assert [stage.ranks[0].layers for stage in stages] == layers
        first, *_, last = (stage.ranks[0] for stage in stages)
        assert first.embedding > 0 and first.head == 0
        assert last.embedding == 0 and last.head > 0


def test_a_ring():
    link = Link("", "", 100, 5)
    assert all_reduce_seconds(8e6, 4, link) == pytest.approx(5e-6 + 1.5 * 8e6 / 100e9)
    assert all_gather_seconds(8e6, 4, link) == pytest.approx(5e-6 + 0.75 * 8e6 / 100e9)
    assert all_reduce_seconds(8e6, 2, link) == pytest.approx(5e-6 + 8e6 / 100e9)
    assert send_seconds(8e6, link) == pytest.approx(5e-6 + 8e6 / 100e9)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_ring_acted_out(n):
    """Every GPU passes a piece on, and the sums are everywhere, after as many bytes as the formula says."""
    data = [[10**rank * (piece + 1) for piece in range(n)] for rank in range(n)]
    want = [sum(column) for column in zip(*data, strict=True)]
    sent = 0
    for gather in (False, True):
        for step in range(n - 1):
            pieces = [(rank - step + gather) % n for rank in range(n)]
            moving = [data[rank][piece] for rank, piece in enumerate(pieces)]
            for rank, piece in enumerate(pieces):
                old = data[(rank + 1) % n][piece]
                data[(rank + 1) % n][piece] = moving[rank] if gather else old + moving[rank]
            sent += 1
    assert data == [want] * n
    link = Link("", "", 1, 0)  # a byte a nanosecond
    assert all_reduce_seconds(n, n, link) * 1e9 == pytest.approx(sent)
    assert all_gather_seconds(n, n, link) * 1e9 == pytest.approx(sent / 2)


@pytest.mark.parametrize("batch", [1, 8])
def test_what_a_token_sends(batch):
    """codellama-34b on four GPUs, added up by hand: 48 blocks of width 8192 and 22016, 32000 words."""
    link = LINKS["nvlink4"]
    reduces, bytes_reduced = 97, 97 * 2 * batch * 8192
    gathers, bytes_gathered = 1, 2 * batch * 32000
    for packing in ("4b-g128", "4b-g32-act"):
        if packing.endswith("act"):
            gathers, bytes_gathered = gathers + 48, bytes_gathered + 48 * 2 * batch * 8192  # what o reads
        (stage,) = stages_of(packed("codellama-34b", packing), Parallel(4), H100)
        seconds = (reduces + gathers) * 10e-6 + (1.5 * bytes_reduced + 0.75 * bytes_gathered) / (link.gb_per_s * 1e9)
        assert stage.link_seconds(batch) == pytest.approx(seconds)


def test_which_link_is_used():
    ethernet = LINKS["ethernet-10"]
    model = packed("codellama-34b", "4b-g128")

    def names(parallel, link):
        return [
            (stage.link and stage.link.name, stage.next_link and stage.next_link.name)
            for stage in stages_of(model, parallel, H100, link)
        ]

    assert names(Parallel(2), None) == [("nvlink4", None)]
    assert names(Parallel(2), LINKS["pcie5"]) == [("pcie5", None)]
    assert names(Parallel(2, nnodes=2), ethernet) == [("ethernet-10", None)]
    assert names(Parallel(2, 2, nnodes=2), ethernet) == [("nvlink4", "ethernet-10"), ("nvlink4", None)]
    assert names(Parallel(1, 4, nnodes=2), ethernet) == [(None, n) for n in ("nvlink4", "ethernet-10", "nvlink4", None)]
    across = [("nvlink4", "ethernet-10"), ("ethernet-10", "ethernet-10"), ("nvlink4", None)]
    assert names(Parallel(2, 3, nnodes=2), ethernet) == across  # three in each machine
    assert names(Parallel(4, 2, nnodes=4), ethernet) == [("ethernet-10", "ethernet-10"), ("ethernet-10", None)]


def test_a_batch_in_stages():
    assert round_seconds([1, 2], 1) == 3  # one sequence waits for itself
    assert round_seconds([1, 2], 2) == 4  # the slower stage is never idle
    assert round_seconds([1, 2], 8) == 4
    assert round_seconds([3], 8) == 3
    assert [part_of(batch, 4) for batch in (1, 3, 4, 5, 32)] == [1, 1, 1, 2, 8]


@pytest.mark.parametrize(
    ("experts", "chosen", "tokens", "ranks"), [(4, 2, 2, 2), (5, 2, 2, 3), (4, 1, 3, 4), (6, 2, 1, 2)]
)
def test_experts_touched(experts, chosen, tokens, ranks):
    """Against every choice that there is."""
    held = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    owner = [rank for rank, count in enumerate(held) for _ in range(count)]
    total, most, choices = 0, 0, list(itertools.combinations(range(experts), chosen))
    for chosen_by_all in itertools.product(choices, repeat=tokens):
        touched = set().union(*chosen_by_all)
        total += len(touched)
        most += max(sum(owner[expert] == rank for expert in touched) for rank in range(ranks))
    count = len(choices) ** tokens
    assert experts_touched(experts, chosen, tokens) == pytest.approx(total / count)
    assert experts_touched(experts, chosen, tokens, ranks) == pytest.approx(most / count)


def test_experts_of_a_large_batch():
    assert experts_touched(8, 2, 1) == 2
    assert experts_touched(8, 2, 1, 8) == 1  # both are elsewhere on eight GPUs, and one is waited for
    assert experts_touched(60, 4, 4096, 4) == pytest.approx(15)
    assert experts_touched(8, 2, 8) == pytest.approx(8 * (1 - 0.75**8))


def test_faster_links_and_larger_batches():
    model = packed("codellama-34b", "4b-g128-act")
    load = Load([0, 4096], [1, 8, 32])
    places = {}
    for link in [*LINKS.values(), LINKS["ethernet-10"]._replace(latency_us=1000)]:
        (found,) = cost(model, [H100], load, [Parallel(4)], link)["devices"]
        places[link] = found["contexts"]
    for one, two in itertools.permutations(places, 2):
        if one.gb_per_s >= two.gb_per_s and one.latency_us <= two.latency_us:
            for fast, slow in zip(places[one], places[two], strict=True):
                assert fast["tokens_per_s"] > slow["tokens_per_s"]
                assert fast["limit_tokens_per_s"] == slow["limit_tokens_per_s"] > fast["tokens_per_s"]
    for rows in places.values():
        for context in (0, 4096):
            few, some, many = (row for row in rows if row["context"] == context)
            assert few["tokens_per_s"] < some["tokens_per_s"] < many["tokens_per_s"]
            assert few["longest_context"] > some["longest_context"] > many["longest_context"]
            assert few["bytes_per_token"] > some["bytes_per_token"] > many["bytes_per_token"]


def test_a_batch_reads_weights_once_and_each_its_own_cache():
    sizes = sizes_of(packed("llama-2-13b", "4b-g32"))
    assert sizes.step_bytes(100, batch=8) == sizes.step_bytes(0) + 8 * sizes.cache_bytes(100) + 7 * 2 * 5120
    assert sizes.memory(100, batch=8) == sizes.memory(100) + 7 * sizes.cache_bytes(100)
    mixtral = sizes_of(packed("mixtral-8x7b", "4b-g128"))
    assert mixtral.packed_read(8) == pytest.approx(mixtral.dense + mixtral.experts * (1 - 0.75**8))


@pytest.mark.parametrize(
    ("name", "parallel", "message"),
    [
        ("llama-2-13b", Parallel(3), "--tensor-parallel: expected a divisor of the 40 attention heads, found 3"),
        ("mixtral-8x7b", Parallel(64), "--tensor-parallel: expected a divisor of the 32 attention heads, found 64"),
        ("llama-2-13b", Parallel(5, 41), "--pipeline-parallel: expected at most 40, found 41"),
        ("llama-2-13b", Parallel(2, experts=True), "--expert-parallel: expected a model with experts, found llama"),
        ("mixtral-8x7b", Parallel(16, experts=True), "--expert-parallel: expected at most 8 GPUs .* found 16"),
        ("llama-2-13b", Parallel(4, nnodes=3), "--nnodes: expected a divisor of 4 GPUs, found 3"),
        ("llama-2-13b", Parallel(4, nnodes=2), "--link: expected what connects the 2 machines, found none"),
        ("llama-2-13b", Parallel(20), "expected a divisor of the 13824 columns of .*gate_proj, found 20"),
        ("llama-2-7b", Parallel(16), "expected a share of .*gate_proj that can be packed, found 16: .* 32 for 3 bits"),
    ],
)
def test_what_is_refused(name, parallel, message):
    with pytest.raises(UsageError, match=message):
        stages_of(packed(name, "3b-g128-act"), parallel, H100)


def test_heads_vocabularies_and_layers_that_are_refused(monkeypatch):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 48, "hidden_size": 6144, "intermediate_size": 12288}
    odd = {**CONFIGS["llama-2-7b"], **sizes, "num_key_value_heads": 8}
    monkeypatch.setitem(CONFIGS, "odd", odd)
    with pytest.raises(UsageError, match="a divisor or a multiple of the 8 heads of keys and values, found 6"):
        stages_of(known_model("odd:4b-g128"), Parallel(6), H100)
    monkeypatch.setitem(CONFIGS, "odd", {**odd, "num_key_value_heads": 48})
    with pytest.raises(UsageError, match=r"a divisor of the 32000 rows of model.embed_tokens.weight, found 3"):
        stages_of(known_model("odd:4b-g128"), Parallel(3), H100)
    model = known_model("odd:4b-g128")
    parts = [part._replace(name=part.name.replace("q_proj", "query")) for part in model.parts]
    with pytest.raises(UsageError, match=r"expected layers called Wqkv, .*, found model.layers.0.self_attn.query"):
        stages_of(model._replace(parts=parts), Parallel(2), H100)


def test_a_device_without_a_link():
    here = H100._replace(link=None)
    with pytest.raises(UsageError, match=r"--link: expected one of nvlink4, .* for h100, found none"):
        stages_of(packed("llama-2-13b", "4b-g32"), Parallel(2), here)
    with pytest.raises(UsageError, match="--device: expected one whose link is known, found h100"):
        stages_of(packed("llama-2-13b", "4b-g32"), Parallel(4, nnodes=2), here, LINKS["ethernet-10"])
    assert len(ranks_of(packed("llama-2-13b", "4b-g32"), Parallel(2, nnodes=2), here, LINKS["ethernet-10"])) == 2


def inspect(capsys, *arguments):
    status = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_the_command(capsys):
    options = ["--device", "h100", "4090", "--tensor-parallel", "1", "2", "--context", "4096", "--batch", "1", "8"]
    found = json.loads(inspect(capsys, "codellama-34b:4b-g128-act", *options, "--json"))["cost"]
    assert [(each["name"], each["tensor_parallel"]) for each in found["devices"]] == [
        *(("h100", 1), ("h100", 2)),
        *(("4090", 1), ("4090", 2)),
    ]
    one, two, _, cards = found["devices"]
    assert one["links"] == [] and [link["name"] for link in two["links"]] == ["nvlink4"]
    assert [link["name"] for link in cards["links"]] == ["pcie4"]
    assert two["weights_bytes"] == pytest.approx(one["weights_bytes"] / 2, rel=0.01)
    for row in two["contexts"]:
        step = row["bytes_per_token"] / (3099 * 1e9)
        assert row["limit_tokens_per_s"] == pytest.approx(1 / step)
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / (row["batch"] * step + row["link_s"]))
    for row in one["contexts"]:
        assert row["link_s"] == 0 and row["tokens_per_s"] == row["limit_tokens_per_s"]


def test_what_the_command_prints(capsys):
    options = ["--device", "h100", "--tensor-parallel", "2", "--pipeline-parallel", "2", "--nnodes", "2"]
    text = inspect(capsys, "codellama-34b:3b-g128-act", *options, "--link", "ethernet-100", "--link-latency", "42")
    assert "calculated, not measured:" in text
    assert "TP 2 x PP 2" in text
    assert "ethernet-100: 12.5 GB/s each way, assumed 42 µs for an operation" in text
    assert "nvlink4: 450 GB/s each way, assumed 10 µs for an operation" in text
    several = inspect(capsys, "llama-2-7b:4b-g128", "mistral-7b:4b-g128", "--device", "4090", "--tensor-parallel", "2")
    assert several.splitlines()[1].split() == ["4090,", "TP", "2"]


def test_a_folder_on_several(capsys):
    options = ["--device", "h100", "--tensor-parallel", "2", "--json"]
    found = json.loads(inspect(capsys, "demo", *options))
    assert found["format"] == "gptq"
    assert found["cost"]["devices"][0]["tensor_parallel"] == 2


@pytest.mark.parametrize(("command", "printed"), SHOWN)
def test_the_tables_of_the_document(capsys, command, printed):
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["ropewalk", "inspect"]
    assert inspect(capsys, *words[2:]).splitlines() == [line[4:] for line in printed.splitlines()]


def test_the_document_has_tables_for_all_of_it():
    assert DOCUMENT.count("$ ropewalk") == len(SHOWN) == 7
    assert DOCUMENT.count("calculated, not measured:") == sum(printed.count("calculated") for _, printed in SHOWN) == 16
    with_and_without = [
        cost(packed("mixtral-8x7b", "4b-g128-act"), [H100], Load([4096], [1, 32]), [Parallel(8, experts=experts)])
        for experts in (True, False)
    ]
    one, many = zip(
        *([row["tokens_per_s"] for row in each["devices"][0]["contexts"]] for each in with_and_without), strict=True
    )
    assert [f"{rate:.0f}" for rate in one] == ["504", "782"]
    assert [round(rate, -2) for rate in many] == [11700, 11700]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--tensor-parallel", "2"], "--device: expected one with --tensor-parallel, found none"),
        (["demo", "--batch", "2"], "--device: expected one with --batch, found none"),
        (["demo", "--expert-parallel"], "--device: expected one with --expert-parallel, found none"),
        (["llama-2-13b:4b-g128", "--tensor-parallel", "7"], "expected a divisor of the 40 attention heads, found 7"),
        (
            ["llama-2-7b:4b-g128", "--tensor-parallel", "2", "--link-latency", "5"],
            "expected --link with it, found none",
        ),
        (["llama-2-7b:4b-g128", "--link", "pcie5", "--link-latency", "nan"], "expected microseconds from 0 to 1e6"),
        (["llama-2-7b:4b-g128", "--batch", "2", "--plot", "a.png"], "--plot: expected one GPU and one sequence"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err
