"""The contract of an accelerator."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch


class Memory(NamedTuple):
    """In bytes: what is in use now, and the most that ever was; None: not known."""

    now: int | None
    peak: int | None
    what: str  # that is counted, in words


class Accelerator(ABC):
    """One kind of hardware.

    In order: :meth:`is_available` and :meth:`auto_device_count` are asked while flags are resolved, then
    :meth:`parse_devices` and :meth:`get_parallel_devices` turn the user's ``devices=`` into devices; none of these
    may initialise the hardware. After launch each process calls :meth:`setup_device` once, and :meth:`teardown`
    when the run ends.
    """

    @abstractmethod
    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` this process's device. A device of another type raises ``ValueError``."""

    @abstractmethod
    def teardown(self) -> None:
        """Free what the process holds on its device. May be called more than once."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: Any) -> Any:
        """Check the user's ``devices=`` and return it in this accelerator's own form."""

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return one device per process of this machine, from what :meth:`parse_devices` returned."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """Return the number of devices that ``devices="auto"`` stands for."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Tell whether this machine has the hardware and torch can use it."""

    def memory(self, device: torch.device) -> Memory | None:
        """Return how much memory this process has in use on ``device``; None where that cannot be told."""
        return None

    @classmethod
    def name(cls) -> str:
        """Return the name of this kind of hardware, as in ``Fabric(accelerator=name)``. May be a static method."""
        return cls.__name__.removesuffix("Accelerator").lower()

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Add this class to ``accelerator_registry`` under its name."""
        accelerator_registry.register(cls.name(), cls, description=cls.__name__)
