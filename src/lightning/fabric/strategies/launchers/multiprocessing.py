"""Start the ranks with ``multiprocessing``: spawn, fork or forkserver. One function runs in every rank."""

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.strategies.launchers import calls
from lightning.fabric.strategies.launchers.launcher import _Launcher
from lightning.fabric.strategies.launchers.processes import RankProcesses, Worker, end_with_parent

StartMethod = Literal["spawn", "fork", "forkserver"]


class _MultiProcessingLauncher(_Launcher):
    """Run a function in ``num_processes`` new processes of this machine; this process waits for them.

    The function, its arguments and what rank 0 returns travel by value (with ``"fork"`` the call is inherited
    instead); tensors in the result arrive on the CPU. Each process has one thread with ``"fork"``, else its share of
    the cores, unless ``OMP_NUM_THREADS`` says otherwise.

    Raises:
        ValueError: This platform, or ``PL_DISABLE_FORK=1``, does not allow the start method.
    """

    needs_function = True

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        start_method: StartMethod = "spawn",
    ) -> None:
        self._cluster_environment = cluster_environment
        self._num_processes = num_processes
        self._start_method = start_method
        _check_start_method(start_method)

    @property
    def is_interactive_compatible(self) -> bool:
        return self._start_method == "fork"

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``function(*args, **kwargs)`` in every rank and return what this machine's first rank returned.

        Raises:
            RankError: A rank raised or died. The message shows the first one that did, with its traceback.
            RuntimeError: Processes exist already, or this process cannot be forked any more.
            TypeError: The function or an argument does not pickle.
        """
        self._check_state()
        with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            ranks = RankProcesses(folder)
            try:
                self._start(ranks, self._hand_over(folder, function, args, kwargs))
                if not ranks.wait():
                    ranks.raise_first_cause()
            except KeyboardInterrupt:
                ranks.interrupt()
                raise
            finally:
                ranks.end()
                self._cluster_environment.teardown()
            return calls.load(folder / "result.pt", map_location="cpu")

    def _check_state(self) -> None:
        method = f"start_method={self._start_method!r}"
        if self._cluster_environment.creates_processes_externally:
            raise RuntimeError(
                f"{method} starts processes itself, but this process was already started as one of several "
                "(LOCAL_RANK or a launcher's variables are set). Use the strategy without `_spawn`, `_fork` or "
                "`_notebook` in its name, or start the script with plain `python`."
            )
        if self._start_method == "fork":
            _check_can_fork(method)

    def _hand_over(
        self, folder: Path, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Any]:
        if self._start_method == "fork":
            return partial(function, *args, **kwargs)
        path = folder / "call.pt"
        calls.write_call(path, function, args, kwargs, sender=f"start_method={self._start_method!r}")
        return partial(_call_from, path)

    def _start(self, ranks: RankProcesses, call: Callable[[], Any]) -> None:
        environment = self._cluster_environment
        first = environment.node_rank() * self._num_processes
        shared = {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
        }
        context = multiprocessing.get_context(self._start_method)
        for local_rank in range(self._num_processes):
            env = {**os.environ, **shared, "LOCAL_RANK": str(local_rank)}
            job = (self._start_method, self._num_processes, first + local_rank, env, ranks.directory, os.getpid(), call)
            process = context.Process(target=_run_rank, args=job, name=f"rank-{first + local_rank}")  # type: ignore[attr-defined]
            with _quiet_fork():
                process.start()
            ranks.add(first + local_rank, Worker(process))


def _run_rank(
    start_method: StartMethod,
    num_processes: int,
    rank: int,
    env: dict[str, str],
    folder: Path,
    parent: int,
    call: Callable[[], Any],
) -> None:
    _set_up_process(start_method, num_processes, env, parent)
    calls.run_call(call, folder, rank, folder / "result.pt" if env["LOCAL_RANK"] == "0" else None)
    if start_method == "spawn":  # the others leave like this anyway
        calls.leave()


def _set_up_process(start_method: StartMethod, num_processes: int, env: dict[str, str], parent: int) -> None:
    os.environ.clear()
    os.environ.update(env)
    _set_num_threads(start_method, num_processes)
    if start_method == "forkserver":  # the system's parent of this process is the server
        launcher = multiprocessing.parent_process()
        end_with_parent(launcher.is_alive if launcher else lambda: False)
    else:
        end_with_parent(lambda: os.getppid() == parent)


def _set_num_threads(start_method: StartMethod, num_processes: int) -> None:
    import torch

    from lightning.fabric.utilities.distributed import _set_num_threads_if_needed

    if start_method == "fork":
        # The parent's pool of threads is not there after a fork: an operation that asks for it waits for ever.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    _set_num_threads_if_needed(num_processes)


def _call_from(path: Path) -> Any:
    return calls.read_call(path)()


@contextmanager
def _quiet_fork() -> Iterator[None]:
    # Newer Pythons warn whenever a process with threads forks; the children start with what makes it safe here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


def _check_start_method(start_method: str) -> None:
    known = ("spawn", "fork", "forkserver")
    if start_method not in known:
        raise ValueError(f"start_method must be one of {', '.join(map(repr, known))}, but got {start_method!r}.")
    if start_method not in multiprocessing.get_all_start_methods():
        raise ValueError(f"start_method={start_method!r} is not available on this platform. Use 'spawn' instead.")
    if start_method == "fork" and os.environ.get("PL_DISABLE_FORK", "0") == "1":
        raise ValueError("start_method='fork' is turned off by PL_DISABLE_FORK=1. Use 'spawn', or unset the variable.")


def _check_can_fork(method: str) -> None:
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"{method} cannot be used after CUDA was initialised in this process: a forked process cannot use it. "
            "Restart, and keep every CUDA call (also `torch.cuda.is_available()`-like checks of other packages that "
            "create a context) inside the launched function."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError(
            f"{method} cannot be used while this process is in a process group: its forks would share the "
            "connections. Call `torch.distributed.destroy_process_group()` first, or restart."
        )
