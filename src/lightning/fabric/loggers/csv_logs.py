"""Metrics as rows of ``metrics.csv``, settings as ``hparams.yaml``, in a numbered folder per run."""

import csv
import io
import math
import os
import weakref
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.fabric.loggers._yaml import to_yaml
from lightning.fabric.loggers.logger import _RunFolderLogger, rank_zero_experiment
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.fabric.utilities.logger import _convert_params
from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.fabric.utilities.types import _PATH


class CSVLogger(_RunFolderLogger):
    """Writes ``root_dir/name/version_<n>/metrics.csv`` on rank 0; needs nothing installed.

    The header is every metric logged so far and ``step``; a call of ``log_metrics`` is a row, with empty cells for
    the metrics that it lacks. Rows reach the file every ``flush_logs_every_n_steps`` rows, with ``save()`` and
    ``finalize()``, and when the process ends, by an exception too.

    Args:
        root_dir: Folder of all experiments, local or any fsspec URL.
        name: Folder in it for the experiment; ``None`` for none.
        version: Folder of this run: a number ``n`` for ``version_<n>``, a string as it is, ``None`` for the next
            free number.
        prefix: Put before each metric's name, joined with ``-``.
        flush_logs_every_n_steps: How many rows may be held back.
    """

    def __init__(
        self,
        root_dir: _PATH,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise ValueError(
                f"CSVLogger(flush_logs_every_n_steps=...) must be at least 1, got {flush_logs_every_n_steps!r}"
            )
        super().__init__(root_dir, name, version, prefix)
        self._flush_every = flush_logs_every_n_steps
        self._numbered = version is None
        self._writer: _ExperimentWriter | None = None
        self._hparams: dict[str, Any] = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> "_ExperimentWriter":
        """The writer of ``metrics.csv``; the first use makes the folder."""
        self._flush_when_process_ends()
        if self._writer is None:
            while not _claim(self.log_dir) and self._numbered:  # another run took this number since we looked
                self._version = int(self.version) + 1
            self._writer = _ExperimentWriter(self.log_dir)
        return self._writer

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Write the settings, and those of earlier calls, to ``hparams.yaml``."""
        self._hparams.update(_convert_params(params))
        with self._fs.open(os.path.join(self.experiment.log_dir, "hparams.yaml"), "w") as file:
            file.write(to_yaml(self._hparams))

    def _write_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        self.experiment.log_metrics(metrics, step)
        if len(self.experiment.metrics) >= self._flush_every:
            self.experiment.save()

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.save()


class _ExperimentWriter:
    """``metrics.csv`` of one run. Holds rows back, appends them; only new metrics rewrite the file."""

    NAME_METRICS_FILE = "metrics.csv"

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.metrics: list[dict[str, Any]] = []
        self.metrics_keys: list[str] = []
        self.metrics_file_path = os.path.join(log_dir, self.NAME_METRICS_FILE)
        self._fs = get_filesystem(log_dir)
        self._local = _is_local_file_protocol(log_dir)
        if self._fs.exists(self.metrics_file_path) and self._fs.size(self.metrics_file_path):
            rank_zero_warn(f"CSVLogger: {self.metrics_file_path} exists and will be overwritten by this run's metrics.")
        _writers.add(self)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Hold one row back until the next ``save``."""
        self.metrics.append({**{name: _scalar(name, value) for name, value in metrics.items()}, "step": step})

    def save(self) -> None:
        """Write the rows held back."""
        if not self.metrics:
            return
        names = [name for name in dict.fromkeys(key for row in self.metrics for key in row) if name != "step"]
        new = [name for name in names if name not in self.metrics_keys]
        if new or not self.metrics_keys:
            before = csv.DictReader(io.StringIO(self._read() if self.metrics_keys else "", newline=""))
            keys = [*self.metrics_keys[:-1], *new, "step"]
            self._replace(_csv([{key: key for key in keys}, *before, *self.metrics], keys))
            self.metrics_keys = keys
        else:
            self._append(_csv(self.metrics, self.metrics_keys))
        self.metrics = []

    def __getstate__(self) -> dict[str, Any]:
        self.save()  # a copy in another process goes on where this one ends
        return vars(self)

    def _read(self) -> str:
        with self._fs.open(self.metrics_file_path, "r", newline="", encoding="utf-8") as file:
            return file.read()

    def _append(self, text: str) -> None:
        if not self._local:  # object stores replace whole objects
            self._replace(self._read() + text)
        else:
            with open(self.metrics_file_path, "a", newline="", encoding="utf-8") as file:
                file.write(text)

    def _replace(self, text: str) -> None:
        """Let a reader, and a crash, find the old file or the new one."""
        target = f"{self.metrics_file_path}.tmp" if self._local else self.metrics_file_path
        with self._fs.open(target, "w", newline="", encoding="utf-8") as file:
            file.write(text)
        if self._local:
            os.replace(target, self.metrics_file_path)


_writers: weakref.WeakSet[_ExperimentWriter] = weakref.WeakSet()


def _save_all() -> None:
    for writer in list(_writers):
        if not writer._local or os.path.isdir(writer.log_dir):
            writer.save()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_save_all)  # else parent and child would both write the rows held back


def _claim(log_dir: str) -> bool:
    """Make the folder of a run; False if it has metrics already."""
    fs = get_filesystem(log_dir)
    fs.makedirs(log_dir, exist_ok=True)
    path = os.path.join(log_dir, _ExperimentWriter.NAME_METRICS_FILE)
    if not _is_local_file_protocol(log_dir):
        return not fs.exists(path)
    try:
        open(path, "x").close()
    except FileExistsError:
        return False
    return True


def _scalar(name: str, value: Any) -> Any:
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(f"CSVLogger logs scalars, but {name!r} has shape {shape}. Log a mean or each element.")
    return value.item() if hasattr(value, "item") else value


def _csv(rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, keys, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()
