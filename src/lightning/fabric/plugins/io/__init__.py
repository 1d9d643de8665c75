"""How one checkpoint gets to storage and back."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO as CheckpointIO
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO as TorchCheckpointIO
    from lightning.fabric.plugins.io.xla import XLACheckpointIO as XLACheckpointIO

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.plugins.io.checkpoint_io": ["CheckpointIO"],
        "lightning.fabric.plugins.io.torch_io": ["TorchCheckpointIO"],
        "lightning.fabric.plugins.io.xla": ["XLACheckpointIO"],
    },
)
