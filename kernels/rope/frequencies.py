"""Inverse frequencies of every rotary scaling that a checkpoint of the Llama family may ask for.

A rotary embedding turns each pair of channels i by the angle `position * inv_freq[i]`. Context
extension changes nothing but `inv_freq` (and, for YaRN and longrope, the length of the vectors):

    default      base ** -(2i / dim)                                  Su et al. 2021, arXiv:2104.09864
    linear       positions divided by `factor`                        Chen et al. 2023, arXiv:2306.15595
    ntk          a larger base: base * alpha ** (dim / (dim - 2))     bloc97, June 2023
    dynamic      ntk with an alpha that grows with the length         emozilla, July 2023
    partial-ntk  by parts: plain, NTK and linear, two blends          jquesnelle/scaled-rope, July 2023
    ntk-by-parts by parts: plain and linear, one blend                Peng et al. 2023, arXiv:2309.00071, section 3.2
    yarn         ntk-by-parts and a temperature                       the same, section 3.4
    llama3       by wavelength: plain, a blend, linear                meta-llama/llama-models, 2024
    longrope     a divisor for each channel, from a search            Ding et al. 2024, arXiv:2402.13753

The parameters have the names that transformers gives them in `config.rope_parameters`. Everything is
computed in float64 and rounded once to float32: an error of one part in 1e7 in `inv_freq` is 1e-3 rad
at position 16384.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ropewalk.errors import RopeError

Frequencies = tuple[np.ndarray, float]


def inverse_frequencies(
    rope_type: str,
    *,
    dim: int,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    **parameters: object,
) -> tuple[torch.Tensor, float]:
    """Return (inv_freq, attention_scaling) of a rotary scaling.

    Args:
        rope_type: one of `ROPE_TYPES`.
        dim: number of channels of a head that are rotated; even. See `rotary_dim`.
        base: the rotary base, `rope_theta`; above 1.
        device: where the result goes; the CPU by default, never the meta device.
        parameters: those of the function below that computes `rope_type`.

    Returns:
        inv_freq: float32 [dim / 2], radians per position.
        attention_scaling: factor for cosine and sine (1 but for yarn and longrope).

    Raises:
        RopeError: unknown type, unknown or missing parameter, or a value outside its range.
    """
    inv_freq, scaling = _compute(rope_type, dim, base, parameters)
    # torch.from_numpy ignores an ambient `torch.device("meta")`, in which transformers builds its models.
    return torch.from_numpy(inv_freq.astype(np.float32)).to(device or "cpu"), scaling


def divisors(rope_type: str, *, dim: int, base: float = 10000.0, **parameters: object) -> Frequencies:
    """Return (what plain frequencies are divided by, float64 [dim / 2]; attention_scaling): the factors with which
    `longrope` says the same as any scaling that does not depend on the length.

    Arguments and errors are those of `inverse_frequencies`.
    """
    inv_freq, scaling = _compute(rope_type, dim, base, parameters)
    return _plain(dim, base) / inv_freq, scaling


def _compute(rope_type: str, dim: int, base: float, parameters: Mapping[str, object]) -> Frequencies:
    """Check the arguments, and compute the frequencies in float64."""
    names = parameter_names(rope_type)
    function = _FUNCTIONS[rope_type]
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2:
        raise RopeError(f"rotary dim: expected an even number of channels, at least 2, found {dim!r}")
    base = _number("rope_theta", base, above=1)
    optional = function.__kwdefaults__ or {}
    for name in parameters:
        if name not in names:
            raise RopeError(
                f"rope type {rope_type}: expected parameters {', '.join(names) or '(none)'}, found {name!r}"
            )
    for name in names:
        if name not in optional and parameters.get(name) is None:
            raise RopeError(f"rope type {rope_type}: expected parameter {name!r}, found none")
    given = {name: value for name, value in parameters.items() if value is not None}
    return function(dim=dim, base=base, **given)


def rotary_dim(head_dim: int, partial_rotary_factor: float = 1.0) -> int:
    """Return how many of a head's channels are rotated: the leading `partial_rotary_factor` of them."""
    factor = _number("partial_rotary_factor", partial_rotary_factor, above=0)
    dim = int(head_dim * factor)
    if factor > 1 or dim < 2 or dim % 2:
        raise RopeError(
            f"partial_rotary_factor: expected an even number of at most {head_dim} channels, "
            f"found {partial_rotary_factor!r}, which gives {dim}"
        )
    return dim


