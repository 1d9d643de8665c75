"""16-bit: weights, computation and gradients in float16 or bfloat16."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision._kept import Kept
from lightning.fabric.plugins.precision.precision import Precision

_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfPrecision(Precision):
    """``precision="16-true"`` and ``"bf16-true"``.

    Halves the memory of weights, gradients and optimizer state. No loss scaling: small gradients vanish in float16.

    Args:
        precision: one of those.
        keep_fp32: names and classes of modules that stay in 32 bit, ``["head", nn.LayerNorm]``: their parameters do,
            and they compute in it. What they return is 16-bit again. So that their values never were 16-bit, modules
            made under ``fabric.init_module()`` are 32-bit then until set-up.
    """

    def __init__(
        self,
        precision: Literal["bf16-true", "16-true"] = "16-true",
        keep_fp32: Iterable[str | type[nn.Module]] = (),
    ) -> None:
        if precision not in _DTYPES:
            raise ValueError(f"`HalfPrecision` is for precision '16-true' or 'bf16-true', but got {precision!r}.")
        self.precision = precision
        self._dtype = _DTYPES[precision]
        self._kept = Kept(keep_fp32)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._kept.convert(module, self._dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self._dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(torch.float32 if self._kept else self._dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self._dtype)

    def convert_input(self, data: Any) -> Any:
        return cast_floating(data, self._dtype)

    def convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())

    def remarks(self) -> list[str]:
        return self._kept.remarks()
