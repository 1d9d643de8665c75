"""`_MultiProcessingLauncher`: every start method looks the same from outside; the first failure is the one raised."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.launchers.report import RankError
from lightning.fabric.testing import on_ranks

# A fresh interpreter that imports torch takes seconds, a fork does not.
EVERY_METHOD = [
    "fork",
    pytest.param("forkserver", marks=pytest.mark.slow),
    pytest.param("spawn", marks=pytest.mark.slow),
]


def launch(method, function, *args, processes=2):
    return _MultiProcessingLauncher(LightningEnvironment(), processes, method).launch(function, *args)


def _join() -> int:
    rank = int(os.environ["LOCAL_RANK"])
    address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    return rank


def _work(tensor, linear):
    """One collective, changed arguments, and everything that must look the same whatever the start method."""
    tensor += _join() + 1
    torch.mm(torch.ones(600, 600), torch.ones(600, 600))  # hangs where a pool of threads was lost in a fork
    dist.all_reduce(tensor)
    return {
        "sum": tensor,
        "linear": linear,
        "tied": [tensor, tensor],
        "local_rank": os.environ["LOCAL_RANK"],
        "node_rank": os.environ["NODE_RANK"],
        "variable": os.environ.get("A_VARIABLE"),
        "threads": torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]),
    }


def _raise_on(rank):
    if _join() == rank:
        raise KeyError("missing")
    dist.barrier()


def _kill(rank):
    if _join() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _return_a_lambda():
    return lambda: None


def _nothing():
    return None


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_rank_zeros_result_comes_back(method, monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "set after the imports")
    torch.mm(torch.ones(600, 600), torch.ones(600, 600))  # makes the parent's pool of threads
    tensor, linear = torch.zeros(1), torch.nn.Linear(2, 3)
    result = launch(method, _work, tensor, linear)
    assert result["sum"].item() == 3.0
    assert tensor.item() == 0.0, "the caller's tensor is not shared with the ranks"
    assert torch.equal(result["linear"].weight, linear.weight)
    assert result["tied"][0] is result["tied"][1]
    assert (result["local_rank"], result["node_rank"], result["variable"]) == ("0", "0", "set after the imports")
    assert result["threads"]
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize("method", EVERY_METHOD[:2])
def test_the_first_exception_is_raised_here_with_its_traceback(method):
    with pytest.raises(
        RankError, match=r"(?s)in _raise_on\n.*First cause: rank 1 raised KeyError: 'missing'"
    ) as caught:
        launch(method, _raise_on, 1)
    assert caught.value.rank == 1
    assert isinstance(caught.value, RuntimeError)


def test_a_killed_rank_is_named_with_its_signal():
    with pytest.raises(RankError, match="First cause: rank 1 was killed by signal SIGKILL"):
        launch("fork", _kill, 1)


def test_a_fork_can_be_launched_again_and_again():
    assert [launch("fork", _nothing, processes=1) for _ in range(3)] == [None] * 3


def test_a_fork_needs_no_importable_function():
    captured = 3
    assert launch("fork", lambda x: x + captured, 4, processes=1) == 7


def test_an_interrupt_leaves_no_orphans(tmp_path):
    # a test run that was itself started in the background ignores interrupts
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt_the_parent():
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(100)

    try:
        with pytest.raises(KeyboardInterrupt):
            launch("fork", interrupt_the_parent, processes=1)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}")


def test_a_function_that_cannot_be_sent_is_refused_before_anything_starts():
    with pytest.raises(TypeError, match=r"start_method='spawn' cannot send '.*<lambda>'"):
        launch("spawn", lambda: None)


def test_a_result_that_cannot_be_sent_is_an_error_of_its_rank():
    with pytest.raises(RankError, match="_return_a_lambda"):
        launch("fork", _return_a_lambda, processes=1)


def test_fork_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("PL_DISABLE_FORK", "1")
    with pytest.raises(ValueError, match="PL_DISABLE_FORK=1"):
        _MultiProcessingLauncher(LightningEnvironment(), 2, "fork")
    _MultiProcessingLauncher(LightningEnvironment(), 2, "spawn")


def test_an_unknown_start_method_is_refused():
    with pytest.raises(ValueError, match="must be one of 'spawn', 'fork', 'forkserver', but got 'threads'"):
        _MultiProcessingLauncher(LightningEnvironment(), 2, "threads")


def test_no_fork_after_cuda_was_initialised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="after CUDA was initialised"):
        launch("fork", _nothing)


def test_no_processes_from_one_that_is_itself_a_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError, match="already started as one of several"):
        launch("spawn", _nothing)


def _fork_from_a_group_member():
    dist.init_process_group("gloo")
    for name in ("LOCAL_RANK", "RANK"):
        del os.environ[name]
    with pytest.raises(RuntimeError, match="while this process is in a process group"):
        launch("fork", _nothing)
    return True


def test_no_fork_from_a_member_of_a_process_group():
    assert on_ranks(1, _fork_from_a_group_member) == [True]


@pytest.mark.parametrize(("method", "interactive"), [("fork", True), ("spawn", False), ("forkserver", False)])
def test_only_a_fork_works_in_a_notebook(method, interactive):
    launcher = _MultiProcessingLauncher(LightningEnvironment(), 2, method)
    assert launcher.is_interactive_compatible is interactive
