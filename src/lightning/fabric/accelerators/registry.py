"""Accelerators by name: the built-in table, and what other packages add to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.registry import Registry, class_of


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


class _AcceleratorRegistry(Registry[AcceleratorEntry]):
    kind = "accelerator"

    def _make_entry(self, cls: Callable[..., Any], description: str, kwargs: Mapping[str, Any]) -> AcceleratorEntry:
        return AcceleratorEntry(cls, kwargs, description)

    def get_class(self, name: str) -> Any:
        """Return the class behind ``name``, whose static methods answer questions about the machine."""
        return class_of(self.entry(name))

    def available_accelerators(self) -> list[str]:
        """Return the sorted names. That a name is known does not say that this machine has the hardware."""
        return sorted(self._entries)


ACCELERATOR_REGISTRY = _AcceleratorRegistry(ACCELERATORS)
"""The one table of accelerators that ``Fabric(accelerator=...)`` looks names up in."""
