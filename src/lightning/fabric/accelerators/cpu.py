"""The processor: any number of processes share it."""

import sys
from pathlib import Path
from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator, Memory
from lightning.fabric.utilities.device_parser import parse_cpu_devices


class CPUAccelerator(Accelerator):
    """``devices=n`` means n processes on this machine."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"`CPUAccelerator` sets up the device 'cpu', but got {str(device)!r}.")

    def teardown(self) -> None:
        pass

    def memory(self, device: torch.device) -> Memory | None:
        """Of the whole process, as the system counts it."""
        what = "this process, in main memory"
        status = Path("/proc/self/status")
        if not status.exists():
            import resource  # not on every system

            unit = 1 if sys.platform == "darwin" else 1024
            return Memory(None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, what)
        lines = (line.partition(":") for line in status.read_text().splitlines())
        size = {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in ("VmRSS", "VmHWM")}
        now = size["VmRSS"]
        return Memory(now, max(now, size.get("VmHWM", now)), what)  # the system is late with the peak

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
