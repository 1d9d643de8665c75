"""The precisions of sharded training: which dtypes parameters, their gradients' reduction and buffers have."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.distributed.fsdp import MixedPrecision as TorchMixedPrecision
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning.fabric.plugins.precision._kept import Kept
from lightning.fabric.plugins.precision.amp import MixedPrecision
from lightning.fabric.plugins.precision.double import DoublePrecision
from lightning.fabric.plugins.precision.float8 import Float8Precision
from lightning.fabric.plugins.precision.half import HalfPrecision
from lightning.fabric.plugins.precision.precision import Precision, StepHooks
from lightning.fabric.utilities.text import did_you_mean


@dataclass(frozen=True)
class Dtypes:
    """Of what is stored and computed with, of the reduction of gradients, and of floating-point buffers."""

    param: torch.dtype
    reduce: torch.dtype
    buffer: torch.dtype


_DTYPES = {
    "16-true": Dtypes(torch.float16, torch.float16, torch.float16),
    "bf16-true": Dtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "16-mixed": Dtypes(torch.float32, torch.float16, torch.float16),
    "bf16-mixed": Dtypes(torch.float32, torch.bfloat16, torch.bfloat16),
    "32-true": Dtypes(torch.float32, torch.float32, torch.float32),
    "64-true": Dtypes(torch.float64, torch.float64, torch.float64),
    "float8": Dtypes(torch.float32, torch.bfloat16, torch.bfloat16),
}


class FSDPPrecision(Precision):
    """Precision for ``FSDPStrategy``.

    ``"16-true"`` and ``"bf16-true"``: parameters, the reduction of gradients and buffers are 16-bit. ``"16-mixed"`` and
    ``"bf16-mixed"``: parameters are 32-bit, reduction and buffers 16-bit, and forward runs under autocast. Gradients
    that wait to be reduced, inside of ``no_backward_sync``, have the dtype of the reduction; for 32 bit there, pass
    ``FSDPStrategy(mixed_precision=MixedPrecision(reduce_dtype=torch.float32))``.

    Args:
        precision: one of those, or ``"32-true"``, ``"64-true"``, ``"float8"``. The latter is ``"bf16-mixed"`` with
            linear layers in float8; for one with options, pass a ``Float8Precision`` in place of this.
        scaler: Scales the loss in place of a ``torch.amp.GradScaler`` with its defaults. Only for ``"16-mixed"``.
        keep_fp32: names and classes of modules that stay in 32 bit, ``["head", nn.LayerNorm]``: their parameters do,
            they compute in it, and so are their gradients reduced. Each is a unit of its own.
    """

    def __init__(
        self, precision: str, scaler: GradScaler | None = None, keep_fp32: Iterable[str | type[nn.Module]] = ()
    ) -> None:
        if precision not in _DTYPES:
            raise ValueError(
                f"`FSDPPrecision` cannot compute in precision={precision!r}.{did_you_mean(str(precision), _DTYPES)} "
                f"It can in: {', '.join(map(repr, _DTYPES))}."
            )
        if scaler is not None and precision != "16-mixed":
            raise ValueError(
                f"`FSDPPrecision` with precision={precision!r} needs no scaler, but got {scaler!r}. "
                "Leave `scaler` out, or use precision='16-mixed'."
            )
        self.precision = precision  # type: ignore[assignment]
        self.dtypes = _DTYPES[precision]
        self._ordinary = _ordinary(precision, scaler, keep_fp32)

    @property
    def mixed_precision_config(self) -> TorchMixedPrecision:
        """The dtypes as torch's own record."""
        return TorchMixedPrecision(
            param_dtype=self.dtypes.param, reduce_dtype=self.dtypes.reduce, buffer_dtype=self.dtypes.buffer
        )

    @property
    def autocasts(self) -> bool:
        """Whether operations choose their dtypes themselves, so that nothing is cast where a module begins."""
        return self.precision in ("16-mixed", "bf16-mixed", "float8")

    @property
    def scaler(self) -> GradScaler | None:
        """The gradient scaler of 16-mixed, with the latest scale; None for others."""
        return self._ordinary.scaler if isinstance(self._ordinary, MixedPrecision) else None

    @scaler.setter
    def scaler(self, scaler: GradScaler | None) -> None:
        if scaler is not None and self.precision != "16-mixed":
            raise ValueError(f"precision={self.precision!r} needs no scaler, but got {scaler!r}.")
        if isinstance(self._ordinary, MixedPrecision):
            self._ordinary.scaler = scaler

    def computes_on(self, device_type: str) -> None:
        """Say what device computes; CUDA if there is one, unless said."""
        if isinstance(self._ordinary, MixedPrecision):
            self._ordinary.move_to(device_type)
        else:
            self._ordinary.computes_on(device_type)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._ordinary.convert_module(module)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self._ordinary.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self._ordinary.module_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        return self._ordinary.forward_context()

    def convert_input(self, data: Any) -> Any:
        return self._ordinary.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return self._ordinary.convert_output(data)

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        self._ordinary.backward(tensor, model, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Collective with a gradient scaler: either every rank steps, or all skip the step."""
        if self.scaler is not None and "closure" not in kwargs:
            self.unscale_gradients(optimizer)
        return self._ordinary.optimizer_step(optimizer, **self._closure_that_unscales(optimizer, kwargs))

    def _closure_that_unscales(self, optimizer: Optimizer, kwargs: dict[str, Any]) -> dict[str, Any]:
        closure = kwargs.get("closure")
        if closure is None or self.scaler is None:
            return kwargs

        def closure_and_unscale() -> Any:
            loss = closure()
            self.unscale_gradients(optimizer)
            return loss

        return {**kwargs, "closure": closure_and_unscale}

    def step_hooks(self) -> StepHooks:
        return super().step_hooks() if self.scaler is not None else self._ordinary.step_hooks()

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring the gradients to their true size. Collective: all ranks learn whether one of them is infinite."""
        scaler = self.scaler
        if scaler is None or not scaler.is_enabled():
            return
        states = scaler._per_optimizer_states
        if states[id(optimizer)]["stage"] is not OptState.READY:
            return
        # The scaler cannot take sharded and plain gradients together, nor does it ask other ranks in every layout.
        # What this rank holds of each is a plain tensor.
        held = _HeldHere(optimizer)
        scaler.unscale_(held)  # type: ignore[arg-type]
        state = states.pop(id(held))
        if dist.is_initialized():
            for found in state["found_inf_per_device"].values():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)
        states[id(optimizer)] = state

    def computes_in(self, name: str, module: nn.Module) -> str:
        return self._ordinary.computes_in(name, module)

    def remarks(self) -> list[str]:
        return self._ordinary.remarks()

    def state_dict(self) -> dict[str, Any]:
        return self._ordinary.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ordinary.load_state_dict(state_dict)


