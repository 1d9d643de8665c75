import logging
import multiprocessing
import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.loggers import tensorboard as module
from lightning.fabric.utilities.rank_zero import rank_zero_only

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")


def written(logger: TensorBoardLogger) -> EventAccumulator:
    logger.finalize("success")
    return EventAccumulator(logger.log_dir).Reload()


class TestFolder:
    def test_is_root_name_version_and_sub_dir(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path, "a", sub_dir="train")
        assert (logger.root_dir, logger.name, logger.version, logger.sub_dir) == (str(tmp_path), "a", 0, "train")
        assert logger.log_dir == str(tmp_path / "a" / "version_0" / "train")

    @pytest.mark.parametrize("name", ["", None])
    def test_without_a_name_it_is_under_the_root(self, tmp_path: Path, name: str | None) -> None:
        assert TensorBoardLogger(tmp_path, name).log_dir == str(tmp_path / "version_0")

    def test_a_string_version_is_used_as_is(self, tmp_path: Path) -> None:
        assert TensorBoardLogger(tmp_path, version="best").log_dir == str(tmp_path / "lightning_logs" / "best")

    def test_the_next_run_gets_the_next_version(self, tmp_path: Path) -> None:
        TensorBoardLogger(tmp_path).log_metrics({"a": 1})
        assert TensorBoardLogger(tmp_path).version == 1


class TestMetrics:
    def test_scalars_are_written_with_their_step(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"loss": torch.tensor(0.5)}, step=3)
        logger.log_metrics({"loss": 0.25}, step=4)
        assert [(e.step, e.value) for e in written(logger).Scalars("loss")] == [(3, 0.5), (4, 0.25)]

    def test_without_a_step_calls_are_counted(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        for value in (1, 2, 3):
            logger.log_metrics({"a": value})
        assert [e.step for e in written(logger).Scalars("a")] == [0, 1, 2]

    def test_the_prefix_is_joined_with_a_dash(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path, prefix="train")
        logger.log_metrics({"loss": 1})
        assert written(logger).Tags()["scalars"] == ["train-loss"]

    def test_a_dict_becomes_one_chart(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"loss": {"train": 1.0, "test": 2.0}}, step=0)
        logger.save()
        assert {path.name for path in Path(logger.log_dir).iterdir() if path.is_dir()} == {"loss_train", "loss_test"}

    @pytest.mark.parametrize("value", ["text", torch.zeros(2), [1, 2]])
    def test_what_is_not_a_scalar_is_refused_by_name(self, tmp_path: Path, value: Any) -> None:
        with pytest.raises(ValueError, match=r"'grad' is .*logger\.experiment"):
            TensorBoardLogger(tmp_path).log_metrics({"grad": value})


class TestHyperparams:
    def test_are_written_with_the_placeholder(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_hyperparams({"lr": 0.1, "model": {"depth": 3}, "path": Path("a"), "none": None})
        events = written(logger)
        assert [e.value for e in events.Scalars("hp_metric")] == [-1]
        assert events.PluginTagToContent("hparams").keys() == {
            "_hparams_/experiment",
            "_hparams_/session_start_info",
            "_hparams_/session_end_info",
        }

    @pytest.mark.parametrize(("metrics", "tag"), [(0.9, "hp_metric"), ({"accuracy": 0.9}, "accuracy")])
    def test_are_written_with_the_metrics_given(self, tmp_path: Path, metrics: Any, tag: str) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_hyperparams(Namespace(lr=0.1), metrics, step=5)
        assert [(e.step, e.value) for e in written(logger).Scalars(tag)] == [(5, pytest.approx(0.9))]

    def test_without_the_placeholder_they_are_written_all_the_same(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
        logger.log_hyperparams({"lr": 0.1})
        events = written(logger)
        assert events.Tags()["scalars"] == []
        assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns about itself
class TestGraph:
    def test_is_traced_with_the_example(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_graph(torch.nn.Linear(2, 1), torch.ones(1, 2))
        assert written(logger).Tags()["graph"]

    def test_the_model_may_carry_the_example(self, tmp_path: Path) -> None:
        logger, model = TensorBoardLogger(tmp_path), torch.nn.Linear(2, 1)
        model.example_input_array = torch.ones(1, 2)  # type: ignore[assignment]
        logger.log_graph(model)
        assert written(logger).Tags()["graph"]

    def test_a_module_that_fabric_has_set_up_is_traced(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        model = Fabric(accelerator="cpu", precision="bf16-mixed").setup(torch.nn.Linear(2, 1))
        logger.log_graph(model, torch.ones(1, 2))
        assert written(logger).Tags()["graph"]


def test_a_graph_without_an_example_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="without an example input"):
        TensorBoardLogger(tmp_path).log_graph(torch.nn.Linear(2, 1))


class TestWriter:
    def test_gets_the_keywords(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path, filename_suffix=".mine")
        logger.log_metrics({"a": 1})
        assert [name.endswith(".mine") for name in os.listdir(logger.log_dir)] == [True]

    def test_is_not_made_on_other_ranks(self, tmp_path: Path) -> None:
        rank_zero_only.rank = 1
        TensorBoardLogger(tmp_path).experiment.add_image("x", None)
        assert list(tmp_path.iterdir()) == []

    def test_stays_behind_when_the_logger_is_pickled(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"a": 1}, step=0)
        copy = pickle.loads(pickle.dumps(logger))
        copy.log_metrics({"a": 2}, step=1)
        copy.finalize("success")
        assert copy.log_dir == logger.log_dir
        assert [e.value for e in written(logger).Scalars("a")] == [1, 2]

    def test_a_fork_gets_its_own(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"a": 1}, step=0)

        child = multiprocessing.get_context("fork").Process(target=logger.log_metrics, args=({"a": 2}, 1))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert sorted(e.value for e in written(logger).Scalars("a")) == [1, 2]


class TestPackage:
    def test_tensorboardx_will_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "package_available", lambda name: name == "tensorboardX")
        monkeypatch.setitem(sys.modules, "tensorboardX", Mock())
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"a": 1}, step=2)
        logger.experiment.add_scalar.assert_called_once_with("a", 1, 2)

    def test_with_neither_the_error_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "package_available", lambda name: False)
        with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
            TensorBoardLogger(tmp_path)

    def test_the_module_has_its_own_log(self) -> None:
        assert module.log is logging.getLogger("lightning.fabric.loggers.tensorboard")
