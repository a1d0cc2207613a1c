"""The experts of a mixture, ours and others': gate, up, activation and down of the experts that tokens were given to.

A call has tokens x [T, hidden], the numbers of their experts [T, top_k] and the weights of these [T, top_k], and
returns [T, hidden], as the experts modules of transformers do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ropewalk.bench.peers.base import Peer, Program, imported
from ropewalk.bench.peers.gptqmodel import GPTQModel
from ropewalk.bench.peers.humming import Humming
from ropewalk.bench.peers.llamacpp import LlamaCpp
from ropewalk.bench.peers.ours import OURS, modes, packed_layer, set_mode
from ropewalk.bench.peers.ours import Ropewalk as RopewalkLinear
from ropewalk.bench.peers.torch_linear import TorchInt4
from ropewalk.bench.peers.weight import Weight, random_weight
from ropewalk.bench.shapes import Packing
from ropewalk.loader.experts import PackedExperts

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Sizes(NamedTuple):
    """Of a mixture: experts, width of the tokens, inner width of an expert, and experts for each token."""

    experts: int
    hidden: int
    ffn: int
    top_k: int = 2

    @property
    def name(self) -> str:
        """As --shapes takes it."""
        return f"{self.experts}x{self.hidden}x{self.ffn}:{self.top_k}"


@dataclass(frozen=True)
class Mixture:
    """The packed layers of all experts, (gate, up, down) of each; what is unpacked of them is kept for all peers."""

    sizes: Sizes
    layers: list[tuple[Weight, Weight, Weight]]
    unpacked: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def expert_bytes(self) -> int:
        """The fewest bytes that a kernel must read of an expert."""
        return sum(weight.nbytes for weight in self.layers[0])

    def clone(self) -> Mixture:
        """Return the same in buffers of its own."""
        return Mixture(self.sizes, [(gate.clone(), up.clone(), down.clone()) for gate, up, down in self.layers])

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return gate and up in one, [E, 2 ffn, hidden], and down, [E, hidden, ffn]."""
        if dtype not in self.unpacked:
            experts, hidden, ffn, _ = self.sizes
            device = self.layers[0][0].device
            both = torch.empty(experts, 2 * ffn, hidden, dtype=dtype, device=device)
            last = torch.empty(experts, hidden, ffn, dtype=dtype, device=device)
            for e, (gate, up, down) in enumerate(self.layers):
                both[e, :ffn], both[e, ffn:], last[e] = gate.dense().t(), up.dense().t(), down.dense().t()
            self.unpacked[dtype] = both, last
        return self.unpacked[dtype]


def random_mixture(sizes: Sizes, packing: Packing, device: torch.device) -> Mixture:
    """Return a mixture of random codes. Each expert has act-orders of its own, gate and up the same one, as GPTQ gives
    them.

    Raises:
        FormatError: a size or setting that the format cannot hold.
    """
    layers = []
    for e in range(sizes.experts):
        parts: list[Weight] = []
        # The sizes of random weights are such that results are of the order of 1 to 10; here two follow each other.
        for i, (k, n) in enumerate([(sizes.hidden, sizes.ffn)] * 2 + [(sizes.ffn, sizes.hidden)]):
            weight = random_weight(k, n, **packing._asdict(), device=device, seed=3 * e + i)
            g_idx = parts[0].g_idx if i == 1 else weight.g_idx
            parts.append(replace(weight, scales=weight.scales / 4, g_idx=g_idx))
        layers.append((parts[0], parts[1], parts[2]))
    return Mixture(sizes, layers)


