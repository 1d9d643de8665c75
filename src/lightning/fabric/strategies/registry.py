"""Strategies by name: the built-in table, and what other packages add to it."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lightning.fabric.strategies._table import STRATEGIES, StrategyEntry
from lightning.fabric.utilities.exceptions import MisconfigurationException

_T = TypeVar("_T", bound=Callable[..., Any])


class _StrategyRegistry:
    """Makes strategies from their names; each :meth:`get` returns a new object."""

    def __init__(self) -> None:
        self._entries: dict[str, StrategyEntry] = dict(STRATEGIES)

    def register(
        self,
        name: str,
        strategy: Callable[..., Any] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Add ``strategy`` under ``name``; ``init_params`` are passed to it by :meth:`get`.

        Without ``strategy`` it is a class decorator. The class's ``runs_on`` and ``start_method`` tell where
        it may be used. A name that is taken raises ``MisconfigurationException`` unless ``override``.
        """
        if not isinstance(name, str):
            raise TypeError(f"The name of a strategy must be a string, but got {name!r}.")
        if name in self._entries and not override:
            raise MisconfigurationException(
                f"The strategy name {name!r} is already registered. Pass `override=True` to replace it."
            )

        def add(cls: _T) -> _T:
            self._entries[name] = entry_of(cls, description, init_params)
            return cls

        return add if strategy is None else add(strategy)

    def get(self, name: str) -> Any:
        """Return a new strategy object; an unknown name raises ``KeyError``."""
        return self.build(self.entry(name))

    def build(self, entry: StrategyEntry, **kwargs: Any) -> Any:
        """Return a new strategy object for ``entry``; ``kwargs`` come on top of the entry's own."""
        target = entry.target
        if isinstance(target, str):
            module, _, cls = target.partition(":")
            target = getattr(importlib.import_module(module), cls)
        return target(**{**entry.kwargs, **kwargs})

    def entry(self, name: str) -> StrategyEntry:
        """Return the facts behind ``name``, without importing the strategy."""
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"Unknown strategy {name!r}. Known: {', '.join(self.available_strategies())}") from None

    def remove(self, name: str) -> None:
        """Forget ``name``; an unknown name raises ``KeyError``."""
        self.entry(name)
        del self._entries[name]

    def available_strategies(self) -> list[str]:
        """Return the sorted names."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)


def entry_of(cls: Callable[..., Any], description: str = "", kwargs: Mapping[str, Any] | None = None) -> StrategyEntry:
    """Return the facts of a strategy class: those of the built-in class that it derives from, then its own.

    Of a class that derives from none of ours nothing is known, so nothing is forbidden.
    """
    built_in = {entry.target: entry for entry in reversed(STRATEGIES.values())}
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


STRATEGY_REGISTRY = _StrategyRegistry()
"""The one table of strategies that ``Fabric(strategy=...)`` looks names up in."""
