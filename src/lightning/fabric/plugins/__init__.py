"""Parts that a strategy is given: precision, cluster environment, checkpoint IO; and collectives."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.plugins.collectives.collective import Collective as Collective
    from lightning.fabric.plugins.collectives.single_device import SingleDeviceCollective as SingleDeviceCollective
    from lightning.fabric.plugins.collectives.torch_collective import TorchCollective as TorchCollective
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment as ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment as LightningEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment as TorchElasticEnvironment
    from lightning.fabric.plugins.environments.xla import XLAEnvironment as XLAEnvironment
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO as CheckpointIO
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO as TorchCheckpointIO
    from lightning.fabric.plugins.io.xla import XLACheckpointIO as XLACheckpointIO
    from lightning.fabric.plugins.precision.amp import MixedPrecision as MixedPrecision
    from lightning.fabric.plugins.precision.bitsandbytes import BitsandbytesPrecision as BitsandbytesPrecision
    from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision as DeepSpeedPrecision
    from lightning.fabric.plugins.precision.double import DoublePrecision as DoublePrecision
    from lightning.fabric.plugins.precision.float8 import Float8Precision as Float8Precision
    from lightning.fabric.plugins.precision.fsdp import FSDPPrecision as FSDPPrecision
    from lightning.fabric.plugins.precision.half import HalfPrecision as HalfPrecision
    from lightning.fabric.plugins.precision.precision import Precision as Precision
    from lightning.fabric.plugins.precision.transformer_engine import (
        TransformerEnginePrecision as TransformerEnginePrecision,
    )
    from lightning.fabric.plugins.precision.xla import XLAPrecision as XLAPrecision

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.plugins.collectives.collective": ["Collective"],
        "lightning.fabric.plugins.collectives.single_device": ["SingleDeviceCollective"],
        "lightning.fabric.plugins.collectives.torch_collective": ["TorchCollective"],
        "lightning.fabric.plugins.environments.cluster_environment": ["ClusterEnvironment"],
        "lightning.fabric.plugins.environments.lightning": ["LightningEnvironment"],
        "lightning.fabric.plugins.environments.torchelastic": ["TorchElasticEnvironment"],
        "lightning.fabric.plugins.environments.xla": ["XLAEnvironment"],
        "lightning.fabric.plugins.io.checkpoint_io": ["CheckpointIO"],
        "lightning.fabric.plugins.io.torch_io": ["TorchCheckpointIO"],
        "lightning.fabric.plugins.io.xla": ["XLACheckpointIO"],
        "lightning.fabric.plugins.precision.amp": ["MixedPrecision"],
        "lightning.fabric.plugins.precision.bitsandbytes": ["BitsandbytesPrecision"],
        "lightning.fabric.plugins.precision.deepspeed": ["DeepSpeedPrecision"],
        "lightning.fabric.plugins.precision.double": ["DoublePrecision"],
        "lightning.fabric.plugins.precision.float8": ["Float8Precision"],
        "lightning.fabric.plugins.precision.fsdp": ["FSDPPrecision"],
        "lightning.fabric.plugins.precision.half": ["HalfPrecision"],
        "lightning.fabric.plugins.precision.precision": ["Precision"],
        "lightning.fabric.plugins.precision.transformer_engine": ["TransformerEnginePrecision"],
        "lightning.fabric.plugins.precision.xla": ["XLAPrecision"],
    },
)
