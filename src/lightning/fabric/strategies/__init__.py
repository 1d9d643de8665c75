"""Strategies: how one module is trained on the devices there are."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp import DDPStrategy as DDPStrategy
    from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy as DeepSpeedStrategy
    from lightning.fabric.strategies.dp import DataParallelStrategy as DataParallelStrategy
    from lightning.fabric.strategies.fsdp import FSDPStrategy as FSDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as ModelParallelStrategy
    from lightning.fabric.strategies.parallel import ParallelStrategy as ParallelStrategy
    from lightning.fabric.strategies.registry import STRATEGY_REGISTRY as STRATEGY_REGISTRY
    from lightning.fabric.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy
    from lightning.fabric.strategies.single_xla import SingleDeviceXLAStrategy as SingleDeviceXLAStrategy
    from lightning.fabric.strategies.strategy import Strategy as Strategy
    from lightning.fabric.strategies.xla import XLAStrategy as XLAStrategy
    from lightning.fabric.strategies.xla_fsdp import XLAFSDPStrategy as XLAFSDPStrategy

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.strategies.ddp": ["DDPStrategy"],
        "lightning.fabric.strategies.deepspeed": ["DeepSpeedStrategy"],
        "lightning.fabric.strategies.dp": ["DataParallelStrategy"],
        "lightning.fabric.strategies.fsdp": ["FSDPStrategy"],
        "lightning.fabric.strategies.model_parallel": ["ModelParallelStrategy"],
        "lightning.fabric.strategies.parallel": ["ParallelStrategy"],
        "lightning.fabric.strategies.registry": ["STRATEGY_REGISTRY"],
        "lightning.fabric.strategies.single_device": ["SingleDeviceStrategy"],
        "lightning.fabric.strategies.single_xla": ["SingleDeviceXLAStrategy"],
        "lightning.fabric.strategies.strategy": ["Strategy"],
        "lightning.fabric.strategies.xla": ["XLAStrategy"],
        "lightning.fabric.strategies.xla_fsdp": ["XLAFSDPStrategy"],
    },
)
