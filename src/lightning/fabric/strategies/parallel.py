"""Strategies with several devices: the world of processes, and collectives on its process group."""

from abc import ABC
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.checkpoint.saving import Peers
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._holding import Holding, ranks
from lightning.fabric.strategies._peers import CollectivePeers, background_peers
from lightning.fabric.strategies.strategy import Strategy, TBroadcast
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.distributed import (
    ReduceOp,
    _all_gather_ddp_if_available,
    _destroy_dist_connection,
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _set_num_threads_if_needed,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.init import refuse_meta
from lightning.fabric.utilities.rank_zero import rank_zero_only


@dataclass(frozen=True)
class World:
    """Who this process is among all: ``rank`` of ``size``, and ``local_rank`` of ``local_size`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0

    def check(self) -> "World":
        """Return the record itself; ``ValueError`` if there can be no such process."""
        if 0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size:
            return self
        raise ValueError(
            f"The launcher describes a process that cannot be: {self}. Each rank must be below its size. "
            "Start as many processes on each machine as `devices` says, on as many machines as `num_nodes` says."
        )


class ParallelStrategy(Strategy, ABC):
    """One process per device, all in one process group.

    Adds to :class:`Strategy` the devices of this machine, the :class:`World`, and collectives that need the group;
    before ``setup_environment`` these raise ``RuntimeError``.

    Before launch every rank is 0, unless the processes were started from outside: then the ranks are the true ones.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision=precision)
        self._parallel_devices = parallel_devices
        self._cluster_environment = cluster_environment
        self._num_nodes = 1
        self._world: World | None = None  # known from setup_environment on
        self._owns_group = False
        self._patience = default_pg_timeout

    # ---- facts ---------------------------------------------------------------------------------------------------

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices of this machine, one per local rank; None until chosen."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = devices

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Owner of ranks and addresses; None until chosen."""
        return self._cluster_environment

    @cluster_environment.setter
    def cluster_environment(self, environment: ClusterEnvironment | None) -> None:
        self._cluster_environment = environment

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on each machine."""
        return len(self.parallel_devices) if self.parallel_devices else 1

    @property
    def world(self) -> World:
        """Who this process is."""
        return self._world if self._world is not None else self._world_before_launch()

    @property
    def global_rank(self) -> int:  # type: ignore[override]
        """Rank among all processes."""
        return self.world.rank

    @property
    def local_rank(self) -> int:  # type: ignore[override]
        """Rank among the processes of this machine."""
        return self.world.local_rank

    @property
    def node_rank(self) -> int:  # type: ignore[override]
        """Rank of this machine."""
        return self.world.node_rank

    @property
    def world_size(self) -> int:  # type: ignore[override]
        """Number of processes on all machines."""
        return self.world.size

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    @property
    def root_device(self) -> torch.device:
        if not self.parallel_devices:
            raise RuntimeError(
                f"{type(self).__name__} has no devices yet. Pass it to `Fabric(strategy=...)`, "
                "or make it with `parallel_devices=[...]`."
            )
        return self.parallel_devices[self.local_rank]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # ---- processes -----------------------------------------------------------------------------------------------

    def _world_before_launch(self) -> World:
        environment = self._cluster_environment
        if environment is not None and environment.creates_processes_externally:
            return self._world_from(environment)
        return World(size=self.num_nodes * self.num_processes, local_size=self.num_processes)

    def _world_from(self, environment: ClusterEnvironment) -> World:
        """Read the world from ``environment``, after handing in what an environment may not know by itself."""
        local_rank, node_rank = environment.local_rank(), environment.node_rank()
        environment.set_world_size(self.num_nodes * self.num_processes)
        environment.set_global_rank(node_rank * self.num_processes + local_rank)
        return World(
            rank=environment.global_rank(),
            size=environment.world_size(),
            local_rank=local_rank,
            local_size=self.num_processes,
            node_rank=node_rank,
        )

    def setup_environment(self) -> None:
        self._join_world(backend=None, timeout=None)

    def _join_world(self, backend: str | None, timeout: timedelta | None) -> None:
        """Learn who this process is, make its device current, and join the process group (or find it joined)."""
        environment = self.cluster_environment
        if environment is None:
            raise RuntimeError(
                f"{type(self).__name__} has no cluster environment yet. Pass it to `Fabric(strategy=...)`, "
                "or make it with `cluster_environment=LightningEnvironment()`."
            )
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._world = world = self._world_from(environment).check()
        rank_zero_only.rank = world.rank
        Strategy.setup_environment(self)  # the device is current before the group is made on it
        if self.num_processes > 1:
            _set_num_threads_if_needed(self.num_processes)
        self._patience = timeout or default_pg_timeout
        self._owns_group = self._owns_group or not _distributed_is_initialized()
        _init_dist_connection(
            environment,
            backend or _get_default_process_group_backend_for_device(self.root_device),
            world.rank,
            world.size,
            **({} if timeout is None else {"timeout": timeout}),
        )
        if (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
            raise RuntimeError(
                f"This process is rank {dist.get_rank()} of {dist.get_world_size()} in the process group that was "
                f"there already, but `devices` and `num_nodes` make it rank {world.rank} of {world.size}. "
                "Make them agree, or leave it to `fabric.launch()` to initialise the group."
            )

    def module_to_device(self, module: nn.Module) -> None:
        refuse_meta(module)
        module.to(self.root_device)

    # ---- other ranks ---------------------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self._need_group("all_gather")
        return _all_gather_ddp_if_available(tensor, group=group, sync_grads=sync_grads)

    def all_reduce(
        self, tensor: Tensor | Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor | Any:
        self._need_group("all_reduce")
        if not isinstance(tensor, Tensor):
            return tensor
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    def barrier(self, name: str | None = None) -> None:
        self._need_group("barrier")
        on_gpu = self.root_device.type == "cuda" and dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        self._need_group("broadcast")
        if self.world_size == 1:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        if self.global_rank == src:
            return obj
        # a tensor arrives on the sender's device, which is another rank's
        home = self.root_device
        return apply_to_collection(
            objects[0], Tensor, lambda tensor: tensor.to(home) if tensor.device.type == home.type else tensor
        )

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self._need_group("reduce_boolean_decision")
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes > 0)

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        self._need_group("raise_on_all")
        texts: list[str | None] = [None] * self.world_size
        dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise RuntimeError(f"Rank {rank} failed while {doing}, so no rank goes on. {text}")

    def _gather_objects(self, obj: Any) -> list[Any] | None:
        """Collective: every rank's ``obj`` on rank 0, None elsewhere."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.global_rank == 0 else None
        dist.gather_object(obj, gathered)
        return gathered

    def _peers(self, in_background: bool = False) -> Peers:
        self._need_group("save")
        return background_peers(self, self._patience) if in_background else CollectivePeers(self)

    def _need_group(self, verb: str) -> None:
        if not _distributed_is_initialized():
            raise RuntimeError(
                f"`{verb}` talks to the other processes of {type(self).__name__}, and this one has not joined them. "
                "Call `fabric.launch()` first, or start the script with `fabric run`."
            )

    # ---- what was done -------------------------------------------------------------------------------------------

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        gradients = "" if self.world_size == 1 else f"left to {type(self).__name__}"
        return [replace(found, gradients=gradients) for found in super().holdings(module, forward_module)]

    def remarks(self) -> list[str]:
        if not _distributed_is_initialized():
            return []
        return [f"The process group has {ranks(dist.get_world_size())} and the backend {dist.get_backend()}."]

    # ---- end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        super().teardown()
        self._world = None
        if self._owns_group:
            self._owns_group = False
            _destroy_dist_connection()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
