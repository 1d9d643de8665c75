"""Everything on one device, in one process."""

from typing import ClassVar

import torch
from torch import nn

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies.strategy import Strategy, _NothingToSync, _OneProcess
from lightning.fabric.utilities.init import refuse_meta
from lightning.fabric.utilities.types import _DEVICE


class SingleDeviceStrategy(_OneProcess, Strategy):
    """One process on ``device``; modules and optimizers stay as they are."""

    runs_on: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda", "mps"})
    _backward_sync_control = _NothingToSync()

    def __init__(
        self,
        device: _DEVICE = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision=precision)
        self._root_device = torch.device(device)

    @property
    def root_device(self) -> torch.device:
        return self._root_device

    @property
    def is_global_zero(self) -> bool:
        return True

    def module_to_device(self, module: nn.Module) -> None:
        refuse_meta(module)
        module.to(self.root_device)
