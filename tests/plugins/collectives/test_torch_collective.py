import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning.fabric.plugins.collectives import TorchCollective
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.testing import on_ranks


@pytest.fixture
def alone():
    """A collective of this process only."""
    collective = TorchCollective()
    collective.setup(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield collective
    collective.teardown()


class TestReduceOperation:
    @pytest.mark.parametrize("op", ["sum", "SUM", "avg", "mean", "min", "max", "product", dist.ReduceOp.SUM])
    def test_strings_and_torch_operations(self, alone, op):
        assert alone.all_reduce(torch.tensor([3.0]), op=op).item() == 3.0

    def test_an_unknown_one_names_those_that_exist(self, alone):
        with pytest.raises(ValueError, match="Unknown reduce operation 'median'. Known: .*'avg'.*'sum'"):
            alone.all_reduce(torch.ones(1), op="median")


class TestGroups:
    def test_before_create_group_it_is_torchs_default_group(self, alone):
        assert alone.group is dist.group.WORLD

    def test_without_torchs_default_group_there_is_none(self):
        with pytest.raises(RuntimeError, match="does not own a group yet"):
            TorchCollective().group  # noqa: B018

    def test_a_default_group_that_somebody_else_made_is_left_alone(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            collective = TorchCollective().setup().create_group()
            collective.teardown()
            assert dist.is_initialized()
        finally:
            dist.destroy_process_group()

    def test_setup_fills_in_the_address_that_the_environment_lacks(self, monkeypatch):
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        monkeypatch.setenv("MASTER_PORT", "1234")
        monkeypatch.setattr(TorchCollective, "init_group", classmethod(lambda cls, **kwargs: None))
        TorchCollective().setup(main_address="host", main_port=5678)
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("host", "1234")

    def test_a_build_of_torch_without_distributed_is_named(self, monkeypatch):
        monkeypatch.setattr(dist, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="needs a build of torch with `torch.distributed`"):
            TorchCollective()


def test_the_default_timeout_is_torchs():
    assert default_pg_timeout == timedelta(minutes=30)


def _only(here, value):
    """Leave out a value that is undefined on the other rank."""
    return value if here else None


def _all_operations():
    """Run on each of two ranks; gives what each operation gave."""
    c = TorchCollective().setup(backend="gloo").create_group(timeout=timedelta(seconds=20))
    rank, x, pair = c.rank, torch.tensor([float(c.rank + 1)]), [torch.zeros(1), torch.zeros(1)]
    first = rank == 0

    def values(tensors):
        return None if tensors is None else [tensor.item() for tensor in tensors]

    results = {
        "world_size": c.world_size,
        "broadcast": c.broadcast(x.clone(), src=1).item(),
        "all_reduce": c.all_reduce(x.clone()).item(),
        "mean": c.all_reduce(x.clone(), op="mean").item(),
        "reduce": _only(first, c.reduce(x.clone(), dst=0).item()),
        "all_gather": values(c.all_gather([torch.zeros(1), torch.zeros(1)], x)),
        "gather": values(c.gather(x, pair if first else None, dst=0)),
        "scatter": c.scatter(torch.zeros(1), [x + 5, x + 6] if first else None, src=0).item(),
        "reduce_scatter": c.reduce_scatter(torch.zeros(1), [x, x * 10]).item(),
        "all_to_all": values(c.all_to_all([torch.zeros(1), torch.zeros(1)], [x, x * 10])),
        "all_gather_object": c.all_gather_object([None, None], {"rank": rank}),
        "broadcast_object_list": c.broadcast_object_list([f"of {rank}"], src=1),
        "gather_object": c.gather_object(rank, [None, None] if first else None, dst=0),
        "scatter_object_list": c.scatter_object_list([None], ["a", "b"] if first else None, src=0),
    }
    if first:
        c.send(x, dst=1, tag=7)
    else:
        results["recv"] = c.recv(torch.zeros(1), src=0, tag=7).item()
    c.barrier()
    c.monitored_barrier()
    c.teardown()
    return {**results, "left": dist.is_initialized()}


def _group_of_rank_1():
    everybody = TorchCollective().setup(backend="gloo")
    some = TorchCollective().create_group(ranks=[1])
    rank = some.rank
    everybody.barrier()  # who leaves while others still connect breaks their connections
    some.teardown()
    everybody.teardown()
    return rank


@pytest.mark.slow
class TestTwoRanks:
    def test_every_operation(self, tmp_path):
        first, second = on_ranks(2, _all_operations, tmp=tmp_path)
        same = {
            "world_size": 2,
            "broadcast": 2.0,
            "all_reduce": 3.0,
            "mean": 1.5,
            "all_gather": [1.0, 2.0],
            "all_gather_object": [{"rank": 0}, {"rank": 1}],
            "broadcast_object_list": ["of 1"],
            "left": False,
        }
        assert first == {
            **same,
            "reduce": 3.0,
            "gather": [1.0, 2.0],
            "scatter": 6.0,
            "reduce_scatter": 3.0,
            "all_to_all": [1.0, 2.0],
            "gather_object": [0, 1],
            "scatter_object_list": ["a"],
        }
        assert second == {
            **same,
            "reduce": None,
            "gather": None,
            "scatter": 7.0,
            "reduce_scatter": 30.0,
            "all_to_all": [10.0, 20.0],
            "gather_object": None,
            "scatter_object_list": ["b"],
            "recv": 1.0,
        }

    def test_a_process_outside_a_group_can_tear_it_down_as_well(self, tmp_path):
        assert on_ranks(2, _group_of_rank_1, tmp=tmp_path) == [-1, 0]
