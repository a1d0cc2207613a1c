"""What the layers of a fused model compute: the same as transformers', with fewer steps (see fuse.py).

The functions here stand in for the `forward` of single modules. Each looks, at every call, whether what it would go
around is as it was when the model was fused; where an adapter, a hook or a gradient asks for the steps one by one, the
module's own `forward` takes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ropewalk.cpu.attention import attention
from ropewalk.loader import apply_rotary, cache_room
from ropewalk.loader.merged import Merged
from ropewalk.norm.ops import add_rms_norm, rms_norm
from ropewalk.rope.ops import rope_and_cache_

FEW = 16  # new tokens up to which attention is one call on the CPU


def is_plain(*modules: nn.Module) -> bool:
    """Return whether calling modules does nothing but their forward, as it was written."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__:
            return False
    return True


def is_watched(module: nn.Module) -> bool:
    """Return whether a hook sees what a module gets or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class Projections:
    """Layers of a module that read one input, and their product where they can be merged.

    Args:
        module: whose they are.
        names: of the layers, in the order of their columns.
        merged: their weights side by side; None where each is called by itself.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], merged: Merged | None):
        self.module = module
        self.names = names
        self.merged = merged

    def usable(self) -> Merged | None:
        """Return the merged layers, if they are the module's still and nothing else wants to see what they compute."""
        merged = self.merged
        if merged is None:
            return None
        own = self.module._modules
        for name, layer in zip(self.names, merged.layers, strict=True):
            if own[name] is not layer:
                return None
        return merged if is_plain(*merged.layers) and merged.is_ready() else None

    def order(self) -> Tensor | None:
        """Return the order in which they want their input, if that is to be folded into what writes it."""
        if is_watched(self.module):
            return None
        merged = self.usable()
        return None if merged is None else merged.order


class FusedAttention:
    """The forward of a Llama's attention, its projections as one, on the CPU with its cache and the rotation.

    Args:
        module: of a family in which it computes what Llama's does.
        merged: q, k and v; None to call them one by one.
        in_one: whether a few tokens are one call on the CPU.
    """

    def __init__(self, module: Any, merged: Merged | None, in_one: bool):
        self.module = module
        self.projections = Projections(module, ("q_proj", "k_proj", "v_proj"), merged)
        self.in_one = in_one
        self.modeling = type(module).__module__

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        *,
        in_order: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the module's own forward does; with `in_order` for channels in the projections' order."""
        module = self.module
        merged = None if _needs_gradient(hidden_states) else self.projections.usable()
        in_one = self._takes(hidden_states, attention_mask, past_key_values)
        if position_embeddings is None or (merged is None and not in_one):
            return type(module).forward(
                module,
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        if merged is not None:
            qkv = merged(hidden_states, in_order)
        else:
            projections = (module.q_proj, module.k_proj, module.v_proj)
            qkv = torch.cat([projection(hidden_states) for projection in projections], dim=-1)
        cos, sin = position_embeddings
        if in_one:
            attended = self._in_one(qkv, cos, sin, attention_mask, past_key_values)
            if attended is not None:
                return module.o_proj(attended), None
        return self.in_steps(qkv, cos, sin, attention_mask, past_key_values, kwargs)

    def _takes(self, x: Tensor, mask: Any, cache: Any) -> bool:
        """Return whether the attention of these tokens can be one call."""
        return (
            self.in_one
            and cache is not None
            and x.is_cpu
            and x.shape[1] <= FEW
            and not torch.compiler.is_compiling()
            and not _needs_gradient(x)
            and not self.module.training
            and self.module.config._attn_implementation == "sdpa"
            and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4))
            and apply_rotary.is_replaced(self.modeling)
            and apply_rotary.has_kernel(x)
        )

    def _in_one(self, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any) -> Tensor | None:
        module = self.module
        heads, kv_heads = self._heads()
        tokens = qkv.shape[1]
        room = cache_room.room_in(cache, module.layer_idx, tokens, qkv, kv_heads, module.head_dim)
        if room is None:
            return None
        out = attention(qkv, cos, sin, room.keys, room.values, room.length, mask, heads, kv_heads, module.scaling)
        cache_room.wrote(cache, module.layer_idx, int(room.length))
        return out

    def _heads(self) -> tuple[int, int]:
        module = self.module
        return module.q_proj.out_features // module.head_dim, module.k_proj.out_features // module.head_dim

    def in_steps(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the module's own forward does with its projections, [B, S, heads of q, k and v times D]."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        module, modeling = self.module, sys.modules[self.modeling]
        heads, kv_heads = self._heads()
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.view(batch, tokens, -1, module.head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        entered = self._enter(q, k, v, cos, sin, cache) if self.in_one else None
        if entered is not None:
            k, v = entered
        else:
            q, k = modeling.apply_rotary_pos_emb(q, k, cos, sin)
            if cache is not None:
                k, v = cache.update(k, v, module.layer_idx)
        interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, modeling.eager_attention_forward
        )
        if (window := _window(module)) is not None:
            kwargs["sliding_window"] = window
        dropout = module.attention_dropout if module.training else 0.0
        out, weights = interface(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **kwargs)
        return module.o_proj(out.reshape(batch, tokens, -1).contiguous()), weights

    def _enter(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Rotate q and k in place and write k and v into a static cache, in one launch; return all its keys and values.

        Returns None, with nothing done, for other caches, and where a gradient is wanted.
        """
        layer = cache_room.static_layer(cache, self.module.layer_idx)
        fits = layer is not None and layer.keys.dtype == q.dtype and layer.keys.shape[0] == q.shape[0]
        if not fits or not _has_one_launch(q) or not apply_rotary.is_replaced(self.modeling) or _needs_gradient(q):
            return None
        slots = (torch.arange(q.shape[2], device=q.device) + layer.cumulative_length)[None]
        layer.cumulative_length.add_(q.shape[2])
        pairs = (table.unflatten(-1, (2, -1)) for table in (cos, sin))
        rope_and_cache_(q, k, v, layer.keys, layer.values, slots, None, None, *pairs)
        return layer.keys, layer.values


