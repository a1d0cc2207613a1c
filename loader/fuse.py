"""Fusing a loaded model: fewer and larger steps for each token, with the same results.

    qkv        q, k and v of an attention as one product, where their act-order is one
    gate-up    gate and up of an MLP as one product, with silu(gate) * up at its end; experts alike
    norm       what a layer adds to the residual stream, and the norm of the sum, in one step
    act-order  on a GPU: a norm, and gate and up, write their channels in the order that the layers behind them want
    attention  on the CPU: the rotation, the cache and the attention of a few new tokens in one call

Nothing of it shows from outside: modules, their names and tensors stay, saving writes what was loaded, an adapter or a
hook on a layer gets its layer called by itself. What a family's modules compute is checked on a small model of it, with
this transformers, before they are replaced.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ropewalk.errors import UsageError
from ropewalk.loader.fused import FusedAttention, FusedLayer, FusedMLP, FusedMptMLP, is_plain
from ropewalk.loader.merged import Merged
from ropewalk.loader.quant_linear import QuantLinear

log = logging.getLogger("ropewalk")

FUSIONS = ("qkv", "gate-up", "norm", "act-order", "attention")
_FORWARDS = (FusedAttention, FusedMLP, FusedMptMLP, FusedLayer)
FAMILIES = ("Llama", "Mistral", "Mixtral", "Qwen2")
_GROUPS = (
    ("qkv", "self_attn", ("q_proj", "k_proj", "v_proj")),
    ("gate-up", "mlp", ("gate_proj", "up_proj")),
)

# class of a layer -> whether its modules compute what ours do
_checked: dict[type, bool] = {}


def parse_fusions(text: str | Iterable[str]) -> frozenset[str]:
    """Return which fusions "auto", "none" or names with commas between them mean.

    Raises:
        UsageError: another name.
    """
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else list(text)
    if names == ["auto"] and (chosen := os.environ.get("ROPEWALK_FUSE")):
        return parse_fusions("all" if chosen == "auto" else chosen)
    if names in (["auto"], ["all"]):
        return frozenset(FUSIONS)
    if names in (["none"], [""], []):
        return frozenset()
    for name in names:
        if name not in FUSIONS:
            raise UsageError(f"fuse: expected auto, none or some of {', '.join(FUSIONS)}, found {name!r}")
    return frozenset(names)


def groups_of(model: nn.Module, fusions: frozenset[str]) -> Iterator[list[QuantLinear]]:
    """Yield packed layers that read the same input and may be merged, three of an attention or two of an MLP."""
    for layer in model.modules():
        if not _is_known(layer):
            continue
        for fusion, attribute, names in _GROUPS:
            module = layer.get_submodule(attribute)
            layers: list[Any] = [module._modules.get(name) for name in names]
            if fusion in fusions and all(type(child) is QuantLinear for child in layers):
                yield layers


def fuse(model: Any, fusions: frozenset[str], apart: Mapping[str, Any] | None = None) -> int:
    """Fuse what can be fused of a filled model.

    Args:
        fusions: see `parse_fusions`.
        apart: names of modules that will be hooked, since they are on devices of their own.

    Returns:
        how many layers were changed.
    """
    unfuse(model)
    names = {module: name for name, module in model.named_modules()}
    count = 0
    for layer in list(model.modules()):
        is_mpt = type(layer).__name__ == "MptMLP"
        if not (is_mpt or _is_known(layer)) or not fusions or not _computes_as_ours(layer, model.config):
            continue
        if any(name.startswith(f"{names[layer]}.") for name in apart or ()) or not is_plain(*layer.modules()):
            continue
        if is_mpt:
            _fuse_mpt(layer, fusions)
        else:
            _fuse_layer(layer, fusions)
        count += 1
    return count


def is_fused(model: nn.Module) -> bool:
    """Return whether a module of a model has a forward of ours."""
    return any(isinstance(vars(module).get("forward"), _FORWARDS) for module in model.modules())


def unfuse(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _FORWARDS):
            del module.forward
        if type(module) is QuantLinear and module._merged is not None:
            module._merged.forget()
            module._merged = None


def _is_known(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith("DecoderLayer") and name.removesuffix("DecoderLayer") in FAMILIES


def _fuse_layer(layer: Any, fusions: frozenset[str]) -> None:
    qkv = gate_up = None
    for group in groups_of(layer, fusions):
        if len(group) == 3:
            qkv = Merged(group)
        elif _is_silu(layer.mlp.act_fn):
            down = layer.mlp.down_proj
            folds = "act-order" in fusions and type(down) is QuantLinear and down.infeatures == group[0].outfeatures
            gate_up = Merged(group, gated=True, reader=down if folds else None)
    if qkv is not None or "attention" in fusions:
        layer.self_attn.forward = FusedAttention(layer.self_attn, qkv, "attention" in fusions)
    if gate_up is not None:
        layer.mlp.forward = FusedMLP(layer.mlp, gate_up)
    if "norm" in fusions:
        layer.forward = FusedLayer(layer, "act-order" in fusions)
    for merged in (qkv, gate_up):
        if merged is not None:
            merged.is_ready()  # now, while memory is planned for


def _fuse_mpt(mlp: Any, fusions: frozenset[str]) -> None:
    """Fold the order of the second layer into the first one's columns, which a GPU's layout gains by."""
    up, down = mlp.up_proj, mlp.down_proj
    if "act-order" in fusions and type(up) is type(down) is QuantLinear:
        merged = Merged([up], reader=down)
        if merged.is_ready() and merged.folded is not None:
            mlp.forward = FusedMptMLP(mlp, merged)
        else:
            merged.part()


def _is_silu(function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    x = torch.linspace(-8, 8, 33)
    return torch.allclose(function(x), nn.functional.silu(x), rtol=0, atol=1e-6)


def _computes_as_ours(layer: nn.Module, config: Any) -> bool:
    """Return whether the layers of a family compute what ours do, found out on a small one of them."""
    kind = type(layer)
    if kind not in _checked:
        try:
            _checked[kind] = _compare_mpt(kind, config) if kind.__name__ == "MptMLP" else _compare(kind, config)
        except Exception as error:  # whatever a class that has changed raises
            log.debug("fuse: %s is left as it is: %s", kind.__name__, error)
            _checked[kind] = False
        if not _checked[kind]:
            log.info("fuse: %s of this transformers is not known here, and left as it is", kind.__name__)
    return _checked[kind]


@torch.no_grad()
def _compare(kind: Any, config: Any) -> bool:
    from transformers import DynamicCache

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention"],
    }
    small = copy.deepcopy(config)
    for name, value in sizes.items():
        if hasattr(small, name):
            setattr(small, name, value)
    small._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        layer = kind(small, layer_idx=0).float().eval()
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
        x = torch.randn(2, 5, 32)
        angles = torch.randn(1, 5, 8)
    tables = angles.cos(), angles.sin()
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)

    def compute() -> torch.Tensor:
        cache = DynamicCache(config=small)
        out: Any = layer(x, attention_mask=mask, position_embeddings=tables, past_key_values=cache)
        return out

    expected = compute()
    layer.forward = FusedLayer(layer, folds=False)
    layer.self_attn.forward = _InSteps(layer.self_attn)
    found = compute()
    gated = hasattr(layer.mlp, "gate_proj")
    if gated:
        mlp = layer.mlp
        again = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        gated = torch.allclose(again, mlp(x), rtol=1e-4, atol=1e-5)
    known = gated or type(layer.mlp).__name__ == "MixtralSparseMoeBlock"
    return known and isinstance(expected, torch.Tensor) and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _compare_mpt(kind: Any, config: Any) -> bool:
    small = copy.deepcopy(config)
    small.hidden_size = 16
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        mlp = kind(small).float().eval()
        x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    numbers = mlp.up_proj(x)
    moved = torch.randperm(numbers.shape[-1])
    by_number = torch.equal(mlp.act(numbers)[..., moved], mlp.act(numbers[..., moved]))
    return by_number and torch.allclose(mlp.down_proj(mlp.act(numbers)) + residual, mlp(x, residual), atol=1e-5)


class _InSteps:
    """The forward of a fused attention whose projections are called one by one, float ones as well."""

    def __init__(self, module: Any):
        self.module = module
        self.fused = FusedAttention(module, None, in_one=False)

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        module = self.module
        qkv = torch.cat([layer(hidden_states) for layer in (module.q_proj, module.k_proj, module.v_proj)], dim=-1)
        cos, sin = kwargs.pop("position_embeddings")
        return self.fused.in_steps(qkv, cos, sin, kwargs.pop("attention_mask"), kwargs.pop("past_key_values"), kwargs)