def _ordinary(precision: str, scaler: GradScaler | None, keep_fp32: Iterable[str | type[nn.Module]]) -> Precision:
    """What does the same on one device."""
    if precision in ("16-mixed", "bf16-mixed"):
        device = "cuda" if torch.cuda.device_count() else "cpu"  # does not initialise CUDA
        return MixedPrecision(precision, device, scaler, keep_fp32)  # type: ignore[arg-type]
    if precision in ("16-true", "bf16-true"):
        return HalfPrecision(precision, keep_fp32)  # type: ignore[arg-type]
    if precision == "64-true":
        return DoublePrecision(keep_fp32)
    return Float8Precision(keep_fp32=keep_fp32) if precision == "float8" else _FullPrecision(keep_fp32)


class _FullPrecision(Precision):
    """32 bit everywhere, also where the strategy was told to compute the rest in other dtypes."""

    def __init__(self, keep_fp32: Iterable[str | type[nn.Module]]) -> None:
        self._kept = Kept(keep_fp32)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._kept.convert(module, None)

    def remarks(self) -> list[str]:
        return self._kept.remarks()


class _HeldHere:
    """What this rank holds of an optimizer's parameters and gradients, as a gradient scaler wants to see them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = [
            {"params": [_held(p) for p in group["params"] if p.grad is not None]} for group in optimizer.param_groups
        ]


def _held(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    local, grad = parameter._local_tensor.detach(), parameter.grad
    local.grad = grad._local_tensor if isinstance(grad, DTensor) else grad
    return local
