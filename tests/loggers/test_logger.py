import copy
import pickle
from typing import Any

import pytest

from lightning.fabric.loggers.logger import Logger, rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only


class Minimal(Logger):
    name = "minimal"
    version = 0

    def __init__(self) -> None:
        self.saved = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None:
        self.saved += 1

    @property
    @rank_zero_experiment
    def experiment(self) -> list[str]:
        """The thing that is written to."""
        return ["real"]


class TestLogger:
    @pytest.mark.parametrize("missing", ["name", "version", "log_metrics", "log_hyperparams"])
    def test_four_members_are_abstract(self, missing: str) -> None:
        members = {name: None for name in ("name", "version", "log_metrics", "log_hyperparams") if name != missing}
        with pytest.raises(TypeError, match=missing):
            type("Incomplete", (Logger,), members)()  # type: ignore[abstract]

    def test_the_rest_has_defaults(self) -> None:
        logger = Minimal()
        assert (logger.root_dir, logger.log_dir, logger.group_separator) == (None, None, "/")
        assert logger.log_graph(None) is None  # type: ignore[arg-type,func-returns-value]

    def test_finalize_saves(self) -> None:
        logger = Minimal()
        logger.finalize("success")
        assert logger.saved == 1


class TestRankZeroExperiment:
    def test_is_the_real_one_on_rank_0(self) -> None:
        assert Minimal().experiment == ["real"]
        assert Minimal.experiment.__doc__ == "The thing that is written to."

    def test_does_nothing_on_other_ranks(self) -> None:
        rank_zero_only.rank = 1
        experiment: Any = Minimal().experiment
        experiment.add_scalar("loss", 1.0).then(2)["key"].call()
        experiment["key"] = 3
        with experiment.run() as run:
            run.log(1)

    def test_the_one_that_does_nothing_can_be_copied(self) -> None:
        rank_zero_only.rank = 1
        experiment = Minimal().experiment
        assert type(copy.deepcopy(experiment)) is type(experiment)
        assert type(pickle.loads(pickle.dumps(experiment))) is type(experiment)
