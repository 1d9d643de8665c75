"""Seeds and states of the random number generators of python, numpy and torch."""

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning.fabric.utilities.imports import package_available
from lightning.fabric.utilities.rank_zero import _get_rank, log, rank_prefixed_message, rank_zero_only

min_seed_value = 0
max_seed_value = 2**32 - 1  # numpy's limit


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python, numpy (if installed) and torch on this process, and return the seed.

    Also sets the environment variable ``PL_GLOBAL_SEED``, which processes started later inherit, and
    ``PL_SEED_WORKERS``.

    Args:
        seed: 0 to 2**32 - 1. ``None``: the value of ``PL_GLOBAL_SEED``, else 0.
        workers: whether the workers of data loaders get seeds of their own (in ``fabric.setup_dataloaders``).
        verbose: log the seed, on every rank.

    Raises:
        ValueError: the seed is not an integer, or out of bounds.
    """
    given = os.environ.get("PL_GLOBAL_SEED", "0") if seed is None else seed
    source = f"seed={given!r}" if seed is not None else f"The environment variable PL_GLOBAL_SEED={given!r}"
    try:
        value = int(given)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{source} is not an integer.") from None
    if not min_seed_value <= value <= max_seed_value:
        raise ValueError(f"{source} is out of bounds: it must be from {min_seed_value} to {max_seed_value}.")
    if verbose:
        log.info(rank_prefixed_message(f"Seed set to {value}", _get_rank()))
    os.environ["PL_GLOBAL_SEED"] = str(value)
    os.environ["PL_SEED_WORKERS"] = str(int(workers))
    _seed_generators(value, value, value)
    return value


def reset_seed(verbose: bool = True) -> None:
    """Seed everything again as the last :func:`seed_everything` did; nothing happens if there was none."""
    if (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
        workers = os.environ.get("PL_SEED_WORKERS", "0") == "1"
        seed_everything(int(seed), workers=workers, verbose=verbose)


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Give this worker of a data loader seeds that no other worker, rank or epoch has (a ``worker_init_fn``)."""
    rank = rank_zero_only.rank if rank is None else rank
    # In a worker, torch's seed is one number per epoch plus the worker's id.
    epoch_seed = torch.initial_seed() - worker_id
    digest = hashlib.sha256(f"{epoch_seed}, {worker_id}, {rank}".encode()).digest()
    torch_seed, python_seed, numpy_seed = digest[:8], digest[8:16], digest[16:20]
    _seed_generators(*(int.from_bytes(part, "big") for part in (python_seed, numpy_seed, torch_seed)))


def _seed_generators(python: int, numpy: int, torch_: int) -> None:
    random.seed(python)
    if package_available("numpy"):
        import numpy as np

        np.random.seed(numpy)
    torch.manual_seed(torch_)


def _collect_rng_states(include_cuda: bool = True) -> dict[str, Any]:
    """Return the state of the global generators: ``torch``, ``python``, ``numpy`` and ``torch.cuda`` where in use."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = _numpy_state(numpy.random)
    if include_cuda and torch.cuda.is_initialized():  # asking the others would initialise CUDA, and forbid a later fork
        states["torch.cuda"] = torch.cuda.get_rng_state_all()
    return states


def _numpy_state(numpy_random: Any) -> Any:
    """What ``get_state()`` returns, without a warning where another generator than the usual one was set."""
    state = numpy_random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return state
    inner = state["state"]
    return state["bit_generator"], inner["key"], inner["pos"], state["has_gauss"], state["gauss"]


def _set_rng_states(rng_state_dict: dict[str, Any]) -> None:
    """Put back what :func:`_collect_rng_states` returned."""
    torch.set_rng_state(rng_state_dict["torch"])
    version, state, gauss = rng_state_dict["python"]
    random.setstate((version, tuple(state), gauss))  # a list after some serialisations
    if "numpy" in rng_state_dict and package_available("numpy"):
        import numpy as np

        np.random.set_state(rng_state_dict["numpy"])
    if "torch.cuda" in rng_state_dict:
        torch.cuda.set_rng_state_all(rng_state_dict["torch.cuda"])


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Random numbers drawn inside do not change those drawn afterwards.

    The generators of CUDA devices are included if CUDA is in use when the block begins.
    """
    states = _collect_rng_states(include_cuda)
    try:
        yield
    finally:
        _set_rng_states(states)
