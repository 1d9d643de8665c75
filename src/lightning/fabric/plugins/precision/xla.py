"""One dtype for weights and computation on XLA devices."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision._kept import Kept
from lightning.fabric.plugins.precision.precision import Precision

DTYPES = {"32-true": torch.float32, "16-true": torch.float16, "bf16-true": torch.bfloat16}


class XLAPrecision(Precision):
    """``precision="32-true"``, ``"16-true"`` and ``"bf16-true"`` on XLA devices.

    Mixed precision is refused: XLA has no gradient scaler for float16, and bfloat16 is the TPU's own dtype.

    Args:
        precision: one of those.
        keep_fp32: names and classes of modules that stay in 32 bit: their parameters do, and they compute in it. What
            they return is 16-bit again. Modules made under ``fabric.init_module()`` are 32-bit then until set-up.

    Raises:
        ValueError: for any other precision.

    """

    def __init__(
        self,
        precision: Literal["32-true", "16-true", "bf16-true"] = "32-true",
        keep_fp32: Iterable[str | type[nn.Module]] = (),
    ) -> None:
        if precision not in DTYPES:
            raise ValueError(
                f"`XLAPrecision` is for precision {', '.join(map(repr, DTYPES))}, but got {precision!r}. "
                "On TPUs, 'bf16-true' is the fast one."
            )
        self.precision = precision
        self._kept = Kept(keep_fp32)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and of computation."""
        return DTYPES[self.precision]

    @property
    def _is_full(self) -> bool:
        return self.dtype is torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._kept.convert(module, None if self._is_full else self.dtype)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._is_full else default_dtype(self.dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._kept else self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def convert_input(self, data: Any) -> Any:
        return data if self._is_full else cast_floating(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        return data if self._is_full else cast_floating(data, torch.get_default_dtype())

    def remarks(self) -> list[str]:
        return self._kept.remarks()
