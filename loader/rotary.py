"""Drop-in rotary embeddings: for transformers 5, and for code of 2023.

Both keep their angles in float32 whatever dtype the model is cast to: in float16 `inv_freq` is off by
up to 5e-4, which is 8 rad at position 16384.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from ropewalk.errors import MissingPackageError, RopeError
from ropewalk.loader import apply_rotary
from ropewalk.loader.keeps_dtypes import KeepsDtypes
from ropewalk.rope.frequencies import ROPE_TYPES, divisors, inverse_frequencies, parameter_names, rotary_dim
from ropewalk.rope.reference import cos_sin

# Rope types of ours that transformers does not have.
REGISTERED_TYPES = ("partial-ntk", "ntk-by-parts", "ntk")
# Types whose frequencies depend on how long the sequence is.
_BY_LENGTH = ("dynamic", "longrope")


def frequencies_of(
    config: Any, device: torch.device | str | None = None, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[Tensor, float]:
    """Return (inv_freq float32 [dim / 2], attention_scaling) for a transformers config.

    Its signature is that of the functions in transformers' `ROPE_INIT_FUNCTIONS`.

    Args:
        config: has `rope_parameters` and either `head_dim` or `hidden_size` and `num_attention_heads`.
        device: where the result goes; the CPU by default.
        seq_len: the length so far, for "dynamic" and "longrope".
        layer_type: which of several sets in `rope_parameters`, for models that have one for each kind of layer.

    Raises:
        RopeError: an unknown type, or parameters that are missing or impossible.
    """
    rope_type, arguments = _arguments(config, seq_len, layer_type)
    return inverse_frequencies(rope_type, device=device, **arguments)


def divisors_of(config: Any) -> tuple[np.ndarray, float]:
    """Return (divisors float64 [dim / 2], attention_scaling) for a transformers config: see
    `ropewalk.rope.frequencies.divisors`.

    Args:
        config: as `frequencies_of` takes it.

    Raises:
        RopeError: an unknown type, or parameters that are missing or impossible.
    """
    rope_type, arguments = _arguments(config)
    return divisors(rope_type, **arguments)


def _arguments(config: Any, seq_len: int | None = None, layer_type: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return (rope type, what `inverse_frequencies` takes for it)."""
    given = dict(config.rope_parameters if layer_type is None else config.rope_parameters[layer_type])
    rope_type = given.pop("rope_type", None) or given.pop("type", "default")
    given.pop("type", None)
    base = given.pop("rope_theta", 10000.0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = rotary_dim(head_dim, given.pop("partial_rotary_factor", None) or 1.0)
    names = parameter_names(rope_type)
    if "original_max_position_embeddings" in names:
        given.setdefault("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
    if "max_position_embeddings" in names:
        # For "dynamic" that is the length up to which nothing is scaled.
        original = given.get("original_max_position_embeddings") if rope_type == "dynamic" else None
        given["max_position_embeddings"] = original or config.max_position_embeddings
    if "seq_len" in names:
        given["seq_len"] = seq_len
    # transformers keeps keys that a type does not use (it warns of them when the config is made).
    given = {name: value for name, value in given.items() if name in names}
    return rope_type, {"dim": dim, "base": base, **given}


class _Registered:
    """How many need transformers to know our types: loads under way or done, and who registered them for good."""

    lock = threading.RLock()
    needed = 0
    holders: ClassVar[set[str]] = set()


def register_rope_types(holder: str | None = None) -> None:
    """Make transformers know "partial-ntk", "ntk-by-parts" and "ntk" as values of `rope_type`.

    A config that names one then builds, saves and reloads. "ntk-by-parts" means the formula of the YaRN
    paper (section 3.2); the formula of July 2023 that also went by that name is "partial-ntk". Calling
    it again changes nothing, and types that transformers has itself are left alone.

    Args:
        holder: a front end that needs them until it calls `unregister_rope_types` with its name.

    Raises:
        MissingPackageError: a transformers before 5, whose configs have no such types.
    """
    try:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin
    except ImportError as error:
        found = importlib.metadata.version("transformers")
        raise MissingPackageError(f"rope types: expected transformers 5.6 or newer, found {found}") from error

    with _Registered.lock:
        _Registered.needed += 1
        if holder is not None:
            _Registered.holders.add(holder)
        for name in REGISTERED_TYPES:
            ROPE_INIT_FUNCTIONS.setdefault(name, frequencies_of)
            if not hasattr(RotaryEmbeddingConfigMixin, _check_of(name)):
                setattr(RotaryEmbeddingConfigMixin, _check_of(name), _validate)


def unregister_rope_types(holder: str | None = None) -> None:
    """Undo `register_rope_types`, unless another holder still needs them. Models that are loaded go on; to save one and
    build it anew takes them again.
    """
    try:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin
    except ImportError:  # before transformers 5 there is nothing to undo
        return

    with _Registered.lock:
        _Registered.needed = 0
        _Registered.holders.discard(holder or "")
        if _Registered.holders:
            return
        for name in REGISTERED_TYPES:
            if ROPE_INIT_FUNCTIONS.get(name) is frequencies_of:
                del ROPE_INIT_FUNCTIONS[name]
            if vars(RotaryEmbeddingConfigMixin).get(_check_of(name)) is _validate:
                delattr(RotaryEmbeddingConfigMixin, _check_of(name))


@contextmanager
def rope_types() -> Iterator[None]:
    """Have our types registered while a model is loaded, and from then on; not if that fails and nobody else had
    them.
    """
    register_rope_types()
    try:
        yield
    except BaseException:
        with _Registered.lock:
            _Registered.needed -= 1
            if _Registered.needed <= 0:
                unregister_rope_types()
        raise


def _check_of(name: str) -> str:
    """Return the name by which transformers looks up the check of a type, hyphens and all."""
    return f"_validate_{name}_rope_parameters"


def _validate(config: Any, rope_parameters: dict[str, Any], ignore_keys: object = None) -> None:
    """Check the parameters of a registered type when a config is made, as transformers does for its own."""
    rope_type = rope_parameters["rope_type"]
    given = {
        name: value
        for name, value in rope_parameters.items()
        if name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    }
    original = getattr(config, "original_max_position_embeddings", None)
    if "original_max_position_embeddings" in parameter_names(rope_type) and original is not None:
        given.setdefault("original_max_position_embeddings", original)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = rotary_dim(head_dim, rope_parameters.get("partial_rotary_factor") or 1.0)
    inverse_frequencies(rope_type, dim=dim, base=rope_parameters.get("rope_theta") or 10000.0, **given)


class RopewalkRotaryEmbedding(KeepsDtypes):
    """A drop-in for `LlamaRotaryEmbedding` of transformers 5 and its copies in other half-rotated families.

    Differences, all meant: frequencies come from float64; casting the model leaves them float32; types
    that depend on the length ("dynamic", "longrope") follow the length of the call and nothing else,
    where transformers remembers the longest so far; nothing waits for the device.

    Args:
        config: a transformers config with `rope_parameters`.
        device: where the buffers go.

    Attributes:
        inv_freq, original_inv_freq: float32 [dim / 2], not in the state dict.
        attention_scaling: factor of cosine and sine.
        modeling: name of the modeling module whose attention the tables are for, where that is known.

    Raises:
        RopeError: an unknown type, or parameters that are missing or impossible.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor
    long_inv_freq: Tensor  # of "longrope" alone

    def __init__(self, config: Any, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.modeling: str | None = None
        parameters = config.rope_parameters
        self.rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._frequencies(device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        if self.rope_type == "longrope":
            original = parameters["original_max_position_embeddings"]
            long_inv_freq, _ = frequencies_of(config, device, seq_len=original + 1)
            self.register_buffer("long_inv_freq", long_inv_freq, persistent=False)
        elif self.rope_type == "dynamic" and self.inv_freq.shape[0] < 2:
            raise RopeError("dynamic: expected a rotary dim above 2, found 2")

    def _frequencies(self, device: torch.device | str | None) -> tuple[Tensor, float]:
        if self.rope_type in ROPE_TYPES:
            return frequencies_of(self.config, device)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self.rope_type not in ROPE_INIT_FUNCTIONS:
            names = ", ".join(dict.fromkeys((*ROPE_TYPES, *ROPE_INIT_FUNCTIONS)))
            raise RopeError(f"rope type: expected one of {names}, found {self.rope_type!r}")
        return ROPE_INIT_FUNCTIONS[self.rope_type](self.config, torch.device(device or "cpu"))

    @staticmethod
    def compute_default_rope_parameters(config: Any, **_: object) -> tuple[Tensor, float]:
        """What transformers calls to fill the buffers of a model that it built on the meta device."""
        return frequencies_of(config)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each [batch, seq, dim], for position_ids [batch, seq].

        They have x's dtype; where a kernel of ours reads them (see apply_rotary.py), float32.
        """
        inv_freq = self._inv_freq_for(position_ids).to(x.device)
        cos, sin = cos_sin(inv_freq, position_ids.to(x.device), self.attention_scaling)
        by_ours = self.modeling is not None and apply_rotary.takes_float32_tables(self.modeling)
        dtype = torch.float32 if by_ours and apply_rotary.has_kernel(x) else x.dtype
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)

    def _inv_freq_for(self, position_ids: Tensor) -> Tensor:
        if self.rope_type not in _BY_LENGTH:
            return self.inv_freq
        length = position_ids.max() + 1  # stays on the device
        parameters = self.config.rope_parameters
        if self.rope_type == "longrope":
            beyond = length > parameters["original_max_position_embeddings"]
            return torch.where(beyond, self.long_inv_freq, self.inv_freq)
        # Dynamic NTK multiplies the base by a power of s, which multiplies inv_freq[i] by another.
        longest = parameters.get("original_max_position_embeddings") or self.config.max_position_embeddings
        factor = parameters["factor"]
        s = (factor * length.clamp(min=longest).double() / longest) - (factor - 1)
        half = self.inv_freq.shape[0]
        powers = torch.arange(half, device=length.device, dtype=torch.float64) / (half - 1)
        return (self.inv_freq.to(length.device).double() * s**-powers).float()

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"rope_type={self.rope_type}, dim={2 * self.inv_freq.shape[0]}"


class _Tables:
    """Cosine and sine of the first positions for one `inv_freq`, made on each device where they are asked for."""

    def __init__(self, inv_freq: Tensor):
        self.inv_freq = inv_freq
        self.made: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def get(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return two tensors [1, 1, at least length, dim], float32."""
        if device not in self.made or self.made[device][0].shape[2] < length:
            cos, sin = cos_sin(self.inv_freq.to(device), torch.arange(length, device=device)[None])
            self.made[device] = (torch.cat((cos, cos), dim=-1)[None], torch.cat((sin, sin), dim=-1)[None])
        return self.made[device]


class LlamaPartNTKScaledRotaryEmbedding(KeepsDtypes):
    """The class of July 2023 by its own name, arguments and results (jquesnelle/scaled-rope, PR 1).

    Code that puts it in place of `LlamaRotaryEmbedding` of transformers 4.31, as the patch published with
    airophin-13b-pntk-16k does, works unchanged. Three things are better than they were: the tables are
    float32 whatever the model is cast to; all layers share them (40 layers of 16384 positions held 640 MiB
    in float32); and an `inv_freq` persisted in a checkpoint is passed over, not loaded.

    Args:
        dim: channels of a head.
        max_position_embeddings: how many positions are tabulated at first; longer sequences extend it.
        base: the rotary base.
        scale: how many times the context is extended.
        ntk_factor, extrapolation_factor: see `ropewalk.rope.frequencies.partial_ntk`.
        original_max_position_embeddings: the context of pretraining.
        device: where the buffer goes.

    Raises:
        RopeError: an argument outside its range.
    """

    inv_freq: Tensor
    _shared: ClassVar[WeakValueDictionary[bytes, _Tables]] = WeakValueDictionary()

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int = 2048,
        base: float = 10000,
        scale: float = 1,
        ntk_factor: float = 1,
        extrapolation_factor: float = 1,
        original_max_position_embeddings: int = 2048,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        inv_freq, _ = inverse_frequencies(
            "partial-ntk",
            dim=dim,
            base=base,
            factor=scale,
            original_max_position_embeddings=original_max_position_embeddings,
            ntk_factor=ntk_factor,
            extrapolation_factor=extrapolation_factor,
        )
        self.register_buffer("inv_freq", inv_freq.to(device or "cpu"), persistent=False)
        self._tables = self._shared.setdefault(inv_freq.numpy().tobytes(), _Tables(inv_freq))
        self.max_seq_len_cached = max_position_embeddings

    @property
    def cos_cached(self) -> Tensor:
        """[1, 1, max_seq_len_cached, dim], float32, on inv_freq's device."""
        return self._tables.get(self.max_seq_len_cached, self.inv_freq.device)[0][:, :, : self.max_seq_len_cached]

    @property
    def sin_cached(self) -> Tensor:
        """As `cos_cached`."""
        return self._tables.get(self.max_seq_len_cached, self.inv_freq.device)[1][:, :, : self.max_seq_len_cached]

    def forward(self, x: Tensor, seq_len: int | None = None) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each [1, 1, seq_len, dim], in x's dtype and on its device.

        x is [batch, heads, seq, head_dim]; its length counts only where seq_len is not given.
        """
        length = x.shape[-2] if seq_len is None else seq_len
        self.max_seq_len_cached = max(length, self.max_seq_len_cached)
        cos, sin = self._tables.get(self.max_seq_len_cached, x.device)
        return cos[:, :, :length].to(x.dtype), sin[:, :, :length].to(x.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        state_dict.pop(prefix + "inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
