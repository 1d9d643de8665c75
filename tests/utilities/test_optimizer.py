import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning.fabric.utilities.optimizer import (
    _optimizer_to_device,
    _optimizers_to_device,
    parameter_names,
    repoint_optimizers,
)


class Node(nn.Module):
    """A module with any parameters and children; parameters may be shared with other nodes."""

    def __init__(self, parameters: list[nn.Parameter], children: list["Node"]) -> None:
        super().__init__()
        for index, parameter in enumerate(parameters):
            self.register_parameter(f"p{index}", parameter)
        for index, child in enumerate(children):
            self.add_module(f"c{index}", child)


@st.composite
def _cases(draw: Any) -> tuple[Node, list[list[nn.Parameter]]]:
    """A module with tied, frozen and nested parameters, and the groups of an optimizer over some of them."""
    pool = [nn.Parameter(torch.randn(2), requires_grad=draw(st.booleans())) for _ in range(draw(st.integers(1, 5)))]
    some = st.lists(st.sampled_from(pool), max_size=3)
    leaves = st.builds(Node, some, st.just([]))
    module = draw(st.recursive(leaves, lambda inner: st.builds(Node, some, st.lists(inner, max_size=2)), max_leaves=4))
    foreign = nn.Parameter(torch.randn(2))
    order = draw(st.permutations([*pool, foreign]))
    cut = draw(st.integers(1, len(order)))
    return module, [group for group in (order[:cut], order[cut:]) if group]


def _replace_parameters(module: nn.Module) -> None:
    """New parameters everywhere; ties are kept, as a deep copy would keep them."""
    memo: dict[int, nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            new = memo.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            submodule._parameters[name] = new


@settings(deadline=None, max_examples=50)
@given(_cases())
def test_every_parameter_of_the_module_is_replaced_in_groups_and_state(
    case: tuple[Node, list[list[nn.Parameter]]],
) -> None:
    module, groups = case
    optimizer = torch.optim.SGD(
        [{"params": group, "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)], momentum=0.9
    )
    for parameter in [parameter for group in groups for parameter in group]:
        parameter.grad = torch.ones(2) if parameter.requires_grad else None
    optimizer.step()
    lists = [group["params"] for group in optimizer.param_groups]
    before = parameter_names(module)
    state = {id(parameter): dict(value) for parameter, value in optimizer.state.items()}

    _replace_parameters(module)
    repoint_optimizers([optimizer], before, module)

    new_of = {id(old): parameter_names(module)[name] for name, old in before.items()}
    for group, old_group, lr in zip(optimizer.param_groups, groups, (0.1, 0.2), strict=False):
        assert [id(p) for p in group["params"]] == [id(new_of.get(id(old), old)) for old in old_group]
        assert group["lr"] == lr
    assert [id(group["params"]) for group in optimizer.param_groups] == [id(params) for params in lists]
    assert len(optimizer.state) == len(state)
    for old in [parameter for group in groups for parameter in group]:
        present = new_of.get(id(old), old)
        assert (present in optimizer.state) == (id(old) in state)
        if id(old) in state:
            assert optimizer.state[present]["momentum_buffer"] is state[id(old)]["momentum_buffer"]


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.arange(6.0).view(2, 3)).sum().backward()
        optimizer.step()

    expected, expected_optimizer = make()
    model, optimizer = make()
    for _ in range(3):
        train(expected, expected_optimizer)
        train(model, optimizer)
        before = parameter_names(model)
        _replace_parameters(model)
        repoint_optimizers([optimizer], before, model)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert str(optimizer.state_dict()) == str(expected_optimizer.state_dict())


def test_two_parameters_that_become_one_appear_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    optimizer = torch.optim.SGD([{"params": [module["a"].weight]}, {"params": [module["b"].weight]}])
    before = parameter_names(module)
    module["a"].weight = module["b"].weight = shared = nn.Parameter(torch.ones(2, 2))
    repoint_optimizers([optimizer], before, module)
    assert [group["params"] for group in optimizer.param_groups] == [[shared], []]


def test_a_parameter_that_is_listed_twice_stays_listed_twice() -> None:
    module = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD([module.weight])
    optimizer.param_groups[0]["params"].append(module.weight)  # torch steps it twice
    before = parameter_names(module)
    module.weight = nn.Parameter(torch.ones(2, 2))
    repoint_optimizers([optimizer], before, module)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == [id(module.weight)] * 2


def test_nothing_replaced_leaves_the_optimizer_alone() -> None:
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    before = copy.copy(optimizer.param_groups[0]["params"])
    repoint_optimizers([optimizer], parameter_names(module), module)
    assert optimizer.param_groups[0]["params"] == before


class TestStateToDevice:
    @pytest.fixture
    def adam(self) -> torch.optim.Adam:
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        optimizer = torch.optim.Adam([parameter])
        optimizer.step()
        return optimizer

    def test_moments_move_and_the_step_counter_stays(self, adam: torch.optim.Adam) -> None:
        _optimizer_to_device(adam, torch.device("meta"))
        (state,) = adam.state.values()
        assert {key: value.device.type for key, value in state.items()} == {
            "step": "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }

    @pytest.mark.parametrize("flag", ["capturable", "fused"])
    def test_a_step_counter_that_is_used_on_the_device_moves(self, adam: torch.optim.Adam, flag: str) -> None:
        adam.param_groups[0][flag] = True
        _optimizers_to_device([adam], "meta")
        assert next(iter(adam.state.values()))["step"].is_meta
