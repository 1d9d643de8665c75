"""What the strategies on XLA devices have in common.

A tensor on an XLA device is a promise: operations are recorded, and run when ``torch_xla.sync`` ends the graph or a
value is read. A graph with a collective in it must be run by every rank.
"""

import pickle
from abc import ABC
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.checkpoint.saving import OneRank, Peers, Prepared
from lightning.fabric.plugins.environments.xla import XLAEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.xla import XLACheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.plugins.precision.xla import DTYPES
from lightning.fabric.strategies._xla_loader import XLADataLoader
from lightning.fabric.strategies.launchers.xla import _XLALauncher
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.strategy import Strategy, TBroadcast
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.imports import require
from lightning.fabric.utilities.optimizer import parameter_names
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.types import _PATH, ReduceOp

_SMALLEST_MESSAGE = 1024  # bytes


class OnXLA(Strategy, ABC):
    """Strategies whose ``root_device`` is an XLA device, in one process or several."""

    runs_on: ClassVar[frozenset[str] | None] = frozenset({"tpu"})

    @property
    def precision(self) -> Precision:
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        check_precision(precision, type(self).__name__)
        Strategy.precision.fset(self, precision)  # type: ignore[attr-defined]

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Writes and reads files; copies tensors to the CPU before, unless set."""
        if self._checkpoint_io is None:
            self._checkpoint_io = XLACheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def setup_environment(self) -> None:
        """As the base class; random numbers on the device then follow the seed that the process has for the CPU."""
        require("torch_xla", type(self).__name__)
        import torch_xla

        super().setup_environment()
        torch_xla.manual_seed(torch.initial_seed() % 2**63)

    def process_dataloader(self, dataloader: DataLoader) -> Any:
        """Return a loader that uploads batches ahead of time and ends a graph before each of them."""
        return XLADataLoader(dataloader, self.root_device)

    def module_to_device(self, module: nn.Module) -> None:
        """Move ``module`` to the device, which makes new parameters; what was tied stays tied."""
        move_keeping_ties(module, self.root_device)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Step, and run what was recorded up to here."""
        import torch_xla

        output = super().optimizer_step(optimizer, **kwargs)
        torch_xla.sync()
        return output

    def _prepare_checkpoint(
        self,
        state: MutableMapping[str, Any],
        storage_options: Any,
        filter: Mapping[str, Callable[[str, Any], bool]],
    ) -> Prepared:
        import torch_xla

        torch_xla.sync()  # on every rank, or the one that reads the tensors would wait for the others
        return super()._prepare_checkpoint(state, storage_options, filter)

    def load_checkpoint(
        self,
        path: _PATH,
        state: nn.Module | Optimizer | MutableMapping[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        import torch_xla

        remainder = super().load_checkpoint(path, state, strict, weights_only)
        torch_xla.sync()  # the copies to the device are made, and what was read can be freed
        return remainder


def check_precision(precision: Precision | None, strategy: str) -> None:
    """Raise ``ValueError`` for a precision that is not one dtype throughout."""
    if precision is not None and precision.precision not in DTYPES:
        raise ValueError(
            f"{strategy} computes in one dtype, so precision must be one of {', '.join(map(repr, DTYPES))}, but "
            f"{type(precision).__name__} is for {precision.precision!r}. On TPUs, 'bf16-true' is the fast one."
        )


def move_keeping_ties(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)`` where that makes new parameters, one for each former one although it has several names."""
    before = parameter_names(module)
    module.to(device)
    first_name: dict[Tensor, str] = {}
    for name, parameter in before.items():
        first = first_name.setdefault(parameter, name)
        if first != name:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = module.get_parameter(first)


class XLARanks(OnXLA, ParallelStrategy, ABC):
    """One process per XLA device. There is no process group of torch: ranks talk through XLA's own collectives."""

    start_method: str | None = "xla"

    def __init__(
        self,
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        checkpoint_io: CheckpointIO | None,
        precision: Precision | None,
    ) -> None:
        check_precision(precision, type(self).__name__)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            checkpoint_io=checkpoint_io,
            precision=precision,
        )

    # -- processes

    @property
    def root_device(self) -> torch.device:
        """The device that torch_xla has given to this process; before launch, the first of the machine."""
        if self._world is None:
            return super().root_device
        import torch_xla

        return torch_xla.device()

    def _configure_launcher(self) -> None:
        devices = self.parallel_devices or []
        if len(devices) == 1 and devices[0].index:
            raise ValueError(
                f"{type(self).__name__} on one device uses the first one, but {devices[0]} is asked for. "
                f"Use strategy='single_xla' for devices=[{devices[0].index}]."
            )
        environment = self.cluster_environment or XLAEnvironment()
        self._launcher = _XLALauncher(environment, self.num_processes)

    def _join_world(self, backend: str | None, timeout: Any) -> None:
        if self.cluster_environment is None:
            self.cluster_environment = XLAEnvironment()
        world = self._world_from(self.cluster_environment).check()
        expected = self.num_nodes * self.num_processes
        # on a pod there may be more machines than were asked for: the runtime knows them all
        if world.size != expected and (self.num_nodes > 1 or world.size % self.num_processes):
            raise ValueError(
                f"{self.num_processes} device(s) on {self.num_nodes} machine(s) are asked for, but torch_xla runs on "
                f"{world.size} device(s). Make `devices` and `num_nodes` agree with them."
            )
        self._world = world
        rank_zero_only.rank = world.rank
        Strategy.setup_environment(self)

    # -- other ranks

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self._need_group("all_gather")
        _check_whole_world(group)
        with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
            gathered: Tensor = _AllGather.apply(tensor.to(self.root_device))
        return gathered.to(tensor.device)

    def all_reduce(
        self, tensor: Tensor | Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        self._need_group("all_reduce")
        _check_whole_world(group)
        if not isinstance(tensor, Tensor):
            return tensor
        operation, is_mean = _reduction(reduce_op)
        reduced = self._reduced(tensor.detach().to(self.root_device), operation)
        return (reduced / self.world_size if is_mean else reduced).to(tensor.device)

    def _reduced(self, tensor: Tensor, operation: str) -> Tensor:
        import torch_xla.core.xla_model as xm

        # a tensor without dimensions may become a constant of the graph, which must be the same on all ranks
        reduced: Tensor = xm.all_reduce(operation, tensor.reshape(1) if tensor.ndim == 0 else tensor)
        return reduced.reshape(tensor.shape)

    def barrier(self, name: str | None = None) -> None:
        self._need_group("barrier")
        import torch_xla.core.xla_model as xm

        xm.rendezvous(name or "barrier")

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        self._need_group("broadcast")
        if self.world_size == 1:
            return obj
        received = self._broadcast_bytes(pickle.dumps(obj) if self.global_rank == src else b"", src)
        if self.global_rank == src:
            return obj
        home = self.root_device
        return apply_to_collection(
            pickle.loads(received), Tensor, lambda tensor: tensor.to(home) if tensor.device.type == "xla" else tensor
        )

    def _broadcast_bytes(self, message: bytes, src: int) -> bytes:
        import torch_xla.core.xla_model as xm

        size = torch.tensor([len(message)]).to(self.root_device)
        xm.collective_broadcast([size], root_ordinal=src)
        length = int(size.item())
        # a graph is compiled for each size, so there are few sizes
        padded = torch.zeros(max(_SMALLEST_MESSAGE, 1 << (length - 1).bit_length()), dtype=torch.uint8)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else 0
        padded = padded.to(self.root_device)
        xm.collective_broadcast([padded], root_ordinal=src)
        return padded.cpu()[:length].numpy().tobytes()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self._need_group("reduce_boolean_decision")
        import torch_xla.core.xla_model as xm

        votes = self._reduced(torch.tensor([int(decision)]).to(self.root_device), xm.REDUCE_SUM).item()
        return votes == self.world_size if all else votes > 0

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        self._need_group("raise_on_all")
        import torch_xla.core.xla_model as xm

        mine = self.world_size if error is None else self.global_rank
        failed = int(self._reduced(torch.tensor([mine]).to(self.root_device), xm.REDUCE_MIN).item())
        if failed == self.world_size:
            return
        text = self.broadcast("" if error is None else f"{type(error).__name__}: {error}", src=failed)
        if error is not None:
            raise error
        raise RuntimeError(f"Rank {failed} failed while {doing}, so no rank goes on. {text}")

    def _gather_objects(self, obj: Any) -> list[Any] | None:
        gathered = [self.broadcast(obj, src=rank) for rank in range(self.world_size)]
        return gathered if self.global_rank == 0 else None

    def _peers(self, in_background: bool = False) -> Peers:
        if in_background and self.world_size > 1:
            raise NotImplementedError(
                f"{type(self).__name__} cannot save while training goes on: the ranks talk through XLA's collectives "
                "alone. Use `blocking=True`."
            )
        return OneRank() if in_background else super()._peers()

    def _need_group(self, verb: str) -> None:
        if self._world is None:
            raise RuntimeError(
                f"`{verb}` talks to the other processes of {type(self).__name__}, and this one has not joined them. "
                "Call `fabric.launch(train)` first, with the function that all of them run."
            )


def _check_whole_world(group: Any) -> None:
    if group is not None:
        raise ValueError(f"On XLA devices all ranks talk to all, but got group={group!r}. Leave `group` out.")


def _reduction(reduce_op: Any) -> tuple[str, bool]:
    """XLA's name of the operation, and whether the result is to be divided by the number of ranks."""
    import torch_xla.core.xla_model as xm

    name = "sum" if reduce_op is None else reduce_op if isinstance(reduce_op, str) else reduce_op.name
    known = {
        "sum": xm.REDUCE_SUM,
        "mean": xm.REDUCE_SUM,
        "avg": xm.REDUCE_SUM,
        "product": xm.REDUCE_MUL,
        "min": xm.REDUCE_MIN,
        "max": xm.REDUCE_MAX,
        "band": xm.REDUCE_AND,
        "bor": xm.REDUCE_OR,
    }
    if name.lower() not in known:
        raise ValueError(f"reduce_op={reduce_op!r} is not a reduction of XLA. Known: {', '.join(known)}.")
    return known[name.lower()], name.lower() in ("mean", "avg")


class _AllGather(torch.autograd.Function):
    """Gather; in backward, each rank gets the sum over all ranks of the gradient for its own part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        import torch_xla.core.xla_model as xm

        # gathering adds up zeros, which truth values cannot do
        summable = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor
        gathered: Tensor = xm.all_gather(summable.unsqueeze(0))
        return gathered.to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        import torch_xla.core.xla_model as xm
        from torch_xla import runtime

        summed: Tensor = xm.all_reduce(xm.REDUCE_SUM, grads[0])
        return summed[runtime.global_ordinal()]
