"""16-bit: weights, computation and gradients in float16 or bfloat16."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision.precision import Precision

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfPrecision(Precision):
    """``precision="16-true"`` and ``"bf16-true"``.

    Halves the memory of weights, gradients and optimizer state. No loss scaling: small gradients vanish in float16.
    """

    def __init__(self, precision: Literal["bf16-true", "16-true"] = "16-true") -> None:
        if precision not in _DTYPES:
            raise ValueError(f"`HalfPrecision` is for precision '16-true' or 'bf16-true', but got {precision!r}.")
        self.precision = precision
        self._dtype = _DTYPES[precision]

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(self._dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self._dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self._dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self._dtype)

    def convert_input(self, data: Any) -> Any:
        return cast_floating(data, self._dtype)

    def convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())
