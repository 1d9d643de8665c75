"""Run a function on several ranks, each in a process of its own, from one ordinary-looking test.

    def mean_of_ranks():
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        return fabric.all_reduce(torch.tensor(float(fabric.global_rank))).item()

    def test_all_reduce_takes_the_mean():
        assert on_ranks(2, mean_of_ranks) == [0.5, 0.5]

The processes are forked from a server that has torch imported, so that a launch takes about a tenth of a second; only
the first one waits for the server to start.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.plugins.environments.lightning import keep_network_port, release_network_port
from lightning.fabric.strategies.launchers import calls
from lightning.fabric.strategies.launchers.processes import RankProcesses, Worker, end_with_parent
from lightning.fabric.strategies.launchers.report import Failure, RankError

T = TypeVar("T")

_STACKS = signal.SIGUSR2  # a rank that receives it writes down where each of its threads is
# A rank that joins a group and ends at once does not break off the others' way into it.
_DEFAULTS = {"OMP_NUM_THREADS": "1", "TORCH_DIST_INIT_BARRIER": "1"}
# with what the first step of an optimizer imports, and what every launch of processes on CPUs does
_modules = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "lightning.fabric.fabric",
    "lightning.fabric.accelerators.cpu",
    "lightning.fabric.accelerators.cuda",
    "lightning.fabric.accelerators.mps",
    "lightning.fabric.accelerators.xla",
    "lightning.fabric.plugins.environments.torchelastic",
    "lightning.fabric.plugins.precision.amp",
    "lightning.fabric.strategies.ddp",
    "lightning.fabric.strategies.launchers.subprocess_script",
    "lightning.fabric.testing.ranks",
]


def preload(*modules: str) -> None:
    """Have modules imported once, in the process that all ranks are forked from. Call it before the first `on_ranks`.

    For modules that many tests need and that take long to import, such as ``torch.distributed.fsdp``.
    """
    _modules.extend(modules)


def on_ranks(
    n: int,
    fn: Callable[..., T],
    *args: Any,
    timeout: float = 60.0,
    tmp: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> list[T]:
    """Run ``fn(*args, **kwargs)`` in ``n`` processes and return what each rank returned, by rank.

    Each process has ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``NODE_RANK``, ``MASTER_ADDR`` and
    ``MASTER_PORT`` (one that is free) in its environment, so that ``Fabric(devices=n).launch()`` joins the others, and
    one thread unless ``OMP_NUM_THREADS`` says more. A process group that ``fn`` leaves behind is destroyed, and so is
    every process that is still there in the end.

    Args:
        fn: A function from the top level of a module; arguments and results must pickle. They travel by value.
        timeout: Seconds until ranks that have not finished are reported, with their stacks, and killed.
        tmp: A folder for the files of this launch, which stay there; a temporary one by default.
        env: More variables for every rank's environment.

    Raises:
        RankError: A rank raised, died or was late. It is the first rank that failed that is shown, not one that failed
            for want of the first.
        TypeError: ``fn`` or an argument cannot be sent to another process.
    """
    with _folder(tmp) as folder:
        calls.write_call(folder / "call.pt", fn, args, kwargs, sender="`on_ranks`")
        ranks = RankProcesses(folder, whole_groups=True)
        port = keep_network_port()
        try:
            _start(ranks, n, port, {**_DEFAULTS, **os.environ, **(env or {})})
            if not ranks.wait(timeout):
                ranks.raise_first_cause()
                _raise_if_late(ranks, n, timeout)
        finally:
            ranks.end(grace=0)
            release_network_port(port)
        return [calls.load(folder / f"result-{rank}.pt") for rank in range(n)]


@contextlib.contextmanager
def _folder(tmp: str | os.PathLike[str] | None) -> Iterator[Path]:
    if tmp is not None:
        yield Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp))
        return
    with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _start(ranks: RankProcesses, n: int, port: int, env: Mapping[str, str]) -> None:
    context = multiprocessing.get_context("forkserver")
    sizes = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "NODE_RANK": 0}
    shared = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with _preloading(context):
        for rank in range(n):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            job = (rank, ranks.directory, {**env, **own})
            process = context.Process(target=_run_rank, args=job, name=f"rank-{rank}")
            process.start()
            ranks.add(rank, Worker(process))


@contextlib.contextmanager
def _preloading(context: ForkServerContext) -> Iterator[None]:
    """Have a server that is started in here import what ranks need."""
    context.set_forkserver_preload(["lightning.fabric.testing._preload"])
    os.environ["LT_TESTING_PRELOAD"] = ",".join([*_modules, *_imported_here()])
    try:
        yield
    finally:
        del os.environ["LT_TESTING_PRELOAD"]


def _imported_here() -> Iterator[str]:
    """What ranks are likely to import because this process has."""
    for name in [*sys.modules]:
        if name in ("pytest", "hypothesis") or name.startswith("lightning.fabric."):
            yield name


def _run_rank(rank: int, folder: Path, env: dict[str, str]) -> None:
    os.setsid()  # a group of its own, so that whatever it starts can be ended with it
    os.environ.clear()
    os.environ.update(env)
    launcher = multiprocessing.parent_process()
    end_with_parent(launcher.is_alive if launcher else lambda: False)
    with (folder / f"stacks-{rank}.txt").open("w") as stacks:
        faulthandler.register(_STACKS, file=stacks)
        calls.run_call(partial(_call, folder), folder, rank, folder / f"result-{rank}.pt")
        faulthandler.unregister(_STACKS)


def _call(folder: Path) -> Any:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return calls.read_call(folder / "call.pt")()


def _raise_if_late(ranks: RankProcesses, n: int, timeout: float) -> None:
    late = ranks.running()
    if not late:
        return
    ranks.send(_STACKS)
    time.sleep(0.5)
    stacks = "\n".join(f"---- rank {rank} is here ----\n{_stack(ranks.directory, rank)}" for rank in late)
    who = "rank" if len(late) == 1 else "ranks"
    message = f"{who} {', '.join(map(str, late))} of {n} had not finished after {timeout:g} s"
    raise RankError(f"{message}\n{stacks}\n{message}", Failure(late[0], time.time(), 124, "TimeoutError", message))


def _stack(folder: Path, rank: int) -> str:
    return (folder / f"stacks-{rank}.txt").read_text().strip() or "(it does not answer)"
