"""Walk nested collections: change the leaves, keep the containers."""

import dataclasses
import sys
from abc import ABC
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.types import _DEVICE

_Types = type | tuple[Any, ...]
_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, Tensor})
_NOT_SEQUENCES = (str, bytes, bytearray, memoryview, range)


def apply_to_collection(
    data: Any,
    dtype: _Types,
    function: Callable[..., Any],
    *args: Any,
    wrong_dtype: _Types | None = None,
    include_none: bool = True,
    **kwargs: Any,
) -> Any:
    """Return ``data`` with ``function(leaf, *args, **kwargs)`` in place of every ``leaf`` of type ``dtype``.

    Goes through mappings, sequences, named tuples and dataclasses at any depth, and returns new containers of the same
    types; every other object is returned as it is. Nothing is changed in place.

    Args:
        wrong_dtype: leaves of this type are left alone although they are of type ``dtype``.
        include_none: ``False`` leaves elements whose result is ``None`` out of mappings and sequences.
    """
    if type(data) is dtype and wrong_dtype is None:  # one tensor, at each step of many programs: no walk
        return function(data, *args, **kwargs)
    if args or kwargs:
        inner = function
        function = lambda leaf: inner(leaf, *args, **kwargs)
    return _apply(data, dtype, function, wrong_dtype, include_none)


def _apply(data: Any, dtype: Any, function: Callable[[Any], Any], wrong: Any, keep_none: bool) -> Any:
    kind = type(data)
    if (kind is dtype or isinstance(data, dtype)) and not (wrong is not None and isinstance(data, wrong)):
        return function(data)
    if kind in _LEAVES:
        return data
    if kind is dict:
        items = {key: _apply(value, dtype, function, wrong, keep_none) for key, value in data.items()}
        return items if keep_none else {key: value for key, value in items.items() if value is not None}
    if kind is list or kind is tuple:
        values = [_apply(value, dtype, function, wrong, keep_none) for value in data]
        if not keep_none:
            values = [value for value in values if value is not None]
        return values if kind is list else tuple(values)
    return _apply_to_other(data, dtype, function, wrong, keep_none)


def _apply_to_other(data: Any, dtype: Any, function: Callable[[Any], Any], wrong: Any, keep_none: bool) -> Any:
    """The containers that need care: subclasses, views, records."""
    kind = type(data)
    if isinstance(data, Mapping):
        items = {key: _apply(value, dtype, function, wrong, keep_none) for key, value in data.items()}
        dropped = () if keep_none else [key for key, value in items.items() if value is None]
        if not isinstance(data, (dict, UserDict)):
            return kind({key: value for key, value in items.items() if key not in dropped})
        new = copy(data)  # keeps a default factory and attributes
        for key, value in items.items():  # not `update`, which adds in a Counter
            new[key] = value
        for key in dropped:
            del new[key]
        return new
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return kind(*(_apply(value, dtype, function, wrong, True) for value in data))
    if isinstance(data, Sequence) and not isinstance(data, _NOT_SEQUENCES):
        values = [_apply(value, dtype, function, wrong, keep_none) for value in data]
        return kind(values if keep_none else [value for value in values if value is not None])
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        record: Any = copy(data)
        for field in dataclasses.fields(data):
            if hasattr(data, field.name):
                value = getattr(data, field.name)
                changed = _apply(value, dtype, function, wrong, keep_none)
                if changed is not value and (keep_none or changed is not None):
                    object.__setattr__(record, field.name, changed)  # works for frozen ones as well
        return record
    return data


class _Movable(ABC):  # noqa: B024
    """Anything with a ``to`` method."""

    @classmethod
    def __subclasshook__(cls, subclass: Any) -> bool:
        return callable(getattr(subclass, "to", None))


def move_data_to_device(batch: Any, device: _DEVICE) -> Any:
    """Return ``batch``, any nested collection, with everything that has a ``to`` method on ``device``.

    Copies of tensors to a CUDA device do not wait for their end (later work on the device's stream does). An object
    whose ``to`` returns nothing is taken to have moved itself.
    """
    return _move(batch, device if isinstance(device, torch.device) else torch.device(device))


def _move(data: Any, device: torch.device) -> Any:
    kind = type(data)
    if kind is Tensor:
        return data if data.device == device else _copy(data, device)
    if kind is tuple:
        return tuple([_move(value, device) for value in data])
    if kind is list:
        return [_move(value, device) for value in data]
    if kind is dict:
        return {key: _move(value, device) for key, value in data.items()}
    return data if kind in _LEAVES else _apply(data, _Movable, lambda leaf: _copy(leaf, device), None, True)


def _copy(movable: Any, device: torch.device) -> Any:
    if isinstance(movable, Tensor) and device.type == "cuda":
        return movable.to(device, non_blocking=True)
    moved = movable.to(device)
    return movable if moved is None else moved


def convert_to_tensors(data: Any, device: _DEVICE) -> Any:
    """Return ``data`` with Python numbers and numpy arrays as new tensors, and all tensors on ``device``."""
    numbers: tuple[type, ...] = (bool, int, float, complex)
    if (numpy := sys.modules.get("numpy")) is not None:  # not imported: then there is no array in `data` either
        numbers += (numpy.ndarray, numpy.number, numpy.bool_)
    data = apply_to_collection(data, numbers, partial(torch.tensor, device=device))
    return move_data_to_device(data, device)


def convert_tensors_to_scalars(data: Any) -> Any:
    """Return ``data`` with a Python number for each tensor; ``ValueError`` for a tensor of more than one element."""
    return apply_to_collection(data, Tensor, _to_scalar)


def _to_scalar(value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(
            f"Only a tensor with one element can become a number, but got one of shape {tuple(value.shape)}. "
            "Reduce it first, for example with `.mean()`."
        )
    return value.item()
