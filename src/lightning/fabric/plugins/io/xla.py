"""Checkpoints whose tensors are on XLA devices."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE, _PATH


class XLACheckpointIO(TorchCheckpointIO):
    """Copies tensors to the CPU before they are written, so that a file can be read where there is no XLA device.

    Whoever writes makes sure that no tensor waits for other processes: ``torch_xla.sync()`` on all of them.
    """

    to_any_path = True

    def write_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
        super().write_checkpoint(apply_to_collection(checkpoint, Tensor, _on_cpu), path)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        super().save_checkpoint(apply_to_collection(checkpoint, Tensor, _on_cpu), path, storage_options)

    def load_checkpoint(  # type: ignore[override]
        self, path: _PATH, map_location: _MAP_LOCATION_TYPE = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        # never mapped from the file: a copy to the device is made when the graph runs, and may read it until then
        return super().load_checkpoint(path, map_location, weights_only=weights_only)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.cpu() if tensor.device.type == "xla" else tensor
