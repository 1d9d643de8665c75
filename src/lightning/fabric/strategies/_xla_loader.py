"""Batches on their way to an XLA device."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class XLADataLoader:
    """The user's loader, read ahead and uploaded by torch_xla's ``MpDeviceLoader``; before each batch a graph ends.

    Everything but the iteration is the loader's own.
    """

    def __init__(self, dataloader: DataLoader[Any], device: torch.device) -> None:
        from torch_xla.distributed.parallel_loader import MpDeviceLoader

        self._dataloader = dataloader
        self._read = _Watched(dataloader)
        self._uploaded = MpDeviceLoader(self._read, device)

    def __iter__(self) -> Iterator[Any]:
        self._read.error = None
        yield from self._uploaded
        if self._read.error is not None:
            raise self._read.error

    def __len__(self) -> int:
        return len(self._dataloader)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataloader":  # while being unpickled or copied
            raise AttributeError(name)
        return getattr(self._dataloader, name)


class _Watched:
    """Remembers an error of the loader, which is read in another thread, where the error would only end the epoch."""

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self._dataloader = dataloader
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._dataloader
        except Exception as error:
            self.error = error

    def __len__(self) -> int:
        return len(self._dataloader)  # type: ignore[arg-type]
