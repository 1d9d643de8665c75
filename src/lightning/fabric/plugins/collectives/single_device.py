"""One process that talks to itself: every operation has its ordinary result at once."""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning.fabric.plugins.collectives.collective import Collective


class SingleDeviceCollective(Collective):
    """A group of one process. Buffers are filled as a backend would fill them; there is nobody to wait for."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        return tensor

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, dst: int = 0, op: Any = "sum") -> Tensor:
        return tensor

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor) -> list[Tensor]:
        tensor_list[0].copy_(tensor)
        return tensor_list

    def gather(self, tensor: Tensor, gather_list: list[Tensor] | None = None, dst: int = 0) -> list[Tensor] | None:
        return None if gather_list is None else self.all_gather(gather_list, tensor)

    def scatter(self, tensor: Tensor, scatter_list: list[Tensor] | None = None, src: int = 0) -> Tensor:
        return tensor if scatter_list is None else tensor.copy_(scatter_list[0])

    def reduce_scatter(self, output: Tensor, input_list: list[Tensor], op: Any = "sum") -> Tensor:
        return output.copy_(input_list[0])

    def all_to_all(self, output_tensor_list: list[Tensor], input_tensor_list: list[Tensor]) -> list[Tensor]:
        return self.all_gather(output_tensor_list, input_tensor_list[0])

    def send(self, tensor: Tensor, dst: int = 0, tag: int = 0) -> None:
        pass

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> Tensor:
        return tensor

    def all_gather_object(self, object_list: list[Any], obj: Any) -> list[Any]:
        object_list[0] = obj
        return object_list

    def broadcast_object_list(
        self, object_list: list[Any], src: int = 0, device: torch.device | None = None
    ) -> list[Any]:
        return object_list

    def gather_object(self, obj: Any, object_gather_list: list[Any] | None = None, dst: int = 0) -> list[Any] | None:
        return None if object_gather_list is None else self.all_gather_object(object_gather_list, obj)

    def scatter_object_list(
        self,
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any] | None,
        src: int = 0,
    ) -> list[Any]:
        if scatter_object_input_list is not None:
            scatter_object_output_list[0] = scatter_object_input_list[0]
        return scatter_object_output_list

    def barrier(self, device_ids: list[int] | None = None) -> None:
        pass

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        pass

    def setup(self, **kwargs: Any) -> Self:
        return self

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def is_initialized(cls) -> bool:
        return True

    @classmethod
    def init_group(cls, **kwargs: Any) -> None:
        pass

    @classmethod
    def new_group(cls, **kwargs: Any) -> Any:
        return object()

    @classmethod
    def destroy_group(cls, group: Any) -> None:
        pass
