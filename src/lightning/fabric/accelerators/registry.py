"""Accelerators by name: the built-in table, and what other packages add to it."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

_T = TypeVar("_T", bound=Callable[..., Any])


@dataclass(frozen=True)
class AcceleratorEntry:
    """``target`` is ``"module:Class"``, imported on first use, or the class itself (third parties)."""

    target: str | Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""


ACCELERATORS: dict[str, AcceleratorEntry] = {
    "cpu": AcceleratorEntry("lightning.fabric.accelerators.cpu:CPUAccelerator", description="Processor"),
    "cuda": AcceleratorEntry("lightning.fabric.accelerators.cuda:CUDAAccelerator", description="NVIDIA or AMD GPU"),
    "mps": AcceleratorEntry("lightning.fabric.accelerators.mps:MPSAccelerator", description="Apple silicon GPU"),
    "tpu": AcceleratorEntry("lightning.fabric.accelerators.xla:XLAAccelerator", description="TPU, through torch_xla"),
}


class _AcceleratorRegistry:
    """Makes accelerators from their names; each :meth:`get` returns a new object."""

    def __init__(self, entries: Mapping[str, AcceleratorEntry] | None = None) -> None:
        self._entries = dict(entries or {})

    def register(
        self,
        name: str,
        accelerator: Callable[..., Any] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Add ``accelerator`` under ``name``; ``init_params`` are passed to it by :meth:`get`.

        Without ``accelerator`` it is a class decorator. A name that is taken raises
        ``MisconfigurationException`` unless ``override``.
        """
        if not isinstance(name, str):
            raise TypeError(f"The name of an accelerator must be a string, but got {name!r}.")
        if name in self._entries and not override:
            raise MisconfigurationException(
                f"The accelerator name {name!r} is already registered. Pass `override=True` to replace it."
            )

        def add(cls: _T) -> _T:
            self._entries[name] = AcceleratorEntry(cls, init_params, description)
            return cls

        return add if accelerator is None else add(accelerator)

    def get(self, name: str) -> Any:
        """Return a new accelerator object; an unknown name raises ``KeyError``."""
        entry = self._entry(name)
        return self.get_class(name)(**entry.kwargs)

    def get_class(self, name: str) -> Any:
        """Return the class behind ``name``, whose static methods answer questions about the machine."""
        target = self._entry(name).target
        if isinstance(target, str):
            module, _, cls = target.partition(":")
            target = getattr(importlib.import_module(module), cls)
        return target

    def remove(self, name: str) -> None:
        """Forget ``name``; an unknown name raises ``KeyError``."""
        self._entry(name)
        del self._entries[name]

    def available_accelerators(self) -> list[str]:
        """Return the sorted names. That a name is known does not say that this machine has the hardware."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _entry(self, name: str) -> AcceleratorEntry:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(self.available_accelerators())
            raise KeyError(f"Unknown accelerator {name!r}. Known: {known}") from None


ACCELERATOR_REGISTRY = _AcceleratorRegistry(ACCELERATORS)
"""The one table of accelerators that ``Fabric(accelerator=...)`` looks names up in."""
