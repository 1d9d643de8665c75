"""One process over several devices."""

import types
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric.strategies.dp import DataParallelStrategy, _DataParallel, _rebind_methods
from lightning.fabric.strategies.parallel import World

CPU = torch.device("cpu")


def test_it_is_one_process_whatever_the_devices() -> None:
    strategy = DataParallelStrategy(parallel_devices=[torch.device("cuda", 0), torch.device("cuda", 1)])
    assert strategy.world == World()
    assert (strategy.world_size, strategy.global_rank, strategy.is_global_zero) == (1, 0, True)
    assert strategy.root_device == torch.device("cuda", 0)
    assert strategy.distributed_sampler_kwargs is None
    assert strategy.start_method is None
    strategy._configure_launcher()
    assert strategy.launcher is None
    assert strategy._backward_sync_control is None


def test_collectives_need_no_launch() -> None:
    strategy = DataParallelStrategy(parallel_devices=[CPU])
    tensor = torch.ones(2)
    assert strategy.all_reduce(tensor) is tensor
    assert strategy.all_gather(tensor) is tensor
    assert strategy.broadcast(tensor) is tensor
    assert strategy.reduce_boolean_decision(False) is False
    strategy.barrier()
    with pytest.raises(OSError, match="disk full"):
        strategy.raise_on_all(OSError("disk full"), "saving")


def test_one_cpu_has_nothing_to_split() -> None:
    module = nn.Linear(1, 1)
    assert DataParallelStrategy(parallel_devices=[CPU]).setup_module(module) is module


def test_several_cpus_are_refused() -> None:
    with pytest.raises(ValueError, match="Use strategy='ddp'"):
        DataParallelStrategy(parallel_devices=[CPU, CPU]).setup_module(nn.Linear(1, 1))


def test_state_has_the_users_names() -> None:
    module = nn.Linear(1, 1)
    assert DataParallelStrategy().get_module_state_dict(_DataParallel(module)).keys() == {"weight", "bias"}


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the instance's own forward should run")


def _scale(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * self.factor


class _Callable:
    def __call__(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        return x * module.factor


@pytest.mark.parametrize("function", [_scale, _Callable()], ids=["function", "object"])
def test_a_method_of_an_instance_computes_with_the_replicas_weights(function: Any) -> None:
    root = nn.Sequential(_Scale(), nn.Identity())
    root[0].forward = types.MethodType(function, root[0])
    replica, child = root._replicate_for_data_parallel(), root[0]._replicate_for_data_parallel()
    replica._modules["0"] = child
    child.factor = torch.full((1,), 5.0)
    assert child.forward(torch.ones(1)).item() == 1.0  # as torch copies it

    _rebind_methods(root, replica)
    assert child.forward(torch.ones(1)).item() == 5.0
    assert root[0].forward(torch.ones(1)).item() == 1.0


def test_a_method_of_something_else_stays_where_it_belongs() -> None:
    root = nn.Identity()
    text = "a"
    root.upper = text.upper
    replica = root._replicate_for_data_parallel()
    _rebind_methods(root, replica)
    assert replica.upper == text.upper


@pytest.mark.gpu
def test_replicas_on_a_gpu_have_their_own_methods() -> None:
    device = torch.device("cuda", 0)
    strategy = DataParallelStrategy(parallel_devices=[device])
    model = nn.Linear(2, 2).to(device)
    module = strategy.setup_module(model)
    assert isinstance(module, _DataParallel)
    model.forward = types.MethodType(lambda self, x: self.weight.sum() * x, model)
    [replica] = module.replicate(model, [device])
    assert replica.forward.__self__ is replica
    assert module(torch.ones(3, 2)).device == device
