import csv
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning.fabric.loggers import CSVLogger
from lightning.fabric.loggers._yaml import to_yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with fsspec.open(os.path.join(logger.log_dir, "metrics.csv"), "r") as file:
        return list(csv.DictReader(file))


def log_and_save(logger: CSVLogger, *metrics: dict[str, Any]) -> None:
    for row in metrics:
        logger.log_metrics(row)
    logger.save()


class TestFolder:
    def test_is_root_name_and_version(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        assert (logger.root_dir, logger.name, logger.version) == (str(tmp_path), "lightning_logs", 0)
        assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")

    @pytest.mark.parametrize("name", [None, ""])
    def test_without_a_name_it_is_under_the_root(self, tmp_path: Path, name: str | None) -> None:
        assert Path(CSVLogger(tmp_path, name=name).log_dir) == tmp_path / "version_0"

    @pytest.mark.parametrize(("version", "folder"), [(7, "version_7"), ("best", "best")])
    def test_takes_the_version_as_given(self, tmp_path: Path, version: int | str, folder: str) -> None:
        assert Path(CSVLogger(tmp_path, "a", version).log_dir) == tmp_path / "a" / folder

    def test_the_next_version_follows_the_highest(self, tmp_path: Path) -> None:
        for folder in ("version_0", "version_10", "version_9", "version_x", "other"):
            (tmp_path / "a" / folder).mkdir(parents=True)
        assert CSVLogger(tmp_path, "a").version == 11

    def test_asking_for_it_makes_no_folder(self, tmp_path: Path) -> None:
        assert CSVLogger(tmp_path).log_dir
        assert list(tmp_path.iterdir()) == []

    def test_two_runs_that_start_together_do_not_share_it(self, tmp_path: Path) -> None:
        first, second = CSVLogger(tmp_path), CSVLogger(tmp_path)
        assert first.version == second.version == 0
        log_and_save(first, {"a": 1})
        log_and_save(second, {"a": 2})
        assert (rows(first)[0]["a"], rows(second)[0]["a"], second.version) == ("1", "2", 1)

    def test_a_file_of_the_same_version_is_overwritten_with_a_warning(self, tmp_path: Path) -> None:
        log_and_save(CSVLogger(tmp_path, version=3), {"a": 1}, {"a": 2})
        again = CSVLogger(tmp_path, version=3)
        with pytest.warns(UserWarning, match=r"version_3/metrics\.csv exists and will be overwritten"):
            log_and_save(again, {"b": 3})
        assert rows(again) == [{"b": "3", "step": "0"}]


class TestRows:
    def test_header_is_every_metric_and_step(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"loss": 0.1, "lr": 1e-05}, step=7)
        logger.save()
        assert (Path(logger.log_dir) / "metrics.csv").read_text() == "loss,lr,step\n0.1,1e-05,7\n"

    def test_new_metrics_widen_the_header(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        log_and_save(logger, {"a": 1}, {"a": 2, "b": 3})
        log_and_save(logger, {"c": 'quo"ted, text\nof two lines'})
        log_and_save(logger, {"b": 4})
        assert rows(logger) == [
            {"a": "1", "b": "", "c": "", "step": "0"},
            {"a": "2", "b": "3", "c": "", "step": "1"},
            {"a": "", "b": "", "c": 'quo"ted, text\nof two lines', "step": "2"},
            {"a": "", "b": "4", "c": "", "step": "3"},
        ]

    def test_known_metrics_are_appended_without_a_rewrite(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        log_and_save(logger, {"a": 1})
        inode = os.stat(logger.experiment.metrics_file_path).st_ino
        log_and_save(logger, {"a": 2})
        assert os.stat(logger.experiment.metrics_file_path).st_ino == inode
        log_and_save(logger, {"b": 3})
        assert os.stat(logger.experiment.metrics_file_path).st_ino != inode

    @pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), 0.5])
    def test_scalars_of_any_kind_are_numbers(self, tmp_path: Path, value: Any) -> None:
        logger = CSVLogger(tmp_path)
        log_and_save(logger, {"a": value})
        assert rows(logger)[0]["a"] == "0.5"

    def test_a_tensor_with_several_elements_is_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'grad' has shape \(2,\)"):
            CSVLogger(tmp_path).log_metrics({"grad": torch.zeros(2)})

    def test_the_step_may_be_among_the_metrics(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        log_and_save(logger, {"a": 1, "step": 40})
        assert rows(logger) == [{"a": "1", "step": "40"}]

    def test_the_prefix_is_joined_with_a_dash(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path, prefix="train")
        log_and_save(logger, {"loss": 1})
        assert rows(logger) == [{"train-loss": "1", "step": "0"}]

    @given(
        batches=st.lists(
            st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False), min_size=1), max_size=3),
            max_size=4,
        )
    )
    def test_whatever_is_logged_reads_back(self, tmp_path_factory: pytest.TempPathFactory, batches: Any) -> None:
        logger = CSVLogger(tmp_path_factory.mktemp("logs"))
        for batch in batches:
            log_and_save(logger, *batch)
        logged = [row for batch in batches for row in batch]
        found = rows(logger) if logged else []
        assert [{k: float(v) for k, v in row.items() if v and k != "step"} for row in found] == logged
        assert [row["step"] for row in found] == [str(number) for number in range(len(logged))]


