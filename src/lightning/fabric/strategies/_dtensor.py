"""Tensors that are split over ranks: between the whole and this rank's part, and what clipping needs of all parts."""

from collections.abc import Iterable, Sequence
from functools import reduce
from math import inf, prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.optim import Optimizer

from lightning.fabric.strategies.strategy import _nonfinite_message

_BUCKET_BYTES = 25 * 2**20  # what `sync_from_rank_zero` sends at once; it needs as much memory again
_Locals = dict[tuple[torch.device, torch.dtype], list[Tensor]]


# ---- whole and part --------------------------------------------------------------------------------------------------


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds, sharing its memory; a plain tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_shard(full: Tensor, like: DTensor) -> Tensor:
    """Return the part of ``full`` that this rank holds if it is laid out like ``like``; no communication.

    It shares memory with ``full`` wherever the part is one block. ``full`` has the (whole) shape of ``like``; dtype
    and device may differ and stay as they are.
    """
    if full.shape != like.shape:
        raise ValueError(
            f"A tensor of shape {tuple(full.shape)} cannot be split like one of shape {tuple(like.shape)}. "
            "Pass the whole tensor."
        )
    position = like.device_mesh.get_coordinate()
    if position is None:  # this rank takes no part in the mesh
        return full.new_empty(0)
    in_turn, afterwards = _order_of_splitting(like)
    for axis in in_turn:
        full = _split(full, like.placements[axis], like.device_mesh.size(axis), position[axis])
    for axis in afterwards:
        full = _block(full, _dim(like.placements[axis]) or 0, like.device_mesh.size(axis), position[axis])
    if full.shape != like._local_tensor.shape:
        raise RuntimeError(
            f"This rank holds a part of shape {tuple(like._local_tensor.shape)}, but the layout {like.placements} on "
            f"{like.device_mesh} says {tuple(full.shape)}. Lay the tensor out with `distribute_tensor`."
        )
    return full


def _order_of_splitting(like: DTensor) -> tuple[list[int], list[int]]:
    """Return the mesh axes that split the tensor in turn, and those that split what is left into blocks afterwards.

    From left to right, unless the tensor says otherwise. A ``_StridedShard`` stands for a split after those on the axes
    to its right. Taking it at its word also covers sizes that do not divide evenly, which torch's way of interleaving
    blocks does not.
    """
    entries = getattr(like._spec, "shard_order", None)
    order = [axis for entry in entries for axis in entry.mesh_dims] if entries else list(range(like.device_mesh.ndim))
    late = [axis for axis in order if _is_split_after_those_to_its_right(like, axis)]
    return [axis for axis in order if axis not in late], late[::-1]


def _is_split_after_those_to_its_right(like: DTensor, axis: int) -> bool:
    placement, sizes = like.placements[axis], like.device_mesh.shape
    if not isinstance(placement, _StridedShard):
        return False
    right = range(axis + 1, like.device_mesh.ndim)
    return placement.split_factor == prod(sizes[i] for i in right if _dim(like.placements[i]) == placement.dim)


def _dim(placement: Placement) -> int | None:
    """Return the tensor dimension that is split; None: every rank of the axis has all of it."""
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def _split(tensor: Tensor, placement: Placement, parts: int, index: int) -> Tensor:
    if isinstance(placement, Shard):
        return _block(tensor, placement.dim, parts, index)
    if isinstance(placement, _StridedShard):  # a block out of each of several
        factor = int(placement.split_factor)
        outer = [_block(tensor, placement.dim, factor, number) for number in range(factor)]
        return torch.cat([_block(block, placement.dim, parts, index) for block in outer], placement.dim)
    if isinstance(placement, Replicate):
        return tensor
    raise ValueError(f"A tensor cannot be laid out as {placement}: that is a sum that is not taken yet.")


