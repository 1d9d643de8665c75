"""Everything on one XLA device, in one process."""

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._xla import OnXLA, check_precision
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.utilities.types import _DEVICE


class SingleDeviceXLAStrategy(OnXLA, SingleDeviceStrategy):
    """One process on ``device``: an XLA device, or its index. What was recorded runs at each step and each batch."""

    def __init__(
        self,
        device: _DEVICE = "xla:0",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        check_precision(precision, type(self).__name__)
        super().__init__(
            device=torch.device("xla", device) if isinstance(device, int) else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision=precision,
        )
