"""`torch.distributed` behind the contract of a collective."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout as default_pg_timeout
from typing_extensions import Self

from lightning.fabric.plugins.collectives.collective import Collective


class TorchCollective(Collective):
    """Calls ``torch.distributed``, with the group filled in."""

    def __init__(self) -> None:
        if not self.is_available():
            raise RuntimeError("`TorchCollective` needs a build of torch with `torch.distributed`.")
        super().__init__()
        self._joined = False  # by this object's `setup`

    @property
    def group(self) -> Any:
        """The process group: the one of :meth:`create_group`, else torch's default group."""
        if self._group is None and self.is_initialized():
            return dist.group.WORLD
        return super().group

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        dist.broadcast(tensor, src, group=self.group)
        return tensor

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        dist.all_reduce(tensor, op=_reduce_op(op), group=self.group)
        return tensor

    def reduce(self, tensor: Tensor, dst: int, op: Any = "sum") -> Tensor:
        dist.reduce(tensor, dst, op=_reduce_op(op), group=self.group)
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        dist.all_gather(tensor_list, tensor, group=self.group)
        return tensor_list

    def gather(self, tensor: Tensor, gather_list: list[Tensor] | None = None, dst: int = 0) -> list[Tensor] | None:
        dist.gather(tensor, gather_list, dst, group=self.group)
        return gather_list

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor] | None = None, src: int = 0) -> Tensor:
        dist.scatter(tensor, scatter_list, src, group=self.group)
        return tensor

    def reduce_scatter(
        self,
        output: Tensor,
        input_list: list[Tensor],
        op: Any = "sum",
    ) -> Tensor:
        dist.reduce_scatter(output, input_list, op=_reduce_op(op), group=self.group)
        return output

    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        dist.all_to_all(output_tensor_list, input_tensor_list, group=self.group)
        return output_tensor_list

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        dist.send(tensor, dst, group=self.group, tag=tag)

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        dist.recv(tensor, src, group=self.group, tag=tag)
        return tensor

    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        dist.all_gather_object(object_list, obj, group=self.group)
        return object_list

    def broadcast_object_list(self, object_list: list[Any], src: int, device: torch.device | None = None) -> list[Any]:
        dist.broadcast_object_list(object_list, src, group=self.group, device=device)
        return object_list

    def gather_object(self, obj: Any, object_gather_list: list[Any] | None = None, dst: int = 0) -> list[Any] | None:
        dist.gather_object(obj, object_gather_list, dst, group=self.group)
        return object_gather_list

    def scatter_object_list(
        self,
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any] | None,
        src: int = 0,
    ) -> list[Any]:
        dist.scatter_object_list(scatter_object_output_list, scatter_object_input_list, src, group=self.group)
        return scatter_object_output_list

    def barrier(self, device_ids: list[int] | None = None) -> None:
        dist.barrier(group=self.group, device_ids=device_ids)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        dist.monitored_barrier(group=self.group, timeout=timeout, wait_all_ranks=wait_all_ranks)

    def setup(self, main_address: str | None = None, main_port: str | int | None = None, **kwargs: Any) -> Self:
        """Join the processes, unless that has been done; :meth:`teardown` then takes them apart again.

        ``main_address`` and ``main_port`` say where the processes meet if MASTER_ADDR and MASTER_PORT do not.
        ``kwargs`` are those of ``torch.distributed.init_process_group``.
        """
        if self.is_initialized():
            return self
        if main_address is not None:
            os.environ.setdefault("MASTER_ADDR", main_address)
        if main_port is not None:
            os.environ.setdefault("MASTER_PORT", str(main_port))
        self.init_group(**kwargs)
        self._joined = True
        return self

    def teardown(self) -> Self:
        super().teardown()
        if self._joined and self.is_initialized():
            dist.destroy_process_group()
        self._joined = False
        return self

    @classmethod
    def is_available(cls) -> bool:
        return dist.is_available()

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.is_available() and dist.is_initialized()

    @classmethod
    def init_group(cls, **kwargs: Any) -> None:
        dist.init_process_group(**kwargs)

    @classmethod
    def new_group(cls, **kwargs: Any) -> Any:
        return dist.new_group(**kwargs)

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        # A process outside a group has a placeholder for it.
        if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def _reduce_op(op: Any) -> Any:
    if not isinstance(op, str):
        return op
    name = {"mean": "AVG"}.get(op.lower(), op.upper())
    if name not in dist.ReduceOp.RedOpType.__members__:
        known = ", ".join(sorted(repr(known.lower()) for known in dist.ReduceOp.RedOpType.__members__))
        raise ValueError(f"Unknown reduce operation {op!r}. Known: {known}")
    return getattr(dist.ReduceOp, name)
