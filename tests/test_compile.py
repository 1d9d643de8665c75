"""Compiled models: set up on the inside and compiled again on the outside, in one graph where one was asked for."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning.fabric import Fabric
from lightning.fabric.plugins import HalfPrecision, MixedPrecision, Precision
from lightning.fabric.strategies import DataParallelStrategy
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.compilation import blocks_to_compile, is_compiled, uncompiled

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

# where a compiled part gets what another has computed, the compiler looks at its gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

BF16 = torch.bfloat16
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self(x).square().mean() * scale


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


NAMES = list(net().state_dict())
X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph


def compiled(module: Any, **options: Any) -> Any:
    return torch.compile(module, **{"backend": "eager", **options})


def on_cpu(**flags: Any) -> Fabric:
    return Fabric(accelerator="cpu", **{"devices": 1, **flags})


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# ---- one process -----------------------------------------------------------------------------------------------------


class TestWhole:
    def test_options_are_those_of_the_users(self):
        outer = torch.compile(net(), backend="eager", fullgraph=True, dynamic=False)
        model = on_cpu().setup(outer)
        assert model._forward_module.dynamo_ctx is outer.dynamo_ctx
        assert uncompiled(model._forward_module) is model.module

    def test_compiled_in_place_it_stays_so(self):
        inner, backend = net(), Backend()
        inner.compile(backend=backend, fullgraph=True)
        model = on_cpu().setup(inner)
        assert model.module is model._forward_module is inner
        assert is_compiled(inner)
        assert torch.equal(model(X), net()(X))
        assert backend.graphs == 1

    def test_compiled_in_both_ways_it_is_compiled_once(self):
        inner, in_place, outside = net(), Backend(), Backend()
        inner.compile(backend=in_place)
        model = on_cpu().setup(compiled(inner, backend=outside))
        model(X)
        assert (in_place.graphs, outside.graphs) == (0, 1)
        assert not is_compiled(model.module)

    def test_disabled_it_is_not_compiled(self):
        in_place = net()
        in_place.compile(disable=True)
        for module in (in_place, torch.compile(net(), disable=True)):
            model = on_cpu().setup(module, _reapply_compile="blocks")  # has nothing to do
            assert not any(map(is_compiled, model._forward_module.modules()))

    def test_what_does_not_tell_its_options_is_refused(self):
        inner = net()
        inner._compiled_call_impl = partial(inner._call_impl)
        with pytest.raises(RuntimeError, match="Net was compiled in place, but not by `module.compile"):
            on_cpu().setup(inner)

    def test_hooks_of_the_compiled_module_are_not_lost(self):
        outer = compiled(net())
        outer.register_forward_hook(lambda module, args, output: None)
        with pytest.raises(ValueError, match="Hooks were registered on the compiled Net"):
            on_cpu().setup(outer)

    def test_set_up_module_compiles_in_place_and_once(self):
        first, second = Backend(), Backend()
        model = on_cpu().setup(compiled(net(), backend=first))
        model.compile(backend=second)
        model(X)
        assert (first.graphs, second.graphs) == (0, 1)
        model.compile(disable=True)
        assert not is_compiled(model._forward_module)

    def test_choice_is_checked(self):
        with pytest.raises(ValueError, match="`_reapply_compile` is True, False or 'blocks', but got 'block'"):
            on_cpu().setup(net(), _reapply_compile="block")
        with pytest.raises(TypeError, match="but got None"):
            on_cpu().setup_module(net(), _reapply_compile=None)

    def test_only_once_set_up(self):
        model = on_cpu().setup(compiled(net()))
        in_place = on_cpu().setup(net())
        in_place.compile(backend="eager")
        for again in (model, compiled(model), in_place):
            with pytest.raises(ValueError, match="set up already"):
                on_cpu().setup(again)

    def test_a_model_that_was_compiled_after_set_up_is_the_set_up_one(self):
        fabric = on_cpu()
        model, optimizer = fabric.setup(net(), torch.optim.SGD(net().parameters(), lr=0.1))
        outer = compiled(model)
        with fabric.no_backward_sync(outer):
            fabric.backward(outer(X).sum(), model=outer)
        assert fabric.clip_gradients(outer, optimizer, max_norm=1.0).ndim == 0


class TestParts:
    def _with_compiled_parts(self, **options: Any) -> Net:
        model = net()
        model.blocks[0] = compiled(model.blocks[0], **options)
        model.blocks[1].compile(**{"backend": "eager", **options})
        model.head = compiled(model.head, **options)
        return model

    @pytest.mark.parametrize("choice", [True, False, "blocks"])
    def test_they_are_compiled_in_place_with_their_options(self, choice):
        backend, module = Backend(), net()
        part = module.blocks[0]
        module = self._with_compiled_parts(backend=backend, fullgraph=True)
        part = module.blocks[0]
        context = part.dynamo_ctx
        model = on_cpu().setup(module, _reapply_compile=choice)
        assert model.module.blocks[0] is part._orig_mod
        assert [name for name, _ in module.named_parameters()] == NAMES
        assert context in [cell.cell_contents for cell in part._orig_mod._compiled_call_impl.__closure__]
        assert [is_compiled(block) for block in module.blocks] == [True, True, False]
        assert torch.equal(model(X), net()(X))
        assert backend.graphs == 2  # blocks share one

    def test_shared_ones_stay_shared(self):
        module = net()
        shared = compiled(module.blocks[0])
        module.blocks[0] = module.blocks[2] = shared
        on_cpu().setup(module)
        assert module.blocks[0] is module.blocks[2] is shared._orig_mod

    def test_inside_a_compiled_model_they_are_in_its_graph(self):
        backend = Backend()
        model = on_cpu().setup(compiled(self._with_compiled_parts(), backend=backend, fullgraph=True))
        assert torch.equal(model(X), net()(X))
        assert backend.graphs == 1
        assert list(model.state_dict()) == NAMES

    def test_what_is_not_to_be_compiled_still_is_not(self):
        module, backend, traced = net(), Backend(), []
        module.blocks[1].register_forward_hook(lambda *_: traced.append(torch.compiler.is_compiling()))
        module.blocks[1] = torch.compiler.disable(module.blocks[1])
        model = on_cpu().setup(compiled(module, backend=backend))
        assert torch.equal(model(X), net()(X))
        assert traced == [False]
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == NAMES

    def test_hooks_of_compiled_parts_run(self):
        module, ran = net(), []
        module.head = compiled(module.head)
        module.head.register_forward_hook(lambda *_: ran.append(True))
        model = on_cpu().setup(module)
        model(X)
        assert ran == [True]
        assert list(model.state_dict()) == NAMES

    def test_dp_would_compute_with_weights_of_another_gpu(self):
        strategy = DataParallelStrategy(parallel_devices=[torch.device("cuda", 0), torch.device("cuda", 1)])
        module = net()
        module.head.compile(backend="eager")
        with pytest.raises(ValueError, match="Linear inside the module is compiled, but 'dp' copies the module"):
            strategy.setup_module(module)
        with pytest.raises(ValueError, match="fullgraph=True, but under 'dp'"):
            strategy.check_one_graph(net())

    def test_layers_of_torchs_own_are_compiled_too(self):
        # by themselves, `layer.compile()` compiles nothing: torch traces none of their frames
        backend = Backend()
        module = nn.Sequential(nn.Linear(3, 3), *(nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0) for _ in range(2)))
        expected = module(X)
        model = on_cpu().setup(compiled(module, backend=backend, fullgraph=True), _reapply_compile="blocks")
        assert torch.equal(model(X), expected)
        assert backend.graphs == 1
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        module.compile(backend=backend, fullgraph=True)
        on_cpu().setup(module)(X)
        assert backend.graphs == 2


class TestBlocks:
    def test_each_is_compiled_in_place_with_the_models_options(self):
        backend = Backend()
        model = on_cpu().setup(compiled(net(), backend=backend, fullgraph=True), _reapply_compile="blocks")
        assert model._forward_module is model.module
        assert [name for name, part in model.module.named_modules() if is_compiled(part)] == [
            f"blocks.{number}" for number in range(3)
        ]
        assert torch.equal(model(X), net()(X))
        assert backend.graphs == 1
        assert list(model.state_dict()) == NAMES

    def test_one_with_options_of_its_own_keeps_them(self):
        module, own, others = net(), Backend(), Backend()
        module.blocks[0].up.register_forward_hook(lambda *_: None)  # so it has another graph than the others
        module.blocks[0].compile(backend=own)
        module.compile(backend=others)
        model = on_cpu().setup(module, _reapply_compile="blocks")
        model(X)
        assert (own.graphs, others.graphs) == (1, 1)
        assert not is_compiled(module)

    def test_blocks_are_what_repeats(self):
        a, b, c = Block(), Block(), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        inner = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())])
        for module, expected in (
            (nn.Sequential(a, c, b), [a, b]),  # hybrids too
            (nn.ModuleDict({"0": a, "1": b}), [a, b]),
            (nn.ModuleList([a, a]), [a]),  # one, used twice
            (nn.Sequential(nn.Linear(2, 2), nn.Sequential(a, b)), [a, b]),
            (inner, list(inner)),  # the outermost
            (nn.ModuleList([nn.ModuleList([a, b]), nn.ModuleList([a, b])]), [a, b]),  # a list is not called
        ):
            assert [module.get_submodule(name) for name in blocks_to_compile(module, [])] == expected
        assert blocks_to_compile(nn.Sequential(a, b), [b.up, b]) == ["1"]  # units go first

    def test_what_a_precision_puts_in_place_of_a_part_is_compiled_too(self):
        class Replaces(Precision):
            def convert_module(self, module):
                module.blocks[1], module.head = Block(), nn.Linear(6, 2)
                return module

        for choice in (True, "blocks"):
            module = net()
            module.head = compiled(module.head)
            model = on_cpu(plugins=Replaces()).setup(compiled(module), _reapply_compile=choice)
            assert is_compiled(model.module.head)
            assert is_compiled(model.module.blocks[1]) is (choice == "blocks")

    @pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))])
    def test_without_blocks_it_says_so(self, module):
        with pytest.raises(ValueError, match="blocks that .* repeats, but it has none"):
            on_cpu().setup(compiled(module), _reapply_compile="blocks")


class TestGraphs:
    @pytest.mark.parametrize(
        ("when", "precision"),
        [*((when, "bf16-mixed") for when in ("before", "in place", "in place after")), ("before", "bf16-true")]
        + [("after", precision) for precision in PRECISIONS],
    )
    def test_one_graph_for_all_steps_and_one_more_for_evaluation(self, precision, when):
        backend = Backend()
        options: dict[str, Any] = {"backend": backend, "fullgraph": True}
        module, fabric = net(), on_cpu(precision=precision)
        if when == "in place":
            module.compile(**options)
        model = fabric.setup(torch.compile(module, **options) if when == "before" else module)
        if when == "in place after":
            model.compile(**options)
        model = torch.compile(model, **options) if when == "after" else model
        for _ in range(5):
            fabric.backward(model(X).sum())
        assert backend.graphs == 1
        for _ in range(2):
            with torch.no_grad():
                assert model.eval()(X).dtype is torch.float32
            model.train()(X)
        assert backend.graphs <= 2

    @pytest.mark.parametrize("in_place", [True, False])
    def test_methods_are_compiled_like_forward(self, in_place):
        module, backend = net(), Backend()
        options: dict[str, Any] = {"backend": backend, "fullgraph": True}
        if in_place:
            module.compile(**options)
        model = on_cpu(precision="bf16-mixed").setup(module if in_place else torch.compile(module, **options))
        with torch.autocast("cpu", dtype=BF16):
            expected = net().training_step(X, scale=2.0)
        for _ in range(5):
            assert torch.equal(model.training_step(X, scale=2.0), expected.float())
            model(X)
        assert backend.graphs == 2

    @pytest.mark.parametrize("plugin", [MixedPrecision, HalfPrecision])
    def test_parts_that_are_kept_in_32_bit_are_in_the_graph(self, plugin):
        backend = Backend()
        kind = "bf16-mixed" if plugin is MixedPrecision else "bf16-true"
        extra = {"device": "cpu"} if plugin is MixedPrecision else {}

        def fabric() -> Fabric:
            return on_cpu(plugins=plugin(kind, **extra, keep_fp32=["head", "blocks.1"]))

        eager = fabric().setup(net())
        model = fabric().setup(compiled(net(), backend=backend, fullgraph=True))
        assert torch.equal(model(X), eager(X))
        assert backend.graphs == 1
        model = fabric().setup(compiled(net(), backend=backend, fullgraph=True), _reapply_compile="blocks")
        assert all(map(is_compiled, model.module.blocks))
        assert torch.equal(model(X), eager(X))

    def test_autocast_is_in_the_users_own_graph(self):
        fabric, backend = on_cpu(precision="bf16-mixed"), Backend()
        model = fabric.setup(net())

        @torch.compile(backend=backend, fullgraph=True)
        def step(x: Tensor) -> Tensor:
            with fabric.autocast():
                loss = (x @ x.T).mean()
            return loss + model(x).mean() + model.training_step(x)

        for _ in range(3):
            step(X).backward()
        assert backend.graphs == 1


class TestFiles:
    @pytest.fixture(params=["before", "after", "parts", "parts, not set up", "parts after"])
    def model(self, request):
        fabric, module = on_cpu(), net()
        if request.param == "before":
            return fabric, fabric.setup(compiled(module))
        if request.param == "after":
            return fabric, compiled(fabric.setup(module))
        if request.param == "parts after":
            model = fabric.setup(module)
            module.blocks[1] = compiled(module.blocks[1])
            return fabric, model
        module.blocks[1] = compiled(module.blocks[1])
        return fabric, fabric.setup(module) if request.param == "parts" else module

    def test_names_never_tell_that_it_is_compiled(self, model, tmp_path):
        fabric, model = model
        fabric.save(tmp_path / "all.pt", {"model": model})
        saved = torch.load(tmp_path / "all.pt")["model"]
        assert list(saved) == NAMES
        zeros = {name: torch.zeros_like(value) for name, value in saved.items()}
        torch.save({"model": zeros}, tmp_path / "zeros.pt")
        torch.save(zeros, tmp_path / "raw.pt")
        for load in (
            lambda: fabric.load(tmp_path / "zeros.pt", {"model": model}),
            lambda: fabric.load_raw(tmp_path / "raw.pt", model),
        ):
            load()
            assert not any(parameter.any() for parameter in model.parameters())
            fabric.load(tmp_path / "all.pt", {"model": model})
            assert torch.equal(model(X), net()(X))

    def test_files_of_compiled_models_are_read(self, model, tmp_path):
        fabric, model = model
        other = net()
        with torch.no_grad():
            other.head.weight.zero_()
        other.blocks[2] = compiled(other.blocks[2])
        state = compiled(other).state_dict()
        assert "_orig_mod.blocks.2._orig_mod.up.weight" in state
        torch.save(state, tmp_path / "raw.pt")
        torch.save({"model": state}, tmp_path / "all.pt")
        for load in (
            lambda: fabric.load(tmp_path / "all.pt", {"model": model}),
            lambda: fabric.load_raw(tmp_path / "raw.pt", model),
        ):
            fabric.load_raw(tmp_path / "raw.pt", model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(1.0)
            load()
            assert torch.equal(model(X), other(X))

    def test_a_state_dict_of_a_compiled_model_is_loaded_with_its_versions(self):
        module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        state = compiled(module).state_dict()
        model = on_cpu().setup(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
        versions = []
        model.module[0]._register_load_state_dict_pre_hook(
            lambda state, prefix, metadata, *_: versions.append(metadata["version"])
        )
        model.load_state_dict(state)
        assert torch.equal(model(X), module(X))
        assert versions == [2]

    def test_a_name_that_does_not_fit_is_still_refused(self, tmp_path):
        model = on_cpu().setup(compiled(nn.Linear(3, 1)))
        for state in (
            {"_orig_mod.weight": torch.ones(1, 3), "_orig_mod.bais": torch.ones(1)},
            {"_orig_mod.weight": torch.ones(1, 3), "weight": torch.ones(1, 3), "bias": torch.ones(1)},
        ):
            with pytest.raises(RuntimeError, match="Unexpected key"):
                model.load_state_dict(state)


# ---- several strategies, against the same by hand --------------------------------------------------------------------


class ByHand(nn.Module):
    """Around ``module``, what a precision is."""

    def __init__(self, module: nn.Module, precision: str) -> None:
        super().__init__()
        self.module = module
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        if self.precision == "bf16-mixed":
            with torch.autocast("cpu", dtype=BF16):
                return self.module(x).float()
        if self.precision == "bf16-true":
            return self.module(x.to(BF16)).float()
        return self.module(x)


def _wrapped_by_hand(strategy: str, precision: str, checkpointed: bool) -> nn.Module:
    from torch.distributed._composable.checkpoint_activation import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module = net().to(BF16 if precision == "bf16-true" else torch.float32)
    if strategy != "fsdp":
        return DistributedDataParallel(module) if strategy == "ddp" else module
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=BF16) if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for block in module.blocks:
        fully_shard(checkpoint(block) if checkpointed else block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def _strategy(name: str, checkpointed: bool = False, **options: Any) -> Any:
    from lightning.fabric.strategies import FSDPStrategy

    if checkpointed:
        options["activation_checkpointing_policy"] = {Block}
    return FSDPStrategy(**{"auto_wrap_policy": {Block}, **options}) if name == "fsdp" else name


def _count(make: Callable[[Callable[[nn.Module], Any]], Any], fullgraph: bool = False) -> int:
    """Return the number of graphs in three steps of what ``make(compile)`` returns."""
    torch._dynamo.reset()
    backend = Backend()
    model = make(lambda module: torch.compile(module, backend=backend, fullgraph=fullgraph))
    for _ in range(3):
        model(X).sum().backward()
    return backend.graphs


def _count_by_hand(strategy: str, precision: str, when: str, checkpointed: bool = False) -> int:
    def make(compile: Callable[[nn.Module], Any]) -> Any:
        module = _wrapped_by_hand(strategy, precision, checkpointed)
        return compile(ByHand(module, precision)) if when == "after" else ByHand(compile(module), precision)

    return _count(make)


def _count_by_fabric(strategy: str, precision: str, when: str, checkpointed: bool = False) -> int:
    fabric = on_cpu(strategy=_strategy(strategy, checkpointed), precision=precision)
    fabric.launch()
    return _count(lambda compile: compile(fabric.setup(net())) if when == "after" else fabric.setup(compile(net())))


def _counts() -> dict[tuple[Any, ...], tuple[int, int]]:
    on_cpu(strategy="ddp").launch()
    cases: list[Any] = [
        *itertools.product(["ddp", "fsdp"], ["bf16-mixed", "bf16-true"], ["before"]),
        *itertools.product(["ddp", "fsdp"], ["bf16-true"], ["after"]),
        ("fsdp", "32-true", "before", True),
    ]
    return {case: (_count_by_hand(*case), _count_by_fabric(*case)) for case in cases}


def _one_graph() -> dict[str, int]:
    """How many graphs there are where one was asked for."""
    found = {}
    for name, precision in itertools.product(["ddp", "fsdp"], ["32-true", "bf16-mixed"]):
        fabric = on_cpu(strategy=_strategy(name, auto_wrap_policy=None), precision=precision)
        fabric.launch()

        def method(compile: Callable[[nn.Module], Any], fabric: Fabric = fabric) -> Any:
            model = fabric.setup(compile(net()))
            return model.training_step

        found[f"{name}, {precision}"] = _count(lambda compile, f=fabric: f.setup(compile(net())), fullgraph=True)
        found[f"{name}, {precision}, method"] = _count(method, fullgraph=True)
    return found


def _refused() -> str:
    fabric = on_cpu(strategy=_strategy("fsdp"))
    fabric.launch()
    with pytest.raises(ValueError, match=r"fullgraph=True, but has units inside \('blocks.0', ") as caught:
        fabric.setup(compiled(net(), fullgraph=True))
    fabric = on_cpu(strategy=_strategy("fsdp", auto_wrap_policy={Block, nn.Linear}))
    fabric.launch()
    with pytest.raises(ValueError, match=r"Block was compiled .* has units inside \('up', 'down'\)"):
        fabric.setup(compiled(net(), fullgraph=True), _reapply_compile="blocks")
    return str(caught.value)


class TestGraphsOfStrategies:
    def test_as_many_as_by_hand(self):
        [counts] = on_ranks(1, _counts, timeout=110)
        assert {case: fabric for case, (_, fabric) in counts.items()} == {
            case: by_hand for case, (by_hand, _) in counts.items()
        }
        assert all(fabric > 0 for _, fabric in counts.values())

    def test_one_if_the_model_was_to_be_one(self):
        [counts] = on_ranks(1, _one_graph, timeout=110)
        assert set(counts.values()) == {1}, counts

    def test_units_cannot_be_in_one(self):
        on_ranks(1, _refused)


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _tensor_parallel(module: Any, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in module.blocks:
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return module


def _fabric_of_two(name: str) -> Fabric:
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy = (
        ModelParallelStrategy(_tensor_parallel, data_parallel_size=1, tensor_parallel_size=2)
        if name == "tensor parallel"
        else _strategy(name)
    )
    fabric = on_cpu(devices=2, strategy=strategy)
    fabric.launch()
    return fabric


WAYS = {
    "ddp": ["eager", "whole", "in place", "parts"],
    "fsdp": ["eager", "whole", "one graph each", "parts", "after"],
    "tensor parallel": ["eager", "one graph each"],
}


def _model_of(way: str, backend: str) -> Any:
    module = net()
    if way == "parts":
        module.blocks = nn.ModuleList(compiled(block, backend=backend) for block in module.blocks)
        module.head.compile(backend=backend)
    elif way == "in place":
        module.compile(backend=backend)
    elif way not in ("eager", "after"):
        return compiled(module, backend=backend, fullgraph=way == "one graph each")
    return module


def _five_steps(fabric: Fabric, way: str, backend: str = "eager", folder: str = "") -> list[float]:
    """Losses over ranks; and keys are those of the model in any case."""
    torch._dynamo.reset()
    choice = {"blocks": "blocks", "one graph each": "blocks", "inside": False}.get(way, True)
    model = fabric.setup_module(_model_of(way, backend), _reapply_compile=choice)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.5))
    called = compiled(model, backend=backend) if way == "after" else model
    data = torch.linspace(-2, 2, 5 * 2 * 4 * 3).sin().reshape(5, 2, 4, 3)
    losses = []
    for step in range(5):
        batch = data[step, fabric.global_rank if fabric.strategy.num_replicas > 1 else 0]
        loss = called(batch).square().mean() if step % 2 else called.training_step(batch)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.as_tensor(fabric.all_reduce(loss.detach())).item())
    if folder:
        _check_files(fabric, called, Path(folder, fabric.strategy.__class__.__name__ + way))
    return losses


def _check_files(fabric: Fabric, model: Any, path: Path) -> None:
    assert [name for name, _ in uncompiled(model).named_parameters()] == NAMES
    assert list(uncompiled(model).state_dict()) == NAMES
    fabric.save(path, {"model": model})
    raw = compiled(net()).state_dict()
    raw_path = path.with_suffix(".raw")
    if fabric.is_global_zero:
        torch.save(raw, raw_path)
    fabric.load_raw(raw_path, model)
    batch = X.clone()
    with torch.no_grad():
        assert torch.allclose(model(batch), net()(batch), atol=1e-6)
        fabric.load(path, {"model": model})
        assert not torch.allclose(model(batch), net()(batch), atol=1e-6)


Losses = dict[str, dict[str, list[float]]]


def _losses(folder: str) -> Losses:
    found = {}
    for name, ways in WAYS.items():
        fabric = _fabric_of_two(name)
        found[name] = {way: _five_steps(fabric, way, folder=folder) for way in ways}
        model = fabric.setup_module(_model_of("parts", "eager"))
        units = [part for part in model.module.modules() if fabric.strategy.is_unit(part)]
        assert len(units) == (3 if name == "fsdp" else 0)  # found inside of what was compiled
    return found


def _losses_with_gradients_in_graphs() -> Losses:
    return {
        name: {
            way: _five_steps(_fabric_of_two(name), way, backend)
            for way, backend in (("eager", ""), ("whole", "aot_eager"), ("blocks", "aot_eager"))
        }
        for name in ("ddp", "fsdp")
    }


def _alone(way: str, backend: str = "aot_eager") -> list[float]:
    return _five_steps(on_cpu(), way, backend)


def _assert_as_eager(found: Losses) -> None:
    for ways in found.values():
        for way, losses in ways.items():
            assert losses == pytest.approx(ways["eager"], rel=1e-5), way
        assert ways["eager"][4] != ways["eager"][0]


class TestLosses:
    @pytest.mark.parametrize("way", ["whole", "blocks"])
    def test_on_one_rank_as_eager(self, way):
        assert _alone(way) == pytest.approx(_alone("eager"), rel=1e-5)

    def test_on_two_ranks_as_eager(self, tmp_path):
        for found in on_ranks(2, _losses, str(tmp_path), timeout=110):
            _assert_as_eager(found)

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_on_two_ranks_with_gradients_in_graphs(self):
        for found in on_ranks(2, _losses_with_gradients_in_graphs, timeout=280):
            _assert_as_eager(found)

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in what the compiler imports
    def test_by_the_default_compiler(self):
        for way in ("whole", "blocks"):
            assert _alone(way, "inductor") == pytest.approx(_alone("eager"), rel=1e-4)
