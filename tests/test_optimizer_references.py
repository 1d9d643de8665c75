"""After any set-up, each optimizer updates exactly those parameters of its that the model uses.

Random models are trained a few steps, and compared with the same models in bare PyTorch: by the identity of parameters,
by what has changed in the state dict, and by what a forward computes. All ranks see the same batch, so that the average
of their gradients is, to the bit, that of one process.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision._dtypes import default_dtype
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

WIDTH = 4
SEEDS = range(10)
PRECISIONS: tuple[Any, ...] = ("32-true", "64-true", "bf16-true", "bf16-mixed")

# ---- models ----------------------------------------------------------------------------------------------------------


class Leaf(nn.Module):
    """Parameters of several kinds, some of which ``forward`` may not use."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.layer = dice.choice([nn.Linear, partial(nn.Linear, bias=False)])(WIDTH, WIDTH)
        if dice.random() < 0.3:
            self.layer.weight.requires_grad_(False)
        if dice.random() < 0.3:
            self.listed = nn.ParameterList(torch.randn(WIDTH) for _ in range(2))
        if dice.random() < 0.3:
            frozen = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
            self.named = nn.ParameterDict({"free": torch.randn(WIDTH), "frozen": frozen})
        if dice.random() < 0.2:
            self.unused = nn.Linear(WIDTH, 2)
        if dice.random() < 0.3:
            self.register_buffer("offset", torch.randn(WIDTH), persistent=dice.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for parameter in getattr(self, "listed", ()):
            x = x + parameter
        if hasattr(self, "named"):
            x = x * self.named["free"] + self.named["frozen"]
        return torch.tanh(x + self.offset if hasattr(self, "offset") else x)


class Branches(nn.Module):
    """Children in a dict, and one of them maybe called twice."""

    def __init__(self, children: list[nn.Module], again: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"part{index}": child for index, child in enumerate(children)})
        self.nothing = nn.Identity()
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts.values()]
        if self.again:
            outputs.append(next(iter(self.parts.values()))(x))
        return self.nothing(torch.stack(outputs).sum(0))


class Chain(nn.Module):
    """Children in a list."""

    def __init__(self, children: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def make_model(seed: int) -> nn.Module:
    """The same for the same seed, on whichever device torch makes tensors."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    leaves = [Leaf(dice) for _ in range(dice.randint(2, 4))]
    if dice.random() < 0.5:
        leaves[1].layer.weight = leaves[0].layer.weight
    leaves[-1].remembered = [leaves[-1].layer.weight]  # an attribute that is a parameter
    parts: list[nn.Module] = [*leaves, nn.ReLU()]
    if dice.random() < 0.3:
        parts.append(leaves[0])  # one module in two places
    dice.shuffle(parts)
    inner = Branches(parts[:2], dice.random() < 0.5)
    outer: list[nn.Module] = [inner, nn.Sequential(*parts[2:]), nn.Linear(WIDTH, WIDTH)]
    return Chain(outer)


# ---- optimizers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to make one optimizer: names of parameters, group by group."""

    make: Callable[[list[dict[str, Any]]], Optimizer]
    groups: list[list[str]]

    def __call__(self, model: nn.Module) -> Optimizer:
        named = dict(model.named_parameters())
        groups = [
            {"params": (named[name] for name in group), "lr": 0.1 * (1 + number)}
            for number, group in enumerate(self.groups)
        ]
        return self.make(groups)


def make_recipes(seed: int, model: nn.Module) -> list[Recipe]:
    """One to three optimizers over different parameters; some parameters may be in none."""
    dice = random.Random(seed + 1000)
    names = [name for name, _ in model.named_parameters()]
    dice.shuffle(names)
    if dice.random() < 0.5:
        names = names[: max(1, len(names) - 2)]
    recipes = []
    for part in _split(dice, names, dice.randint(1, 3)):
        make = dice.choice([partial(SGD, momentum=0.9), partial(AdamW, foreach=False), AdamW])
        recipes.append(Recipe(make, _split(dice, part, dice.randint(1, 2))))
    return recipes


def _split(dice: random.Random, items: list[str], number: int) -> list[list[str]]:
    cuts = sorted(dice.sample(range(1, len(items)), min(number, len(items)) - 1))
    return [items[start:end] for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True)]


# ---- what it is compared with ----------------------------------------------------------------------------------------


@dataclass
class Trained:
    """What there is after training; ``states`` of each optimizer by name of the parameter."""

    weights: dict[str, Tensor]
    output: Tensor
    states: list[dict[str, dict[str, Tensor]]]
    before: dict[str, Tensor] = field(default_factory=dict)

    def changed(self) -> set[str]:
        return {name for name, value in self.weights.items() if not torch.equal(value, self.before[name])}


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(value) for name, value in model.state_dict().items()}


