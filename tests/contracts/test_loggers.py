"""What ``Fabric`` and its users may do with any logger, whoever wrote it."""

import pickle
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only

# torch's writer uses a numpy name that numpy is about to drop
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")


class InMemoryLogger(Logger):
    """The least that a logger of one's own is: the fake that tests can log to."""

    name = "memory"
    version = 0

    def __init__(self, root_dir: Path) -> None:
        self.rows: list[dict[str, Any]] = []

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None: ...


MakeLogger = Callable[[Path], Logger]


@pytest.fixture(params=[CSVLogger, TensorBoardLogger, InMemoryLogger], ids=lambda cls: cls.__name__)
def make(request: pytest.FixtureRequest) -> MakeLogger:
    return request.param


def use(logger: Logger) -> None:
    """Every method, as a program would on each rank."""
    logger.log_hyperparams({"lr": 0.1, "layers": [1, 2], "model": {"depth": 3}, "note": None})
    logger.log_hyperparams(Namespace(seed=1))
    logger.log_metrics({"loss": torch.tensor(0.5), "count": 3}, step=0)
    logger.log_metrics({"loss": 0.25})
    logger.save()


class TestAnyLogger:
    def test_takes_every_call(self, make: MakeLogger, tmp_path: Path) -> None:
        logger = make(tmp_path)
        use(logger)
        logger.finalize("success")

    @pytest.mark.parametrize("status", ["success", "failed", "aborted"])
    def test_may_be_saved_and_finalized_before_anything_else_and_twice(
        self, make: MakeLogger, tmp_path: Path, status: str
    ) -> None:
        logger = make(tmp_path)
        for _ in range(2):
            logger.save()
            logger.finalize(status)
        assert list(tmp_path.rglob("*.*")) == []

    def test_writes_on_rank_0_only(self, make: MakeLogger, tmp_path: Path) -> None:
        rank_zero_only.rank = 1
        logger = make(tmp_path)
        use(logger)
        logger.finalize("success")
        assert list(tmp_path.iterdir()) == []
        assert getattr(logger, "rows", []) == []

    def test_keeps_its_name_version_and_folder(self, make: MakeLogger, tmp_path: Path) -> None:
        logger = make(tmp_path)
        before = (logger.name, logger.version, logger.root_dir, logger.log_dir, logger.group_separator)
        use(logger)
        logger.finalize("success")
        assert (logger.name, logger.version, logger.root_dir, logger.log_dir, logger.group_separator) == before

    def test_travels_to_another_process_before_and_in_the_middle_of_use(self, make: MakeLogger, tmp_path: Path) -> None:
        logger = make(tmp_path)
        for _ in range(2):
            copy = pickle.loads(pickle.dumps(logger))
            assert (copy.name, copy.version, copy.log_dir) == (logger.name, logger.version, logger.log_dir)
            use(logger)
        use(copy)
        copy.finalize("success")
        logger.finalize("success")

    def test_receives_what_fabric_logs(self, make: MakeLogger, tmp_path: Path) -> None:
        memory, logger = InMemoryLogger(tmp_path), make(tmp_path)
        fabric = Fabric(accelerator="cpu", loggers=[logger, memory])
        fabric.log("loss", torch.tensor(0.5), step=3)
        fabric.log_dict({"loss": 0.25, "accuracy": 1.0})
        fabric.logger.finalize("success")
        assert fabric.logger is logger
        assert memory.rows == [{"loss": 0.5, "step": 3}, {"loss": 0.25, "accuracy": 1.0, "step": None}]


class TestDuckTyping:
    def test_an_object_with_the_same_methods_is_a_logger(self) -> None:
        class Theirs:
            def __init__(self) -> None:
                self.rows: list[Any] = []

            def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
                self.rows.append((dict(metrics), step))

        theirs = Theirs()
        Fabric(accelerator="cpu", loggers=theirs).log("a", 1, step=2)  # type: ignore[arg-type]
        assert theirs.rows == [({"a": 1}, 2)]
