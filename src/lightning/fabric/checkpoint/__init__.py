"""Checkpoints that cannot be lost: what a committed one contains, and how it comes to be, is read and goes.

* ``checksum``: of a file, by several threads
* ``manifest``: what a committed checkpoint contains, and whether it still does
* ``transaction``: stage, commit: a path holds a whole checkpoint, the old one or the new one, at any time
* ``remote``: the same behind a URL, where nothing can be renamed
* ``pickling``: what of a state pickles, and what loading reads back by default
* ``saving``: one save by several ranks; ``background`` and ``snapshot``: while training goes on
* ``loading``: what is to be read, verified
* ``directory``: many of them, the latest good one, and which are kept
* ``safetensors_files``: weights alone, as Hugging Face lays them out
* ``contents``: a checkpoint of any form, opened; ``conversion`` and ``comparison`` of such
* ``commands``, ``consolidation``: the command line
"""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.checkpoint.directory import Best as Best
    from lightning.fabric.checkpoint.manifest import DamagedCheckpointError as DamagedCheckpointError
    from lightning.fabric.checkpoint.manifest import Manifest as Manifest
    from lightning.fabric.checkpoint.manifest import read_manifest as read_manifest
    from lightning.fabric.checkpoint.saving import SaveOptions as SaveOptions

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.checkpoint.directory": ["Best"],
        "lightning.fabric.checkpoint.manifest": ["DamagedCheckpointError", "Manifest", "read_manifest"],
        "lightning.fabric.checkpoint.saving": ["SaveOptions"],
    },
)
