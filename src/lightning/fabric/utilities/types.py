"""The protocols and unions that annotations across the library share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, Union, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as LRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau as ReduceLROnPlateau
from torch.utils.data import DataLoader

if torch.distributed.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
    from torch.distributed import ReduceOp as ReduceOp
else:

    class ProcessGroup:  # type: ignore[no-redef]
        """Stands in where torch was built without ``torch.distributed``."""

    class ReduceOp:  # type: ignore[no-redef]
        """Stands in where torch was built without ``torch.distributed``."""

        SUM = AVG = PRODUCT = MIN = MAX = BAND = BOR = BXOR = None


_PATH = Union[str, Path]
_DEVICE = Union[torch.device, str, int]
_MAP_LOCATION_TYPE = Union[
    _DEVICE,
    Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None],
    dict[_DEVICE, _DEVICE],
    None,
]
_PARAMETERS = Iterator[nn.Parameter]
_Wrappable = Union[nn.Module, Optimizer, DataLoader]  # what the ``setup`` methods of Fabric take

_Key = TypeVar("_Key")


@runtime_checkable
class _Stateful(Protocol[_Key]):
    """Anything whose state can be taken out and put back."""

    def state_dict(self) -> dict[_Key, Any]: ...

    def load_state_dict(self, state_dict: dict[_Key, Any]) -> None: ...


@runtime_checkable
class Steppable(Protocol):
    """Anything with a ``step``."""

    def step(self, closure: Callable[[], Tensor] | None = ...) -> Any: ...


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """What looks like an optimizer without being a ``torch.optim.Optimizer``."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: Any

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...