def train(
    model: Callable[[Tensor], Tensor],
    optimizers: list[Optimizer],
    dtype: torch.dtype,
    steps: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Iterator[Tensor]:
    """Step, and yield what the model computes of a batch each time."""
    for step in range(steps):
        batch = torch.arange(3.0 * WIDTH, dtype=torch.float64).add(step).sin().view(3, WIDTH).to(dtype)
        loss = model(batch).float().pow(2).sum()
        if loss.requires_grad:
            backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            yield model(torch.ones(2, WIDTH, dtype=dtype)).float()


def finished(
    model: nn.Module, named: dict[str, Tensor], optimizers: list[Optimizer], before: dict[str, Tensor], output: Tensor
) -> Trained:
    names = {parameter: name for name, parameter in named.items()}
    states = [
        {names[p]: {key: full(value) for key, value in state.items()} for p, state in optimizer.state.items()}
        for optimizer in optimizers
    ]
    return Trained(state_of(model), output, states, before)


DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


@cache
def reference(seed: int, precision: str, steps_before: int) -> tuple[Trained, list[Recipe]]:
    dtype = DTYPES.get(precision, torch.float32)
    with default_dtype(dtype):
        model = make_model(seed).to(dtype)
    recipes = make_recipes(seed, model)
    optimizers = [recipe(model) for recipe in recipes]
    for _ in train(model, optimizers, dtype, steps_before):
        pass
    before = state_of(model)
    forward = torch.autocast("cpu", torch.bfloat16)(model) if precision == "bf16-mixed" else model
    *_, output = train(forward, optimizers, dtype, 2)
    return finished(model, dict(model.named_parameters()), optimizers, before, output), recipes


# ---- ways to set up --------------------------------------------------------------------------------------------------


def joint(fabric: Fabric, seed: int, recipes: list[Recipe], steps_before: int, **kwargs: Any) -> Any:
    """Model and optimizers together; the optimizers may have been stepped before."""
    with fabric.init_module():
        model = make_model(seed)
    optimizers = [recipe(model) for recipe in recipes]
    dtype = next(model.parameters()).dtype
    for _ in train(model, optimizers, dtype, steps_before):
        pass
    wrapped, *optimizers = fabric.setup(model, *optimizers, **kwargs)
    return model, wrapped, optimizers


def before_the_module(fabric: Fabric, seed: int, recipes: list[Recipe], steps_before: int) -> Any:
    """Optimizers made first, everything set up on its own."""
    with fabric.init_module():
        model = make_model(seed)
    optimizers = [recipe(model) for recipe in recipes]
    wrapped = fabric.setup_module(model)
    return model, wrapped, [fabric.setup_optimizers(optimizer) for optimizer in optimizers]


def after_the_module(
    fabric: Fabric, seed: int, recipes: list[Recipe], steps_before: int, empty: bool = False, **kwargs: Any
) -> Any:
    """Optimizers made of what came out."""
    with fabric.init_module(empty_init=empty):
        model = make_model(seed)
    wrapped = fabric.setup_module(model, **kwargs)
    optimizers = [recipe(wrapped) for recipe in recipes]
    return model, wrapped, [fabric.setup_optimizers(optimizer) for optimizer in optimizers]


SetUp = Callable[[Fabric, int, list[Recipe], int], Any]
UNSHARDED: dict[str, SetUp] = {
    "joint": joint,
    "joint, not moved": partial(joint, move_to_device=False),
    "before the module": before_the_module,
    "after the module": after_the_module,
}
SHARDED: dict[str, SetUp] = {
    "joint": joint,
    "after the module": after_the_module,
    "after the module, which was on the meta device": partial(after_the_module, empty=True),
}
SEPARATE = {name: way for name, way in SHARDED.items() if name != "joint"}
WHOLE = {name: way for name, way in SHARDED.items() if name != "after the module"}


def check(fabric: Fabric, precision: str, way: SetUp, seed: int, exactly: bool = True) -> None:
    """Set up and train; raise ``AssertionError`` for what differs from bare PyTorch.

    ``exactly``: in values, too.
    """
    steps_before = seed % 2 if getattr(way, "func", way) is joint else 0
    expected, recipes = reference(seed, precision, steps_before)
    model, wrapped, optimizers = way(fabric, seed, recipes, steps_before)

    named = dict(wrapped.named_parameters())
    for recipe, optimizer in zip(recipes, optimizers, strict=True):
        for names, group in zip(recipe.groups, optimizer.param_groups, strict=True):
            assert [id(named[name]) for name in names] == [id(parameter) for parameter in group["params"]]
        assert {id(p) for p in optimizer.state} <= {id(named[name]) for group in recipe.groups for name in group}
    for module in model.modules():
        if hasattr(module, "remembered"):
            assert module.remembered[0] is module.layer.weight

    before = state_of(wrapped)
    dtype = DTYPES.get(precision, torch.float32)
    *_, output = train(wrapped, optimizers, dtype, 2, fabric.backward)
    found = finished(wrapped, named, optimizers, before, output)

    assert found.changed() == expected.changed()
    assert found.weights.keys() == expected.weights.keys()
    assert [state.keys() for state in found.states] == [state.keys() for state in expected.states]
    if exactly:
        _check_values(found, expected)


def _check_values(found: Trained, expected: Trained) -> None:
    compare = partial(torch.testing.assert_close, rtol=0, atol=0)
    compare(found.before, expected.before)
    compare(found.weights, expected.weights)
    compare(found.output, expected.output.to(found.output.dtype))
    compare(found.states, expected.states)


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", UNSHARDED)
def test_one_device(precision: Any, way: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    for seed in SEEDS:
        check(fabric, precision, UNSHARDED[way], seed)


def _compiled(fabric: Fabric, seed: int, recipes: list[Recipe], steps_before: int) -> Any:
    with fabric.init_module():
        model = make_model(seed)
    optimizers = [recipe(model) for recipe in recipes]
    wrapped, *optimizers = fabric.setup(torch.compile(model, backend="eager"), *optimizers)
    return model, wrapped, optimizers


def test_a_compiled_model() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    for seed in SEEDS[:1]:
        torch._dynamo.reset()
        check(fabric, "32-true", _compiled, seed)


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    """The plan of the model-parallel strategy."""
    from torch.distributed.fsdp import fully_shard

    for part in module.parts[1]:
        if isinstance(part, Leaf) and not _shares(module, part):
            fully_shard(part, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def _shares(module: nn.Module, part: nn.Module) -> bool:
    """Whether something else in the module has parameters of ``part``."""
    names = [name for name, parameter in module.named_parameters(remove_duplicate=False)]
    return len(names) != len(list(module.parameters())) or part in list(module.parts[0].modules())


def _strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=True)
    if name == "model_parallel":
        from lightning.fabric.strategies import ModelParallelStrategy

        return ModelParallelStrategy(_shard, data_parallel_size=2, tensor_parallel_size=1)
    from lightning.fabric.strategies import FSDPStrategy

    return FSDPStrategy(auto_wrap_policy={Leaf, nn.Linear} if name == "fsdp, units" else None)


def _train_all(strategies: dict[str, dict[str, SetUp]]) -> list[str]:
    """Return what went wrong, and where."""
    warnings.filterwarnings("ignore", message=".* are one parameter, used in several units")
    wrong = []
    for strategy, ways in strategies.items():
        for index, precision in enumerate(PRECISIONS):
            fabric = Fabric(accelerator="cpu", devices=2, strategy=_strategy(strategy), precision=precision)
            fabric.launch()
            # FSDP casts in other places than autocast does
            exactly = not (strategy.startswith("fsdp") and "mixed" in precision)
            for seed in range(index, 8, 4):
                for name, way in ways.items():
                    try:
                        check(fabric, precision, way, seed, exactly)
                    except Exception as error:
                        wrong.append(f"{strategy}, {name}, {precision}, {seed}: {type(error).__name__}: {error}")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [("ddp", "model_parallel"), ("fsdp", "fsdp, units")], ids=" and ".join)
def test_two_ranks(strategies: tuple[str, ...]) -> None:
    ways = {"ddp": UNSHARDED, "fsdp": WHOLE, "fsdp, units": SHARDED, "model_parallel": SEPARATE}
    found = on_ranks(2, _train_all, {name: ways[name] for name in strategies})
    assert found == [[], []]


# ---- what cannot be --------------------------------------------------------------------------------------------------


def _mistakes() -> list[str]:
    """Return the errors of optimizers that are not of the model's parameters."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=_strategy("fsdp"))
    fabric.launch()

    def error_of(function: Callable[[], Any]) -> str:
        try:
            function()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    model, other = make_model(0), make_model(1)
    early = SGD(model.parameters(), lr=0.1)
    fabric.setup_module(model)
    with fabric.init_module(empty_init=True):
        on_meta = make_model(2)
    mistakes = [
        lambda: fabric.setup_optimizers(early),  # of what the parameters were before
        lambda: fabric.setup_optimizers(SGD(other.parameters(), lr=0.1)),
        lambda: fabric.setup(on_meta, SGD(on_meta.parameters(), lr=0.1)),
    ]
    return [error_of(mistake) for mistake in mistakes]


def test_an_optimizer_from_before_the_model_had_memory_is_refused() -> None:
    """Torch replaces the parameters then, so the steps of this optimizer would go nowhere."""
    model = nn.Linear(1, 1, device="meta")
    optimizer = SGD(model.parameters(), lr=0.1)
    model.to_empty(device="cpu")
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(RuntimeError, match=r"SGD has 2 parameter\(s\) on the meta device"):
        fabric.setup(model, optimizer)
    with pytest.raises(RuntimeError, match="Create the optimizer after that"):
        fabric.setup_optimizers(optimizer)


def test_optimizers_of_other_parameters_are_refused() -> None:
    for errors in on_ranks(2, _mistakes):
        assert errors[0].startswith("ValueError: SGD has parameters that are not those of a module that was set up")
        assert errors[1] == errors[0]
        assert errors[2].startswith("RuntimeError: SGD has parameters on the meta device")
