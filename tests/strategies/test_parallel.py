"""Who a process is before and after launch, and what needs the others."""

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.parallel import ParallelStrategy, World
from lightning.fabric.utilities.rank_zero import rank_zero_only

CPU = torch.device("cpu")


def _strategy(processes: int = 1, **kwargs: Any) -> ParallelStrategy:
    return DDPStrategy(CPUAccelerator(), [CPU] * processes, LightningEnvironment(), **kwargs)


@pytest.fixture
def started_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NODE_RANK", "2")


class TestWorld:
    def test_before_launch_it_is_the_first_of_all(self) -> None:
        strategy = _strategy(2)
        strategy.num_nodes = 3
        assert strategy.world == World(rank=0, size=6, local_rank=0, local_size=2, node_rank=0)
        assert strategy.is_global_zero

    @pytest.mark.usefixtures("started_outside")
    def test_started_from_outside_it_is_the_true_one_at_once(self) -> None:
        strategy = _strategy(2)
        strategy.num_nodes = 3
        assert strategy.world == World(rank=5, size=6, local_rank=1, local_size=2, node_rank=2)
        assert (strategy.global_rank, strategy.world_size) == (5, 6)
        assert (strategy.local_rank, strategy.node_rank, strategy.num_processes) == (1, 2, 2)
        assert strategy.distributed_sampler_kwargs == {"num_replicas": 6, "rank": 5}
        assert not strategy.is_global_zero

    def test_nothing_chosen_is_one_process(self) -> None:
        assert DDPStrategy().world == World()

    @given(
        st.tuples(*[st.integers(-1, 3)] * 4).map(lambda t: World(t[0], t[1], t[2], t[3])),
    )
    def test_a_process_that_cannot_be_is_refused(self, world: World) -> None:
        if 0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size:
            assert world.check() is world
        else:
            with pytest.raises(ValueError, match="cannot be"):
                world.check()

    def test_the_device_is_that_of_the_local_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        devices = [torch.device("cuda", 4), torch.device("cuda", 7)]
        strategy = DDPStrategy(parallel_devices=devices, cluster_environment=LightningEnvironment())
        assert strategy.root_device == devices[1]

    def test_without_devices_there_is_no_device(self) -> None:
        with pytest.raises(RuntimeError, match="has no devices yet"):
            DDPStrategy().root_device  # noqa: B018

    def test_what_is_given_can_be_replaced(self) -> None:
        strategy, environment = DDPStrategy(), LightningEnvironment()
        strategy.parallel_devices, strategy.cluster_environment = [CPU], environment
        assert strategy.parallel_devices == [CPU]
        assert strategy.cluster_environment is environment


class TestBeforeLaunch:
    def test_it_pickles(self) -> None:
        assert pickle.loads(pickle.dumps(_strategy(2))).parallel_devices == [CPU, CPU]

    @pytest.mark.parametrize(
        "call",
        [
            lambda s: s.all_gather(torch.ones(1)),
            lambda s: s.all_reduce(torch.ones(1)),
            lambda s: s.barrier(),
            lambda s: s.broadcast(1),
            lambda s: s.reduce_boolean_decision(True),
            lambda s: s.raise_on_all(None, "testing"),
            lambda s: s.setup_module(nn.Linear(1, 1)),
        ],
        ids=["all_gather", "all_reduce", "barrier", "broadcast", "decision", "raise_on_all", "setup_module"],
    )
    def test_talking_to_others_says_to_launch(self, call: Any) -> None:
        with pytest.raises(RuntimeError, match=r"fabric\.launch\(\)"):
            call(_strategy(2))


class TestSetup:
    def test_the_group_is_joined_and_left_once(self) -> None:
        strategy = _strategy()
        rank_zero_only.rank = 7
        strategy.setup_environment()
        assert dist.get_backend() == "gloo"
        assert rank_zero_only.rank == 0
        assert strategy.world == World()
        strategy.teardown()
        assert not dist.is_initialized()
        strategy.teardown()

    def test_it_can_be_set_up_again(self) -> None:
        strategy = _strategy()
        for _ in range(2):
            strategy.setup_environment()
            assert strategy.all_gather(torch.ones(1)).shape == (1, 1)
            strategy.teardown()

    def test_a_group_that_was_there_is_used_and_left_alone(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            strategy = _strategy()
            strategy.setup_environment()
            strategy.teardown()
            assert dist.is_initialized()
            with pytest.raises(RuntimeError, match=r"rank 0 of 1 .* rank 0 of 2\."):
                _strategy(2).setup_environment()
        finally:
            dist.destroy_process_group()

    def test_the_environment_has_to_agree_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(ValueError, match="WORLD_SIZE is 4"):
            _strategy(2).setup_environment()
        assert not dist.is_initialized()

    def test_more_processes_than_devices_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Lenient(LightningEnvironment):
            def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...

        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(ValueError, match="Start as many processes"):
            DDPStrategy(CPUAccelerator(), [CPU], Lenient()).setup_environment()

    def test_it_needs_to_know_the_environment(self) -> None:
        with pytest.raises(RuntimeError, match="has no cluster environment yet"):
            DDPStrategy(CPUAccelerator(), [CPU]).setup_environment()
