"""64-bit: weights, computation and gradients in double."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision.precision import Precision


class DoublePrecision(Precision):
    """``precision="64-true"``."""

    precision = "64-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.double()

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
