"""How the ranks of a process group agree while they save and load together."""

import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightning.fabric.checkpoint.background import StorePeers
from lightning.fabric.checkpoint.saving import OneRank, Peers

if TYPE_CHECKING:
    from lightning.fabric.strategies.parallel import ParallelStrategy


class CollectivePeers:
    """:class:`Peers` that talk by the collectives of a strategy, while training waits."""

    def __init__(self, strategy: "ParallelStrategy") -> None:
        self.rank = strategy.global_rank
        self.size = strategy.world_size
        self._strategy = strategy

    def gather(self, obj: Any) -> list[Any] | None:
        return self._strategy._gather_objects(obj)

    def share(self, obj: Any) -> Any:
        return self._strategy.broadcast(obj)

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        self._strategy.raise_on_all(error, doing)

    def leave(self) -> None:
        return None


def background_peers(strategy: "ParallelStrategy", timeout: timedelta) -> Peers:
    """Collective: return peers that talk through a connection of their own to the store of the process group."""
    if strategy.world_size == 1:
        return OneRank()
    name = strategy.broadcast(f"fabric/save/{uuid.uuid4().hex}")
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return StorePeers(store, strategy.global_rank, strategy.world_size, name, timeout)