# Each function below returns float64 [dim / 2] and the attention scaling.


def default(*, dim: int, base: float) -> Frequencies:
    """The original: base ** -(2i / dim)."""
    return _plain(dim, base), 1.0


def linear(*, dim: int, base: float, factor: float) -> Frequencies:
    """Position interpolation: every position divided by `factor`."""
    return _plain(dim, base) / _factor(factor), 1.0


def ntk(*, dim: int, base: float, alpha: float) -> Frequencies:
    """NTK-aware: the base grows so that the slowest channel is slowed by `alpha` and the fastest by nothing."""
    return _plain(dim, _ntk_base(dim, base, _number("alpha", alpha, above=0))), 1.0


def dynamic(
    *,
    dim: int,
    base: float,
    factor: float,
    max_position_embeddings: int,
    seq_len: int | None = None,
) -> Frequencies:
    """NTK-aware with alpha = factor * L / max_position_embeddings - (factor - 1).

    `seq_len` is the length L so far; up to `max_position_embeddings` nothing is scaled.
    """
    factor, longest = _factor(factor), _length("max_position_embeddings", max_position_embeddings)
    length = max(seq_len or longest, longest)
    return _plain(dim, _ntk_base(dim, base, factor * length / longest - (factor - 1))), 1.0


def partial_ntk(
    *,
    dim: int,
    base: float,
    factor: float,
    original_max_position_embeddings: int,
    ntk_factor: float = 1.0,
    extrapolation_factor: float = 1.0,
    beta_0: float = 1.25,
    beta_1: float = 0.75,
    gamma_0: float = 16.0,
    gamma_1: float = 2.0,
) -> Frequencies:
    """Partial NTK as in LlamaPartNTKScaledRotaryEmbedding (jquesnelle/scaled-rope, PR 1, 8 July 2023).

    Channels that turn less than `beta_1` times within the original context are interpolated linearly,
    those that turn more than `beta_0` times are scaled NTK-aware, and those above `gamma_0` turns are
    left alone; between, two ramps blend (`gamma_1` ends the second). `ntk_factor` and
    `extrapolation_factor`, both 1 in every published model, weaken the two blends.
    """
    factor = _factor(factor)
    original = _length("original_max_position_embeddings", original_max_position_embeddings)
    plain = _plain(dim, base)
    scaled = _plain(dim, _ntk_base(dim, base, factor))
    mask = (1 - _ramp(dim, *_turns(dim, base, original, beta_0, beta_1))) * ntk_factor
    inv_freq = plain / factor * (1 - mask) + scaled * mask
    mask = (1 - _ramp(dim, *_turns(dim, base, original, gamma_0, gamma_1))) * extrapolation_factor
    return inv_freq * (1 - mask) + plain * mask, 1.0


