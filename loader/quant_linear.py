"""QuantLinear: a linear layer whose weight stays packed, with AutoGPTQ's arguments, buffers and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ropewalk.gptq.ops  # noqa: F401  registers ropewalk::gptq_linear
from ropewalk import cpu
from ropewalk.errors import FormatError
from ropewalk.gptq import cpu_layout, cpu_ops
from ropewalk.gptq.format import (
    FORMATS,
    check_values,
    expected_tensors,
    group_count,
    is_sequential,
    is_symmetric,
    pack,
    sequential_g_idx,
    unpack,
    zeros_v1_to_v2,
    zeros_v2_to_v1,
)
from ropewalk.gptq.layout import has_even_groups, row_order, supports, to_checkpoint, to_execution
from ropewalk.loader.keeps_dtypes import KeepsDtypes
from ropewalk.loader.merged import Merged


class QuantLinear(KeepsDtypes):
    """y = x W + bias with W packed in the checkpoint layout of `ropewalk.gptq.format`.

    A drop-in for `auto_gptq.nn_modules.qlinear.*.QuantLinear`: the same positional arguments, the buffers
    `qweight`, `qzeros`, `scales`, `g_idx` and `bias` under the same names and shapes, `pack` and
    `post_init`. The buffers hold what the file holds, so `state_dict()` writes the checkpoint back
    bit for bit; what the kernels need besides is derived from them in `post_init`, or at the first call.
    That turns `qweight`, in its place, into the execution layout of the device: on a GPU that of
    `ropewalk.gptq.layout`; on the CPU, where our kernels are or can be built, that of
    `ropewalk.gptq.cpu_layout`, and `scales` with it. Saving, loading and moving the module turn it back.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: rows that share a scale; -1 for all of them.
        infeatures, outfeatures: K and N.
        bias: whether there is one.
        use_cuda_fp16, kernel_switch_threshold, trainable: AutoGPTQ's; accepted and without meaning here
            (one kernel serves all sizes, and the gradient with respect to the input is always there).
        weight_dtype: dtype of the scales and the bias; float16 in every published checkpoint.
        checkpoint_format: "gptq" (v1, zero points stored less one) or "gptq_v2".

    Attributes:
        cpu_mode: "exact" or "int8" (see `ropewalk.gptq.cpu_ops`); None for the default of the process. It can be
            set at any time.

    Raises:
        FormatError: bits, group_size or sizes that the format cannot hold.
    """

    QUANT_TYPE = "ropewalk"
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        bits: int,
        group_size: int,
        infeatures: int,
        outfeatures: int,
        bias: bool,
        use_cuda_fp16: bool = True,
        kernel_switch_threshold: int = 128,
        trainable: bool = False,
        weight_dtype: torch.dtype = torch.float16,
        *,
        checkpoint_format: str = "gptq",
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not super(): a subclass may be a layer of another program as well
        if checkpoint_format not in FORMATS:
            raise FormatError("checkpoint_format", " or ".join(FORMATS), repr(checkpoint_format))
        tensors = expected_tensors(infeatures, outfeatures, bits, group_size, bias=bias)
        self.bits = bits
        self.infeatures = self.in_features = infeatures
        self.outfeatures = self.out_features = outfeatures
        self.group_size = infeatures if group_size == -1 else group_size
        self.maxq = (1 << bits) - 1
        self.checkpoint_format = checkpoint_format
        self.cpu_mode: str | None = None
        self._merged: Merged | None = None  # with other layers that read the same input
        self.register_buffer("bias", None)
        for name, (shape, dtype) in tensors.items():
            dtype = weight_dtype if dtype.is_floating_point else dtype
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("g_idx", sequential_g_idx(infeatures, group_size).to(self.qweight.device))
        self._forget()

    def _forget(self) -> None:
        """Drop what was derived from the buffers."""
        self._ready = False
        self._layout = "checkpoint"  # of qweight: that, "gpu" or "cpu"
        self._zeros: Tensor | None = None
        # Of the rows: in the checkpoint's layout the group of each, elsewhere where each is in the checkpoint.
        self._order: Tensor | None = None
        if self._merged is not None:
            self._merged.forget()

    def post_init(self) -> None:
        """Derive from the buffers what the kernels want: zero points unless all are symmetric, the order of
        rows unless it is sequential, and the execution layout of the device.

        Raises:
            FormatError: a group number out of range, or scales that are not finite.
        """
        self._leave_execution()
        check_values({"scales": self.scales} if self.g_idx is None else {"scales": self.scales, "g_idx": self.g_idx})
        self._enter_execution()

    def _enter_execution(self, empty: Callable[..., Tensor] = torch.empty) -> None:
        zeros = None
        if not is_symmetric(self.qzeros, self.bits, self.checkpoint_format):
            v1 = self.checkpoint_format == "gptq"
            zeros = zeros_v1_to_v2(self.qzeros, self.bits) if v1 else self.qzeros
        self._default_mode = cpu_ops.default_mode()
        layout = self._best_layout()
        if layout == "checkpoint":
            self._zeros = zeros
            sequential = self.g_idx is None or is_sequential(self.g_idx, self.group_size)
            self._order = None if sequential else self.g_idx
        else:
            each = None if zeros is None else unpack(zeros, self.bits, dim=1)
            order = row_order(self.g_idx, self.group_size)
            if layout == "gpu":
                self._zeros, self._order = each, order
                self.qweight = to_execution(self.qweight, self.bits, order)
            else:
                self._order = cpu_layout.row_map(order, self.infeatures, self.group_size)
                self._zeros = None if each is None else cpu_layout.tile_columns(each)
                blocks = cpu_layout.block_count(self.infeatures, self.group_size)
                self.qweight = cpu_layout.words_for(self.qweight, self._order, self.bits, blocks, empty)
                self._scales_dtype = self.scales.dtype
                self.scales = cpu_layout.scales_for_tiles(self.scales, empty)
        self._layout = layout
        self._ready = True

    def _best_layout(self) -> str:
        """Return the layout that the kernels of this device want, or "checkpoint" where there are none."""
        if not has_even_groups(self.g_idx, self.group_size):
            return "checkpoint"
        if self._has_gpu_kernels():
            return "gpu" if supports(self.group_size, self.infeatures) else "checkpoint"
        return "cpu" if self.qweight.device.type == "cpu" and cpu.load() else "checkpoint"

    def _has_gpu_kernels(self) -> bool:
        return self.qweight.is_cuda

    def _checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return what the execution layout replaced, as the file holds it."""
        if self._layout == "gpu":
            return {"qweight": to_checkpoint(self.qweight, self.bits, self._order, self.infeatures)}
        if self._layout == "cpu":
            qweight = torch.ops.ropewalk.cpu_unpack(
                self.qweight, self._order, self.bits, self.infeatures, self.outfeatures
            )
            scales = cpu_layout.untile_columns(self.scales, self.outfeatures).to(self._scales_dtype)
            return {"qweight": qweight, "scales": scales}
        return {}

    def _leave_execution(self) -> None:
        """Turn the buffers back into what the file holds."""
        for name, tensor in self._checkpoint_tensors().items():
            setattr(self, name, tensor)
        self._forget()

    def fill(
        self, parts: Mapping[str, Tensor], device: torch.device, empty: Callable[..., Tensor] = torch.empty
    ) -> None:
        """Take the tensors of a checkpoint and be ready; nothing of the given memory is kept.

        Args:
            parts: "qweight", "qzeros", "scales" and, as this layer has them, "g_idx" and "bias", of values that
                were checked (`ropewalk.gptq.format.check_values`).
            device: where the layer is to be.
            empty: gives the memory for what is rearranged on the CPU, called as torch.empty is.
        """
        self._forget()
        self.g_idx = None
        for name in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            if name in parts:
                setattr(self, name, parts[name].to(device))
        self._enter_execution(empty)
        given = {tensor.data_ptr() for tensor in parts.values()}
        for name, tensor in self._buffers.items():
            if tensor is not None and tensor.data_ptr() in given:
                setattr(self, name, tensor.clone())
        if self._layout == "checkpoint":
            self._enter_execution()  # what it derives there may be the buffers themselves

    @property
    def computes_exactly(self) -> bool:
        """Whether its mode on the CPU is "exact"."""
        return (self._default_mode if self.cpu_mode is None else self.cpu_mode) == "exact"

    def drop_g_idx(self) -> None:
        """Do without g_idx, for checkpoints that have none: row k is in group k // group_size."""
        self.register_buffer("g_idx", None)
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., outfeatures] in x's dtype for x [..., infeatures]."""
        if not self._ready:
            self.post_init()
        if self._layout == "cpu":
            # A module looks for its buffers in three places; a token asks for a thousand of them.
            buffers: Any = self._buffers
            return cpu_ops.linear(
                x,
                buffers["qweight"],
                buffers["scales"],
                self._zeros,
                self._order,
                buffers["bias"],
                self.bits,
                self.group_size,
                self.outfeatures,
                self.computes_exactly,
            )
        if self._layout == "gpu":
            return torch.ops.ropewalk.packed_linear(
                x, self.qweight, self.scales, self._zeros, self._order, self.bias, self.bits, self.group_size
            )
        return torch.ops.ropewalk.gptq_linear(
            x, self.qweight, self.scales, self._zeros, self._order, self.bias, self.bits, self.group_size
        )

    def pack(self, linear: Any, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> None:
        """Fill the buffers from a layer whose weight already lies on the grid.

        Args:
            linear: has `weight` [N, K] (a transformers Conv1D: [K, N]) and `bias`.
            scales, zeros: [N, G], as GPTQ's quantizer returns them; zeros are the true zero points.
            g_idx: [K]; sequential by default.
        """
        self._leave_execution()
        weight = linear.weight.detach()
        if type(linear).__name__ == "Conv1D":
            weight = weight.t()
        if tuple(weight.shape) != (self.outfeatures, self.infeatures):
            raise FormatError("weight", f"shape {[self.outfeatures, self.infeatures]}", list(weight.shape))
        scales, zeros = scales.t().contiguous().float(), zeros.t().contiguous().float()
        groups = group_count(self.infeatures, self.group_size)
        if tuple(scales.shape) != (groups, self.outfeatures) or zeros.shape != scales.shape:
            raise FormatError("scales", f"shape {[self.outfeatures, groups]}", list(scales.t().shape))
        device = self.qweight.device
        g_idx = sequential_g_idx(self.infeatures, self.group_size) if g_idx is None else g_idx.to(torch.int32)
        self.register_buffer("g_idx", g_idx.to(device))
        rows = g_idx.long().to(weight.device)
        codes = torch.round(weight.t().float() / scales[rows] + zeros[rows]).clamp(0, self.maxq)
        self.qweight.copy_(pack(codes.to(torch.int64), self.bits))
        qzeros = pack(zeros.to(torch.int64), self.bits, dim=1)
        self.qzeros.copy_(zeros_v2_to_v1(qzeros, self.bits) if self.checkpoint_format == "gptq" else qzeros)
        self.scales.copy_(scales)
        if self.bias is not None and linear.bias is not None:
            self.bias.copy_(linear.bias.detach())
        self._forget()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        # Checkpoints from before act-order have no g_idx. Without a qweight this is not ours to fill in: PEFT
        # loads an adapter by a state dict that has only the adapter in it.
        if prefix + "qweight" not in state_dict:
            return super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._leave_execution()
        if self.g_idx is not None:
            state_dict.setdefault(prefix + "g_idx", sequential_g_idx(self.infeatures, self.group_size))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._forget()

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._checkpoint_tensors().items():
            destination[prefix + name] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        ready = self._ready
        self._leave_execution()
        super()._apply(fn, recurse)
        self._forget()
        if ready and not self.qweight.is_meta:
            self.post_init()
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, format={self.checkpoint_format}"
        )
