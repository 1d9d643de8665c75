"""What a module is under FSDP: the user's inside, and around it what keeps gathered parameters and gradients true."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
)
from torch.optim import Optimizer

from lightning.fabric.strategies.strategy import _NO_CONTEXT, _BackwardSyncControl
from lightning.fabric.utilities.compilation import uncompiled


class FSDPRoot(nn.Module):
    """The user's module inside; calling this one is what makes parameters whole.

    As another object than the user's module, it lets the user's methods run under it, and call the module themselves.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self._units: list[FSDPModule] = []
        self.unsynced_depth = 0
        self.has_unsynced_gradients = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        try:
            return self.module(*args, **kwargs)
        except BaseException:
            self.abandon_step()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reaches gradients, too, that were not synchronised, so are in no parameter's ``grad``."""
        super().zero_grad(set_to_none)
        self.zero_unsynced_gradients()

    def units(self) -> list[FSDPModule]:
        """Itself and the units inside, outer ones first."""
        if not self._units:
            self.__dict__["_units"] = [part for part in self.modules() if isinstance(part, FSDPModule)]
        return self._units

    def reshard_all(self) -> None:
        """Show this rank's part of every parameter, and free what was gathered. Not during forward or backward."""
        for unit in self.units():
            unit.reshard()

    def abandon_step(self) -> None:
        """Be as before the forward, which did not come to its end; else torch would leave gradients out of the next."""
        reset = getattr(FSDPModule, "reset_iter_state", None)  # from torch 2.13 on
        if reset is not None:
            reset(self)

    def zero_unsynced_gradients(self) -> None:
        """:meth:`drop_unsynced_gradients`, if there may be any."""
        if self.has_unsynced_gradients:
            self.__dict__["has_unsynced_gradients"] = False
            self.drop_unsynced_gradients()

    def drop_unsynced_gradients(self) -> None:
        """Forget what has piled up whole on this rank."""
        for unit in self.units():
            for group in _groups(unit):
                group._partial_reduce_output = None
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):  # it was whole at least once
                        parameter._unsharded_param.grad = None


def _groups(unit: FSDPModule) -> list[Any]:
    """What torch keeps of the parameters of ``unit``."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []  # before torch 2.13


class ReshardAfterStep:
    """Lets no forward see parameters that were gathered before the step, as in a look at samples between the two."""

    def __init__(self, roots: "WeakSet[FSDPRoot]") -> None:
        self._roots = roots

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for root in self._roots:
            root.reshard_all()


class ZeroGrad:
    """``Optimizer.zero_grad`` that reaches gradients which were not synchronised, so are in no parameter's ``grad``."""

    def __init__(self, zero_grad: Callable[..., None], roots: "WeakSet[FSDPRoot]") -> None:
        self._zero_grad = zero_grad
        self._roots = roots

    def __call__(self, set_to_none: bool = True) -> None:
        self._zero_grad(set_to_none)
        for root in self._roots:
            root.zero_unsynced_gradients()


class FSDPBackwardSync(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        if not enabled:
            return _NO_CONTEXT
        root = module if isinstance(module, FSDPRoot) else uncompiled(module)
        if not isinstance(root, FSDPRoot):
            raise TypeError(
                f"`no_backward_sync` needs the module that `setup_module` returned, but got {type(module).__name__}. "
                "Pass the result of `fabric.setup(...)`."
            )
        return _NoSync(root)


class _NoSync(AbstractContextManager[None]):
    """Inside, gradients pile up whole on each rank; the next backward outside of it adds them up over the ranks."""

    def __init__(self, root: FSDPRoot) -> None:
        self._root = root

    def __enter__(self) -> None:
        state = self._root.__dict__  # setting an attribute of a module takes microseconds
        state["unsynced_depth"] += 1
        state["has_unsynced_gradients"] = True
        if state["unsynced_depth"] == 1:
            self._synchronise(False)

    def __exit__(self, *error: object) -> None:
        state = self._root.__dict__
        state["unsynced_depth"] -= 1
        if state["unsynced_depth"] == 0:
            self._synchronise(True)

    def _synchronise(self, on: bool) -> None:
        for unit in self._root.units():
            unit.set_requires_gradient_sync(on, recurse=False)
