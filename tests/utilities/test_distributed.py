import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler

from lightning.fabric.testing import on_ranks
from lightning.fabric.utilities import distributed
from lightning.fabric.utilities.distributed import (
    DistributedSamplerWrapper,
    ReduceOp,
    _all_gather_ddp_if_available,
    _destroy_dist_connection,
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _set_num_threads_if_needed,
    _suggested_max_num_threads,
    _sync_ddp,
    _sync_ddp_if_available,
    is_shared_filesystem,
)


class _Environment:
    """What the launcher has put in the variables."""

    main_address = property(lambda self: os.environ["MASTER_ADDR"])
    main_port = property(lambda self: int(os.environ["MASTER_PORT"]))

    def global_rank(self) -> int:
        return int(os.environ["RANK"])

    def world_size(self) -> int:
        return int(os.environ["WORLD_SIZE"])


def _join(**kwargs: Any) -> int:
    _init_dist_connection(_Environment(), "gloo", timeout=timedelta(seconds=20), **kwargs)
    return dist.get_rank()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a world of one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(_free_port()))


# ---- functions that run on each rank


def _reductions() -> dict[str, Any]:
    rank = _join()
    value = torch.tensor([rank + 1, 10], dtype=torch.float)
    results = {
        str(op): _sync_ddp(value, reduce_op=op).tolist() for op in ("sum", None, "mean", "AVG", "max", "product")
    }
    results["op"] = _sync_ddp(value, reduce_op=ReduceOp.MIN).tolist()
    results["enum mean"] = _sync_ddp(value, reduce_op=ReduceOp.AVG).tolist()
    results["int mean"] = _sync_ddp(torch.tensor(rank), reduce_op="mean").item()
    results["strided"] = _sync_ddp(torch.arange(4.0).view(2, 2).T + rank, reduce_op="sum").tolist()
    results["input"] = value.tolist()
    weight = torch.ones(1, requires_grad=True)
    results["detached"] = not _sync_ddp_if_available(weight * 2).requires_grad
    return results


def _gathers() -> dict[str, Any]:
    rank = _join()
    tensor = torch.full((2, 3), float(rank), requires_grad=True)
    plain = _all_gather_ddp_if_available(tensor)
    kept = _all_gather_ddp_if_available(tensor, sync_grads=True)
    weights = torch.tensor([10.0, 1.0]) * (rank + 1)  # rank 1 uses everything twice
    (kept.sum((1, 2)) * weights).sum().backward()
    return {
        "plain": (tuple(plain.shape), plain[:, 0, 0].tolist(), plain.requires_grad),
        "scalar": _all_gather_ddp_if_available(torch.tensor(rank)).tolist(),
        "strided": _all_gather_ddp_if_available(torch.arange(4).view(2, 2).T)[1].tolist(),
        "grad": tensor.grad[0, 0].item(),
    }


def _group_of_two() -> list[Any]:
    rank = _join()
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    group = groups[rank % 2]
    gathered = _all_gather_ddp_if_available(torch.tensor(rank), group=group)
    return [_sync_ddp(torch.tensor(float(rank)), group, "mean").item(), gathered.tolist()]


def _keys_of_restart(count: str) -> set[str]:
    """Where this attempt of an elastic launch writes in the store that all attempts share."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = count
    _join()
    shared = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    keys = {key.partition("/")[0] for key in shared.list_keys()}
    dist.barrier()  # the store goes with rank 0
    return keys


class _Nodes:
    """Two ranks, each on a node of its own."""

    num_nodes = 2

    def __init__(self) -> None:
        self.is_global_zero = _join() == 0

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def barrier(self, name: str | None = None) -> None:
        dist.barrier()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = _sync_ddp(torch.tensor(int(decision)))
        return bool(votes == dist.get_world_size() if all else votes > 0)


def _shared(path: str) -> Any:
    """``RANK`` in the path stands for the rank's own folder."""
    strategy = _Nodes()
    path = path.replace("RANK", os.environ["RANK"])
    try:
        return is_shared_filesystem(strategy, path, timeout=1)
    except FileNotFoundError as error:
        return str(error)


def _alone(present: str) -> str:
    if os.environ["RANK"] != present:
        return ""
    try:
        _init_dist_connection(_Environment(), "gloo", timeout=timedelta(seconds=1))
    except RuntimeError as error:
        return str(error)
    return "joined"


def _leave_without_a_word() -> None:
    """The group is destroyed at exit: otherwise torch may abort the process."""
    _join()


