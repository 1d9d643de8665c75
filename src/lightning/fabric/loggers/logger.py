"""What a logger is, and the part that loggers share which write into a numbered folder per run."""

import functools
import os
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from multiprocessing.util import Finalize
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning.fabric.utilities.cloud_io import _is_dir, _is_local_file_protocol, get_filesystem
from lightning.fabric.utilities.logger import _add_prefix
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.types import _PATH


class Logger(ABC):
    """Receives what ``fabric.log``, ``fabric.log_dict`` and the user's own calls report.

    Every rank calls every method; a logger writes on global rank 0 only (see :func:`rank_zero_only` and
    :func:`rank_zero_experiment`). ``Fabric`` accepts any object with these methods.
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment: runs of one name are compared with each other."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of this name it is."""

    @property
    def root_dir(self) -> str | None:
        """The folder with all experiments, where the logger writes files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run, where the logger writes files."""
        return None

    @property
    def group_separator(self) -> str:
        """What joins the parts of a metric's name into groups: ``"train/loss"``."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record scalars: Python numbers or tensors with one element."""

    @abstractmethod
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record the settings of the run."""

    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:  # noqa: B027  optional
        """Record the graph of the model as traced with the example input, where the logger can."""

    def save(self) -> None:  # noqa: B027  optional
        """Write out what is held back."""

    def finalize(self, status: str) -> None:
        """End the run, with a status such as ``"success"``, ``"failed"`` or ``"aborted"``."""
        self.save()


class _RunFolderLogger(Logger):
    """A logger with a folder ``root_dir/name/version``: keeps the guard and the names; subclasses write."""

    LOGGER_JOIN_CHAR = "-"

    def __init__(self, root_dir: _PATH, name: str | None, version: int | str | None, prefix: str) -> None:
        root_dir = os.fspath(root_dir)
        self._local = _is_local_file_protocol(root_dir)
        self._root_dir = os.path.expanduser(root_dir.rpartition("://")[2]) if self._local else root_dir
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        self._fs = get_filesystem(self._root_dir)
        self._rows_logged = 0
        self._used_in_process: int | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        """As given, else the next number without a folder (settled when it is first asked for)."""
        if self._version is None:
            self._version = self._next_version()
        return self._version

    @property
    def root_dir(self) -> str:
        return self._root_dir

    @property
    def log_dir(self) -> str:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return os.path.join(self._root_dir, self._name, version)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record scalars; without a ``step``, here or among the metrics, it is the number of earlier calls."""
        if step is None:
            step = metrics.get("step", self._rows_logged)
        self._write_metrics(_add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR), step)
        self._rows_logged += 1

    @rank_zero_only
    def save(self) -> None:
        self._flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._flush()

    def __getstate__(self) -> dict[str, Any]:
        self.version  # noqa: B018  settles it: a copy in another process belongs to the same run
        return {**vars(self), "_used_in_process": None}

    def _flush_when_process_ends(self) -> bool:
        """Arrange it once; return whether this is the first time in this process."""
        if self._used_in_process == os.getpid():
            return False
        self._used_in_process = os.getpid()
        # Not atexit, which does not run in a process that multiprocessing has forked.
        Finalize(None, self._flush_if_folder_exists, exitpriority=10)
        return True

    def _flush_if_folder_exists(self) -> None:
        if not self._local or os.path.isdir(self.log_dir):
            self._flush()

    @abstractmethod
    def _write_metrics(self, metrics: Mapping[str, Any], step: int) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...

    def _next_version(self) -> int:
        runs = os.path.join(self._root_dir, self._name)
        if not _is_dir(self._fs, runs, strict=True):
            return 0
        found = (os.path.basename(entry.rstrip("/")) for entry in self._fs.ls(runs, detail=False))
        numbers = (name.removeprefix("version_") for name in found if name.startswith("version_"))
        return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def rank_zero_experiment(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate the getter of ``experiment``, so that ranks other than 0 get an object that does nothing."""

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        return _DummyExperiment() if rank_zero_only.rank > 0 else fn(self)

    return experiment


class _DummyExperiment:
    """Takes every call, attribute and item, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # else copy, pickle and numpy would take this for an object with their protocols
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: object) -> None: ...
