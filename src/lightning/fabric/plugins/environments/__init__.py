"""Who started the processes, and what each is told about the others."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment as ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment as LightningEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment as TorchElasticEnvironment
    from lightning.fabric.plugins.environments.xla import XLAEnvironment as XLAEnvironment

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.plugins.environments.cluster_environment": ["ClusterEnvironment"],
        "lightning.fabric.plugins.environments.lightning": ["LightningEnvironment"],
        "lightning.fabric.plugins.environments.torchelastic": ["TorchElasticEnvironment"],
        "lightning.fabric.plugins.environments.xla": ["XLAEnvironment"],
    },
)
