"""The process group, what goes over it, and samplers that share a data set among its ranks."""

import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from contextlib import suppress
from datetime import timedelta
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DistributedSampler

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.fabric.utilities.seed import _seed_generators, isolate_rng
from lightning.fabric.utilities.types import _PATH, ProcessGroup
from lightning.fabric.utilities.types import ReduceOp as ReduceOp


class _Environment(Protocol):
    """What joining a process group needs to know of a cluster environment."""

    @property
    def main_address(self) -> str: ...

    @property
    def main_port(self) -> int: ...

    def global_rank(self) -> int: ...

    def world_size(self) -> int: ...


# ---- the process group -------------------------------------------------------------------------------------------


def _distributed_is_initialized() -> bool:
    """Return whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def _get_default_process_group_backend_for_device(device: torch.device) -> str:
    """Return ``nccl`` for CUDA, ``gloo`` for the CPU, torch's choice for others."""
    if device.type == "cuda":
        return "nccl"
    return dist.Backend.default_device_backend_map.get(device.type, "gloo")


def _init_dist_connection(
    cluster_environment: _Environment,
    torch_distributed_backend: str,
    global_rank: int | None = None,
    world_size: int | None = None,
    **kwargs: Any,
) -> None:
    """Collective: join the default process group; nothing happens if this process is in one already.

    The group is destroyed when the process ends. ``kwargs`` go to ``torch.distributed.init_process_group``;
    ``timeout`` also limits how long this waits for the other ranks.

    Raises:
        RuntimeError: no ``torch.distributed``, the port is taken, or not all ranks came in time.
        ValueError: there is no such port.
    """
    if not dist.is_available():
        raise RuntimeError("This build of torch has no `torch.distributed`, so several processes cannot work together.")
    if dist.is_initialized():
        return
    rank = cluster_environment.global_rank() if global_rank is None else global_rank
    size = cluster_environment.world_size() if world_size is None else world_size
    address, port = cluster_environment.main_address, cluster_environment.main_port
    if size > 1 and not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT must be from 1 to 65535, the same for all {size} ranks, but it is {port}.")
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    try:
        store = _rendezvous(rank, size, f"{address}:{port}", kwargs.get("timeout"))
        dist.init_process_group(torch_distributed_backend, store=store, rank=rank, world_size=size, **kwargs)
        if "gloo" in torch_distributed_backend:  # a rank that ended now would break off the others' way into the group
            if store.add("joined", 1) == size:
                store.set("all joined", "")
            store.wait(["all joined"])
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "Gloo" not in str(error):
            raise  # nothing to do with the others: this torch lacks the backend, say
        raise RuntimeError(_why_not_joined(error, rank, size, f"{address}:{port}")) from error
    # Not `atexit`: this also runs in a process that `multiprocessing` started, and not in one forked from this.
    Finalize(None, _destroy_dist_connection, exitpriority=0)
    rank_zero_info(f"Joined {size} process(es) at {address}:{port} with backend {torch_distributed_backend!r}.")


def _rendezvous(rank: int, size: int, address: str, timeout: timedelta | None) -> Store:
    if size == 1:
        return torch._C._distributed_c10d.HashStore()  # nobody to meet: no port is opened
    options = {} if timeout is None else {"timeout": timeout}
    store, _, _ = next(rendezvous("env://", rank, size, **options))
    if timeout is not None:
        store.set_timeout(timeout)
    # The attempts of an elastic launch share one store, and so do the groups that a process joins one after the other
    # while something still holds the first; without a prefix of their own they would read each other's addresses.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _joins[address] += 1
    return PrefixStore(f"restart{restart}/join{_joins[address]}", store)


_joins: Counter[str] = Counter()  # by address, since every rank counts alike only those where all of them met


def _why_not_joined(error: Exception, rank: int, size: int, address: str) -> str:
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"Rank {rank} cannot open {address}, where the {size} ranks meet: the port is in use by another program. "
            "Choose another port with the environment variable MASTER_PORT or with `fabric run --main-port`."
        )
    return (
        f"Rank {rank} of {size} could not join the others at {address}: {error}\n"
        "Check that all ranks were started, with the same MASTER_ADDR and MASTER_PORT, and can reach that address."
    )


def _destroy_dist_connection() -> None:
    """Leave and destroy the process group, if there is one."""
    if _distributed_is_initialized():
        # A thread of gloo may still want the interpreter's lock to let go of its last collective. Whoever frees the
        # group, such as a DDP module that outlives it, waits for that thread while holding the lock.
        time.sleep(0.005)
        dist.destroy_process_group()


# ---- collectives -------------------------------------------------------------------------------------------------


def _sync_ddp_if_available(
    result: Tensor, group: ProcessGroup | None = None, reduce_op: "ReduceOp | str | None" = None
) -> Tensor:
    """:func:`_sync_ddp` in a process group, else ``result`` itself."""
    return _sync_ddp(result, group, reduce_op) if _distributed_is_initialized() else result


def _sync_ddp(result: Tensor, group: ProcessGroup | None = None, reduce_op: "ReduceOp | str | None" = None) -> Tensor:
    """Collective: ``result`` reduced over the ranks of ``group`` (``None``: all), as a new tensor without gradient.

    ``reduce_op`` is ``"mean"``/``"avg"``, ``"sum"`` (also ``None``) or the name of another ``ReduceOp``, or a
    ``ReduceOp``. The mean of integers is a floating-point tensor.
    """
    op: Any = reduce_op.lower() if isinstance(reduce_op, str) else "sum" if reduce_op is None else reduce_op
    mean = op in ("mean", "avg") or op == ReduceOp.AVG
    if mean:
        op = ReduceOp.SUM  # AVG is not in every backend, nor defined for integers
    elif isinstance(op, str):
        if op.upper() not in ReduceOp.RedOpType.__members__:
            known = "mean, avg, sum, product, min, max, band, bor, bxor"
            raise ValueError(f"reduce_op={reduce_op!r} is not a known reduction. Known: {known}.")
        op = getattr(ReduceOp, op.upper())
    reduced = result.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=op, group=group)
    return reduced / dist.get_world_size(group) if mean else reduced


