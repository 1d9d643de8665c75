"""Modules whose parameters are not initialised, or not even allocated, yet."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning.fabric.utilities.types import _DEVICE


class _EmptyInit(TorchFunctionMode):
    """Inside, the functions of ``torch.nn.init`` leave the memory of their tensor as it is.

    Saves the time of filling parameters that a checkpoint will overwrite. ``enabled=False`` changes nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.enabled and (getattr(func, "__module__", None) == "torch.nn.init" or _fills_for_init(func)):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _fills_for_init(func: Callable[..., Any]) -> bool:
    """Whether ``func`` is an in-place operation in one of the few functions that fill a tensor for ``torch.nn.init``.

    Not all of ``torch.nn.init`` (Xavier, for one) announces itself to a mode; all of it fills through these.
    """
    caller = sys._getframe(2)
    return (
        caller.f_globals.get("__name__") == "torch.nn.init"
        and (caller.f_code.co_name.startswith("_no_grad_") or caller.f_code.co_name == "kaiming_normal_")
        and getattr(func, "__name__", "").endswith("_")
        and not func.__name__.startswith("__")
    )


def _materialize(module: nn.Module, device: _DEVICE) -> None:
    """Allocate and initialise what ``module`` itself, not its children, has on the meta device."""
    if not callable(getattr(module, "reset_parameters", None)):
        raise TypeError(
            f"`{type(module).__name__}` has parameters or buffers on the meta device and no method `reset_parameters`, "
            "which is needed to initialise them. Add the method, or create the module outside of "
            "`fabric.init_module(empty_init=True)`."
        )
    module.to_empty(device=torch.device(device), recurse=False)
    module.reset_parameters()  # type: ignore[operator]


def _materialize_meta_tensors(module: nn.Module, device: _DEVICE) -> None:
    """Allocate on ``device`` and initialise every submodule that has something on the meta device; ties are kept."""
    materialized: dict[Tensor, nn.Parameter] = {}
    for submodule in module.modules():
        if not _has_meta_device_parameters_or_buffers(submodule, recurse=False):
            continue
        before = dict(submodule._parameters)
        _materialize(submodule, device)
        for name, parameter in before.items():
            if parameter is not None and parameter.is_meta:
                new = submodule._parameters[name]
                assert new is not None
                submodule._parameters[name] = materialized.setdefault(parameter, new)


def _has_meta_device_parameters_or_buffers(obj: nn.Module | Optimizer, recurse: bool = True) -> bool:
    """Return whether a module or optimizer refers to any tensor on the meta device."""
    if isinstance(obj, Optimizer):
        return any(parameter.is_meta for group in obj.param_groups for parameter in group["params"])
    if isinstance(obj, nn.Module):
        return any(tensor.is_meta for tensor in chain(obj.parameters(recurse), obj.buffers(recurse)))
    raise TypeError(f"Expected a module or an optimizer, but got {obj!r}.")
