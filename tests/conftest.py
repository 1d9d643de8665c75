"""What every test gets: the process as it was before, and an order that shows failures early."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning.fabric.testing import preload
from lightning.fabric.utilities.rank_zero import rank_zero_only


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run fast tests first; skip tests for a GPU where there is none.

    Several workers begin with the files that have slow tests: none is left with a long one at the end.
    """
    several = hasattr(config, "workerinput")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (several and item.path not in slow, item.get_closest_marker("slow") is not None))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have test modules imported once, in the process that all ranks are forked from."""
    preload(*dict.fromkeys(item.module.__name__ for item in session.items if isinstance(item, pytest.Function)))


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    """Undo what a test changed in this process; fail the test that leaves a process group behind."""
    environ, rank_zero = dict(os.environ), dict(vars(rank_zero_only))
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    python_rng, numpy_rng, torch_rng = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    os.environ.clear()
    os.environ.update(environ)
    vars(rank_zero_only).clear()
    vars(rank_zero_only).update(rank_zero)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports the compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    random.setstate(python_rng)
    np.random.set_state(numpy_rng)
    torch.set_rng_state(torch_rng)
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group initialised", pytrace=False)
