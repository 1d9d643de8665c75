"""Casting of nested tensors, and the default dtype for a while."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.apply_func import apply_to_collection

# The named methods take half the time of `Tensor.to(dtype)`.
_METHODS = {
    torch.float16: Tensor.half,
    torch.bfloat16: Tensor.bfloat16,
    torch.float32: Tensor.float,
    torch.float64: Tensor.double,
}


def cast_floating(data: Any, dtype: torch.dtype) -> Any:
    """Return ``data`` with its floating-point tensors as ``dtype``; all else, and its shape as a tree, untouched.

    Runs twice in every forward, so the plain types come first and nothing is copied that has the dtype already.
    """
    kind = type(data)
    if kind is Tensor:
        return data if data.dtype is dtype or not data.is_floating_point() else _METHODS[dtype](data)
    if kind is tuple:
        return tuple([cast_floating(item, dtype) for item in data])
    if kind is dict:
        return {key: cast_floating(item, dtype) for key, item in data.items()} if data else data
    return apply_to_collection(data, Tensor, _cast, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class default_dtype:
    """While entered, new floating-point tensors have ``dtype``."""

    __slots__ = ("_dtype", "_previous")

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._previous = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_default_dtype(self._previous)
