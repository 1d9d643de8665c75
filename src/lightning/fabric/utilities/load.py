"""Checkpoints whose tensors are read one by one, when they are needed."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.types import _PATH, _Stateful

_METADATA_FILENAME = "meta.pt"
_INDEX_FILENAME = ".metadata"
HAS_MANIFEST = "lightning.fabric: has a manifest"  # in the index of a folder, so that a manifest that is gone is missed

_READ_FREE = frozenset(
    {"shape", "size", "numel", "dim", "ndim", "dtype", "layout", "device", "requires_grad", "is_meta", "stride"}
)


def is_sharded_folder(folder: _PATH) -> bool:
    """Return whether the local ``folder`` holds a checkpoint in parts; its index is what a save writes last."""
    return (Path(folder) / _INDEX_FILENAME).is_file()


def had_manifest(folder: _PATH) -> bool:
    """Return whether ``folder`` holds a checkpoint in parts that was saved with a manifest."""
    return is_sharded_folder(folder) and HAS_MANIFEST.encode() in (Path(folder) / _INDEX_FILENAME).read_bytes()


class _NotYetLoadedTensor:
    """A tensor of a checkpoint file, read when a torch function or method first needs its values.

    Its shape, dtype and the like can be asked for without reading it.
    """

    def __init__(self, mapped: Tensor) -> None:
        self._mapped = mapped

    def _load_tensor(self) -> Tensor:
        """Return the tensor; the operating system reads what is used of it, and may forget it again."""
        return self._mapped

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = _materialize_tensors((tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_mapped":  # asked by copy and pickle
            raise AttributeError(name)
        return getattr(self._mapped if name in _READ_FREE else self._load_tensor(), name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


def _lazy_load(filename: _PATH, weights_only: bool | None = None) -> Any:
    """Return what ``torch.save`` wrote into a local file, with a :class:`_NotYetLoadedTensor` for every tensor.

    The file must stay as it is (it may be replaced or deleted, not overwritten) as long as these are in use.
    """
    path = Path(filename)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {str(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except RuntimeError as error:
        raise RuntimeError(f"Cannot read {str(path)!r} tensor by tensor: {error}") from error
    return apply_to_collection(checkpoint, Tensor, _NotYetLoadedTensor)


def _materialize_tensors(collection: Any) -> Any:
    """Return ``collection`` with tensors in place of the :class:`_NotYetLoadedTensor` objects."""
    return apply_to_collection(collection, _NotYetLoadedTensor, _NotYetLoadedTensor._load_tensor)


def _move_state_into(source: dict[str, Any], destination: dict[str, Any], keys: Iterable[str] | None = None) -> None:
    """Move the entries ``keys`` (``None``: all) from ``source`` to ``destination``.

    What is in ``destination`` and has a ``load_state_dict`` loads the entry; anything else is replaced by it.
    """
    for key in list(source) if keys is None else set(keys):
        state = source.pop(key)
        if isinstance(destination.get(key), _Stateful):
            destination[key].load_state_dict(state)
        else:
            destination[key] = state