class _AllGather(torch.autograd.Function):
    """Gather; in backward, each rank gets the sum over all ranks of the gradient for its own part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
        dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        summed = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed[dist.get_rank(ctx.group)], None


def _all_gather_ddp_if_available(tensor: Tensor, group: ProcessGroup | None = None, sync_grads: bool = False) -> Tensor:
    """Collective: the tensors of all ranks of ``group``, all of one shape, stacked along a new first dimension.

    Without a process group: ``tensor`` itself. ``sync_grads=True`` lets gradients flow back to every rank's tensor.
    """
    if not _distributed_is_initialized():
        return tensor
    with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
        gathered: Tensor = _AllGather.apply(tensor, group)
    return gathered


# ---- this machine ------------------------------------------------------------------------------------------------


def _num_cpus_available() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _suggested_max_num_threads(num_processes: int = 1) -> int:
    """Return the number of threads that leaves every core busy once, with ``num_processes`` on this machine."""
    if num_processes < 1:
        raise ValueError(f"`num_processes` must be 1 or more, but got {num_processes!r}.")
    return max(1, _num_cpus_available() // num_processes)


def _set_num_threads_if_needed(num_processes: int = 1) -> None:
    """Share the cores among the processes of this machine, unless the user has set ``OMP_NUM_THREADS``."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = _suggested_max_num_threads(num_processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


class _Ranks(Protocol):
    """What :func:`is_shared_filesystem` needs of a strategy."""

    @property
    def is_global_zero(self) -> bool: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any: ...

    def barrier(self, name: str | None = None) -> None: ...

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool: ...


def is_shared_filesystem(strategy: _Ranks, path: _PATH | None = None, timeout: int = 3) -> bool:
    """Collective: whether the ranks on all nodes see the same files under ``path`` (``None``: the working directory).

    Remote URLs count as shared, and so does everything on one node. ``timeout`` is how many seconds a rank waits for a
    file of rank 0's to appear.

    Raises:
        FileNotFoundError: on all ranks, if no rank has ``path``.
    """
    if path is not None and not _is_local_file_protocol(path):
        return True
    folder = Path(path or Path.cwd()).resolve()
    everywhere = strategy.reduce_boolean_decision(folder.exists(), all=True)
    if not everywhere and not strategy.reduce_boolean_decision(folder.exists(), all=False):
        raise FileNotFoundError(f"Cannot tell whether {str(folder)!r} is shared: there is no such file or folder.")
    if getattr(strategy, "num_nodes", 1) == 1:
        return True
    return everywhere and _see_one_file(strategy, folder.parent if folder.is_file() else folder, timeout)


def _see_one_file(strategy: _Ranks, folder: Path, timeout: int) -> bool:
    check = folder / f".shared-{strategy.broadcast(uuid.uuid4().hex)}"
    if strategy.is_global_zero:
        with suppress(OSError):  # a read-only folder: then no rank sees the file, and the answer is no
            check.touch()
    strategy.barrier("is_shared_filesystem")
    seen = _appears(check.exists, timeout)
    shared = strategy.reduce_boolean_decision(seen, all=True)
    if strategy.is_global_zero:
        check.unlink(missing_ok=True)
    return shared


def _appears(there: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not (seen := there()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return seen


# ---- samplers ----------------------------------------------------------------------------------------------------


class DistributedSamplerWrapper(DistributedSampler):
    """Gives each rank its share of what any sampler (or batch sampler) yields, in the sampler's own order.

    The sampler draws from generators seeded with ``seed + epoch``, so that all ranks share out one and the same order.
    ``set_epoch`` reaches the sampler as well, if it has the method.

    Args:
        sampler: has ``__len__`` and ``__iter__``.
        num_replicas: number of ranks; ``None``: the world size of the process group.
        rank: this rank; ``None``: as in the process group.
        shuffle: shuffle on top of the sampler's order.
        seed: the same on every rank.
        drop_last: drop the tail, instead of repeating samples, where the number of samples is not a multiple of
            ``num_replicas``.
    """

    def __init__(
        self,
        sampler: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if not isinstance(sampler, Sized):
            raise TypeError(
                f"`{type(sampler).__name__}` has no `__len__`, so its samples cannot be shared among processes. Add "
                "the method, or pass `use_distributed_sampler=False` and let each process draw its own samples."
            )
        super().__init__(sampler, num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.sampler: Any = sampler

    def __iter__(self) -> Iterator[Any]:
        drawn = self._draw()
        self.dataset = drawn  # type: ignore[assignment]
        share = len(drawn) / self.num_replicas  # may differ from epoch to epoch
        self.num_samples = math.floor(share) if self.drop_last else math.ceil(share)
        self.total_size = self.num_samples * self.num_replicas
        return iter([drawn[index] for index in super().__iter__()])

    def _draw(self) -> list[Any]:
        with isolate_rng(include_cuda=False):
            seed = self.seed + self.epoch
            _seed_generators(seed % 2**32, seed % 2**32, seed)
            return list(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration: another one for each ``epoch``."""
        super().set_epoch(epoch)
        if callable(set_epoch := getattr(self.sampler, "set_epoch", None)):
            set_epoch(epoch)