def ntk_by_parts(
    *,
    dim: int,
    base: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Frequencies:
    """NTK-by-parts as in the YaRN paper: YaRN's blend of plain and linear, without its temperature.

    The name also stood, in July 2023, for what is `partial_ntk` here; the two differ by up to 16 %.
    """
    factor = _factor(factor)
    original = _length("original_max_position_embeddings", original_max_position_embeddings)
    plain = _plain(dim, base)
    mask = 1 - _ramp(dim, *_turns(dim, base, original, beta_fast, beta_slow, truncate))
    return plain / factor * (1 - mask) + plain * mask, 1.0


def yarn(
    *,
    dim: int,
    base: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> Frequencies:
    """YaRN: `ntk_by_parts`, with cosine and sine longer by 0.1 ln(factor) + 1.

    `attention_factor` replaces that number; `mscale` and `mscale_all_dim` (DeepSeek) make it the
    quotient of two such numbers with their own weights for ln(factor).
    """
    inv_freq, _ = ntk_by_parts(
        dim=dim,
        base=base,
        factor=factor,
        original_max_position_embeddings=original_max_position_embeddings,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=truncate,
    )

    def temperature(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = temperature(mscale) / temperature(mscale_all_dim) if both else temperature()  # type: ignore[arg-type]
    return inv_freq, _number("attention_factor", attention_factor, above=0)


def llama3(
    *,
    dim: int,
    base: float,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> Frequencies:
    """Llama 3.1: linear below `low_freq_factor` turns in the original context, plain above
    `high_freq_factor`, and a blend that is linear in the number of turns between.
    """
    factor = _factor(factor)
    original = _length("original_max_position_embeddings", original_max_position_embeddings)
    low = _number("low_freq_factor", low_freq_factor, above=0)
    high = _number("high_freq_factor", high_freq_factor, above=low)
    plain = _plain(dim, base)
    turns = original * plain / (2 * math.pi)
    mask = np.clip((turns - low) / (high - low), 0, 1)
    return plain / factor * (1 - mask) + plain * mask, 1.0


def longrope(
    *,
    dim: int,
    base: float,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position_embeddings: int,
    max_position_embeddings: int | None = None,
    factor: float | None = None,
    attention_factor: float | None = None,
    seq_len: int | None = None,
) -> Frequencies:
    """LongRoPE: each channel has its own divisor, one set up to the original context and one beyond.

    `seq_len` chooses the set. The attention scaling is sqrt(1 + ln(factor) / ln(original)), with
    factor = max_position_embeddings / original where it is not given.
    """
    original = _length("original_max_position_embeddings", original_max_position_embeddings)
    name, divisors = ("long_factor", long_factor) if (seq_len or 0) > original else ("short_factor", short_factor)
    if len(divisors) != dim // 2:
        raise RopeError(f"{name}: expected {dim // 2} numbers, one for each pair of channels, found {len(divisors)}")
    if factor is None:
        if max_position_embeddings is None:
            raise RopeError("longrope: expected factor or max_position_embeddings, found neither")
        factor = _length("max_position_embeddings", max_position_embeddings) / original
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    checked = np.array([_number(name, value, above=0) for value in divisors])
    return _plain(dim, base) / checked, _number("attention_factor", attention_factor, above=0)


_FUNCTIONS: dict[str, Callable[..., Frequencies]] = {
    "default": default,
    "linear": linear,
    "ntk": ntk,
    "dynamic": dynamic,
    "partial-ntk": partial_ntk,
    "ntk-by-parts": ntk_by_parts,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
}
ROPE_TYPES = tuple(_FUNCTIONS)


def parameter_names(rope_type: str) -> tuple[str, ...]:
    """Return the names of the parameters that `rope_type` takes besides dim and base.

    Raises:
        RopeError: an unknown type.
    """
    if rope_type not in _FUNCTIONS:
        raise RopeError(f"rope type: expected one of {', '.join(ROPE_TYPES)}, found {rope_type!r}")
    return tuple(n for n in _FUNCTIONS[rope_type].__annotations__ if n not in ("dim", "base", "return"))


def _plain(dim: int, base: float) -> np.ndarray:
    return base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


def _ntk_base(dim: int, base: float, alpha: float) -> float:
    if dim <= 2:
        raise RopeError(f"NTK scaling: expected a rotary dim above 2, found {dim}")
    return base * alpha ** (dim / (dim - 2))


def _turns(dim: int, base: float, length: int, most: float, least: float, truncate: bool = True) -> tuple[float, float]:
    """Return the channels (low, high) that turn `most` and `least` times within `length` positions,
    rounded outwards unless `truncate` is off, and kept inside the head.
    """

    def channel(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(most), channel(least)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def _ramp(dim: int, low: float, high: float) -> np.ndarray:
    """Return 0 up to channel pair `low`, 1 from `high` on, and a straight line between."""
    if low == high:
        high += 0.001  # as the originals do, so that the division stands
    return np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)


def _number(name: str, value: object, above: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= above:
        raise RopeError(f"{name}: expected a number above {above:g}, found {value!r}")
    return float(value)


def _factor(value: object) -> float:
    return _number("factor", value, above=0)


def _length(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RopeError(f"{name}: expected a positive number of positions, found {value!r}")
    return value
