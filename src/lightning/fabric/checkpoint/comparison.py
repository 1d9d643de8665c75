"""In what two checkpoints differ, value by value; one tensor of each is read at a time."""

import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.checkpoint.contents import Leaves, verified_contents
from lightning.fabric.utilities.sharded_folder import Place
from lightning.fabric.utilities.types import _PATH

_PIECE = 1 << 20  # elements that are compared at once, in a wider dtype
_TEXT_LIMIT = 60


def differences(
    first: _PATH,
    second: _PATH,
    key: str | None = None,
    weights_only: bool | None = None,
) -> Iterator[str]:
    """Yield a line for each value that only one has, or that is not the same in both; none if they are equal.

    Both are verified first; of a folder of checkpoints, it is the newest good one.
    The checkpoints may be of different forms: the same state saved in a folder and in one file is equal. With ``key``,
    only that entry is compared; what is a bare state dict is that entry itself. Kinds of containers are not compared.

    Raises:
        KeyError: if one has no entry ``key``.
        DamagedCheckpointError: if one is not as it was saved.

    """
    with verified_contents(first, weights_only) as (a, _), verified_contents(second, weights_only) as (b, _):
        one, other = (contents.leaves() if key is None else contents.part(key) for contents in (a, b))
        yield from (f"{_name(place)}: only in the first, {_what(one[place]())}" for place in one if place not in other)
        yield from (
            f"{_name(place)}: only in the second, {_what(other[place]())}" for place in other if place not in one
        )
        for place in one:
            if place in other and (difference := _difference(one, other, place)):
                yield f"{_name(place)}: {difference}"


def _name(place: Place) -> str:
    return ".".join(map(str, place)) or "everything"


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value)} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= _TEXT_LIMIT else f"{text[: _TEXT_LIMIT - 3]}..."


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _difference(one: Leaves, other: Leaves, place: Place) -> str:
    a, b = one[place](), other[place]()
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if _same(a, b) else f"{_what(a)} / {_what(b)}"
    if a.shape != b.shape:
        return f"{_what(a)} / {_what(b)}"
    texts = [] if a.dtype == b.dtype else [f"{_dtype(a)} / {_dtype(b)}"]
    if a.is_meta != b.is_meta:
        texts.append(f"{'no values' if a.is_meta else 'values'} / {'no values' if b.is_meta else 'values'}")
    try:
        count, largest = (0, 0.0) if a.is_meta or b.is_meta else _distance(a, b)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{_name(place)!r} is of a kind that cannot be compared: {error}") from error
    if count:
        texts.append(f"max difference {largest:.3g}, in {count} of {a.numel()} values")
    return ", ".join(texts)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    # what is not equal to itself (NaN), or whose comparison is no yes or no (an array), may still be the same
    return a is b or pickle.dumps(a) == pickle.dumps(b) or _is_equal(a, b)


def _is_equal(a: Any, b: Any) -> bool:
    equal = a == b
    return equal if isinstance(equal, bool) else False


def _distance(a: Tensor, b: Tensor) -> tuple[int, float]:
    """Return how many values differ, and by how much at most; NaN if one of both is."""
    count, largest = 0, torch.zeros((), dtype=torch.float64)
    for x, y in zip(_pieces(a), _pieces(b), strict=True):
        wide = _wide(torch.promote_types(_wide(x.dtype), _wide(y.dtype)))
        x, y = x.to(wide), y.to(wide)
        differ = (x != y) & ~(x.isnan() & y.isnan())
        if number := int(differ.sum()):
            count += number
            largest = torch.maximum(largest, (x[differ] - y[differ]).abs().max().to(torch.float64))
    return count, largest.item()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.detach().reshape(-1).split(_PIECE)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else torch.int64
