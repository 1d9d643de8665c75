"""Where ``fabric.log`` writes. Any object with the methods of ``Logger`` can be given to ``Fabric(loggers=...)``."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.loggers.csv_logs import CSVLogger as CSVLogger
    from lightning.fabric.loggers.logger import Logger as Logger
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.loggers.csv_logs": ["CSVLogger"],
        "lightning.fabric.loggers.logger": ["Logger"],
        "lightning.fabric.loggers.tensorboard": ["TensorBoardLogger"],
    },
)
