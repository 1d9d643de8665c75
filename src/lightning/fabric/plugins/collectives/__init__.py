"""Talk between processes, one object per backend."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.plugins.collectives.collective import Collective as Collective
    from lightning.fabric.plugins.collectives.single_device import SingleDeviceCollective as SingleDeviceCollective
    from lightning.fabric.plugins.collectives.torch_collective import TorchCollective as TorchCollective

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.plugins.collectives.collective": ["Collective"],
        "lightning.fabric.plugins.collectives.single_device": ["SingleDeviceCollective"],
        "lightning.fabric.plugins.collectives.torch_collective": ["TorchCollective"],
    },
)
