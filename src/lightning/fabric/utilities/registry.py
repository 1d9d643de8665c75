"""Callbacks that installed packages add to every Fabric object."""

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

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
