"""Merge a sharded checkpoint into one file: the path by which programs know ``checkpoint/consolidation.py``."""

import sys

from lightning.fabric._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"lightning.fabric.checkpoint.consolidation": ["consolidate_checkpoint", "main"]}
)

if __name__ == "__main__":
    sys.exit(__getattr__("main")())