def _has_one_launch(x: Tensor) -> bool:
    return x.is_cuda


def _window(module: Any) -> int | None:
    """Return the sliding window that the families with one hand on, Qwen2 layer by layer."""
    window: int | None = getattr(module, "sliding_window", None)
    is_llama = type(module).__name__.startswith("Llama")
    return window if window is not None or is_llama else getattr(module.config, "sliding_window", None)


def _same(module: Any, other: Any) -> bool:
    return module is other


class FusedMLP:
    """The forward of a gated MLP, gate and up as one.

    Args:
        module: computes down(silu(gate(x)) * up(x)).
        merged: gate and up.
    """

    def __init__(self, module: Any, merged: Merged):
        self.module = module
        self.projections = Projections(module, ("gate_proj", "up_proj"), merged)

    def __call__(self, x: Tensor, in_order: bool = False) -> Tensor:
        """Return what the module's own forward does; with `in_order` for channels in the projections' order."""
        merged = None if _needs_gradient(x) else self.projections.usable()
        if merged is None:
            result: Tensor = type(self.module).forward(self.module, x)
            return result
        return _read_by(self.module.down_proj, merged(x, in_order), merged)


class FusedMptMLP:
    """The forward of MPT's MLP, the order that its second layer wants folded into the columns of its first.

    Args:
        module: computes down(act(up(x))), where act goes number by number, and adds what it is given.
        merged: up, alone.
    """

    def __init__(self, module: Any, merged: Merged):
        self.module = module
        self.projections = Projections(module, ("up_proj",), merged)

    def __call__(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """Return what the module's own forward does."""
        module = self.module
        merged = None if _needs_gradient(hidden_states) or module.training else self.projections.usable()
        if merged is None or merged.folded is None:
            result: Tensor = type(module).forward(module, hidden_states, residual)
            return result
        return _read_by(module.down_proj, module.act(merged(hidden_states)), merged) + residual


def _read_by(down: Any, inner: Tensor, merged: Merged) -> Tensor:
    """Return what the next layer makes of channels that may be in the order that it wanted."""
    result: Tensor
    if merged.folded is None:
        result = down(inner)
    elif _same(down, merged.reader) and down._order is merged.folded and is_plain(down):
        result = down(inner, in_order=True)
    else:  # an adapter, or a hook
        result = down(inner.index_select(-1, torch.argsort(merged.folded)))
    return result


class FusedLayer:
    """The forward of a Llama's layer, whose sums and norms are one step.

    Args:
        module: computes x + attention(norm(x)), and then that + mlp(norm(that)).
        folds: whether a norm is written in the order that the packed layers behind it want.
    """

    def __init__(self, module: Any, folds: bool):
        self.module = module
        self.norms = module.input_layernorm, module.post_attention_layernorm
        self.folds = folds

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the module's own forward does."""
        module = self.module
        before, after = self.norms
        same = module.input_layernorm is before and module.post_attention_layernorm is after
        if args or _needs_gradient(hidden_states) or module.training or not (same and is_plain(before, after)):
            result: Tensor = type(module).forward(module, hidden_states, *args, **kwargs)
            return result
        order, ordered = self._order(module.self_attn)
        normed = rms_norm(hidden_states, before.weight, before.variance_epsilon, order)
        attended, _ = module.self_attn(hidden_states=normed, **kwargs, **ordered)
        order, ordered = self._order(module.mlp)
        hidden_states, normed = add_rms_norm(hidden_states, attended, after.weight, after.variance_epsilon, order)
        total: Tensor = hidden_states + module.mlp(normed, **ordered)
        return total

    def _order(self, reader: nn.Module) -> tuple[Tensor | None, dict[str, bool]]:
        """Return the order in which a module wants its input, and how it is told."""
        fused = reader.__dict__.get("forward")
        if not self.folds or not isinstance(fused, (FusedAttention, FusedMLP)):
            return None, {}
        order = fused.projections.order()
        return order, {} if order is None else {"in_order": True}
