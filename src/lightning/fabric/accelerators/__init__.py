"""The hardware a process can run on: what is there, how a request for devices is read, how one is made ready."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator as Accelerator
    from lightning.fabric.accelerators.cpu import CPUAccelerator as CPUAccelerator
    from lightning.fabric.accelerators.cuda import CUDAAccelerator as CUDAAccelerator
    from lightning.fabric.accelerators.cuda import find_usable_cuda_devices as find_usable_cuda_devices
    from lightning.fabric.accelerators.mps import MPSAccelerator as MPSAccelerator
    from lightning.fabric.accelerators.registry import ACCELERATOR_REGISTRY as ACCELERATOR_REGISTRY
    from lightning.fabric.accelerators.xla import TPUAccelerator as TPUAccelerator
    from lightning.fabric.accelerators.xla import XLAAccelerator as XLAAccelerator

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.accelerators.accelerator": ["Accelerator"],
        "lightning.fabric.accelerators.cpu": ["CPUAccelerator"],
        "lightning.fabric.accelerators.cuda": ["CUDAAccelerator", "find_usable_cuda_devices"],
        "lightning.fabric.accelerators.mps": ["MPSAccelerator"],
        "lightning.fabric.accelerators.registry": ["ACCELERATOR_REGISTRY"],
        "lightning.fabric.accelerators.xla": ["TPUAccelerator", "XLAAccelerator"],
    },
)
