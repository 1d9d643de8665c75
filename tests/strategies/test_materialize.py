"""Modules made on the meta device and sharded get the values of a module that was made for real in one process."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning.fabric.strategies._dtensor import full_tensor, local_tensor
from lightning.fabric.strategies._materialize import MetaTensors
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.init_tape import recording_init

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    """With a tie, buffers, values computed from others, and a second round of initialisation."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width, padding_idx=3)
        self.position = nn.Parameter(torch.randn(5, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)))
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.uniform_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.rnn(x)[0]
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def _fsdp(model: Model) -> None:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def _hsdp(model: Model) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s")))


def _parts_only(model: Model) -> None:
    """The rest stays plain, the same on every rank."""
    fully_shard(model.blocks[0])


def _tensor_parallel(model: Model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _two_dimensional(model: Model) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


def _not_at_all(model: Model) -> None:
    pass


def _from_rank_zero(state: Tensor) -> Tensor:
    dist.broadcast(state, 0)
    return state


def _state(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: full_tensor(tensor).clone() for name, tensor in named}


def _differences(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert state.keys() == expected.keys()
    return [name for name in state if not torch.equal(state[name], expected[name])]


def _made_for_real(seed: int = 5) -> tuple[Model, Tensor]:
    torch.manual_seed(seed)
    return Model(), torch.get_rng_state()


def _materialized(shard: Callable[[Model], None], seed: int = 5) -> Model:
    torch.manual_seed(seed)
    with recording_init():
        model = Model()
    meta = MetaTensors.of(model)
    assert meta
    shard(model)
    meta.materialize(model, CPU, agree=_from_rank_zero)
    return model


# ---- values ----------------------------------------------------------------------------------------------------------


def _compare(shard: Callable[[Model], None]) -> dict[str, Any]:
    dist.init_process_group("gloo")
    model = _materialized(shard)
    drawn = torch.get_rng_state()
    reference, expected_drawn = _made_for_real()
    return {
        "different": _differences(_state(model), dict(reference.state_dict())),
        "generator": torch.equal(drawn, expected_drawn),
        "tied": model.head.weight is model.embedding.weight,
        "elements": sum(local_tensor(parameter).numel() for parameter in model.parameters()),
    }


@pytest.mark.parametrize(
    ("shard", "ranks"),
    [
        (_not_at_all, 1),
        (_fsdp, 1),
        (_fsdp, 2),
        (_fsdp, 4),
        (_parts_only, 2),
        (_hsdp, 4),
        (_tensor_parallel, 2),
        (_two_dimensional, 4),
    ],
)
def test_values_are_those_of_one_process_to_the_bit(shard: Callable[[Model], None], ranks: int) -> None:
    total = sum(parameter.numel() for parameter in Model().parameters())
    results = on_ranks(ranks, _compare, shard)
    for result in results:
        assert result["different"] == []
        assert result["generator"]
        assert result["tied"]
    if shard is _fsdp:
        assert sum(result["elements"] for result in results) == total


def _train() -> list[list[float]]:
    """The losses of three steps, and of three of a module made for real."""
    dist.init_process_group("gloo")
    tokens = torch.arange(10).reshape(2, 5)

    def losses(model: Model) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        values = []
        for _ in range(3):
            loss = model(tokens).logsumexp(-1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    return [losses(_materialized(_fsdp)), losses(_made_for_real()[0])]


def test_what_comes_out_trains() -> None:
    """FSDP, and modules with lists of their parameters, know the new ones."""
    for sharded, whole in on_ranks(2, _train):
        assert sharded == pytest.approx(whole, rel=1e-5)
        assert whole[0] != whole[-1]


def _seeded_by_rank() -> tuple[list[str], bool]:
    dist.init_process_group("gloo")
    model = _materialized(_fsdp, seed=5 + dist.get_rank())
    after = torch.rand(4)
    reference, _ = _made_for_real()
    everyones = [torch.empty(4) for _ in range(2)]
    dist.all_gather(everyones, after)
    return _differences(_state(model), dict(reference.state_dict())), torch.equal(*everyones)


def test_ranks_of_different_seeds_take_the_first_ones_values_and_keep_their_own_numbers() -> None:
    assert on_ranks(2, _seeded_by_rank) == [([], False)] * 2


def _converted() -> tuple[list[str], str]:
    dist.init_process_group("gloo")
    torch.manual_seed(5)
    with recording_init():
        model = Model()
    model.to(torch.bfloat16)
    meta = MetaTensors.of(model)
    _fsdp(model)
    meta.materialize(model, CPU, agree=_from_rank_zero)
    reference = _made_for_real()[0].to(torch.bfloat16)
    return _differences(_state(model), dict(reference.state_dict())), str(model.position.dtype)


def test_a_conversion_in_between_is_made_up_for() -> None:
    assert on_ranks(2, _converted) == [([], "torch.bfloat16")] * 2


# ---- without a recording ---------------------------------------------------------------------------------------------


def _reset(param_init_fn: Callable[[nn.Module], object] | None) -> tuple[dict[str, Tensor], bool]:
    dist.init_process_group("gloo")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    meta = MetaTensors.of(model)
    fully_shard(model[0])
    fully_shard(model)
    torch.manual_seed(dist.get_rank())
    meta.materialize(model, CPU, agree=_from_rank_zero, param_init_fn=param_init_fn)
    same_numbers = torch.rand(3)
    first = same_numbers.clone()
    dist.broadcast(first, 0)
    return _state(model), torch.equal(first, same_numbers)


def _zeros(module: nn.Module) -> None:
    module.to_empty(device="cpu", recurse=False)
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)
    for buffer in module.buffers(recurse=False):
        buffer.fill_(7)


def test_without_a_recording_submodules_are_reset_whole() -> None:
    """In the order of submodules, from the first rank's random numbers."""
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    for rank, (state, same_numbers) in enumerate(on_ranks(2, _reset, None)):
        assert _differences(state, dict(expected.state_dict())) == []
        assert same_numbers == (rank == 0)


def test_a_function_may_initialise_instead() -> None:
    for state, _ in on_ranks(2, _reset, _zeros):
        assert all(
            (state[name] == (7 if name.startswith("2.1.") and "weight" not in name and "bias" not in name else 0)).all()
            for name in state
        )


class WithoutReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(3))
        self.layer = nn.Linear(2, 2)


def test_no_way_to_initialise_is_an_error_before_anything_is_changed() -> None:
    with torch.device("meta"):
        model = WithoutReset()
    meta = MetaTensors.of(model)
    with pytest.raises(TypeError, match=r"`WithoutReset` has 'free' on the meta device.*no method `reset_parameters`"):
        meta.materialize(model, CPU)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_function_that_leaves_parameters_empty_is_an_error() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"`param_init_fn` must initialise 'weight' of `Linear` with shape \(2, 2\)"):
        MetaTensors.of(model).materialize(model, CPU, param_init_fn=lambda module: None)


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_real_tensors_and_attributes_stay() -> None:
    with recording_init():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias = bias = nn.Parameter(torch.ones(2))
    model[0].weight.mark = "kept"
    model[0].weight.requires_grad_(False)
    MetaTensors.of(model).materialize(model, CPU)
    assert model[0].bias is bias
    assert torch.equal(bias, torch.ones(2))
    assert model[0].weight.mark == "kept"
    assert not model[0].weight.requires_grad
    assert isinstance(model[0].weight, nn.Parameter)
    assert not isinstance(model[1].running_mean, nn.Parameter)