def _block(tensor: Tensor, dim: int, parts: int, index: int) -> Tensor:
    size = tensor.size(dim)
    length = -(-size // parts)  # as torch.chunk does it: the last blocks may be smaller, or empty
    start = min(index * length, size)
    return tensor.narrow(dim, start, min(length, size - start))


def distribute_like(full: Tensor, like: Tensor) -> Tensor:
    """Return ``full`` laid out like ``like``, on its device; no communication. Plain if ``like`` is.

    The dtype stays. What is returned may share memory with ``full`` only if this rank holds all of it.
    """
    if not isinstance(like, DTensor):
        return full.to(like.device)
    part = local_shard(full.detach(), like)
    if part.numel() < full.numel():
        part = part.clone(memory_format=torch.contiguous_format)  # so that the whole can be freed
    return _with_layout(part.to(like._local_tensor.device), like)


def _with_layout(part: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """Collective for DTensors, over the ranks of its mesh: the whole tensor on each of them, plain.

    A plain tensor is returned itself; the whole may share its memory where every rank has all of it.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    mesh_type, part = tensor.device_mesh.device_type, tensor._local_tensor
    if part.device.type != mesh_type and not part.is_meta:  # offloaded: the group talks from the other device
        return full_tensor(_with_layout(part.to(mesh_type), tensor)).to(part.device)
    in_turn, afterwards = _order_of_splitting(tensor)
    placements = list(tensor.placements)
    for axis in reversed([*in_turn, *afterwards]):  # one by one: torch warns of doing it all at once
        if _dim(placements[axis]) is not None:
            placements[axis] = Replicate()
            tensor = tensor.redistribute(placements=placements)
    return tensor.full_tensor().detach()


# ---- gradients -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def total_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Collective if any of ``grads`` is split: their norm as if they were one vector, the same on every rank.

    Plain tensors and DTensors on any meshes may be mixed; what several ranks hold alike counts once. The result is a
    plain tensor without dimensions on the device of the first gradient, in the gradients' dtype; 0 if there are none.
    Where nothing is split it is bit for bit what ``torch.nn.utils.get_total_norm`` says. ``norm_type`` is above 0 and
    may be ``inf``. Every rank passes the same gradients in the same order.
    """
    if not grads:
        return torch.tensor(0.0)
    groups: dict[_Splitting, list[Tensor]] = {}
    for grad in map(_summed, grads):
        groups.setdefault(_splitting(grad), []).append(grad)
    device = local_tensor(grads[0]).device
    norms = [_group_norm(splitting, group, norm_type).to(device) for splitting, group in groups.items()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)


_Splitting = tuple[DeviceMesh | None, tuple[int, ...]]  # which mesh axes the parts are on; (None, ()): one part


def _splitting(tensor: Tensor) -> _Splitting:
    if not isinstance(tensor, DTensor):
        return None, ()
    mesh = tensor.device_mesh
    axes = tuple(
        axis for axis, placement in enumerate(tensor.placements) if _dim(placement) is not None and mesh.size(axis) > 1
    )
    return (mesh, axes) if axes else (None, ())


def _summed(grad: Tensor) -> Tensor:
    """Collective for a DTensor whose sum over ranks is outstanding: the same with the sum taken."""
    if isinstance(grad, DTensor) and any(isinstance(placement, Partial) for placement in grad.placements):
        return grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
    return grad


def _group_norm(splitting: _Splitting, grads: list[Tensor], norm_type: float) -> Tensor:
    """Collective, unless there is one part: the norm of gradients that are all split over the same axes."""
    mesh, axes = splitting
    parts = [part for part in map(local_tensor, grads) if part.numel()]  # the largest of nothing is an error in torch
    own = nn.utils.get_total_norm(parts, norm_type) if parts else torch.tensor(0.0)
    dtype = reduce(torch.promote_types, [torch.empty(0, dtype=grad.dtype).abs().dtype for grad in grads])
    if mesh is None:
        return own.to(dtype)
    # rounded to the gradients' dtype only at the end; and gathered, not summed, so that no rank's bits can differ
    norm = own.to(mesh.device_type, torch.promote_types(dtype, torch.float32))
    for axis in axes:
        norms = [torch.empty_like(norm) for _ in range(mesh.size(axis))]
        dist.all_gather(norms, norm, group=mesh.get_group(axis))
        norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm.to(dtype)


@torch.no_grad()
def clip_norm(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, describe: nn.Module
) -> Tensor:
    """Collective: scale the gradients of ``parameters`` in place, so that their norm is at most ``max_norm``.

    Returns the norm before, see :func:`total_norm`. With ``error_if_nonfinite``, if it is not finite, every rank raises
    ``RuntimeError`` and leaves the gradients alone; the error calls parameters by their names in ``describe``.
    """
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    grads = [parameter.grad for parameter in with_grad if parameter.grad is not None]
    total = total_norm(grads, norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(_message_of_all_ranks(describe, with_grad, norm_type, total))
    # as torch does: a product always, so that the device need not be asked whether the norm is above
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for (device, _), parts in _by_device_and_dtype(grads).items():
        torch._foreach_mul_(parts, factor.to(device))
    return total


class _Seen(NamedTuple):
    """What the error needs to know of a parameter; ``grad`` is finite if the gradient is, on every rank."""

    shape: torch.Size
    grad: Tensor


def _message_of_all_ranks(module: nn.Module, parameters: list[Tensor], norm_type: float, total: Tensor) -> str:
    # `isfinite(grad).all()` of a DTensor is wrong in torch 2.13: it adds up the ranks' answers, and one yes is a yes
    seen = {p: _Seen(p.shape, total_norm([p.grad], inf)) for p in parameters if p.grad is not None}
    names = [(name, seen[p]) for name, p in module.named_parameters() if p in seen]
    named: Any = SimpleNamespace(named_parameters=lambda: names)
    shown: list[Any] = list(seen.values())
    return _nonfinite_message(named, shown, norm_type, total)


@torch.no_grad()
def clip_value(parameters: Iterable[Tensor], clip_val: float) -> None:
    """Bound every gradient of ``parameters`` to ``[-clip_val, clip_val]`` in place.

    Collective only for gradients whose sum over ranks is outstanding: these are replaced by the sum.
    """
    grads = []
    for parameter in parameters:
        if parameter.grad is not None:
            summed = _summed(parameter.grad)
            if summed is not parameter.grad:
                parameter.grad = summed
            grads.append(summed)
    for parts in _by_device_and_dtype(grads).values():
        torch._foreach_clamp_min_(parts, -clip_val)
        torch._foreach_clamp_max_(parts, clip_val)


def _by_device_and_dtype(tensors: Iterable[Tensor]) -> _Locals:
    groups: _Locals = {}
    for part in map(local_tensor, tensors):
        groups.setdefault((part.device, part.dtype), []).append(part)
    return groups


# ---- optimizers and modules ------------------------------------------------------------------------------------------


@torch.no_grad()
def shard_optimizer_state(optimizer: Optimizer) -> None:
    """Lay out the state of every split parameter like the parameter, in place; no communication.

    That is state with as many entries as the parameter: momenta, not step counters. Every rank has it whole, and
    keeps its part.
    """
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, DTensor) or not isinstance(state, dict):
            continue
        for key, value in state.items():
            if _is_whole(value, parameter) and key != "step":
                state[key] = distribute_like(value, parameter)


def _is_whole(value: Any, parameter: DTensor) -> bool:
    plain = isinstance(value, Tensor) and not isinstance(value, DTensor)
    return plain and value.ndim > 0 and value.shape == parameter.shape


def plain_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that are not split, and have memory."""
    tensors = (*module.parameters(), *module.buffers())
    return [tensor for tensor in tensors if not isinstance(tensor, DTensor) and not tensor.is_meta]


def move_plain_tensors(module: nn.Module, device: torch.device) -> None:
    """Bring what is not split to ``device``; parameters and buffers stay the same objects."""
    for tensor in plain_tensors(module):
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


@torch.no_grad()
def sync_from_rank_zero(module: nn.Module, device: torch.device, group: Any = None) -> None:
    """Collective over ``group`` (None: everyone): plain parameters and buffers as on its first rank, in place.

    What is split already, or on the meta device, is left alone. Tensors travel from ``device`` in buckets of 25 MiB.
    What is elsewhere stays there, and passes through ``device`` one by one.
    """
    group = group if group is not None else dist.group.WORLD
    tensors = [tensor.detach() for tensor in plain_tensors(module)]
    here = [tensor for tensor in tensors if tensor.device == device]
    if here:
        dist._broadcast_coalesced(group, here, _BUCKET_BYTES, 0)  # type: ignore[attr-defined]
    for tensor in tensors:
        if tensor.device != device:
            sent = tensor.to(device).contiguous()
            dist.broadcast(sent, group=group, group_src=0)
            tensor.copy_(sent)
