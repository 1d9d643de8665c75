"""The GPU of an Apple silicon machine. There is one."""

import platform
from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator, Memory
from lightning.fabric.utilities.device_parser import parse_mps_devices


class MPSAccelerator(Accelerator):
    """One process on the one GPU; its index is 0."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != "mps":
            raise ValueError(f"`MPSAccelerator` sets up the device 'mps', but got {str(device)!r}.")

    def teardown(self) -> None:
        if self.is_available():
            torch.mps.empty_cache()

    def memory(self, device: torch.device) -> Memory | None:
        """Of torch's tensors; the system does not say what the peak was."""
        if not self.is_available():
            return None
        return Memory(torch.mps.current_allocated_memory(), None, f"tensors on {device}")

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return parse_mps_devices(devices, available=MPSAccelerator.auto_device_count())

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("mps", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return int(MPSAccelerator.is_available())

    @staticmethod
    def is_available() -> bool:
        # An Intel Mac with an AMD GPU has MPS as well, but lacks what torch's kernels need.
        return torch.backends.mps.is_available() and platform.machine() == "arm64"

    @staticmethod
    def name() -> str:
        return "mps"
