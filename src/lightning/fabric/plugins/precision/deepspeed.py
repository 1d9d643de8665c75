"""Precisions as DeepSpeed has them: weights in 16 bit that its engine keeps a 32-bit copy of."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning.fabric.plugins.precision._dtypes import cast_floating, default_dtype
from lightning.fabric.plugins.precision._kept import Kept
from lightning.fabric.plugins.precision.precision import Precision, dtype_name

_DTYPES = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}
_BACKWARD_OPTIONS = ("retain_graph", "scale_wrt_gas")


class DeepSpeedPrecision(Precision):
    """The precisions that ``DeepSpeedStrategy`` can do.

    With 16 bits the engine computes with 16-bit weights and updates a 32-bit copy of them; in float16 it scales the
    loss, and skips steps whose gradients overflow. The two forms differ before set-up alone: under ``"bf16-true"`` and
    ``"16-true"`` the model is made in 16 bit; ``"-mixed"`` leaves the conversion of its weights to the engine, and its
    buffers in 32 bit.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.
        keep_fp32: must be empty, unless all is in 32 bit: the engine has one dtype for all parameters.

    Raises:
        ValueError: for any other precision, and for modules to keep in 32 bit.

    """

    engine = "deepspeed"

    def __init__(
        self,
        precision: Literal["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"],
        keep_fp32: Iterable[str | type[nn.Module]] = (),
    ) -> None:
        if precision not in _DTYPES:
            raise ValueError(
                f"DeepSpeed has no precision {precision!r}. Use one of {', '.join(map(repr, _DTYPES))}, "
                "or another strategy."
            )
        kept = Kept(keep_fp32)
        if kept and precision != "32-true":
            raise ValueError(
                f"`DeepSpeedPrecision` cannot keep {kept!r} in 32 bit under precision={precision!r}: the engine of "
                "DeepSpeed converts all parameters to one dtype. Use precision='32-true', or strategy='fsdp' with "
                f"`FSDPPrecision({precision!r}, keep_fp32=...)`."
            )
        self.precision = precision
        self.dtype = _DTYPES[precision]  # of the weights that the engine computes with
        self._makes_low = precision.endswith("-true") and self.dtype is not torch.float32

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(self.dtype) if self._makes_low else module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.dtype) if self._makes_low else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def convert_input(self, data: Any) -> Any:
        return data if self.dtype is torch.float32 else cast_floating(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        return data if self.dtype is torch.float32 else cast_floating(data, torch.get_default_dtype())

    def backward(self, tensor: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of ``tensor``, a loss of one element; the arguments are those of the engine's ``backward``.

        ``model`` is the engine.
        """
        unknown = [name for name in kwargs if name not in _BACKWARD_OPTIONS]
        if unknown:
            raise TypeError(
                f"DeepSpeed's backward has no option {unknown[0]!r}. It takes {' and '.join(_BACKWARD_OPTIONS)}."
            )
        if tensor.numel() != 1:
            raise ValueError(
                f"DeepSpeed's backward starts from a loss of one element, but got a tensor of shape "
                f"{tuple(tensor.shape)}. Reduce it first, with `loss.mean()` or `loss.sum()`."
            )
        model.backward(tensor, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Let the engine, which is passed as ``optimizer``, step; ``closure=`` is called once before, for its loss."""
        closure = kwargs.pop("closure", None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        optimizer.step(**kwargs)
        return loss

    def computes_in(self, name: str, module: nn.Module) -> str:
        return dtype_name(self.dtype)
