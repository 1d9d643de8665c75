"""Metrics for TensorBoard, through ``tensorboard`` or ``tensorboardX``, whichever is installed."""

import importlib
import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning.fabric.loggers.logger import _RunFolderLogger, rank_zero_experiment
from lightning.fabric.utilities.imports import package_available
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_callable_params
from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.fabric.utilities.types import _PATH

log = logging.getLogger(__name__)


class TensorBoardLogger(_RunFolderLogger):
    """Writes TensorBoard event files to ``root_dir/name/version_<n>[/sub_dir]`` on rank 0.

    Args:
        root_dir: Folder of all experiments.
        name: Folder in it for the experiment; ``""`` for none.
        version: Folder of this run: a number ``n`` for ``version_<n>``, a string as it is, ``None`` for the next
            free number.
        default_hp_metric: Whether ``log_hyperparams`` without a metric writes the placeholder ``hp_metric``, which
            the HPARAMS tab needs to list the run.
        prefix: Put before each metric's name, joined with ``-``.
        sub_dir: Folder inside the run's folder.
        **kwargs: For ``SummaryWriter``, such as ``comment``, ``max_queue`` and ``flush_secs``.

    Raises:
        ModuleNotFoundError: neither ``tensorboard`` nor ``tensorboardX`` is installed.
    """

    def __init__(
        self,
        root_dir: _PATH,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: _PATH | None = None,
        **kwargs: Any,
    ) -> None:
        self._package()
        super().__init__(root_dir, name, version, prefix)
        self._sub_dir = None if sub_dir is None else os.path.expanduser(os.fspath(sub_dir))
        self._default_hp_metric = default_hp_metric
        self._kwargs = kwargs
        self._writer: Any = None

    @property
    def sub_dir(self) -> str | None:
        """The folder inside the run's folder, if any."""
        return self._sub_dir

    @property
    def log_dir(self) -> str:
        return os.path.join(super().log_dir, self._sub_dir or "").rstrip("/")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``SummaryWriter``: ``logger.experiment.add_image(...)``. The first use makes the folder."""
        if self._flush_when_process_ends() or self._writer is None:  # a fork leaves the writer's thread behind
            self._fs.makedirs(self.log_dir, exist_ok=True)
            writer = importlib.import_module(self._package()).SummaryWriter
            self._writer = writer(log_dir=self.log_dir, **self._kwargs)
        return self._writer

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | float | None = None,
        step: int | None = None,
    ) -> None:
        """Record the settings for the HPARAMS tab, with the metrics that the runs are to be compared by."""
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif not isinstance(metrics, dict):
            metrics = {"hp_metric": metrics}
        self._write_metrics(metrics, step or 0)

        summary = importlib.import_module(f"{self._package()}.summary")
        settings = _sanitize_callable_params(_flatten_dict(_convert_params(params)))
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for part in summary.hparams(plain, metrics):
            self.experiment._get_file_writer().add_summary(part)

    @rank_zero_only
    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:
        """Record the graph of the model, traced with ``input_array`` or the model's ``example_input_array``."""
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if example is None:
            rank_zero_warn(
                "TensorBoardLogger.log_graph records nothing without an example input: pass `input_array=` or set"
                " `model.example_input_array`."
            )
            return
        user_module = getattr(model, "_original_module", model)  # what `fabric.setup` returns cannot be traced
        self.experiment.add_graph(user_module, example)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._writer is not None:
            self._writer.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_writer": None}

    def _write_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, dict):
                self.experiment.add_scalars(name, value, step)
                continue
            try:
                self.experiment.add_scalar(name, value.item() if isinstance(value, Tensor) else value, step)
            except Exception as error:
                raise ValueError(
                    f"TensorBoardLogger logs numbers, tensors with one element and dicts of them, but {name!r} is"
                    f" {value!r}. For other things use `logger.experiment`, the SummaryWriter."
                ) from error

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @staticmethod
    def _package() -> str:
        if package_available("tensorboard"):
            return "torch.utils.tensorboard"
        if package_available("tensorboardX"):
            return "tensorboardX"
        raise ModuleNotFoundError("TensorBoardLogger needs a package that is not installed: pip install tensorboard")
