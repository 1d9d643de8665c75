"""Fabric: take an ordinary PyTorch script to any hardware and any scale, and keep your loop."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.fabric import Fabric as Fabric
    from lightning.fabric.utilities.seed import seed_everything as seed_everything
    from lightning.fabric.wrappers import is_wrapped as is_wrapped

__version__ = "3.0.0.dev0"

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.fabric": ["Fabric"],
        "lightning.fabric.utilities.seed": ["seed_everything"],
        "lightning.fabric.wrappers": ["is_wrapped"],
    },
)
