"""Checkpoints as single files of `torch.save`, on any file system that fsspec knows."""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning.fabric.checkpoint.safetensors_files import is_safetensors, read_safetensors
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.cloud_io import _atomic_save, _load, get_filesystem
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE, _PATH

torch.serialization.add_safe_globals([AttributeDict, bytes])  # torch knows all bytes but the empty ones


class TorchCheckpointIO(CheckpointIO):
    """Saves with ``torch.save`` and loads with ``torch.load``."""

    to_any_path = True

    def write_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
        torch.save(checkpoint, path)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError(
                f"`{type(self).__name__}.save_checkpoint` takes no `storage_options`, but got {storage_options!r}. "
                "Write a `CheckpointIO` of your own and pass it as `Fabric(plugins=...)` to use them."
            )
        _atomic_save(checkpoint, path)

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: _MAP_LOCATION_TYPE = "cpu",
        weights_only: bool | None = None,
        mmap: bool = False,
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``, on the CPU unless ``map_location`` says otherwise.

        ``weights_only=None`` means torch's own default. ``mmap=True`` leaves the tensors of a local file on disk until
        they are read. Safetensors, a file or a folder with an index, are a bare state dict.
        """
        if is_safetensors(path):
            return _weights(path, map_location, mmap)
        try:
            checkpoint: dict[str, Any] = _load(path, map_location, weights_only=weights_only, mmap=mmap)
        except pickle.UnpicklingError as error:
            if not (refused := re.search(r"GLOBAL (\S+)|got <class '(.+?)'>", str(error))):
                raise
            raise pickle.UnpicklingError(_refusal(path, refused[1] or refused[2])) from error
        except (LookupError, EOFError, UnicodeDecodeError, OverflowError, struct.error) as error:  # of torch's parser
            raise RuntimeError(
                f"Cannot read {str(path)!r}: it is damaged, or not what `torch.save` writes. "
                f"{type(error).__name__}: {error}"
            ) from error
        return checkpoint

    def remove_checkpoint(self, path: _PATH) -> None:
        fs = get_filesystem(path)
        if fs.exists(str(path)):
            fs.rm(str(path), recursive=True)


def _weights(path: _PATH, map_location: _MAP_LOCATION_TYPE, mmap: bool) -> dict[str, Any]:
    device = _device(map_location)
    tensors = read_safetensors(path)
    moved = {tensor: tensor.to(device, copy=not mmap) for tensor in tensors.values()}  # what is tied stays so
    return {name: moved[tensor] for name, tensor in tensors.items()}


def _device(map_location: _MAP_LOCATION_TYPE) -> torch.device:
    """Return where a tensor goes that comes from no device, as those in safetensors."""
    if isinstance(map_location, Mapping):
        return torch.device(map_location.get("cpu", "cpu"))
    if callable(map_location):
        moved = map_location(torch.UntypedStorage(0), "cpu")
        return torch.device("cpu") if moved is None else moved.device
    return torch.device("cpu" if map_location is None else map_location)


def _refusal(path: _PATH, name: str) -> str:
    return (
        f"The checkpoint {str(path)!r} holds an object of {name}, which `weights_only=True` (the default) refuses, "
        "because a file with such objects can run any code. If you trust the file, pass `weights_only=False`, or "
        f"allow this one with `torch.serialization.add_safe_globals([{name}])`."
    )
