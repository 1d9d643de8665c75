"""What strategies over DTensors have in common: starting, clipping, files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.checkpoint.saving import Prepared
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies import _sharded_files
from lightning.fabric.strategies._dtensor import clip_norm, clip_value
from lightning.fabric.strategies._holding import Holding, copy_on_each
from lightning.fabric.strategies._sharded_holding import holdings_of
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.utilities.types import _PATH


class ShardedStrategy(ParallelStrategy, ABC):
    """Parameters are DTensors on a :attr:`device_mesh`: each rank has a part of what the module is.

    A subclass makes ``self._device_mesh`` in ``setup_environment``.
    """

    runs_on: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda"})
    start_method = "popen"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, None, precision)
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._device_mesh: DeviceMesh | None = None

    @property
    @abstractmethod
    def _writes_folders(self) -> bool:
        """Whether checkpoints are folders, to which each rank adds its part; else they are files that rank 0 writes."""

    @abstractmethod
    def _show_parts(self) -> None:
        """Put the rank's parts in place of the whole parameters that may be there after a forward, and free these.

        Not during forward or backward.
        """

    @property
    def process_group_backend(self) -> str | None:
        """Name of the backend that moves data between ranks; None: by the device."""
        return self._process_group_backend

    @property
    def device_mesh(self) -> DeviceMesh:
        """The arrangement of the ranks; from launch on."""
        if self._device_mesh is None:
            raise RuntimeError("`device_mesh` is made of the processes, and they do not exist yet. Launch first.")
        return self._device_mesh

    # -- processes

    def _configure_launcher(self) -> None:
        if self.cluster_environment is None:
            raise RuntimeError(f"{type(self).__name__} needs its cluster environment before a launcher can be chosen.")
        self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _join_mesh(self, mesh: DeviceMesh) -> None:
        """Collective: wait until all ranks have connected the groups of ``mesh``, and give these our timeout."""
        self.barrier("device mesh")  # a rank that is done at once would take the others' meeting place with it
        if self._timeout is not None:
            for axis in range(mesh.ndim):  # torch gives these groups its own default
                _set_pg_timeout(self._timeout, mesh.get_group(axis))

    # -- the step

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        parameters = self.precision.main_params(optimizer)
        return clip_norm(parameters, max_norm, norm_type, error_if_nonfinite, self._module_with_state(module))

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        clip_value(self.precision.main_params(optimizer), clip_val)

    # -- files

    def _prepare_checkpoint(
        self,
        state: MutableMapping[str, Any],
        storage_options: Any,
        filter: Mapping[str, Callable[[str, Any], bool]],
    ) -> Prepared:
        """Collective: a folder, to which each rank adds its part; or a file, which rank 0 writes."""
        self._show_parts()
        return _sharded_files.prepare(
            self, state, sharded=self._writes_folders, storage_options=storage_options, filter=filter
        )

    def load_checkpoint(
        self,
        path: _PATH,
        state: nn.Module | Optimizer | MutableMapping[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Collective: restore ``state`` from a folder or a file, of any number of ranks, and return what is left.

        What is left of a file is not read yet: the file may be replaced or removed, but not overwritten in place.
        """
        self._show_parts()
        return _sharded_files.load_checkpoint(self, path, state, strict=strict, weights_only=weights_only)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any | Tensor]:
        """Return ``module``'s state under the user's names: each rank's part; or, for one file, all of it on rank 0.

        Collective for one file; the other ranks get an empty dict then.
        """
        self._show_parts()
        module = self._module_with_state(module)
        return (
            module.state_dict()
            if self._writes_folders
            else _sharded_files.full_module_state(module, rank_zero_only=True)
        )

    def load_module_state_dict(
        self, module: nn.Module, state_dict: dict[str, Any | Tensor], strict: bool = True
    ) -> Any:
        """Copy ``state_dict``, of full tensors (the same on every rank) or of parts, into ``module``."""
        self._show_parts()
        return _sharded_files.load_full_module_state(self._module_with_state(module), state_dict, strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state in torch's format: each rank's part; or, for one file, all of it on rank 0.

        Collective for one file; the other ranks get an empty dict then.
        """
        return (
            optimizer.state_dict()
            if self._writes_folders
            else _sharded_files.full_optimizer_state(optimizer, rank_zero_only=True)
        )

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        _sharded_files.load_full_optimizer_state(optimizer, state_dict)

    # -- what was done

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        return holdings_of(module, forward_module, self._holding_of_plain)

    def _holding_of_plain(self, name: str, parameter: Tensor) -> Holding:
        return Holding.all_of(name, parameter, copy_on_each(self.world_size))

    def is_unit(self, part: nn.Module) -> bool:
        return isinstance(part, FSDPModule)

    def remarks(self) -> list[str]:
        mesh = self._device_mesh
        if mesh is None:
            return super().remarks()
        axes = zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
        shown = ", ".join(f"{name!r} of {size}" for name, size in axes)
        return [*super().remarks(), f"The ranks are a mesh with the axes {shown}."]

    # -- end

    def teardown(self) -> None:
        super().teardown()
        self._device_mesh = None
