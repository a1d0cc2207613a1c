"""A module whose buffers move with the model but are never cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsDtypes(nn.Module):
    """Base of modules whose buffers keep their dtype under `half()`, `to(dtype)` and the like.

    Angles in float16 and scales in bfloat16 are wrong, whatever the model around them computes in.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
