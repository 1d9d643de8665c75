"""The contract of a collective."""

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


class Collective(ABC):
    """Operations between the processes of one group, which the object owns.

    :meth:`setup` joins the processes, :meth:`create_group` makes the group, then every process of the group calls the
    same operations in the same order; :meth:`teardown` gives both back. Names, arguments and in-place effects are
    those of ``torch.distributed``: ``src`` and ``dst`` are global ranks, and results arrive in the buffers that were
    passed. An operation that fills a buffer returns it.
    """

    def __init__(self) -> None:
        self._group: Any | None = None

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's rank in the group."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of processes in the group."""

    @property
    def group(self) -> Any:
        """The backend's handle of the group; ``RuntimeError`` before :meth:`create_group`."""
        if self._group is None:
            raise RuntimeError(
                f"`{type(self).__name__}` does not own a group yet. Call `create_group()` on every process first."
            )
        return self._group

    @abstractmethod
    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite ``tensor`` with that of rank ``src``."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        """Overwrite ``tensor`` with the reduction over all processes; ``op`` is ``"sum"``, ``"avg"``, ``"max"``..."""

    @abstractmethod
    def reduce(self, tensor: Tensor, dst: int, op: Any = "sum") -> Tensor:
        """Overwrite ``tensor`` with the reduction on rank ``dst``. What the others then hold is undefined."""

    @abstractmethod
    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        """Fill ``tensor_list``, one per process, with everybody's ``tensor``."""

    @abstractmethod
    def gather(self, tensor: Tensor, gather_list: list[Tensor] | None = None, dst: int = 0) -> list[Tensor] | None:
        """Fill ``gather_list`` (given on rank ``dst`` only) with everybody's ``tensor``."""

    @abstractmethod
    def scatter(self, tensor: Tensor, scatter_list: list[Tensor] | None = None, src: int = 0) -> Tensor:
        """Overwrite ``tensor`` with this process's part of ``scatter_list`` (given on rank ``src`` only)."""

    @abstractmethod
    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: Any = "sum") -> Tensor:
        """Overwrite ``output`` with the reduction of everybody's entry of ``input_list`` for this process."""

    @abstractmethod
    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        """Send each process its entry of ``input_tensor_list``; fill ``output_tensor_list`` with what they sent."""

    @abstractmethod
    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Send ``tensor`` to rank ``dst``, which receives it with the same ``tag``."""

    @abstractmethod
    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        """Overwrite ``tensor`` with what rank ``src`` (None: any) sends."""

    @abstractmethod
    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        """Fill ``object_list``, one place per process, with everybody's ``obj``, which must pickle."""

    @abstractmethod
    def broadcast_object_list(self, object_list: list[Any], src: int, device: torch.device | None = None) -> list[Any]:
        """Overwrite the items of ``object_list`` with those of rank ``src``."""

    @abstractmethod
    def gather_object(self, obj: Any, object_gather_list: list[Any] | None = None, dst: int = 0) -> list[Any] | None:
        """Fill ``object_gather_list`` (given on rank ``dst`` only) with everybody's ``obj``."""

    @abstractmethod
    def scatter_object_list(
        self,
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any] | None,
        src: int = 0,
    ) -> list[Any]:
        """Put this process's item of rank ``src``'s input list in place 0 of the output list."""

    @abstractmethod
    def barrier(self, device_ids: list[int] | None = None) -> None:
        """Wait until every process of the group is here."""

    @abstractmethod
    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """Wait like :meth:`barrier`, but raise after ``timeout`` and name the processes that are not here."""

    @abstractmethod
    def setup(self, **kwargs: Any) -> Self:
        """Join the processes with :meth:`init_group`, unless that has been done, and return this object."""

    def create_group(self, **kwargs: Any) -> Self:
        """Make and own a new group (``kwargs`` as in :meth:`new_group`) and return this object.

        :meth:`setup` or :meth:`init_group` must have been called, and every process calls this.
        """
        if self._group is not None:
            raise RuntimeError(f"`{type(self).__name__}` owns a group already. Use one object per group.")
        self._group = self.new_group(**kwargs)
        return self

    def teardown(self) -> Self:
        """Destroy the group that this object owns, if it does, and return this object."""
        if self._group is not None:
            self.destroy_group(self._group)
            self._group = None
        return self

    @classmethod
    @abstractmethod
    def is_available(cls) -> bool:
        """Tell whether the backend is there."""

    @classmethod
    @abstractmethod
    def is_initialized(cls) -> bool:
        """Tell whether the processes have been joined."""

    @classmethod
    @abstractmethod
    def init_group(cls, **kwargs: Any) -> None:
        """Join the processes. Every process calls this once."""

    @classmethod
    @abstractmethod
    def new_group(cls, **kwargs: Any) -> Any:
        """Make a group of some of the joined processes (all, by default) and return its handle."""

    @classmethod
    @abstractmethod
    def destroy_group(cls, group: Any) -> None:
        """Give back a group that :meth:`new_group` returned."""