def one_by_one(layers: Any, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Compute expert by expert.

    Args:
        layers: the functions (gate, up, down) of an expert, by its number.
    """
    total = torch.zeros_like(x)
    for expert in expert_ids.unique().tolist():
        token, place = torch.where(expert_ids == expert)
        gate, up, down = layers[expert]
        rows = x[token]
        y = down(silu(gate(rows)) * up(rows))
        total.index_add_(0, token, (y * weights[token, place, None]).to(total.dtype))
    return total


class ExpertsPeer(Program, ABC):
    """A way to compute with packed experts.

    Attributes:
        dense: whether it keeps the weights unpacked, in the dtype it computes in.
        mode: which of our kernels for the CPU it is; None for what has no such choice.
        most_copies: over how many copies of a mixture to rotate at most.
    """

    dense = False
    mode: str | None = None
    most_copies = 8

    def refuses(self, mixture: Mixture) -> str | None:
        """Return why it cannot hold a mixture, or None."""
        reasons = (self.cannot_hold(weight) for weight in mixture.layers[0])
        return next((reason for reason in reasons if reason), None)

    def too_many(self, sizes: Sizes, tokens: int, dtype: torch.dtype) -> str | None:
        """Return why it does not take so many tokens, or None."""
        return None

    def nbytes(self, mixture: Mixture, dtype: torch.dtype) -> int:
        """Return the fewest bytes that it must read of an expert."""
        return 3 * mixture.sizes.hidden * mixture.sizes.ffn * dtype.itemsize if self.dense else mixture.expert_bytes

    @abstractmethod
    def prepare(self, mixture: Mixture, dtype: torch.dtype) -> Call:
        """Return a function of tokens, experts and weights, with the mixture's buffers or its own."""


class Ropewalk(ExpertsPeer):
    """`PackedExperts`, the module that `ropewalk.load` puts into a mixture: all experts in one operator for each layer.

    Args:
        mode: of our kernels for the CPU, None for their default.
    """

    bits = (2, 3, 4, 8)
    act_order = True
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def __init__(self, name: str = OURS, mode: str | None = None, devices: tuple[str, ...] = ("cpu", "cuda")):
        self.name = name
        self.mode = mode
        self.devices = devices

    def prepare(self, mixture: Mixture, dtype: torch.dtype) -> Call:
        """Load the layers of all experts and stack them."""
        names = ("w1", "w3", "w2")
        experts = [dict(zip(names, map(packed_layer, layers), strict=True)) for layers in mixture.layers]
        module = PackedExperts(experts, nn.SiLU())
        set_mode(module, self.mode)
        if not module.stack():
            raise RuntimeError("expected experts that can be computed together, found others")
        return module


class OneByOne(ExpertsPeer):
    """A kernel for single layers, called for each expert that has tokens.

    Args:
        linear: the kernel.
    """

    def __init__(self, linear: Peer, by_default: tuple[str, ...] = ("cpu", "cuda")):
        self.linear = linear
        self.name = f"{linear.name}-one-by-one"
        self.mode = linear.mode
        self.package, self.devices, self.dtypes = linear.package, linear.devices, linear.dtypes
        self.by_default = by_default
        self.most_copies = max(
            1, linear.most_copies // 96
        )  # 24 layers and more in each, of which some are slow to make

    def available(self, device: torch.device) -> str | None:
        """Return why it cannot run here, or None."""
        return self.linear.available(device)

    def refuses(self, mixture: Mixture) -> str | None:
        """Ask the kernel."""
        reasons = (self.linear.refuses(weight) for weight in mixture.layers[0])
        return next((reason for reason in reasons if reason), None)

    def nbytes(self, mixture: Mixture, dtype: torch.dtype) -> int:
        """Return that of the three layers."""
        return sum(self.linear.nbytes(weight, dtype) for weight in mixture.layers[0])

    def prepare(self, mixture: Mixture, dtype: torch.dtype) -> Call:
        """Prepare every layer."""
        layers = [[self.linear.prepare(weight.clone(), dtype) for weight in layers] for layers in mixture.layers]
        return lambda x, expert_ids, weights: one_by_one(layers, x, expert_ids, weights)


class Transformers(ExpertsPeer):
    """transformers' MixtralExperts with the weights unpacked, by one of its implementations.

    Args:
        implementation: "eager", which takes expert by expert, "batched_mm", which copies the weights of each token's
            experts, or "grouped_mm", which is the default of its models.
    """

    package = "transformers"
    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True
    dense = True
    dtypes = (torch.bfloat16, torch.float16)

    MOST_COPIED = 4e9  # bytes

    def __init__(self, implementation: str):
        self.implementation = implementation
        self.name = f"transformers-{implementation.removesuffix('_mm')}"

    def too_many(self, sizes: Sizes, tokens: int, dtype: torch.dtype) -> str | None:
        """Say how much would be copied."""
        copied = tokens * sizes.top_k * 2 * sizes.hidden * sizes.ffn * dtype.itemsize
        if self.implementation == "batched_mm" and copied > self.MOST_COPIED:
            return f"would copy {copied / 1e9:.0f} GB of weights"
        return None

    def prepare(self, mixture: Mixture, dtype: torch.dtype) -> Call:
        """Make the module around the unpacked weights."""
        experts, hidden, ffn, top_k = mixture.sizes
        config = imported("transformers").MixtralConfig(
            hidden_size=hidden, intermediate_size=ffn, num_local_experts=experts, num_experts_per_tok=top_k
        )
        config._experts_implementation = self.implementation
        with torch.device("meta"):
            module = imported("transformers.models.mixtral.modeling_mixtral").MixtralExperts(config)
        both, down = mixture.dense(dtype)
        module.load_state_dict({"gate_up_proj": both, "down_proj": down}, assign=True)
        return module.requires_grad_(False)


class TorchAll(ExpertsPeer):
    """torch.bmm over all experts with all tokens, unpacked: every expert computes every token, and weights of 0 leave
    out what nobody wanted. It reads them all, and waits for nothing.
    """

    name = "torch-all-experts"
    devices = ("cpu", "cuda")
    bits = (2, 3, 4, 8)
    act_order = True
    dense = True
    dtypes = (torch.bfloat16, torch.float16)

    MOST_TOKENS = 128  # beyond them it only wastes arithmetic

    def too_many(self, sizes: Sizes, tokens: int, dtype: torch.dtype) -> str | None:
        """Say beyond how many tokens that makes no sense."""
        return f"is timed up to {self.MOST_TOKENS} tokens" if tokens > self.MOST_TOKENS else None

    def prepare(self, mixture: Mixture, dtype: torch.dtype) -> Call:
        """Multiply with all of it."""
        both, down = (t.transpose(1, 2) for t in mixture.dense(dtype))
        experts = mixture.sizes.experts

        def run(x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
            gate, up = torch.bmm(x.expand(experts, *x.shape), both).chunk(2, -1)
            each = torch.bmm(silu(gate) * up, down)
            mixing = x.new_zeros(len(x), experts).scatter_(1, expert_ids, weights)
            return torch.einsum("te,eth->th", mixing, each)

        return run


def experts_peers(device: torch.device | None = None, mode: str | None = None) -> list[ExpertsPeer]:
    """Return all that compute experts, ours first: on a CPU in each of its modes.

    Args:
        mode: of our kernels for the CPU, as `ours.modes` takes it.
    """
    ours = [Ropewalk()]
    single = RopewalkLinear()
    if device is not None and device.type == "cpu":
        named = modes(mode)
        ours = [Ropewalk(name, one, ("cpu",)) for name, one in named]
        single = RopewalkLinear(OURS, named[0][1], ("cpu",))
    return [
        *ours,
        OneByOne(single),
        Transformers("grouped_mm"),
        Transformers("eager"),
        Transformers("batched_mm"),
        TorchAll(),
        OneByOne(LlamaCpp()),
        OneByOne(TorchInt4()),
        # It compiles every layer, which takes minutes on a CPU.
        OneByOne(GPTQModel(), by_default=("cuda",)),
        OneByOne(GPTQModel("marlin", "gptq_marlin", devices=("cuda",))),
        OneByOne(Humming()),
    ]


def reference(mixture: Mixture, x: Tensor, expert_ids: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is right in a dtype, [T, hidden], one unpacked layer at a time."""

    def layer(weight: Weight) -> Callable[[Tensor], Tensor]:
        return lambda rows: linear(rows, weight.dense().t().to(dtype))

    layers = [[layer(weight) for weight in layers] for layers in mixture.layers]
    return one_by_one(layers, x.to(dtype), expert_ids, weights.to(dtype))
