import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from lightning.fabric.utilities.seed import (
    _collect_rng_states,
    _set_rng_states,
    isolate_rng,
    pl_worker_init_function,
    reset_seed,
    seed_everything,
)


def _draw() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_seeds_all_generators_and_the_environment() -> None:
    assert seed_everything(7, workers=True) == 7
    first = _draw()
    assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == ("7", "1")
    seed_everything(7)
    assert _draw() == first
    assert os.environ["PL_SEED_WORKERS"] == "0"
    seed_everything(8)
    assert all(a != b for a, b in zip(first, _draw(), strict=True))


def test_no_seed_means_that_of_the_environment_else_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert seed_everything() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "2020")
    assert seed_everything() == 2020


@pytest.mark.parametrize("seed", [-1, 2**32, "text", [1], float("inf")])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed="):
        seed_everything(seed)


def test_a_bad_seed_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "abc")
    with pytest.raises(ValueError, match="PL_GLOBAL_SEED='abc' is not an integer"):
        seed_everything()


@pytest.mark.parametrize("seed", [0, 2**32 - 1, "5"])
def test_bounds_are_inside(seed: Any) -> None:
    assert seed_everything(seed) == int(seed)


def test_verbose_says_it_on_every_rank(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    seed_everything(1)
    assert "[rank: 1] Seed set to 1" in caplog.text
    caplog.clear()
    seed_everything(2, verbose=False)
    assert not caplog.text


def test_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    before = torch.get_rng_state()
    reset_seed()
    assert torch.equal(before, torch.get_rng_state())
    seed_everything(3, workers=True)
    first = _draw()
    reset_seed()
    assert _draw() == first
    assert os.environ["PL_SEED_WORKERS"] == "1"


def test_isolate_rng_also_when_the_block_raises() -> None:
    seed_everything(1)
    expected = _draw()
    seed_everything(1)
    with pytest.raises(KeyError), isolate_rng():
        _draw()
        raise KeyError
    assert _draw() == expected


def test_states_survive_a_serialisation_that_has_no_tuples() -> None:
    states = _collect_rng_states()
    assert set(states) == {"torch", "python", "numpy"}
    version, internal, gauss = states["python"]
    expected = _draw()
    _set_rng_states(states | {"python": [version, list(internal), gauss]})
    assert _draw() == expected


def test_every_worker_rank_and_epoch_gets_seeds_of_its_own() -> None:
    drawn = set()
    for epoch_seed in (0, 1):
        for rank in range(3):
            for worker in range(3):
                torch.manual_seed(epoch_seed * 1000 + worker)  # as the data loader does in a worker
                pl_worker_init_function(worker, rank)
                drawn.update(_draw())
    assert len(drawn) == 2 * 3 * 3 * 3


def test_worker_seeds_repeat() -> None:
    def draw() -> tuple[float, ...]:
        torch.manual_seed(5)
        pl_worker_init_function(1, 2)
        return _draw()

    assert draw() == draw()


@pytest.mark.slow
def test_works_without_numpy() -> None:
    code = """
import sys
sys.modules["numpy"] = None
from lightning.fabric.utilities.seed import seed_everything, isolate_rng, pl_worker_init_function
seed_everything(1)
pl_worker_init_function(0, 0)
with isolate_rng():
    pass
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
