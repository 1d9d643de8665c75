"""Saving while training goes on: a thread that writes, ranks that talk through a store, errors that are not lost."""

import atexit
import pickle
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn


class StorePeers:
    """:class:`Peers` that talk through a store of ``torch.distributed``, not by collectives: training has those.

    Args:
        store: one that this rank's thread has for itself (``Store.clone``), because it waits in there.
        name: of this save, the same on all ranks.
        timeout: how long to wait for another rank.

    """

    def __init__(self, store: Any, rank: int, size: int, name: str, timeout: timedelta) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._name = name
        self._timeout = timeout
        self._round = 0

    def gather(self, obj: Any) -> list[Any] | None:
        prefix = self._next()
        self._store.set(f"{prefix}/{self.rank}", pickle.dumps(obj))
        if self.rank != 0:
            return None
        gathered = [self._get(f"{prefix}/{rank}", rank) for rank in range(self.size)]
        for rank in range(self.size):
            self._store.delete_key(f"{prefix}/{rank}")
        return gathered

    def share(self, obj: Any) -> Any:
        prefix = self._next()
        if self.rank == 0:
            self._store.set(prefix, pickle.dumps(obj))
            return obj
        return self._get(prefix, 0)

    def raise_on_all(self, error: Exception | None, doing: str) -> None:
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        first = None
        if errors is not None:
            first = next(((rank, text) for rank, text in enumerate(errors) if text is not None), None)
        first = self.share(first)
        if error is not None:
            raise error
        if first is not None:
            rank, text = first
            raise RuntimeError(f"Rank {rank} failed while {doing}: {text}")

    def _next(self) -> str:
        self._round += 1
        return f"{self._name}/{self._round}"

    def _get(self, key: str, rank: int) -> Any:
        from torch.distributed import DistStoreError

        try:
            self._store.wait([key], self._timeout)
        except DistStoreError as error:
            raise TimeoutError(
                f"Rank {rank} did not come to save its part within {self._timeout.total_seconds():g} s. It may have "
                "ended, or its disk may be slow: see its output, or raise the strategy's `timeout`."
            ) from error
        return pickle.loads(self._store.get(key))


class Background:
    """Does jobs one after the other in a thread. An error of one is raised by the next call, or at exit.

    Args:
        pending: how many jobs may wait besides the one that runs; :meth:`submit` waits for room.

    """

    def __init__(self, pending: int = 1) -> None:
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=pending)
        self._errors: list[Exception] = []
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Have ``job`` done; raise what an earlier one raised."""
        self.raise_errors()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fabric-checkpoints", daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when every job is done; raise what one of them raised."""
        self._jobs.join()
        self.raise_errors()

    @property
    def is_idle(self) -> bool:
        """Whether every job is done."""
        return self._jobs.unfinished_tasks == 0

    def raise_errors(self) -> None:
        """Raise the first error that was not raised yet."""
        if self._errors:
            raise self._errors.pop(0)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception as error:
                self._errors.append(error)
            finally:
                self._jobs.task_done()

    def _at_exit(self) -> None:
        self._jobs.join()
        for error in self._errors:
            rank_zero_warn(f"A checkpoint was not saved, as it turned out at the end: {error}")
