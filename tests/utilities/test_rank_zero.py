import logging
import warnings

import pytest

from lightning.fabric.utilities import rank_zero
from lightning.fabric.utilities.rank_zero import (
    _get_rank,
    rank_prefixed_message,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in rank_zero._RANK_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    rank_zero_only.rank = None  # type: ignore[assignment]


def test_runs_on_rank_zero_only() -> None:
    @rank_zero_only
    def add(x: int, *, y: int) -> int:
        """Adds."""
        return x + y

    assert add.__doc__ == "Adds."
    assert add(1, y=2) == 3
    rank_zero_only.rank = 1
    assert add(1, y=2) is None


def test_default_elsewhere() -> None:
    rank_zero_only.rank = 3
    assert rank_zero_only(lambda: 1, default="other")() == "other"


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"])
def test_the_rank_comes_from_the_environment_at_the_time_of_the_call(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = rank_zero_only(lambda: "ran")
    assert function() == "ran"
    monkeypatch.setenv(variable, "2")
    assert function() is None
    assert rank_zero_only.rank == 2
    rank_zero_only.rank = 0
    assert function() == "ran", "what was set goes first"


def test_the_global_rank_goes_before_the_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _get_rank() is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "4")
    assert _get_rank() == 4


def test_a_rank_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK must be an integer, but is 'first'"):
        _get_rank()


def test_warnings_point_at_the_first_line_outside_the_library() -> None:
    with pytest.warns(UserWarning, match="careful") as caught:
        rank_zero_warn("careful")
    assert caught[0].filename == __file__
    with pytest.deprecated_call(match="old") as caught:
        rank_zero_deprecation("old")
    assert caught[0].filename == __file__


def test_a_stacklevel_counts_from_the_caller() -> None:
    def inner() -> None:
        rank_zero_warn("careful", RuntimeWarning, stacklevel=2)

    with pytest.warns(RuntimeWarning) as caught:
        inner()  # this line
    assert caught[0].lineno == inner.__code__.co_firstlineno + 4


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lightning.fabric")
    rank_zero_info("%s info", "first")
    rank_zero_debug("first debug")
    rank_zero_only.rank = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_zero_warn("no")
        rank_zero_deprecation("no")
    rank_zero_info("second")
    rank_zero_debug("second")
    assert [record.getMessage() for record in caplog.records] == ["first info", "first debug"]


def test_messages_show_on_stderr_unless_the_program_has_its_own_logging(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    rank_zero_info("shown")
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    rank_zero_info("left to the program")
    assert capsys.readouterr().err == "shown\n"


def test_prefix() -> None:
    assert rank_prefixed_message("text", 1) == "[rank: 1] text"
    assert rank_prefixed_message("text", None) == "text"
