"""What can be wrong with a call of ``Fabric``, one sentence a function."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning.fabric.strategies._single_file import is_stateful
from lightning.fabric.utilities.types import Optimizable
from lightning.fabric.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer, is_wrapped


def launched(is_launched: bool, processes: int, what: str) -> None:
    """``what`` needs the processes to exist."""
    if not is_launched:
        raise RuntimeError(
            f"`{what}` needs all {processes} processes, and they do not exist yet. Call `fabric.launch()` first, "
            "or start the script with `fabric run`."
        )


def function_to_launch(function: Any, is_needed: bool, launcher: str) -> None:
    """What ``launch`` is given can be run in a process."""
    if function is None:
        if is_needed:
            raise TypeError(
                f"`fabric.launch()` under {launcher} needs the function that the processes run, because they cannot "
                "go on with the rest of this script. Call `fabric.launch(train)` with `def train(fabric): ...`."
            )
        return
    if not callable(function):
        raise TypeError(f"`fabric.launch` takes a function, but got {function!r}. Pass `train`, not `train(...)`.")
    if not inspect.signature(function).parameters:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"`{name}()` takes no argument, but `fabric.launch` passes the Fabric object as the first one. "
            f"Write `def {name}(fabric): ...`."
        )


def module_to_set_up(module: Any) -> None:
    """A plain module, set up for the first time."""
    if is_wrapped(module):
        raise ValueError(
            "The model is set up already: it came out of `fabric.setup` or `fabric.setup_module`. "
            "Set each model up once."
        )
    if not isinstance(module, nn.Module):
        raise TypeError(f"`setup` takes a `torch.nn.Module` first, but got {module!r}. Pass the model.")
    if _has_wrapped_part(module):
        raise ValueError(
            f"{type(module).__name__} contains a part that is set up already. Set the whole model up, or its parts."
        )


def _has_wrapped_part(module: nn.Module) -> bool:
    # not by `modules()`: that of a wrapper gives the parts of its original
    parts = list(module._modules.values())
    return any(isinstance(part, _FabricModule) or (part is not None and _has_wrapped_part(part)) for part in parts)


def optimizers_to_set_up(optimizers: Sequence[Any]) -> None:
    """Plain optimizers, each set up for the first time."""
    for optimizer in optimizers:
        if isinstance(optimizer, _FabricOptimizer):
            raise ValueError(
                "An optimizer is set up already: it came out of `fabric.setup` or `fabric.setup_optimizers`. "
                "Set each optimizer up once."
            )
        if not isinstance(optimizer, (Optimizer, Optimizable)):
            raise TypeError(f"An optimizer is wanted, but got {optimizer!r}. Pass a `torch.optim.Optimizer`.")
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise ValueError("The same optimizer is passed twice. Pass each optimizer once.")


def way_to_compile(choice: Any) -> None:
    """What is to become of a compiled module."""
    if not isinstance(choice, (bool, str)):
        raise TypeError(f"`_reapply_compile` is True, False or 'blocks', but got {choice!r}. Pass one of them.")
    if isinstance(choice, str) and choice != "blocks":
        raise ValueError(f"`_reapply_compile` is True, False or 'blocks', but got {choice!r}. Pass one of them.")


def at_least_one(objects: Sequence[Any], verb: str, noun: str) -> None:
    """``verb`` has got something to work on."""
    if not objects:
        raise ValueError(f"`{verb}` needs at least one {noun}, but got none.")


def dataloaders_to_set_up(dataloaders: Sequence[Any]) -> None:
    """Plain dataloaders, each set up for the first time."""
    at_least_one(dataloaders, "setup_dataloaders", "dataloader")
    for loader in dataloaders:
        if isinstance(loader, _FabricDataLoader):
            raise ValueError(
                "A dataloader is set up already: it came out of `fabric.setup_dataloaders`. Set each loader up once."
            )
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"`setup_dataloaders` takes `torch.utils.data.DataLoader` objects, but got {loader!r}. "
                "Wrap the dataset in a DataLoader, or use your own loader without set-up and `fabric.to_device`."
            )


def set_up_module(module: Any, verb: str) -> None:
    """``module`` came out of set-up."""
    if not isinstance(module, _FabricModule):
        raise TypeError(
            f"`{verb}` needs the module that `fabric.setup` returned, but got {type(module).__name__}. "
            "Pass the result of `fabric.setup(...)`."
        )


def one_kind_of_clipping(clip_val: Any, max_norm: Any) -> None:
    """By value or by norm."""
    if (clip_val is None) == (max_norm is None):
        raise ValueError(
            "`clip_gradients` clips either by value (`clip_val=`) or by norm (`max_norm=`), but got "
            f"clip_val={clip_val!r} and max_norm={max_norm!r}. Pass one of them."
        )


def no_plain_loaders(state: Mapping[str, Any]) -> None:
    """A loader in the state knows where it is: it is set up, or has a state of its own."""
    for key, value in state.items():
        if isinstance(value, DataLoader) and not is_stateful(value):
            raise TypeError(
                f"state[{key!r}] is a {type(value).__name__} that is not set up, so it does not know how far it is. "
                "Put there what `fabric.setup_dataloaders` returned."
            )


def state_filter(filter: Any, state: Mapping[str, Any]) -> None:
    """A ``(name, value) -> bool`` for keys that the state has."""
    if not isinstance(filter, dict):
        raise TypeError(f"`filter` maps keys of the state to functions, but got {filter!r}. Pass a dict.")
    unknown = sorted(set(filter) - set(state))
    if unknown:
        raise ValueError(f"`filter` has the keys {unknown}, which the state has not. The state has {sorted(state)}.")
    for key, function in filter.items():
        if not callable(function) or not _takes_two_arguments(function):
            raise TypeError(
                f"filter[{key!r}] must be a function of two arguments, (name, value) -> bool, but got {function!r}."
            )


def _takes_two_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    return len(inspect.signature(function).parameters) == 2
