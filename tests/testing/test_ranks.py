"""`on_ranks`: results by rank, the first failure rather than its echo, late and killed ranks by name."""

import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning.fabric.testing import RankError, on_ranks


def _identity():
    return {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}


def _join() -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    return dist.get_rank()


def _sum_of_ranks(start):
    total = torch.tensor(float(start + _join()))
    dist.all_reduce(total)
    return total


def _raise_on(rank):
    if _join() == rank:
        raise ValueError(f"broken on {rank}")
    dist.barrier()


def _kill(rank):
    if _join() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _sleep_on(rank):
    if int(os.environ["RANK"]) == rank:
        time.sleep(100)


def _leave_a_child_behind(path):
    path.write_text(str(subprocess.Popen(["sleep", "100"]).pid))


def _exit_with(code):
    raise SystemExit(code)


def _threads():
    return torch.get_num_threads()


def _environment(name):
    return os.environ.get(name)


def _shared_storage(tensor):
    tensor += int(os.environ["RANK"])
    return tensor


def test_every_rank_knows_its_place():
    assert on_ranks(2, _identity) == [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in range(2)
    ]


def test_ranks_can_form_a_process_group_and_return_tensors():
    assert [total.item() for total in on_ranks(2, _sum_of_ranks, 1)] == [3.0, 3.0]


def test_arguments_travel_by_value():
    tensor = torch.zeros(1)
    assert [t.item() for t in on_ranks(2, _shared_storage, tensor)] == [0.0, 1.0]
    assert tensor.item() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_exception_is_shown_and_not_its_echo(rank):
    with pytest.raises(RankError) as caught:
        on_ranks(2, _raise_on, rank)
    assert caught.value.rank == rank
    assert "in _raise_on\n" in str(caught.value)
    assert str(caught.value).endswith(f"First cause: rank {rank} raised ValueError: broken on {rank} (exit code 1)\n")


def test_a_killed_rank_is_named_with_its_signal():
    with pytest.raises(
        RankError, match=r"rank 1 was killed by signal SIGKILL, perhaps out of memory \(exit code 137\)"
    ):
        on_ranks(2, _kill, 1)


def test_a_late_rank_is_named_with_its_stack():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 had not finished after 0.5 s.*in _sleep_on") as caught:
        on_ranks(2, _sleep_on, 1, timeout=0.5)
    assert caught.value.rank == 1
    assert "rank 0 is here" not in str(caught.value)


def test_an_exit_is_a_failure():
    with pytest.raises(RankError, match="SystemExit: 3"):
        on_ranks(1, _exit_with, 3)


def test_what_a_rank_started_is_ended_with_it(tmp_path):
    on_ranks(1, _leave_a_child_behind, tmp_path / "pid")
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # the test's own timeout is the limit
        time.sleep(0.01)


def test_a_local_function_is_refused():
    with pytest.raises(TypeError, match=r"cannot send '.*<lambda>'.*top level of a module"):
        on_ranks(1, lambda: None)


def test_the_environment_is_the_callers(monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "mine")
    assert on_ranks(1, _environment, "A_VARIABLE") == ["mine"]
    assert on_ranks(1, _environment, "A_VARIABLE", env={"A_VARIABLE": "yours"}) == ["yours"]


def test_ranks_have_one_thread_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert on_ranks(1, _threads) == [1]
    assert on_ranks(1, _threads, env={"OMP_NUM_THREADS": "2"}) == [2]


def test_files_stay_in_the_given_folder(tmp_path):
    on_ranks(1, _identity, tmp=tmp_path)
    assert list(tmp_path.glob("ranks-*/result-0.pt"))
