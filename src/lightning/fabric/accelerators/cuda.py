"""NVIDIA GPUs, and AMD GPUs in builds of torch for ROCm, where they are called cuda as well."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator, Memory
from lightning.fabric.utilities.device_parser import parse_gpu_devices
from lightning.fabric.utilities.rank_zero import rank_zero_info


class CUDAAccelerator(Accelerator):
    """One process per GPU. Indices count the GPUs that CUDA_VISIBLE_DEVICES leaves visible."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(f"`CUDAAccelerator` sets up CUDA devices like 'cuda:0', but got {str(device)!r}.")
        torch.cuda.set_device(device)
        _hint_at_tensor_cores(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))

    def teardown(self) -> None:
        torch.cuda.empty_cache()

    def memory(self, device: torch.device) -> Memory | None:
        """Of torch's tensors, without what its allocator keeps in reserve."""
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return Memory(now, peak, f"tensors on {device}")

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return parse_gpu_devices(devices, available=num_cuda_devices())

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return num_cuda_devices()

    @staticmethod
    def is_available() -> bool:
        return is_cuda_available()

    @staticmethod
    def name() -> str:
        return "cuda"


def num_cuda_devices() -> int:
    """Return the number of visible GPUs. Does not initialise CUDA, so the process can still be forked."""
    return torch.cuda.device_count()


def is_cuda_available() -> bool:
    """Tell whether there is a GPU that torch can use. Does not initialise CUDA."""
    with _nvml_based_check():
        return torch.cuda.is_available()


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Return the indices of ``num_devices`` GPUs (-1: of all) on which this process can allocate memory.

    For GPUs in exclusive mode, which another process may hold: ``Fabric(devices=find_usable_cuda_devices(2))``.
    Asking for more GPUs than are visible raises ``ValueError``; finding fewer than asked, ``RuntimeError``.
    Tries them out, which initialises CUDA: the process should not fork afterwards.
    """
    if type(num_devices) is not int or num_devices < -1:
        raise ValueError(
            f"`num_devices` must be the number of devices to find, or -1 for all, but got {num_devices!r}."
        )
    visible = num_cuda_devices()
    if visible == 0 or num_devices > visible:
        wanted = "usable devices" if num_devices == -1 else f"{num_devices} device(s)"
        raise ValueError(f"You asked to find {wanted}, but this machine has {visible} visible CUDA device(s).")
    usable: list[int] = []
    for index in range(visible):
        if len(usable) == num_devices:
            break
        if _is_usable(torch.device("cuda", index)):
            usable.append(index)
    if len(usable) < num_devices:
        busy = sorted({*range(visible)} - {*usable})
        raise RuntimeError(
            f"You asked to find {num_devices} device(s), but only {len(usable)} of {visible} can be used now. "
            f"Probably other processes hold the devices with indices {busy}."
        )
    return usable


def _is_usable(device: torch.device) -> bool:
    try:
        torch.tensor(0, device=device)
    except RuntimeError:
        return False
    return True


@contextmanager
def _nvml_based_check() -> Iterator[None]:
    """Have ``torch.cuda.is_available`` ask the driver's library instead of the CUDA runtime, which spoils a fork."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@cache
def _hint_at_tensor_cores(name: str, capability: tuple[int, int]) -> None:
    # "none" is what nobody has set; "ieee" is a choice.
    if capability >= (8, 0) and torch.backends.cuda.matmul.fp32_precision == "none":
        rank_zero_info(
            f"{name!r} has Tensor Cores. `torch.set_float32_matmul_precision('high')` (or 'medium') uses them for "
            "float32 matrix products too: much faster, a little less precise."
        )
