"""A module that knows its device and dtype, also when it has no parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self


class _DeviceDtypeModuleMixin(nn.Module):
    """Adds ``device`` and ``dtype``, which follow every move and conversion of the module or of its parent."""

    __jit_unused_properties__ = ["device", "dtype"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._device = torch.get_default_device()
        self._dtype: torch.dtype = torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """The device of the last move, with its index."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the last conversion."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # Every one of `to`, `cuda`, `half`, `type`, `to_empty`... comes through here, for children as well.
        changed = fn(torch.empty(0, device=self._device, dtype=self._dtype))
        self._device, self._dtype = changed.device, changed.dtype
        return super()._apply(fn, *args, **kwargs)
