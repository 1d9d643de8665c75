"""Strategies by name: the built-in table, and what other packages add to it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning.fabric.strategies._table import STRATEGIES, UNNAMED, StrategyEntry
from lightning.fabric.utilities.registry import Registry


class _StrategyRegistry(Registry[StrategyEntry]):
    kind = "strategy"

    def _make_entry(self, cls: Callable[..., Any], description: str, kwargs: Mapping[str, Any]) -> StrategyEntry:
        return entry_of(cls, description, kwargs)

    def available_strategies(self) -> list[str]:
        """Return the sorted names."""
        return sorted(self._entries)


def entry_of(cls: Callable[..., Any], description: str = "", kwargs: Mapping[str, Any] | None = None) -> StrategyEntry:
    """Return the facts of a strategy class: those of the built-in class that it derives from, then its own.

    Of a class that derives from none of ours nothing is known, so nothing is forbidden.
    """
    built_in = {entry.target: entry for entry in reversed((*STRATEGIES.values(), *UNNAMED))}
    bases = (f"{base.__module__}:{base.__qualname__}" for base in getattr(cls, "__mro__", ()))
    unknown = StrategyEntry(cls, multi_process=True, many_devices=True)
    facts = next((built_in[base] for base in bases if base in built_in), unknown)

    kwargs = dict(kwargs or {})
    start_method = kwargs.get("start_method", getattr(cls, "start_method", None))
    return replace(
        facts,
        target=cls,
        kwargs=kwargs,
        description=description,
        runs_on=getattr(cls, "runs_on", facts.runs_on),
        # On the class it may be a property, which says nothing
        start_method=start_method if isinstance(start_method, str) else facts.start_method,
    )


STRATEGY_REGISTRY = _StrategyRegistry(STRATEGIES)
"""The one table of strategies that ``Fabric(strategy=...)`` looks names up in."""
