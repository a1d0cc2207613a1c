"""GPTQModel's layers: the one it selects for the machine, and Marlin by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ropewalk.bench.peers.base import Peer, imported
from ropewalk.bench.peers.weight import Weight


class GPTQModel(Peer):
    """A QuantLinear of GPTQModel (7.6).

    Args:
        name: its name in tables.
        backend: a value of its `BACKEND`, "auto" for its own choice.
    """

    package = "gptqmodel"
    bits = (2, 3, 4, 8)
    act_order = True
    most_copies = 24  # it compiles some of them one by one

    def __init__(self, name: str = "gptqmodel", backend: str = "auto", devices: tuple[str, ...] = ("cpu", "cuda")):
        self.name = name
        self.backend = backend
        self.devices = devices
        # Its kernels for the CPU want bfloat16.
        self.dtypes = (torch.bfloat16, torch.float16)

    def prepare(self, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Select a class as GPTQModel does when it loads a model, and fill its buffers."""
        gptqmodel = imported("gptqmodel")
        importer = imported("gptqmodel.utils.importer")
        backend = gptqmodel.BACKEND(self.backend)
        device = imported("gptqmodel.models._const").DEVICE(weight.device.type)
        settings = {
            "bits": weight.bits,
            "group_size": weight.group_size,
            "desc_act": weight.desc_act,
            "sym": weight.sym,
            "pack_dtype": torch.int32,
            "dtype": dtype,
        }
        cls = importer.select_quant_linear(device=device, backend=backend, **settings)
        layer = cls(
            in_features=weight.in_features,
            out_features=weight.out_features,
            bias=False,
            backend=backend,
            register_buffers=True,
            **settings,
        ).to(weight.device)
        qzeros = weight.qzeros_v2() if cls.REQUIRES_FORMAT_V2 else weight.qzeros
        for name, value in (("qweight", weight.qweight), ("qzeros", qzeros), ("g_idx", weight.g_idx)):
            getattr(layer, name).data.copy_(value)
        layer.scales.data.copy_(weight.scales)
        if cls.REQUIRES_FORMAT_V2:
            layer.qzero_format(format=2)
        # Some of its kernels share scratch memory, which this hands out.
        model = torch.nn.Sequential(layer.eval())
        imported("gptqmodel.utils.model").gptqmodel_post_init(model, use_act_order=weight.desc_act)
        model.note = cls.__name__
        return model
