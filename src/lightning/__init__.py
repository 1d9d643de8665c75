"""``import lightning as L; L.Fabric(...)``. Names are imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning.fabric import __version__ as __version__
from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.fabric import Fabric as Fabric
    from lightning.fabric.utilities.seed import seed_everything as seed_everything

_own, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.fabric": ["Fabric"],
        "lightning.fabric.utilities.seed": ["seed_everything"],
    },
)
_FROM_PYTORCH_LIGHTNING = ("Trainer", "LightningModule", "LightningDataModule", "Callback")


def __getattr__(name: str) -> Any:
    if name == "pytorch":
        return importlib.import_module("lightning.pytorch")
    if name in _FROM_PYTORCH_LIGHTNING:
        return getattr(importlib.import_module("lightning.pytorch"), name)
    return _own(name)
