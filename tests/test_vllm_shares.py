"""What each rank keeps of a packed layer of vLLM: together they compute what the whole weight does.

The layers are vLLM's own, made and filled as its loaders do, one rank after the other in this process.
"""

import contextlib
import itertools
import types

import pytest
import torch

from ropewalk import cpu
from ropewalk.gptq.rtn import quantize_rtn
from ropewalk.loader.quant_linear import QuantLinear

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from ropewalk.errors import FormatError
from ropewalk.gptq.layout import row_order
from ropewalk.patches.vllm import linear as ours
from ropewalk.patches.vllm.config import Packing, RopewalkConfig
from ropewalk.patches.vllm.experts import RopewalkExpertsMethod

HIDDEN, INNER, HEAD = 128, 256, 32
TOKENS = 3


@pytest.fixture
def rank(monkeypatch):
    """Return a context manager in which vLLM takes this process for one of several ranks."""

    @contextlib.contextmanager
    def become(rank, ranks, lora=False):
        with monkeypatch.context() as patch, set_current_vllm_config(VllmConfig()) as _:
            for module in (layers, parameter):
                patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
                patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
            if lora:
                config = ours.get_current_vllm_config()
                changed = types.SimpleNamespace(lora_config=object(), compilation_config=config.compilation_config)
                patch.setattr(ours, "get_current_vllm_config", lambda: changed)
            yield patch

    return become


def packed(columns, rows, packing, sym, seed):
    """Return (tensors of a layer, its weight [K, N] in float32)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator) if packing.desc_act else None
    weight = torch.randn(columns, rows, generator=generator)
    tensors = quantize_rtn(
        weight,
        bits=packing.bits,
        group_size=packing.group_size,
        sym=sym,
        order=order,
        checkpoint_format=packing.checkpoint_format,
    )
    whole = QuantLinear(
        packing.bits, packing.group_size, rows, columns, False, checkpoint_format=packing.checkpoint_format
    )
    whole.load_state_dict(tensors)
    return tensors, whole(torch.eye(rows))


def config_of(packing, down):
    """Return the config that a checkpoint with these layers would have."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    config = RopewalkConfig.from_config(
        {"bits": packing.bits, "group_size": packing.group_size, "desc_act": packing.desc_act}
    )
    config.layers = dict.fromkeys(names, packing)
    order = row_order(down["g_idx"], packing.group_size)
    config.orders = {} if order is None else {"mlp.down_proj": order}
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


def fill(layer, shards):
    """Read a checkpoint's layers into one of vLLM: shard id -> tensors."""
    for shard, tensors in shards.items():
        for name, tensor in tensors.items():
            found = getattr(layer, name)
            found.weight_loader(found, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)


def name(packing):
    """Return what a test of a packing is called."""
    return f"{packing.bits}b-{packing.group_size}{'-act' * packing.desc_act}"


PACKINGS = [
    *(Packing(bits, 32, True, "gptq") for bits in (2, 3, 4, 8)),
    *(Packing(bits, 32, False, "gptq") for bits in (3, 4)),
    *(Packing(bits, -1, False, "gptq_v2") for bits in (3, 4)),
    Packing(4, 64, False, "gptq"),  # at four ranks o has half of a group
    Packing(4, 64, True, "gptq_v2"),
    Packing(4, 128, True, "gptq"),  # and down too, sorted
]


