"""What is looked up by name: tables that users add to, and callbacks that installed packages add to every Fabric."""

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

CALLBACKS_GROUP = "lightning.fabric.callbacks_factory"


def _load_external_callbacks(group: str = CALLBACKS_GROUP) -> list[Any]:
    """Return the callbacks of all installed packages that name a factory in the entry-point group ``group``.

    A factory is called without arguments and returns one callback or a list of them.
    """
    callbacks: list[Any] = []
    for entry in _entries(group):
        try:
            made = entry.load()()
        except Exception as error:
            raise RuntimeError(
                f"The callback factory {entry.value!r}, which an installed package adds to every Fabric object "
                f"(entry-point group {group!r}), failed: {error!r}. Fix or uninstall that package."
            ) from error
        callbacks.extend(made if isinstance(made, (list, tuple)) else [made])
    return callbacks


@functools.cache  # a look through the metadata of every installed package
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


class Entry(Protocol):
    """What a registry keeps under a name: ``target`` is ``"module:Class"``, imported on first use, or the class."""

    @property
    def target(self) -> str | Callable[..., Any]: ...

    @property
    def kwargs(self) -> Mapping[str, Any]: ...


_Entry = TypeVar("_Entry", bound=Entry)
_T = TypeVar("_T", bound=Callable[..., Any])


class Registry(ABC, Generic[_Entry]):
    """Makes objects of one ``kind`` from their names; each :meth:`get` returns a new one."""

    kind: str

    def __init__(self, entries: Mapping[str, _Entry] | None = None) -> None:
        self._entries = dict(entries or {})

    @abstractmethod
    def _make_entry(self, cls: Callable[..., Any], description: str, kwargs: Mapping[str, Any]) -> _Entry:
        """Return what is kept for a class that a user registers."""

    def register(
        self,
        name: str,
        cls: Callable[..., Any] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Add ``cls`` under ``name``; ``init_params`` are passed to it by :meth:`get`. Without ``cls``: a decorator.

        A name that is taken raises ``MisconfigurationException`` unless ``override``.
        """
        if not isinstance(name, str):
            raise TypeError(f"The name of a registered {self.kind} must be a string, but got {name!r}.")
        if name in self._entries and not override:
            raise MisconfigurationException(
                f"The {self.kind} name {name!r} is already registered. Pass `override=True` to replace it."
            )

        def add(cls: _T) -> _T:
            self._entries[name] = self._make_entry(cls, description, init_params)
            return cls

        return add if cls is None else add(cls)

    def get(self, name: str) -> Any:
        """Return a new object; an unknown name raises ``KeyError``."""
        return self.build(self.entry(name))

    def build(self, entry: _Entry, **kwargs: Any) -> Any:
        """Return a new object for ``entry``; ``kwargs`` come on top of the entry's own."""
        return class_of(entry)(**{**entry.kwargs, **kwargs})

    def entry(self, name: str) -> _Entry:
        """Return what is kept under ``name``, without importing the class."""
        try:
            return self._entries[name]
        except KeyError:
            raise KeyError(f"Unknown {self.kind} {name!r}. Known: {', '.join(sorted(self._entries))}") from None

    def remove(self, name: str) -> None:
        """Forget ``name``; an unknown name raises ``KeyError``."""
        self.entry(name)
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)


def class_of(entry: Entry) -> Any:
    """Return the class behind ``entry``, importing it."""
    if not isinstance(entry.target, str):
        return entry.target
    module, _, cls = entry.target.partition(":")
    return getattr(importlib.import_module(module), cls)