class Pair(NamedTuple):
    one: Tensor
    name: str


class WithAttributes(nn.Module):
    """Tensors that are neither parameters nor buffers, and parameters that are attributes too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.plain = torch.rand(3)
        self.tables = {"list": [torch.arange(3.0), "text"], "pair": Pair(torch.eye(2), "eye")}
        self.same = (self.plain,)
        self.first = self.layer.weight.detach()[0]
        self.weights = [self.layer.weight]
        self.tables["itself"] = self.tables
        self.untouched = ("no", ["tensors"])


def test_attributes_get_their_values_and_stay_the_parameters_they_are() -> None:
    torch.manual_seed(1)
    expected = WithAttributes()
    torch.manual_seed(1)
    with recording_init():
        model = WithAttributes()
    lists, untouched = model.tables["list"], model.untouched
    MetaTensors.of(model).materialize(model, CPU)
    assert torch.equal(model.plain, expected.plain)
    assert model.same[0] is model.plain
    assert model.tables["list"] is lists
    assert torch.equal(lists[0], expected.tables["list"][0])
    assert isinstance(model.tables["pair"], Pair)
    assert torch.equal(model.tables["pair"].one, torch.eye(2))
    assert torch.equal(model.first, expected.first)
    assert model.weights[0] is model.layer.weight
    assert model.untouched is untouched
    assert dict(model.named_parameters()).keys() == dict(expected.named_parameters()).keys()


def test_a_lazy_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without a shape cannot be shared out: '0.weight', '0.bias'.* first forward"):
        MetaTensors.of(nn.Sequential(nn.LazyLinear(2)))


def test_a_reset_does_not_change_what_was_recorded_or_real() -> None:
    torch.manual_seed(1)
    with recording_init():
        model = nn.Linear(2, 2)
    with torch.device("meta"):
        model.bias = nn.Parameter(torch.empty(2))
    MetaTensors.of(model).materialize(model, CPU)
    torch.manual_seed(1)
    assert torch.equal(model.weight, nn.Linear(2, 2).weight)
    assert model.bias.abs().max() <= 0.5**0.5


def test_a_module_with_nothing_on_meta_has_nothing_to_materialize() -> None:
    assert not MetaTensors.of(nn.Linear(2, 2))


def test_an_attribute_goes_on_being_the_parameter_that_was_shared_out() -> None:
    assert on_ranks(2, _aliased) == [True, True]


def _aliased() -> bool:
    dist.init_process_group("gloo")
    models = [WithAttributes()]
    with recording_init():
        models.append(WithAttributes())
    for model in models:
        meta = MetaTensors.of(model)
        fully_shard(model)
        meta.materialize(model, CPU)
    return all(isinstance(m.layer.weight, DTensor) and m.weights[0] is m.layer.weight for m in models)


def test_parts_are_dtensors_of_the_layout_they_had() -> None:
    assert on_ranks(2, _layout) == [True, True]


def _layout() -> bool:
    dist.init_process_group("gloo")
    with recording_init():
        model = nn.Linear(3, 5)
    meta = MetaTensors.of(model)
    fully_shard(model)
    before = [(p.placements, p.shape, p.to_local().shape) for p in model.parameters() if isinstance(p, DTensor)]
    meta.materialize(model, CPU)
    after = [(p.placements, p.shape, p.to_local().shape) for p in model.parameters() if isinstance(p, DTensor)]
    return before == after and len(after) == 2
