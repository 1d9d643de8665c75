"""Which submodules become a unit: of plain trees, without a process group."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    lambda_auto_wrap_policy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

from lightning.fabric.strategies._wrap_policy import Units, choice_of, modules_to_checkpoint, units_to_shard
from lightning.fabric.testing import preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")


class Block(nn.Module):
    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.layers[1](self.layers[0](x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.blocks = nn.ModuleDict({"a": Block(), "b": Block()})
        self.head = nn.Linear(2, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks["b"](self.blocks["a"](self.embed(x))))


def _units(root: nn.Module, policy: Any, **kwargs: Any) -> Units:
    return units_to_shard(root, choice_of(policy, "auto_wrap_policy"), **kwargs)


def _names(root: nn.Module, modules: list[nn.Module]) -> list[str]:
    names = {module: name for name, module in root.named_modules()}
    return [names[module] for module in modules]


def _chosen(policy: Any, root: nn.Module | None = None, **kwargs: Any) -> list[str]:
    root = root or Model()
    return _names(root, _units(root, policy, **kwargs).modules)


BLOCKS = ["blocks.a", "blocks.b"]
LINEARS_IN_BLOCKS = [f"{block}.layers.{i}" for block in BLOCKS for i in (0, 1)]


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        "policy",
        [
            {Block},
            [Block],
            Block,
            ModuleWrapPolicy({Block}),
            CustomPolicy(lambda module: isinstance(module, Block)),
            partial(transformer_auto_wrap_policy, transformer_layer_cls={Block}),
            partial(lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, Block)),
            lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block),
        ],
    )
    def test_each_way_says_the_same(self, policy: Any) -> None:
        assert _chosen(policy) == BLOCKS

    def test_inner_units_come_first(self) -> None:
        assert _chosen({Block, nn.Linear}) == [
            *LINEARS_IN_BLOCKS[:2],
            "blocks.a",
            *LINEARS_IN_BLOCKS[2:],
            "blocks.b",
            "head",
        ]

    def test_none_and_no_class_choose_nothing(self) -> None:
        assert _chosen(None) == _chosen(set()) == []

    def test_by_size(self) -> None:
        def chosen(min_num_params: int) -> list[str]:
            return _chosen(partial(size_based_auto_wrap_policy, min_num_params=min_num_params))

        assert chosen(1) == ["embed", *LINEARS_IN_BLOCKS, "head"]
        assert chosen(12) == BLOCKS  # a block has 12
        assert chosen(1000) == []

    def test_a_function_is_asked_inside_only_where_it_wants(self) -> None:
        def not_in_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            return not isinstance(module, Block) if recurse else isinstance(module, nn.Linear)

        assert _chosen(not_in_blocks) == ["head"]

    def test_a_function_is_told_what_is_in_no_unit_yet(self) -> None:
        told = {}

        def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            if not recurse:
                told[type(module)] = nonwrapped_numel
            return recurse or isinstance(module, nn.Linear)

        _chosen(policy, nn.Sequential(Block()))
        assert told == {nn.ModuleList: 0, nn.Linear: 6, nn.ReLU: 0, Block: 0}

    def test_the_root_is_no_unit(self) -> None:
        assert _chosen(lambda module, recurse, nonwrapped_numel: True, nn.Linear(1, 1)) == []
        assert _chosen({nn.Linear}, nn.Linear(1, 1)) == []

    @pytest.mark.parametrize("policy", [3, "Block", {3}, {nn.Linear, int}])
    def test_else_it_is_an_error(self, policy: Any) -> None:
        with pytest.raises(TypeError, match="`some_policy`"):
            choice_of(policy, "some_policy")

    def test_options_for_a_submodule_are_refused(self) -> None:
        with pytest.raises(ValueError, match="returned options for head: {'a': 1}"):
            _chosen(CustomPolicy(lambda module: {"a": 1} if getattr(module, "out_features", 0) == 4 else False))
        with pytest.raises(TypeError, match="must return a bool, but returned 3 for it"):
            _chosen(CustomPolicy(lambda module: 3))


class TestWhatCanBeAUnit:
    def test_what_is_never_called_gives_way_to_its_children(self) -> None:
        assert _chosen({nn.ModuleDict}) == BLOCKS
        assert _chosen({nn.ModuleList}) == LINEARS_IN_BLOCKS
        assert _chosen({nn.ParameterList}, nn.Sequential(nn.ParameterList([nn.Parameter(torch.ones(1))]))) == []

    def test_what_has_no_parameters_is_left_out(self) -> None:
        assert _chosen({nn.ReLU}) == []

    def test_parts_of_attention_are_used_past_their_forward(self) -> None:
        model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
        assert _chosen({nn.Linear}, model) == ["0.linear1", "0.linear2"]
        assert _chosen({nn.MultiheadAttention}, model) == ["0.self_attn"]

    def test_what_is_ignored_is_left_out(self) -> None:
        model = Model()
        assert _chosen({nn.Linear}, model, ignored=[model.head]) == LINEARS_IN_BLOCKS
        assert _chosen({nn.Linear}, model, ignored_parameters={model.head.weight}) == LINEARS_IN_BLOCKS
        everything = partial(size_based_auto_wrap_policy, min_num_params=8)
        assert "head" in _chosen(everything, model)
        assert "head" not in _chosen(everything, model, ignored=[model.head])


class TestSharedParameters:
    def test_in_the_root_and_a_unit(self) -> None:
        model = Model()
        model.head.weight = model.embed.weight
        modules, ties = _units(model, {Block, nn.Linear, nn.Embedding})
        assert _names(model, modules) == [*LINEARS_IN_BLOCKS[:2], "blocks.a", *LINEARS_IN_BLOCKS[2:], "blocks.b"]
        assert [(tie.parameters, tie.units) for tie in ties] == [(("embed.weight", "head.weight"), ("embed", "head"))]

    def test_in_two_units(self) -> None:
        model = Model()
        model.blocks["b"].layers[0].weight = model.blocks["a"].layers[0].weight
        assert _chosen({Block}, model) == []

    def test_in_a_unit_and_one_inside_it(self) -> None:
        block = Block()
        block.layers[1].weight = block.layers[0].weight
        assert _chosen({Block, nn.Linear}, nn.Sequential(block)) == ["0"]

    def test_within_one_unit(self) -> None:
        block = Block()
        block.layers[1].weight = block.layers[0].weight
        modules, ties = _units(nn.Sequential(block), {Block})
        assert modules == [block]
        assert ties == []

    def test_a_module_in_two_units(self) -> None:
        one, other = Block(), Block()
        other.layers[0] = one.layers[0]
        model = nn.Sequential(one, other)
        assert _chosen({Block}, model) == []
        assert _chosen({nn.Linear}, model) == ["0.layers.0", "0.layers.1", "1.layers.1"]  # itself it is one unit
        assert _chosen({Block, nn.Linear}, model) == ["0.layers.0", "0.layers.1", "0", "1.layers.1", "1"]

    def test_the_same_block_twice(self) -> None:
        block = Block()
        assert _chosen({Block}, nn.Sequential(block, block)) == ["0"]

    def test_ignored_ones_tie_nothing(self) -> None:
        model = Model()
        model.head.weight = model.embed.weight
        assert _chosen({nn.Linear}, model, ignored_parameters={model.embed.weight}) == LINEARS_IN_BLOCKS


class TestToCheckpoint:
    def test_all_but_the_root(self) -> None:
        model = Model()
        choice = choice_of({Block, Model, nn.ReLU}, "activation_checkpointing_policy")
        chosen = _names(model, modules_to_checkpoint(model, choice))
        assert chosen == ["blocks.a.act", "blocks.a", "blocks.b.act", "blocks.b"]
        assert modules_to_checkpoint(model, None) == []

    def test_containers_give_way(self) -> None:
        model = Model()
        chosen = modules_to_checkpoint(model, choice_of({nn.ModuleDict}, ""))
        assert _names(model, chosen) == BLOCKS


# ---- any tree --------------------------------------------------------------------------------------------------------


class Leaf(nn.Module):
    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        for i, parameter in enumerate(parameters):
            setattr(self, f"p{i}", parameter)

    def forward(self) -> None: ...


class Inner(Leaf):
    def forward(self) -> None: ...


class Container(nn.Module):
    """Has no forward."""


POOL = 4


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """Trees in which parameters and whole modules may be shared."""
    pool = [nn.Parameter(torch.zeros(i + 1)) for i in range(POOL)]
    made: list[nn.Module] = []

    def node(depth: int) -> nn.Module:
        if made and draw(st.integers(0, 5)) == 0:
            return draw(st.sampled_from(made))
        cls = draw(st.sampled_from([Leaf, Inner, Container]))
        own = draw(st.lists(st.sampled_from([*range(POOL), *[None] * POOL]), max_size=2))
        parameters = [nn.Parameter(torch.zeros(2)) if i is None else pool[i] for i in own]
        module = cls() if cls is Container else cls(*parameters)
        if depth:
            for i in range(draw(st.integers(0, 3))):
                module.add_module(f"m{i}", node(depth - 1))
        made.append(module)
        return module

    root = Inner()
    for i in range(draw(st.integers(1, 3))):
        root.add_module(f"m{i}", node(3))
    return root


CLASSES = st.sets(st.sampled_from([Leaf, Inner, Container]))


@settings(max_examples=150, deadline=None)
@given(tree=trees(), classes=CLASSES)
def test_of_any_tree_every_parameter_is_in_one_unit(tree: nn.Module, classes: set[type[nn.Module]]) -> None:
    before = list(tree.named_modules(remove_duplicate=False))
    units, ties = _units(tree, classes)
    paths = dict(before)

    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for path, module in before:
        for parameter in module.parameters(recurse=False):
            around = [path[:i] for i in range(len(path), 0, -1) if path[i:][:1] in ("", ".")]
            unit = next((paths[outer] for outer in around if paths[outer] in units), tree)
            owners.setdefault(parameter, set()).add(unit)
    assert all(len(found) == 1 for found in owners.values())

    assert all(
        units.index(inner) <= units.index(outer) for outer in units for inner in outer.modules() if inner in units
    )
    assert len(set(units)) == len(units)
    assert tree not in units
    assert all(type(unit) is not Container and list(unit.parameters()) for unit in units)
    assert list(tree.named_modules(remove_duplicate=False)) == before
    assert _units(tree, sorted(classes, key=str)).modules == units
    assert all(len(tie.parameters) > 1 and tie.units for tie in ties)


@settings(max_examples=50, deadline=None)
@given(tree=trees(), classes=CLASSES)
def test_of_any_tree_what_is_wanted_is_a_unit_but_for_ties(tree: nn.Module, classes: set[type[nn.Module]]) -> None:
    units, ties = _units(tree, classes)
    wanted = {
        module
        for module in tree.modules()
        if isinstance(module, tuple(classes)) and type(module) is not Container and list(module.parameters())
    } - {tree}
    assert wanted - {tree.get_submodule(path) for tie in ties for path in tie.units} <= set(units)