# ---- tests


class TestInit:
    def test_joins_and_destroys(self, one_rank: None) -> None:
        assert not _distributed_is_initialized()
        _init_dist_connection(_Environment(), "gloo")
        assert _distributed_is_initialized()
        assert (dist.get_backend(), dist.get_world_size()) == ("gloo", 1)
        _init_dist_connection(_Environment(), "nccl")  # a group is there: nothing happens
        _destroy_dist_connection()
        _destroy_dist_connection()
        assert not _distributed_is_initialized()

    def test_ranks_given_go_before_the_environment(self, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "5")
        monkeypatch.setenv("WORLD_SIZE", "8")
        _init_dist_connection(_Environment(), "gloo", global_rank=0, world_size=1)
        assert dist.get_world_size() == 1
        _destroy_dist_connection()

    def test_an_occupied_port_is_named_with_the_way_out(self, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::", 0))
            sock.listen()
            port = sock.getsockname()[1]
            monkeypatch.setenv("MASTER_PORT", str(port))
            with pytest.raises(RuntimeError, match=rf"127.0.0.1:{port}.*in use.*MASTER_PORT.*--main-port"):
                _init_dist_connection(_Environment(), "gloo", global_rank=0, world_size=2)
        assert not _distributed_is_initialized()

    @pytest.mark.parametrize("port", ["0", "65536"])
    def test_a_port_that_cannot_be_is_refused(self, one_rank: None, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ValueError, match=f"MASTER_PORT must be from 1 to 65535.*but it is {port}"):
            _init_dist_connection(_Environment(), "gloo", global_rank=0, world_size=2)

    def test_other_failures_are_passed_on(self, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("Distributed package doesn't have this backend built in")

        monkeypatch.setattr(dist, "init_process_group", fail)
        with pytest.raises(RuntimeError, match="^Distributed package"):
            _init_dist_connection(_Environment(), "gloo")

    def test_no_distributed_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dist, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match=r"no `torch.distributed`"):
            _init_dist_connection(_Environment(), "gloo")

    @pytest.mark.slow
    @pytest.mark.parametrize("present", [0, 1])
    def test_ranks_that_do_not_come_are_reported(self, present: int) -> None:
        message = on_ranks(2, _alone, str(present))[present]
        assert message.startswith(f"Rank {present} of 2 could not join the others at 127.0.0.1:")
        assert "MASTER_ADDR and MASTER_PORT" in message

    def test_attempts_of_an_elastic_launch_do_not_see_each_other(self) -> None:
        prefixes = on_ranks(2, _keys_of_restart, "3")[1]
        assert "restart3" in prefixes
        assert not {prefix for prefix in prefixes if "default_pg" in prefix}

    @pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "nccl"), ("meta", "gloo")])
    def test_default_backend(self, device: str, backend: str) -> None:
        assert _get_default_process_group_backend_for_device(torch.device(device)) == backend

    def test_the_group_is_left_at_exit(self) -> None:
        assert on_ranks(2, _leave_without_a_word) == [None, None]


class TestCollectives:
    def test_reductions(self) -> None:
        for results in on_ranks(2, _reductions):
            rank_value = results.pop("input")
            assert rank_value in ([1, 10], [2, 10]), "the input is not changed"
            assert results == {
                "sum": [3, 20],
                "None": [3, 20],
                "mean": [1.5, 10],
                "AVG": [1.5, 10],
                "max": [2, 10],
                "product": [2, 100],
                "op": [1, 10],
                "enum mean": [1.5, 10],
                "int mean": 0.5,
                "strided": [[1, 5], [3, 7]],
                "detached": True,
            }

    def test_gathers(self) -> None:
        first, second = on_ranks(2, _gathers)
        assert first["plain"] == second["plain"] == ((2, 2, 3), [0, 1], False)
        assert first["scalar"] == second["scalar"] == [0, 1]
        assert first["strided"] == [[0, 2], [1, 3]]
        assert (first["grad"], second["grad"]) == (30, 3)

    def test_on_a_group(self) -> None:
        assert on_ranks(3, _group_of_two) == [[1, [0, 2]], [1, [1]], [1, [0, 2]]]

    def test_without_a_group_nothing_happens(self) -> None:
        tensor = torch.ones(2)
        assert _sync_ddp_if_available(tensor) is tensor
        assert _all_gather_ddp_if_available(tensor) is tensor

    @pytest.mark.parametrize("op", ["median", "premul_sum_", ""])
    def test_unknown_reduction(self, op: str, one_rank: None) -> None:
        with pytest.raises(ValueError, match=f"reduce_op='{op}' is not a known reduction"):
            _sync_ddp(torch.ones(1), reduce_op=op)


