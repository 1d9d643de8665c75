"""TPUs, through torch_xla, which is imported when it is needed. Experimental."""

from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.utilities.device_parser import parse_tpu_devices
from lightning.fabric.utilities.imports import package_available, require


class XLAAccelerator(Accelerator):
    """One process per TPU core. Making one needs torch_xla (``ModuleNotFoundError``); the static methods do not."""

    def __init__(self) -> None:
        require("torch_xla", "accelerator='tpu'")

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do: torch_xla gives each process its core."""

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int | list[int]:
        """Return a number of cores, or a list with the index of one core."""
        return parse_tpu_devices(devices, available=XLAAccelerator.auto_device_count())

    @staticmethod
    def get_parallel_devices(devices: int | list[int]) -> list[torch.device]:
        indices = range(devices) if isinstance(devices, int) else devices
        return [torch.device("xla", index) for index in indices]

    @staticmethod
    def auto_device_count() -> int:
        """Return the number of TPU cores of this machine, without taking hold of one."""
        if not package_available("torch_xla"):
            return 0
        from torch_xla._internal import tpu

        return int(tpu.num_available_devices())

    @staticmethod
    def is_available() -> bool:
        return XLAAccelerator.auto_device_count() > 0

    @staticmethod
    def name() -> str:
        return "tpu"


TPUAccelerator = XLAAccelerator