class TestFlush:
    def test_rows_are_held_back_up_to_a_number(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path, flush_logs_every_n_steps=2)
        sizes = []
        for step in range(5):
            logger.log_metrics({"a": 1}, step=step * 10)
            sizes.append(len(rows(logger)))
        assert sizes == [0, 2, 2, 4, 4]

    @pytest.mark.parametrize("number", [0, -1])
    def test_the_number_must_be_positive(self, tmp_path: Path, number: int) -> None:
        with pytest.raises(ValueError, match=rf"flush_logs_every_n_steps=\.\.\.\) must be at least 1, got {number}"):
            CSVLogger(tmp_path, flush_logs_every_n_steps=number)

    def test_finalize_writes_the_rest(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"a": 1})
        logger.finalize("success")
        assert len(rows(logger)) == 1

    def test_a_failed_rewrite_leaves_the_old_file_and_the_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logger = CSVLogger(tmp_path)
        log_and_save(logger, {"a": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
            with pytest.raises(OSError, match="no space left"):
                log_and_save(logger, {"b": 2})
        assert rows(logger) == [{"a": "1", "step": "0"}]
        logger.save()
        assert rows(logger) == [{"a": "1", "b": "", "step": "0"}, {"a": "", "b": "2", "step": "1"}]

    @pytest.mark.slow
    @pytest.mark.parametrize(("ending", "status"), [("raise RuntimeError", 1), ("pass", 0), ("sys.exit(3)", 3)])
    def test_rows_are_written_however_the_script_ends(self, tmp_path: Path, ending: str, status: int) -> None:
        code = (
            "import sys; from lightning.fabric.loggers import CSVLogger\n"
            f"CSVLogger({str(tmp_path)!r}).log_metrics({{'a': 1}})\n{ending}"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == status
        assert rows(CSVLogger(tmp_path, version=0)) == [{"a": "1", "step": "0"}]

    def test_a_fork_writes_its_own_rows_only(self, tmp_path: Path) -> None:
        import multiprocessing

        logger = CSVLogger(tmp_path)
        logger.log_metrics({"a": 1})
        child = multiprocessing.get_context("fork").Process(target=logger.log_metrics, args=({"a": 2},))
        child.start()
        child.join()
        logger.save()
        assert [row["a"] for row in rows(logger)] == ["1", "2"]

    def test_a_pickled_copy_goes_on_in_the_same_file(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"a": 1})
        log_and_save(pickle.loads(pickle.dumps(logger)), {"a": 2})
        assert rows(logger) == [{"a": "1", "step": "0"}, {"a": "2", "step": "1"}]

    def test_a_copy_pickled_before_the_first_row_uses_the_same_folder(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        log_and_save(pickle.loads(pickle.dumps(logger)), {"a": 1})
        assert rows(logger) == [{"a": "1", "step": "0"}]


class TestOtherRanks:
    def test_write_nothing(self, tmp_path: Path) -> None:
        rank_zero_only.rank = 1
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"a": 1})
        logger.log_hyperparams({"lr": 1})
        logger.save()
        logger.finalize("success")
        assert list(tmp_path.iterdir()) == []


class TestRemote:
    @pytest.fixture
    def root(self) -> Iterator[str]:
        yield "memory://csv_logger"
        fs = fsspec.filesystem("memory")
        if fs.exists("/csv_logger"):
            fs.rm("/csv_logger", recursive=True)

    def test_works_on_any_filesystem(self, root: str) -> None:
        logger = CSVLogger(root)
        logger.log_hyperparams({"lr": 0.1})
        log_and_save(logger, {"a": 1}, {"b": 2})
        log_and_save(logger, {"a": 3})
        assert [row["a"] for row in rows(logger)] == ["1", "", "3"]
        assert CSVLogger(root).version == 1
        assert fsspec.open(f"{logger.log_dir}/hparams.yaml", "r").open().read() == "lr: 0.1\n"


class TestHyperparams:
    def test_are_kept_over_calls(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        logger.log_hyperparams({"lr": 1e-5, "betas": (0.9, 0.999), "path": Path("a/b"), "model": {"depth": 3}})
        logger.log_hyperparams(Namespace(lr=1e-4, seed=np.int64(1), resume=None, on=True))
        text = (Path(logger.log_dir) / "hparams.yaml").read_text()
        assert text.splitlines()[:2] == ["lr: 0.0001", "betas: [0.9, 0.999]"]
        assert yaml.safe_load(text) == {
            "lr": 1e-4,
            "betas": [0.9, 0.999],
            "path": "a/b",
            "model": {"depth": 3},
            "seed": 1,
            "resume": None,
            "on": True,
        }

    @given(
        st.dictionaries(
            st.text(),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                max_leaves=6,
            ),
            max_size=4,
        )
    )
    def test_any_yaml_reader_gives_them_back(self, settings: dict[str, Any]) -> None:
        assert (yaml.safe_load(to_yaml(settings)) or {}) == settings
