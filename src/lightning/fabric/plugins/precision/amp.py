"""Mixed precision: weights in 32 bit, computation in 16 where that is safe (autocast)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import LBFGS, Optimizer

from lightning.fabric.plugins.precision._dtypes import cast_floating
from lightning.fabric.plugins.precision._kept import Kept, is_kept
from lightning.fabric.plugins.precision.precision import NO_STEP_HOOKS, Precision, StepHooks, dtype_name

_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class MixedPrecision(Precision):
    """``precision="16-mixed"`` and ``"bf16-mixed"``.

    Args:
        precision: With ``"16-mixed"`` the loss is scaled, so that small gradients survive in float16.
        device: The type of the device that computes, ``"cuda"`` or ``"cpu"``.
        scaler: Scales the loss in place of a ``torch.amp.GradScaler`` with its defaults. Only for ``"16-mixed"``.
        keep_fp32: names and classes of modules that compute in 32 bit, ``["head", nn.Softmax]``: without autocast,
            from inputs that are cast to 32 bit; what they return is 32-bit.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str,
        scaler: GradScaler | None = None,
        keep_fp32: Iterable[str | type[nn.Module]] = (),
    ) -> None:
        if precision not in _DTYPES:
            raise ValueError(f"`MixedPrecision` is for precision '16-mixed' or 'bf16-mixed', but got {precision!r}.")
        if scaler is not None and precision != "16-mixed":
            raise ValueError(
                f"`MixedPrecision` with precision={precision!r} needs no scaler, but got {scaler!r}. "
                "Leave `scaler` out, or use precision='16-mixed'."
            )
        self.precision = precision
        self.device = device
        self._scaler = scaler
        self._kept = Kept(keep_fp32)
        self._update_due = False
        self._autocast: tuple[tuple[str, Any], ...] | None = None

    @property
    def scaler(self) -> GradScaler | None:
        """The gradient scaler of 16-mixed, with the latest scale; None for bf16-mixed."""
        if self._update_due and self._scaler is not None:
            self._update_due = False
            self._scaler.update()
        return self._made_scaler()

    @scaler.setter
    def scaler(self, scaler: GradScaler | None) -> None:
        self._scaler = scaler
        self._update_due = False

    def computes_on(self, device_type: str) -> None:
        if device_type != self.device:
            raise ValueError(
                f"`MixedPrecision(device={self.device!r})` casts what {self.device!r} devices compute, and would do "
                f"nothing on {device_type!r}. Pass device={device_type!r}, or use precision={self.precision!r}."
            )

    def move_to(self, device_type: str) -> None:
        """Cast what devices of this type compute, whatever was said before."""
        self.device = device_type
        self._autocast = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self._kept.convert(module, None)

    def forward_context(self) -> AbstractContextManager[Any]:
        if torch.compiler.is_dynamo_compiling():  # the compiler understands this, but not what follows
            return torch.autocast(self.device, dtype=_DTYPES[self.precision])
        # Making a `torch.autocast` checks the device and the dtype each time, which costs as much as entering it.
        # Each forward gets a fresh copy of one that was checked, because forwards may be nested.
        if self._autocast is None:
            self._autocast = tuple(vars(torch.autocast(self.device, dtype=_DTYPES[self.precision])).items())
        context = torch.autocast.__new__(torch.autocast)
        for name, value in self._autocast:
            setattr(context, name, value)
        return context

    def convert_input(self, data: Any) -> Any:
        for item in data if type(data) is tuple else (data,):
            if type(item) is not Tensor or item.dtype is not torch.float32:
                return cast_floating(data, torch.float32)
        return data

    def convert_output(self, data: Any) -> Any:
        dtype = torch.get_default_dtype()
        if type(data) is Tensor and dtype is torch.float32 and data.is_floating_point():
            return data.float()
        return cast_floating(data, dtype)

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        if (scaler := self.scaler) is not None:
            tensor = scaler.scale(tensor)
        tensor.backward(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        if (scaler := self._made_scaler()) is None:
            return optimizer.step(**kwargs)
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                "precision='16-mixed' does not work with the optimizer LBFGS, which calls its closure several times "
                "per step while the gradients are scaled. Use precision='bf16-mixed', or another optimizer."
            )
        loss = None
        if (closure := kwargs.pop("closure", None)) is not None:
            with torch.enable_grad():
                loss = closure()
        result = scaler.step(optimizer, **kwargs)
        # The scale may change only when all optimizers of this backward have stepped. Nobody says which those are,
        # so the update waits for the next backward, or for somebody who looks at the scaler.
        self._update_due = True
        return result if closure is None else loss

    def step_hooks(self) -> StepHooks:
        return NO_STEP_HOOKS if type(self) is MixedPrecision and self._made_scaler() is None else super().step_hooks()

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        scaler = self._scaler
        if scaler is None or not scaler.is_enabled():
            return
        if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            scaler.unscale_(optimizer)

    def computes_in(self, name: str, module: nn.Module) -> str:
        if is_kept(module):
            return super().computes_in(name, module)
        return f"{dtype_name(_DTYPES[self.precision])} (autocast)"

    def remarks(self) -> list[str]:
        return self._kept.remarks()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (scaler := self.scaler) is not None and state_dict:
            scaler.load_state_dict(state_dict)

    def _made_scaler(self) -> GradScaler | None:
        # Made on first use and not with the plugin, because making one asks CUDA whether it is there, and a process
        # that has asked cannot be forked.
        if self._scaler is None and self.precision == "16-mixed":
            self._scaler = GradScaler(self.device)
        return self._scaler
