"""Ranks that act together, each for itself, fail together."""

import pytest

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks
from lightning.fabric.utilities.ranks import all_or_none


def one_fails(error: type[BaseException]) -> str:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    try:
        with all_or_none(fabric.strategy, "sowing"):
            if fabric.global_rank == 1:
                raise error("no seeds")
    except (error, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def test_the_others_name_the_rank_that_failed_and_that_one_has_its_own_error():
    other, own = on_ranks(2, one_fails, ValueError)
    assert own == "ValueError: no seeds"
    assert other.startswith("RuntimeError")
    for word in ("Rank 1", "sowing", "no seeds"):
        assert word in other


def test_nothing_is_raised_if_none_fails():
    with all_or_none(Fabric(accelerator="cpu", devices=1).strategy, "sowing"):
        pass


def test_it_does_not_catch_what_ends_the_process():
    with pytest.raises(KeyboardInterrupt), all_or_none(Fabric(accelerator="cpu", devices=1).strategy, "sowing"):
        raise KeyboardInterrupt
