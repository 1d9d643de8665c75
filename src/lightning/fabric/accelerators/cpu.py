"""The processor: any number of processes share it."""

from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.utilities.device_parser import parse_cpu_devices


class CPUAccelerator(Accelerator):
    """``devices=n`` means n processes on this machine."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"`CPUAccelerator` sets up the device 'cpu', but got {str(device)!r}.")

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return parse_cpu_devices(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu")] * parse_cpu_devices(devices)

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "cpu"
