"""Start the ranks by running the script again. This process is the first rank; the others are its children."""

import atexit
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, ClassVar, NoReturn

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.strategies.launchers import calls, report
from lightning.fabric.strategies.launchers.command import command_of_this_program, directory_of_this_program
from lightning.fabric.strategies.launchers.launcher import _Launcher
from lightning.fabric.strategies.launchers.processes import FAREWELL, RankProcesses, follow_launcher
from lightning.fabric.strategies.launchers.report import Failure

_FROM_LAUNCHER = "LT_LAUNCH"  # what a child has to know: JSON with the parent's pid, the folder for errors, threads
_GRACE = 3.0  # seconds that the script has to raise by itself after another rank has failed


class _SubprocessScriptLauncher(_Launcher):
    """Run this program's own command again for the local ranks 1 to ``num_processes`` - 1 of this machine.

    A child that fails ends this process and the other children within seconds, also when they wait in a collective;
    a page about the first failure is the last thing printed. At its normal end this process waits for the children.
    Where the environment has started the processes already, none is started here.
    """

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        self._cluster_environment = cluster_environment
        self._num_processes = num_processes
        self._num_nodes = num_nodes

    @property
    def is_interactive_compatible(self) -> bool:
        return False

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start the other ranks, once, and return ``function(*args, **kwargs)``.

        Raises:
            RuntimeError: There is no script that could be run again.
        """
        _FirstRank.finish_former_job()
        if self._cluster_environment.creates_processes_externally:
            _set_num_threads(self._num_processes)
            _become_child()
        else:
            self._start_children()
        return function(*args, **kwargs)

    def _start_children(self) -> None:
        command = command_of_this_program() if self._num_processes > 1 else []
        environment = self._cluster_environment
        variables = {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self._num_nodes * self._num_processes),
        }
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        threads = _set_num_threads(self._num_processes)
        if self._num_processes == 1:
            return
        first = environment.node_rank() * self._num_processes
        ranks = RankProcesses(tempfile.mkdtemp(prefix="ranks-"))
        launch = {"parent": os.getpid(), "errors": str(ranks.directory), "threads": threads, "first": first}
        for local_rank in range(1, self._num_processes):
            env = {**os.environ, "LOCAL_RANK": str(local_rank), _FROM_LAUNCHER: json.dumps(launch)}
            directory = directory_of_this_program()
            child = subprocess.Popen(command, env=env, cwd=directory, stdin=subprocess.DEVNULL)
            ranks.add(first + local_rank, child)
        _FirstRank(first, ranks, command, before).take_charge()


def _set_num_threads(num_processes: int) -> int | None:
    """Give this rank its share of the cores; return the number if it was not the user who has set it."""
    from lightning.fabric.utilities.distributed import _set_num_threads_if_needed

    set_by_user = "OMP_NUM_THREADS" in os.environ
    _set_num_threads_if_needed(num_processes)
    return None if set_by_user else int(os.environ["OMP_NUM_THREADS"])


# -- in a child


def _become_child() -> None:
    """Follow the parent: the same threads, an error file in its folder, an end when it ends."""
    text = os.environ.pop(_FROM_LAUNCHER, None)  # not for the processes that the script starts
    if text is None:  # somebody else's process, or a second launch in the same one
        return
    launch = json.loads(text)
    if launch["threads"] is not None:
        import torch

        torch.set_num_threads(launch["threads"])
    rank = launch["first"] + int(os.environ["LOCAL_RANK"])
    follow_launcher(rank, launch["errors"], launch["parent"])


# -- in the parent


class _FirstRank:
    """This process as the first rank of its machine, in charge of the others."""

    in_charge: ClassVar["_FirstRank | None"] = None

    def __init__(
        self, rank: int, ranks: RankProcesses, command: list[str], environ_before: Mapping[str, str | None]
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._command = command
        self._environ_before = environ_before
        self._pid = os.getpid()
        self._script_has_ended = threading.Event()
        self._end = threading.Lock()  # of the thread that sees the launch to its end
        self._is_over = False

    def take_charge(self) -> None:
        """Watch the other ranks from now on, and see this process's own end."""
        _FirstRank.in_charge = self
        self._previous_hook = sys.excepthook
        self._stderr = sys.stderr  # other hooks may have put something else there when the page is printed
        sys.excepthook = self._script_has_raised
        atexit.register(self._wait_for_others)
        threading.Thread(target=self._watch, name="watch-ranks", daemon=True).start()

    @classmethod
    def finish_former_job(cls) -> None:
        """See the former launch to its end, if this is a new job in the same process: one of a Hydra sweep."""
        former = cls.in_charge
        if former is None or former._command == command_of_this_program():
            return
        former._wait_for_others()
        atexit.unregister(former._wait_for_others)
        sys.excepthook = former._previous_hook
        cls.in_charge = None
        for name, value in former._environ_before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    def _watch(self) -> None:
        if self._ranks.wait():
            return
        # The main thread is told by the lost connection, and can say where it was. If it cannot, or does not get to
        # its end, this process must end all the same.
        if not self._script_has_ended.wait(_GRACE) and self._end.acquire(blocking=False):
            self._exit_with_page()
        time.sleep(2 * FAREWELL)
        os._exit(1)

    def _script_has_raised(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() != self._pid:  # a fork that the script has made
            self._previous_hook(kind, error, trace)
            return
        report.write_error(self._ranks.directory, self._rank, error.with_traceback(trace))
        calls.finish_saves()  # for which the other ranks have to be there; if one is gone, `_watch` ends the waiting
        self._take_over()
        if isinstance(error, KeyboardInterrupt):
            self._ranks.interrupt()
        _, failures = self._end_others()
        if self._previous_hook is not sys.__excepthook__:  # the user's
            self._previous_hook(kind, error, trace)
        self._print_page(failures)

    def _wait_for_others(self) -> None:
        if os.getpid() != self._pid or self._is_over:
            return
        self._take_over()
        calls.destroy_process_group()  # whoever still waits for this rank must not wait for ever
        if not self._ranks.wait():
            logging.shutdown()  # the rest of the interpreter's farewell is skipped
            self._exit_with_page()
        self._end_others()

    def _take_over(self) -> None:
        """Make the end of the launch the main thread's; if the watching one has begun it, it ends the process."""
        self._script_has_ended.set()
        if not self._end.acquire(blocking=False):
            time.sleep(4 * FAREWELL)

    def _end_others(self) -> tuple[Failure | None, list[Failure]]:
        self._is_over = True
        cause, failures = self._ranks.first_cause(), self._ranks.failures()
        self._ranks.end()
        shutil.rmtree(self._ranks.directory, ignore_errors=True)
        return cause, failures

    def _exit_with_page(self) -> NoReturn:
        cause, failures = self._end_others()
        self._print_page(failures)
        os._exit(cause.shell_code if cause is not None else 1)

    def _print_page(self, failures: list[Failure]) -> None:
        sys.stdout.flush()
        print(report.page(failures), file=self._stderr, end="", flush=True)
