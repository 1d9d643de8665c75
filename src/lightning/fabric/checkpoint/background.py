"""Saving while training goes on: a thread that writes, ranks that talk through a store, errors that are not lost."""

import atexit
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import parent_process, util
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError

from lightning.fabric.checkpoint.saving import Peers, Prepared, SaveOptions, save
from lightning.fabric.checkpoint.snapshot import Snapshot
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _local_path
from lightning.fabric.utilities.ranks import all_or_none
from lightning.fabric.utilities.types import _PATH

_LAST_WORDS = timedelta(seconds=10)
_PATIENCE = 2  # seconds until somebody who ends a process is told what it waits for


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
        self._shared: list[str] = []  # keys

    def gather(self, obj: Any) -> list[Any] | None:
        prefix = self._next()
        self._set(f"{prefix}/{self.rank}", obj)
        if self.rank != 0:
            return None
        gathered = [self._get(f"{prefix}/{rank}", rank) for rank in range(self.size)]
        for key in (*self._shared, *(f"{prefix}/{rank}" for rank in range(self.size))):  # all have read what was shared
            self._store.delete_key(key)
        self._shared.clear()
        return gathered

    def share(self, obj: Any) -> Any:
        prefix = self._next()
        if self.rank == 0:
            self._set(prefix, obj)
            self._shared.append(prefix)
            return obj
        return self._get(prefix, 0)

    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        first = None
        if errors is not None:
            first = next(((rank, text) for rank, text in enumerate(errors) if text is not None), None)
        first = self.share(first)
        if error is not None:
            raise error
        if first is not None:
            rank, text = first
            raise RuntimeError(f"Rank {rank} failed while {doing}, so no rank goes on. {text}")

    def leave(self) -> None:
        prefix = self._next()
        with suppress(ConnectionError, DistStoreError):  # what is to be said has been said
            self._set(f"{prefix}/{self.rank}", None)
            if self.rank == 0:  # its process holds the store as a rule: it may not end before all have heard
                self._store.wait([f"{prefix}/{rank}" for rank in range(self.size)], min(self._timeout, _LAST_WORDS))

    def _next(self) -> str:
        self._round += 1
        return f"{self._name}/{self._round}"

    def _set(self, key: str, obj: Any) -> None:
        with self._reaching_rank_0():
            self._store.set(key, pickle.dumps(obj))

    def _get(self, key: str, rank: int) -> Any:
        try:
            with self._reaching_rank_0():
                self._store.wait([key], self._timeout)
                return pickle.loads(self._store.get(key))
        except DistStoreError as error:
            raise TimeoutError(
                f"Rank {rank} did not come to save its part within {self._timeout.total_seconds():g} s. It may have "
                "ended, or its disk may be slow: see its output, or raise the strategy's `timeout`."
            ) from error

    @contextmanager
    def _reaching_rank_0(self) -> Iterator[None]:
        """Whose process most often holds the store."""
        try:
            yield
        except DistNetworkError as error:
            raise ConnectionError(
                f"Rank {self.rank} lost the connection through which ranks agree on a save: the process that holds it, "
                "rank 0's as a rule, may have ended. See its output."
            ) from error


class Saver:
    """Saves checkpoints, at once or while training goes on; never two at a time."""

    def __init__(self) -> None:
        self._background = Background()
        self._snapshot = Snapshot()

    def save(
        self, prepared: Prepared, target: _PATH, options: SaveOptions, peers: Peers, later: Peers, strategy: str
    ) -> None:
        """Collective: see :func:`saving.save`; unless ``options.blocking``, ``target`` is written after this returns.

        ``peers`` are for now, ``later`` for a thread. What is written is what the values are when this returns.
        """
        if options.blocking:
            save(prepared, target, options, peers, strategy)
            return
        with all_or_none(peers, f"copying the state for {os.fspath(target)!r}"):
            self._detach(prepared)
            if _is_local_file_protocol(target):  # wherever the process will be when it is written
                target = _local_path(target).absolute()

        def job() -> None:
            try:
                save(prepared, target, options, later, strategy)
            finally:
                later.leave()

        self._background.start(job)

    def wait(self) -> None:
        """Return when nothing is being saved; raise what went wrong with the last one."""
        self._background.wait()

    def _detach(self, prepared: Prepared) -> None:
        assert prepared.detach is not None
        self._snapshot.begin()
        prepared.detach(self._snapshot.copy)
        self._snapshot.end()


class Background:
    """Does one job at a time in a thread. An error of it is raised by the next call, or ends the process with code 1.

    There is never a second job: whoever has one waits for the first, so no more than one copy of a state is held.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._at_end_of_child: util.Finalize | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Have ``job`` done, after what is being done; raise what that raised."""
        self.wait()
        # a thread that may live on: the interpreter would wait for others before it calls our handler
        self._thread = threading.Thread(target=self._work, args=(job,), name="fabric-checkpoint", daemon=True)
        _started.add(self)
        atexit.register(self.finish)
        if parent_process() is not None:  # a process of `multiprocessing` may leave without what atexit has
            self._at_end_of_child = util.Finalize(None, self._finish_child, exitpriority=100)
        self._thread.start()

    def wait(self) -> None:
        """Return when the job is done; raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            _started.discard(self)
            atexit.unregister(self.finish)
            if self._at_end_of_child is not None:
                self._at_end_of_child.cancel()
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done."""
        return self._thread is None or not self._thread.is_alive()

    def _work(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait at the end of a process, and say what went wrong; its exit code will tell."""
        global _is_lost
        if self._thread is not None:
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():
                print("Waiting for a checkpoint that is being saved.", file=sys.stderr, flush=True)
        try:
            self.wait()
        except Exception as error:
            _is_lost = True
            print(f"A checkpoint could not be saved: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _finish_child(self) -> None:
        self.finish()
        _fail_if_lost()


_started: set[Background] = set()  # and not waited for yet
_is_lost = False


def wait_for_all() -> None:
    """Return when nothing is being saved in this process any more; raise what went wrong."""
    for background in tuple(_started):
        background.wait()


def finish_all() -> None:
    """The same for a process that ends by an error of its own: what went wrong besides is printed."""
    for background in tuple(_started):
        background.finish()


@atexit.register  # before what others register later, which runs first
def _fail_if_lost() -> None:
    if _is_lost:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the only way to a code from here
    return