@pytest.mark.parametrize("layout", ["cpu", "gpu"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("packing", PACKINGS, ids=name)
def test_ranks_compute_the_whole(packing, ranks, layout, rank, monkeypatch):
    if layout == "cpu" and not cpu.load():
        pytest.skip("needs the C++ kernels")
    monkeypatch.setattr(QuantLinear, "_best_layout", lambda self: layout)
    gate, gates = packed(INNER, HIDDEN, packing, True, 1)
    up, ups = packed(INNER, HIDDEN, packing, False, 2)
    down, downs = packed(HIDDEN, INNER, packing, False, 3)
    o, os = packed(HIDDEN, HIDDEN, packing, False, 4)
    config = config_of(packing, down)
    if packing.bits == 3 and not packing.desc_act:
        for tensors in (gate, up, down, o):  # as before there was act-order
            del tensors["g_idx"]
    x, attended = (torch.randn(TOKENS, n, generator=torch.Generator().manual_seed(5)) for n in (HIDDEN, HIDDEN))
    first, second = [], []
    for number in range(ranks):
        with rank(number, ranks) as patch:
            options = {"bias": False, "params_dtype": torch.float32, "quant_config": config}
            gate_up = layers.MergedColumnParallelLinear(HIDDEN, [INNER] * 2, prefix="mlp.gate_up_proj", **options)
            fill(gate_up, {0: gate, 1: up})
            mlp = layers.RowParallelLinear(INNER, HIDDEN, prefix="mlp.down_proj", reduce_results=False, **options)
            fill(mlp, {None: down})
            out = layers.RowParallelLinear(HIDDEN, HIDDEN, prefix="self_attn.o_proj", reduce_results=False, **options)
            fill(out, {None: o})
            inner = gate_up(x)[0].chunk(2, dim=-1)
            inner = torch.nn.functional.silu(inner[0]) * inner[1]
            assert mlp.ropewalk._around is None
            if ranks > 1:
                assert all(layer._order is None or layout == "cpu" for layer in mlp.ropewalk.layers)
            second.append(mlp(inner)[0])
            patch.setattr(ours, "tensor_model_parallel_all_gather", lambda _: attended)
            first.append(out(attended[:, number * HIDDEN // ranks :][:, : HIDDEN // ranks])[0])
            if layout == "cpu":  # the other one fills up to blocks of more rows than there are
                held = sum(layer.qweight.numel() for layer in mlp.ropewalk.layers)
                assert held * ranks == down["qweight"].numel()
    torch.testing.assert_close(sum(first), attended @ os, rtol=1e-4, atol=1e-3)
    expected = (torch.nn.functional.silu(x @ gates) * (x @ ups)) @ downs
    torch.testing.assert_close(sum(second), expected, rtol=1e-4, atol=expected.abs().max().item() * 1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_of_keys_and_values(kv_heads, rank):
    packing, ranks = Packing(4, 32, True, "gptq"), 2
    tensors = {name: packed(n * HEAD, HIDDEN, packing, False, i) for i, (name, n) in enumerate(
        {"q": 4, "k": kv_heads, "v": kv_heads}.items())}  # fmt: skip
    x = torch.randn(TOKENS, HIDDEN)
    config = config_of(packing, packed(HIDDEN, INNER, packing, False, 3)[0])
    for number in range(ranks):
        with rank(number, ranks):
            qkv = layers.QKVParallelLinear(
                HIDDEN, HEAD, 4, kv_heads, bias=False, params_dtype=torch.float32, quant_config=config,
                prefix="self_attn.qkv_proj",
            )  # fmt: skip
            fill(qkv, {name: parts for name, (parts, _) in tensors.items()})
            own = max(1, kv_heads // ranks)
            first = number * kv_heads // ranks
            expected = [x @ tensors["q"][1][:, number * 2 * HEAD :][:, : 2 * HEAD]]
            expected += [x @ tensors[name][1][:, first * HEAD :][:, : own * HEAD] for name in ("k", "v")]
            torch.testing.assert_close(qkv(x)[0], torch.cat(expected, -1), rtol=1e-4, atol=1e-3)


def test_adapters_keep_the_channels_where_they_are(rank):
    packing = Packing(4, 32, True, "gptq")
    down, _ = packed(HIDDEN, INNER, packing, False, 3)
    config = config_of(packing, down)
    with rank(0, 2, lora=True):
        options = {"bias": False, "params_dtype": torch.float32, "quant_config": config}
        mlp = layers.RowParallelLinear(INNER, HIDDEN, prefix="mlp.down_proj", reduce_results=False, **options)
        fill(mlp, {None: down})
        assert mlp.ropewalk._around is not None


@pytest.mark.parametrize(("bits", "columns"), [(3, 96), (4, 24)])
def test_a_share_that_fills_no_words_is_refused(bits, columns, rank):
    config = RopewalkConfig.from_config({"bits": bits, "group_size": 32, "desc_act": False})
    with rank(0, 4), pytest.raises(FormatError, match="q_proj of one rank: out_features: expected a multiple of"):
        layers.ColumnParallelLinear(HIDDEN, columns, quant_config=config, prefix="q_proj")


EXPERTS = 3


def experts_on(rank, ranks, packing, tensors, local=None, last_first=False):
    """Return vLLM's container of experts as one rank has it, filled.

    Args:
        tensors: (expert, "w1", "w2" or "w3") -> tensors of the checkpoint.
        local: numbers of the experts of this rank; by default all.
        last_first: read what is to be read in the opposite order.
    """
    local = list(range(EXPERTS)) if local is None else local
    share = ranks if len(local) == EXPERTS else 1
    parallel = types.SimpleNamespace(tp_size=share, tp_rank=rank if share > 1 else 0)
    moe = types.SimpleNamespace(activation=MoEActivation.SILU, has_bias=False, moe_parallel_config=parallel)
    layer = torch.nn.Module()
    layer.apply_router_weight_on_input = False
    layer._map_global_expert_id_to_local_expert_id = lambda e: local.index(e) if e in local else -1
    here = torch.tensor([layer._map_global_expert_id_to_local_expert_id(e) for e in range(EXPERTS)])
    layer._expert_map = None if share == ranks else here
    method = RopewalkExpertsMethod(packing, moe, "experts")
    method.create_weights(layer, len(local), HIDDEN, INNER // share, torch.float32)
    read = [(e, shard, part, t) for (e, shard), parts in tensors.items() for part, t in parts.items()]
    for e, shard, part, tensor in reversed(read) if last_first else read:
        found = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{part}")
        taken = found.weight_loader(found, tensor, f"experts.{shard}_{part}", shard, e, return_success=True)
        assert taken == (e in local)
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters())  # nothing is held twice
    return lambda x, weights, ids: method.apply(layer, x, weights, ids)


@pytest.mark.parametrize("last_first", [False, True], ids=["", "down first"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("packing", PACKINGS, ids=name)
def test_ranks_compute_all_experts(packing, ranks, last_first):
    made = {
        (e, shard): packed(*size, packing, e > 0, 3 * e + i)
        for e in range(EXPERTS)
        for i, (shard, size) in enumerate({"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}.items())
    }
    tensors = {key: parts for key, (parts, _) in made.items()}
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :2].int()
    weights = torch.rand(TOKENS, 2, generator=generator)
    expected = torch.zeros(TOKENS, HIDDEN)
    for token, place in itertools.product(range(TOKENS), range(2)):
        gate, down, up = (made[int(ids[token, place]), shard][1] for shard in ("w1", "w2", "w3"))
        inner = torch.nn.functional.silu(x[token] @ gate) * (x[token] @ up)
        expected[token] += weights[token, place] * (inner @ down)
    bound = {"rtol": 1e-4, "atol": expected.abs().max().item() * 1e-4}
    shared = sum(experts_on(r, ranks, packing, tensors, last_first=last_first)(x, weights, ids) for r in range(ranks))
    torch.testing.assert_close(shared, expected, **bound)
    if ranks == 2:
        dealt = sum(experts_on(r, 2, packing, tensors, local=[[0, 2], [1]][r])(x, weights, ids) for r in range(2))
        torch.testing.assert_close(dealt, expected, **bound)


def test_experts_that_cannot_be_shared_are_refused():
    packing = Packing(4, 128, True, "gptq")
    with pytest.raises(
        FormatError, match=r"experts .of 256 on 16 ranks.: expected .* parts of groups of 128, found 16"
    ):
        experts_on(0, 16, packing, {})
    down, _ = packed(HIDDEN, INNER, packing, True, 0)
    del down["g_idx"]
    with pytest.raises(FormatError, match=r"experts.0.w2.g_idx: expected a tensor of this name \(desc_act is true\)"):
        experts_on(0, 2, packing, {(0, "w2"): down})
    moved, _ = packed(HIDDEN, INNER, Packing(4, 32, True, "gptq"), True, 0)
    with pytest.raises(FormatError, match=r"experts.0.w2.g_idx: expected .*desc_act is false.* rows in another order"):
        experts_on(0, 2, Packing(4, 32, False, "gptq"), {(0, "w2"): moved})


def test_gate_and_up_that_are_one_weight_on_disk(rank):
    packing = Packing(4, 32, True, "gptq")
    both, boths = packed(2 * INNER, HIDDEN, packing, False, 1)
    down, downs = packed(HIDDEN, INNER, packing, False, 3)
    config = config_of(packing, down)
    config.layers["mlp.gate_up_proj"] = packing
    x, total = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5)), 0
    for number in range(2):
        with rank(number, 2):
            options = {"bias": False, "params_dtype": torch.float32, "quant_config": config}
            gate_up = layers.MergedColumnParallelLinear(HIDDEN, [INNER] * 2, prefix="mlp.gate_up_proj", **options)
            fill(gate_up, {None: both})
            mlp = layers.RowParallelLinear(INNER, HIDDEN, prefix="mlp.down_proj", reduce_results=False, **options)
            fill(mlp, {None: down})
            inner = gate_up(x)[0].chunk(2, dim=-1)
            total = total + mlp(torch.nn.functional.silu(inner[0]) * inner[1])[0]
    gate, up = (x @ boths).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ downs
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=expected.abs().max().item() * 1e-4)