class TestThreads:
    def test_shared_among_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distributed, "_num_cpus_available", lambda: 8)
        assert [_suggested_max_num_threads(n) for n in (1, 3, 16)] == [8, 2, 1]
        with pytest.raises(ValueError, match="1 or more"):
            _suggested_max_num_threads(0)

    def test_set_and_exported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distributed, "_num_cpus_available", lambda: 4)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        _set_num_threads_if_needed(2)
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (2, "2")

    def test_the_user_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        before = torch.get_num_threads()
        _set_num_threads_if_needed(64)
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (before, "7")

    def test_counts_the_cores_of_this_process(self) -> None:
        assert distributed._num_cpus_available() == len(os.sched_getaffinity(0))


class TestSharedFilesystem:
    @pytest.fixture
    def one_node(self) -> Any:
        return SimpleNamespace(num_nodes=1, reduce_boolean_decision=lambda decision, all=True: decision)

    def test_one_node(self, one_node: Any, tmp_path: Path) -> None:
        assert is_shared_filesystem(one_node, tmp_path)
        assert is_shared_filesystem(one_node)

    def test_remote(self, one_node: Any) -> None:
        assert is_shared_filesystem(one_node, "s3://bucket/folder")

    def test_missing(self, one_node: Any, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            is_shared_filesystem(one_node, tmp_path / "missing")

    def test_two_nodes(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert on_ranks(2, _shared, str(tmp_path)) == [True, True]
        assert on_ranks(2, _shared, str(tmp_path / "file")) == [True, True]
        assert os.listdir(tmp_path) == ["file"], "leaves nothing behind"

    def test_two_nodes_with_folders_of_their_own(self, tmp_path: Path) -> None:
        for rank in "01":
            (tmp_path / rank).mkdir()
        assert on_ranks(2, _shared, f"{tmp_path}/RANK") == [False, False]

    def test_missing_on_one_node_is_not_shared_and_on_all_raises_on_all(self, tmp_path: Path) -> None:
        (tmp_path / "0").mkdir()
        assert on_ranks(2, _shared, f"{tmp_path}/RANK") == [False, False]
        messages = on_ranks(2, _shared, f"{tmp_path}/missing")
        assert all("there is no such file" in message for message in messages)


class TestDistributedSamplerWrapper:
    @pytest.mark.parametrize(("drop_last", "shares"), [(False, [[0, 2, 4], [1, 3, 0]]), (True, [[0, 2], [1, 3]])])
    def test_uneven(self, drop_last: bool, shares: list[list[int]]) -> None:
        samplers = [
            DistributedSamplerWrapper(SequentialSampler(range(5)), 2, rank, drop_last=drop_last) for rank in (0, 1)
        ]
        assert [list(sampler) for sampler in samplers] == shares
        assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]

    def test_shuffles_on_top_if_asked(self) -> None:
        samplers = [DistributedSamplerWrapper(SequentialSampler(range(50)), 2, rank, shuffle=True) for rank in (0, 1)]
        first, second = (list(sampler) for sampler in samplers)
        assert sorted(first + second) == list(range(50))
        assert first != sorted(first)
        samplers[0].set_epoch(1)
        assert list(samplers[0]) != first

    def test_the_number_of_samples_may_change(self) -> None:
        class Growing(SequentialSampler):
            def set_epoch(self, epoch: int) -> None:
                self.data_source = range(4 + 2 * epoch)

        sampler = DistributedSamplerWrapper(Growing(range(4)), 2, 1)
        assert list(sampler) == [1, 3]
        sampler.set_epoch(1)
        assert list(sampler) == [1, 3, 5]

    def test_takes_world_and_rank_from_the_group(self, one_rank: None) -> None:
        _init_dist_connection(_Environment(), "gloo")
        try:
            assert list(DistributedSamplerWrapper(SequentialSampler(range(3)))) == [0, 1, 2]
        finally:
            _destroy_dist_connection()


def test_waits_for_a_file_that_appears_late(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    assert distributed._appears(lambda: next(answers), timeout=10)
    start = time.monotonic()
    assert not distributed._appears(lambda: False, timeout=0.1)
    assert time.monotonic() - start >= 0.1
