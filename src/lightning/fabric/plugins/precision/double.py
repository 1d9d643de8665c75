"""64-bit: weights, computation and gradients in double."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision._kept import Kept
from lightning.fabric.plugins.precision.precision import Precision


class DoublePrecision(Precision):
    """``precision="64-true"``.

    Args:
        keep_fp32: names and classes of modules that stay in 32 bit: their parameters do, and they compute in it. What
            they return is 64-bit again.
    """

    precision = "64-true"

    def __init__(self, keep_fp32: Iterable[str | type[nn.Module]] = ()) -> None:
        self._kept = Kept(keep_fp32)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._kept.convert(module, torch.float64)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(torch.float64)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(torch.float64)

    def forward_context(self) -> AbstractContextManager[Any]:
        return default_dtype(torch.float64)

    def convert_input(self, data: Any) -> Any:
        return cast_floating(data, torch.float64)

    def convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())

    def remarks(self) -> list[str]:
        return self._kept.remarks()
