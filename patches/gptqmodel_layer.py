"""Our packed layer as one that GPTQModel takes for its own. Importing this imports GPTQModel."""

from __future__ import annotations

from typing import Any

import torch
from gptqmodel.models._const import DEVICE, PLATFORM
from gptqmodel.nn_modules.qlinear import GPTQQuantLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.backend import BACKEND

from ropewalk.errors import FormatError
from ropewalk.gptq.format import expected_tensors
from ropewalk.loader.quant_linear import QuantLinear


class RopewalkLinear(QuantLinear, GPTQQuantLinear):
    """A QuantLinear that is a GPTQQuantLinear, too, built with the arguments that GPTQModel gives.

    What the class attributes say, GPTQModel reads when it looks for a layer. The zero points stay as the file has
    them, v1 or v2, and the arguments say which of the two: so `REQUIRES_FORMAT_V2` is false, and GPTQModel converts
    none of them.

    Raises:
        NotImplementedError: a layer that the format of ours cannot hold; GPTQModel then takes another class.
    """

    SUPPORTS_BACKENDS = (BACKEND.AUTO,)
    SUPPORTS_BACKEND_SELECTION = False  # by name; it stands in the table of AUTO alone
    SUPPORTS_METHODS = (METHOD.GPTQ,)
    SUPPORTS_FORMATS = {FORMAT.GPTQ: 0, FORMAT.GPTQ_V2: 0}  # noqa: RUF012  GPTQModel reads a dict
    SUPPORTS_BITS = (2, 3, 4, 8)
    SUPPORTS_GROUP_SIZE = (-1, 16, 32, 64, 128, 256, 512, 1024)
    SUPPORTS_DESC_ACT = (True, False)
    SUPPORTS_SYM = (True, False)
    SUPPORTS_SHARDS = True
    SUPPORTS_TRAINING = True
    SUPPORTS_AUTO_PADDING = True  # a last group may be short
    SUPPORTS_RAW_PACKING = False  # what GPTQModel quantizes, it packs and saves with its own
    SUPPORTS_IN_FEATURES_DIVISIBLE_BY = (1,)
    SUPPORTS_OUT_FEATURES_DIVISIBLE_BY = (1,)
    SUPPORTS_PACK_DTYPES = (torch.int32,)
    SUPPORTS_ADAPTERS = ()
    SUPPORTS_DEVICES = (DEVICE.CPU, DEVICE.CUDA, DEVICE.ROCM)
    SUPPORTS_PLATFORM = (PLATFORM.ALL,)
    SUPPORTS_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
    REQUIRES_FORMAT_V2 = False

    def __init__(
        self,
        bits: int,
        group_size: int,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        format: Any = FORMAT.GPTQ,
        register_buffers: bool = True,
        **kwargs: Any,
    ):
        sizes = {"in_features": in_features, "out_features": out_features}
        GPTQQuantLinear.__init__(
            self, bits=bits, group_size=group_size, bias=bias, format=format, register_buffers=False, **sizes, **kwargs
        )
        QuantLinear.__init__(
            self, bits, group_size, in_features, out_features, bias, checkpoint_format=FORMAT(format).value
        )

    @classmethod
    def _validate(cls, **settings: Any) -> tuple[bool, Exception | None]:
        """Tell GPTQModel whether a layer of these settings can be one of ours."""
        ok, error = super()._validate(**settings)
        if ok and settings.get("in_features") and settings.get("out_features"):
            try:
                names = ("in_features", "out_features", "bits", "group_size")
                expected_tensors(**{name: settings[name] for name in names})
            except FormatError as unfit:
                return False, NotImplementedError(str(unfit))
        return ok, error
