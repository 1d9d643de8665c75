"""Start a process for each TPU core of this machine, by ``torch_xla``. One function runs in every process."""

import copy
import os
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.strategies.launchers import calls
from lightning.fabric.strategies.launchers.launcher import _Launcher
from lightning.fabric.strategies.launchers.multiprocessing import (
    _check_can_fork,
    _check_start_method,
    _quiet_fork,
    _set_num_threads,
)
from lightning.fabric.strategies.launchers.processes import RankProcesses, end_with_parent
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.imports import require

_Start = Literal["fork", "spawn"]
_inherited: dict[str, Callable[[], Any]] = {}  # calls of this process and of those that were forked from it


class _XLALauncher(_Launcher):
    """Run a function on every TPU core of this machine; this process waits for it.

    Processes are forked, so that the function may be any, unless ``PL_DISABLE_FORK=1`` or the platform has no fork:
    then it travels by value to fresh interpreters. What the first rank of this machine returns comes back, with its
    tensors on the CPU. For one core no process is made: the function runs here.
    """

    needs_function = True

    def __init__(
        self, cluster_environment: ClusterEnvironment, num_processes: int, start_method: _Start | None = None
    ) -> None:
        self._cluster_environment = cluster_environment
        self._num_processes = num_processes
        self._start_method: _Start = start_method or _default_start_method()
        _check_start_method(self._start_method)

    @property
    def is_interactive_compatible(self) -> bool:
        return self._start_method == "fork"

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``function(*args, **kwargs)`` in every rank and return what this machine's first rank returned.

        Raises:
            RankError: A rank raised. The message shows the first one that did, with its traceback.
            RuntimeError: This process uses an XLA device already, was started as one of several, or cannot be forked
                any more; or a rank died without an exception.
            ModuleNotFoundError: There is no torch_xla.

        """
        require("torch_xla", "strategy='xla'")
        _check_not_started_by_others()
        try:
            if self._num_processes == 1:
                return _run_here(partial(function, *args, **kwargs))
            with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as name:
                return self._run_on_all(Path(name), function, args, kwargs)
        finally:
            self._cluster_environment.teardown()

    def _run_on_all(
        self, folder: Path, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from torch_xla.distributed import xla_multiprocessing

        if self._start_method == "fork":
            _check_can_fork("strategy='xla'")
            _inherited[str(folder)] = partial(function, *args, **kwargs)
        else:
            calls.write_call(folder / "call.pt", function, args, kwargs, sender="strategy='xla'")
        job = (str(folder), self._start_method, self._num_processes, os.getpid())
        try:
            with _quiet_fork():
                xla_multiprocessing.spawn(_run_rank, args=job, nprocs=None, start_method=self._start_method)
        except BrokenProcessPool as error:
            RankProcesses(folder).raise_first_cause()
            raise RuntimeError(
                "A process of strategy='xla' ended without an exception: it was killed, perhaps out of memory."
            ) from error
        finally:
            _inherited.pop(str(folder), None)
        return calls.load(folder / "result.pt", map_location="cpu")


def _default_start_method() -> _Start:
    return "fork" if hasattr(os, "fork") and os.environ.get("PL_DISABLE_FORK", "0") != "1" else "spawn"


def _check_not_started_by_others() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        raise RuntimeError(
            "strategy='xla' starts processes itself, but `fabric run` or torchrun has started them already. "
            "Start the script with plain `python`."
        )


def _run_here(call: Callable[[], Any]) -> Any:
    from torch_xla.distributed import xla_multiprocessing

    results: list[Any] = []
    xla_multiprocessing.spawn(lambda _: results.append(call()), nprocs=1)
    return results[0]


def _run_rank(rank: int, name: str, start_method: _Start, num_processes: int, parent: int) -> None:
    from torch_xla import runtime

    folder = Path(name)
    if os.getpid() != parent:
        end_with_parent(lambda: os.getppid() == parent)
    _set_num_threads(start_method, num_processes)
    result = folder / "result.pt" if runtime.local_ordinal() == 0 else None
    calls.run_call(partial(_call, folder), folder, rank, result)


def _call(folder: Path) -> Any:
    import torch_xla

    result = _received(folder)()
    torch_xla.sync()  # on all ranks: the result of one may wait for the others
    return move_data_to_device(result, "cpu")


def _received(folder: Path) -> Callable[[], Any]:
    from torch_xla import runtime

    if str(folder) not in _inherited:
        return calls.read_call(folder / "call.pt")
    call = _inherited[str(folder)]
    # older TPUs have two devices in a process, each with a thread: what belongs to a rank is not shared
    return copy.deepcopy(call) if runtime.addressable_device_count() > 1 else call
