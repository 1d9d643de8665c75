"""Copies of tensors on the CPU, taken before training goes on and kept until they are written."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning.fabric.utilities.apply_func import apply_to_collection


class Snapshot:
    """Memory for copies, used again by the next ones: a state has the same tensors every time.

    Tensors that share memory share it in the copy. CUDA tensors are copied into pinned memory, all at once.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}
        self._used: dict[tuple[int, bool], list[Tensor]] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # of storages; with what keeps the address from reuse

    def begin(self) -> None:
        """Take a new one; the copies of the last one are overwritten."""
        self._free, self._used = self._used, {}
        self._copies = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` in CPU memory of this snapshot; complete after :meth:`end`."""
        if is_lazy(tensor):
            return copy.deepcopy(tensor)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(self.copy(tensor.detach()), requires_grad=tensor.requires_grad)
        if tensor.is_meta:
            return tensor
        if not _is_plain(tensor):
            return tensor.detach().clone().cpu()
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        known = self._copies.get(storage.data_ptr())
        if known is None:
            known = self._copies[storage.data_ptr()] = (tensor, self._copied(tensor))
        blank = torch.empty(0, dtype=tensor.dtype)
        return blank.set_(known[1].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def end(self) -> None:
        """Return when every copy is complete, and the originals may change."""
        if any(tensor.is_cuda for tensor, _ in self._copies.values()):
            torch.cuda.current_stream().synchronize()
        self._copies = {}
        self._free = {}  # what was not used again

    def _copied(self, tensor: Tensor) -> Tensor:
        """Return all bytes of the memory that ``tensor`` is in."""
        storage = tensor.untyped_storage()
        size, pinned = storage.nbytes(), tensor.is_cuda
        waiting = self._free.get((size, pinned))
        target = waiting.pop() if waiting else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._used.setdefault((size, pinned), []).append(target)
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        target.copy_(whole, non_blocking=pinned)
        return target


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is what its storage, its strides and its dtype say, and nothing more."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or tensor.is_nested)
    )


def detached(obj: Any, snapshot_of: Any) -> Any:
    """Return a deep copy of ``obj``, in which tensors are those that ``snapshot_of(tensor)`` returns."""
    copies: dict[int, Any] = {}

    def take(tensor: Tensor) -> Tensor:
        copies[id(tensor)] = snapshot_of(tensor)
        return tensor

    apply_to_collection(obj, Tensor, take)
    return copy.deepcopy(obj, copies)
