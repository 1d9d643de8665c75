"""Starting the processes of a run, and saying what went wrong in them."""

from typing import TYPE_CHECKING

from lightning.fabric._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning.fabric.strategies.launchers.launcher import _Launcher as _Launcher
    from lightning.fabric.strategies.launchers.multiprocessing import (
        _MultiProcessingLauncher as _MultiProcessingLauncher,
    )
    from lightning.fabric.strategies.launchers.subprocess_script import (
        _SubprocessScriptLauncher as _SubprocessScriptLauncher,
    )
    from lightning.fabric.strategies.launchers.xla import _XLALauncher as _XLALauncher

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "lightning.fabric.strategies.launchers.launcher": ["_Launcher"],
        "lightning.fabric.strategies.launchers.multiprocessing": ["_MultiProcessingLauncher"],
        "lightning.fabric.strategies.launchers.subprocess_script": ["_SubprocessScriptLauncher"],
        "lightning.fabric.strategies.launchers.xla": ["_XLALauncher"],
    },
)
