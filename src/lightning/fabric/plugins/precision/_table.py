"""The names of precisions and the classes behind them; knows no torch."""

import importlib
from typing import Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.text import did_you_mean


class _Entry(NamedTuple):
    target: str  # "module:Class"
    kwargs: dict[str, Any]


_HERE = "lightning.fabric.plugins.precision"
_TABLE: dict[str, _Entry] = {
    "64-true": _Entry(f"{_HERE}.double:DoublePrecision", {}),
    "32-true": _Entry(f"{_HERE}.precision:Precision", {}),
    "16-true": _Entry(f"{_HERE}.half:HalfPrecision", {"precision": "16-true"}),
    "bf16-true": _Entry(f"{_HERE}.half:HalfPrecision", {"precision": "bf16-true"}),
    "16-mixed": _Entry(f"{_HERE}.amp:MixedPrecision", {"precision": "16-mixed"}),
    "bf16-mixed": _Entry(f"{_HERE}.amp:MixedPrecision", {"precision": "bf16-mixed"}),
    "float8": _Entry(f"{_HERE}.float8:Float8Precision", {}),
    "transformer-engine": _Entry(
        f"{_HERE}.transformer_engine:TransformerEnginePrecision", {"weights_dtype": "bfloat16"}
    ),
    "transformer-engine-float16": _Entry(
        f"{_HERE}.transformer_engine:TransformerEnginePrecision", {"weights_dtype": "float16"}
    ),
}
_SAME_MEANING = {"64": "64-true", "32": "32-true"}
_FOR_HISTORY = {"16": "16-mixed", "bf16": "bf16-mixed"}

PRECISIONS: tuple[str, ...] = tuple(_TABLE)
"""The canonical names."""


def canonical(precision: object) -> str:
    """Return the canonical name of what a user passes as ``precision=``: a string, an int or None (``"32-true"``).

    Anything else raises ``ValueError``. ``16`` and ``"bf16"`` are accepted with a warning that gives the long form.
    """
    if precision is None:
        return "32-true"
    name = str(precision) if type(precision) is int else precision
    if isinstance(name, str):
        name = _SAME_MEANING.get(name, name)
        if name in _FOR_HISTORY:
            _nudge(precision, _FOR_HISTORY[name])
            return _FOR_HISTORY[name]
        if name in _TABLE:
            return name
    hint = did_you_mean(precision, PRECISIONS) if isinstance(precision, str) else ""
    known = ", ".join(map(repr, PRECISIONS))
    raise ValueError(f"Unknown precision {precision!r}.{hint} Known: {known}, and 64, 32, 16, 'bf16' for short.")


def build_precision(name: str, device_type: str, target: str | None = None) -> Any:
    """Return a new precision plugin for a canonical ``name``, to compute on ``device_type`` (``"cpu"``, ``"cuda"``).

    ``target``, ``"module:Class"``, is made in place of the ordinary plugin, with ``name`` alone.
    """
    if target is not None:
        return _class(target)(name)
    entry = _TABLE[name]
    kwargs = {**entry.kwargs, "device": device_type} if name.endswith("-mixed") else entry.kwargs
    return _class(entry.target)(**kwargs)


def _class(target: str) -> Any:
    module, _, cls = target.partition(":")
    return getattr(importlib.import_module(module), cls)


def _nudge(given: object, name: str) -> None:
    rank_zero_warn(f"precision={given!r} means {name!r}. Write precision={name!r} to say so.")
