"""Modules whose parameters are not initialised, or not even allocated, yet."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning.fabric.utilities.types import _DEVICE


class _EmptyInit(TorchFunctionMode):
    """Inside, the functions of ``torch.nn.init`` leave the memory of parameters as it is.

    Saves the time of filling parameters that a checkpoint will overwrite. ``enabled=False`` changes nothing. All other
    tensors are filled, for a checkpoint need not have them: buffers, and what a parameter is made of afterwards. Some
    entries become NaN, by which :func:`unfilled` knows what nothing has filled since.
    """

    was_used: ClassVar[bool] = False
    """Whether this process has left any parameter empty."""

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
            tensor: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(tensor, nn.Parameter) and _can_be_marked(tensor):
                _mark_as_unfilled(tensor)
                return tensor
        return func(*args, **kwargs)


_MARKS = 64  # per parameter, so that one which was filled in part is known too


def _can_be_marked(tensor: Tensor) -> bool:
    """Whether an entry can be NaN; else a parameter that is empty would pass for one that is filled."""
    return not is_lazy(tensor) and (tensor.is_floating_point() or tensor.is_complex())


@torch.no_grad()
def _mark_as_unfilled(tensor: Tensor) -> None:
    if tensor.numel() and not tensor.is_meta:
        _EmptyInit.was_used = True
        for whole, index in _marks(tensor):
            whole[index] = float("nan")


def _is_marked(tensor: Tensor) -> Tensor:
    return torch.cat([whole[index].isnan().view(-1) for whole, index in _marks(tensor)]).any()


def _marks(tensor: Tensor) -> list[tuple[Tensor, Any]]:
    """Return where the marks are: every so manyth entry from the first on, and the last. As tensors and indices."""
    whole, every = tensor.detach(), -(-tensor.numel() // _MARKS)
    last = whole, (-1,) * tensor.ndim
    if tensor.is_contiguous():
        return [(whole.view(-1), slice(None, None, every)), last]
    positions = torch.arange(0, tensor.numel(), every, device=tensor.device)  # whatever their order in memory
    return [(whole, torch.unravel_index(positions, tensor.shape)), last]


def unfilled(named_tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of parameters that :class:`_EmptyInit` has left empty and of which a part is empty still.

    What was filled with NaN where the marks are is named too. Sharded tensors are never left empty.
    """
    if not _EmptyInit.was_used:
        return []
    marked = {
        name: _is_marked(tensor)
        for name, tensor in named_tensors
        if _can_be_marked(tensor) and tensor.numel() and not tensor.is_meta and not hasattr(tensor, "_local_tensor")
    }
    return [name for name, mark in marked.items() if mark]


def refuse_unfilled(named_tensors: Iterable[tuple[str, Tensor]], doing: str) -> None:
    """Raise ``RuntimeError`` if any tensor is :func:`unfilled`; ``doing`` is what would have used it."""
    names = unfilled(named_tensors)
    if names:
        raise RuntimeError(
            f"{doing} would use parameters that were created empty, under `init_module(empty_init=True)`, and that "
            f"nothing has filled since, or not all of (or that were filled with NaN): {_shown(names)}. "
            "Load a checkpoint that has them first, or create the model with `empty_init=False`."
        )


def refuse_meta(module: nn.Module) -> None:
    """Raise ``RuntimeError`` if anything of ``module`` is on the meta device, from where nothing can be moved."""
    named = (*module.named_parameters(), *module.named_buffers())
    names = [name for name, tensor in named if tensor.is_meta and not is_lazy(tensor)]
    if names:
        raise RuntimeError(
            f"{type(module).__name__} has parameters or buffers on the meta device, which have no values that could be "
            f"moved to the device: {_shown(names)}. Create the model under `fabric.init_module(empty_init=True)` in "
            'place of `torch.device("meta")`, or fill it first, after `model.to_empty(device=fabric.device)`.'
        )


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if names[10:] else "")


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
