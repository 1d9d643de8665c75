"""An explanation tells what is so: of random models under each strategy, what it says is compared with the tensors."""

import gc
import json
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from lightning.fabric import Fabric
from lightning.fabric.observe.outline import common_facts, rows
from lightning.fabric.observe.records import BufferReport, ModuleReport, ParameterReport, PartReport
from lightning.fabric.testing import on_ranks, preload

preload("lightning.fabric.strategies.fsdp", "lightning.fabric.strategies.model_parallel")


# ---- random models ---------------------------------------------------------------------------------------------------


def random_model(seed):
    """Linear layers, norms and what has no parameters, nested; some tied, some frozen. 8 numbers in, 8 out."""
    choice = random.Random(seed)
    torch.manual_seed(seed)

    def layer(depth=0):
        kind = choice.choice(["linear", "norm", "batch norm", "nothing", "deep"] if depth < 2 else ["linear", "norm"])
        if kind == "deep":
            return nn.Sequential(*(layer(depth + 1) for _ in range(choice.randint(1, 3))))
        made = {"linear": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "batch norm": nn.BatchNorm1d(8)}
        return made.get(kind, nn.Tanh())

    model = nn.Sequential(nn.Linear(8, 8), *(layer() for _ in range(choice.randint(2, 5))), nn.Linear(8, 8))
    if choice.random() < 0.5:
        model[-1].weight = model[0].weight
    for parameter in list(model.parameters())[2:]:
        parameter.requires_grad = choice.random() < 0.7
    return model


def assert_true_of(report, own, strategy):
    """Whatever the report says of parameters and buffers is found by looking at them."""
    found = {parameter.name: parameter for parameter in report.parameters}
    assert list(found) == [name for name, _ in own.named_parameters()]
    aliases = {}
    for name, parameter in own.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for name, parameter in own.named_parameters():
        said, here = found[name], getattr(parameter, "_local_tensor", parameter)
        assert [said.name, *said.aliases] == aliases[id(parameter)]
        assert (said.shape, said.shape_here) == (tuple(parameter.shape), tuple(here.shape))
        assert (said.dtype, said.device) == (str(here.dtype)[6:], str(here.device))
        assert (said.numel, said.numel_here) == (parameter.numel(), here.numel())
        assert said.trainable == parameter.requires_grad
        assert said.bytes_here == here.numel() * here.element_size()
        assert said.layout == layout_of(parameter, strategy.world_size)
        if not said.trainable:
            assert not said.gradients
    buffers = [(b.name, b.shape, f"torch.{b.dtype}", b.device) for b in report.buffers]
    assert buffers == [(name, tuple(b.shape), str(b.dtype), str(b.device)) for name, b in own.named_buffers()]
    kinds = {part.name: part.kind for part in report.parts}
    assert kinds == {name: type(part).__name__ for name, part in own.named_modules()}


def layout_of(parameter, world_size):
    if not hasattr(parameter, "placements"):
        return "whole" if world_size == 1 else f"a copy on each of {world_size} ranks"
    mesh, words = parameter.device_mesh, []
    for name, size, placement in zip(mesh.mesh_dim_names, mesh.shape, parameter.placements, strict=True):
        if size > 1:
            what = f"1/{size} of dim {placement.dim}" if placement.is_shard() else "repeated"
            words.append(f"{what} over {name!r} ({size} ranks)")
    return ", ".join(words) or "whole"


def dtypes_in_forward(model, batch):
    """What comes out of the model, and the dtype of what each linear layer puts out, by name."""
    computed = {}

    def record(name):
        return lambda layer, args, output: computed.update({name: str(output.dtype)[6:]})

    layers = [(name, part) for name, part in model.module.named_modules() if isinstance(part, nn.Linear)]
    hooks = [part.register_forward_hook(record(name)) for name, part in layers]
    output = model(batch)
    for hook in hooks:
        hook.remove()
    return output, computed


@contextmanager
def dtypes_on_the_way(monkeypatch):
    """The dtypes of what is added up over ranks."""
    sent = set()

    def recording(collective):
        def call(*args, **kwargs):
            tensor = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
            sent.add(str(tensor.dtype)[6:])
            return collective(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in {"reduce_scatter_single", "reduce_scatter_tensor", "all_reduce"} & vars(dist).keys():
            patch.setattr(dist, name, recording(getattr(dist, name)))
        yield sent


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("seed", range(5))
def test_one_process(seed, precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = fabric.setup(random_model(seed))
    (report,) = fabric.explain().modules
    assert_true_of(report, model.module, fabric.strategy)
    assert {parameter.gradients for parameter in report.parameters} == {""}
    _, computed = dtypes_in_forward(model, torch.randn(4, 8))
    said = {parameter.name: parameter.computes_in.split()[0] for parameter in report.parameters}
    assert {name: said[f"{name}.bias"] for name in computed} == computed


def test_parameters_that_do_not_exist_yet():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))
    assert fabric.explain().modules[0].parameters[0].layout == "not initialised yet"
    model(torch.randn(1, 5))
    assert fabric.explain().modules[0].parameters[0].shape == (3, 5)


def test_of_nothing_it_says_so():
    explanation = Fabric(accelerator="cpu", devices=1).explain()
    assert not explanation.process.launched
    assert explanation.modules == explanation.optimizers == explanation.loaders == explanation.attention == ()
    assert "not set up (or gone): model, optimizer, loader" in str(explanation)
    assert "not launched yet, 2 ranks to come" in str(Fabric(accelerator="cpu", devices=2, strategy="ddp").explain())


def test_it_is_plain_data_and_keeps_nothing_alive():
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model := random_model(0), torch.optim.Adam(model.parameters()))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.zeros(4, 8))))
    explanation = fabric.explain()
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["plan"][0] == {"name": "accelerator", "value": "cpu", "because": "accelerator='cpu'"}
    assert [entry["name"] for entry in data["modules"][0]["parameters"]] == [n for n, _ in model.named_parameters()]
    assert explanation == replace(fabric.explain(), memory=explanation.memory)
    del model, optimizer, loader
    gc.collect()
    assert fabric.explain().modules == fabric.explain().optimizers == fabric.explain().loaders == ()


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _sharded(**options):
    from lightning.fabric.strategies import FSDPStrategy

    return FSDPStrategy(auto_wrap_policy={nn.Linear}, **options)


def _split(model, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    is_tied = model[0].weight is model[-1].weight
    if mesh["tensor_parallel"].size() > 1 and not is_tied:
        last = RowwiseParallel(input_layouts=Replicate())
        plan = {"0": ColwiseParallel(output_layouts=Replicate()), str(len(model) - 1): last}
        parallelize_module(model, mesh["tensor_parallel"], plan)
    if mesh["data_parallel"].size() > 1:
        for part in () if is_tied else (model[0], model[-1]):
            fully_shard(part, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
    return model


def _model_parallel(data, tensor):
    from lightning.fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(_split, data_parallel_size=data, tensor_parallel_size=tensor)


CASES = [
    ("ddp", "32-true", lambda: "ddp"),
    ("ddp", "bf16-mixed", lambda: "ddp"),
    ("ddp", "bf16-true", lambda: "ddp"),
    ("fsdp", "32-true", _sharded),
    ("fsdp", "bf16-mixed", _sharded),
    ("fsdp", "bf16-true", lambda: _sharded(sharding_strategy="SHARD_GRAD_OP")),
    ("fsdp", "32-true", lambda: _sharded(sharding_strategy="NO_SHARD")),
    ("fsdp", "32-true", lambda: _sharded(mixed_precision=_low())),
    ("split", "32-true", lambda: _model_parallel(1, 2)),
    ("fsdp", "32-true", lambda: _model_parallel(2, 1)),
]


def _low():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _explain_each(seeds):
    found = []
    for number, (kind, precision, strategy) in enumerate(CASES):
        for seed in seeds:
            fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy(), precision=precision)
            fabric.launch()
            model = fabric.setup_module(random_model(seed))
            optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
            explanation = fabric.explain()
            (report,) = explanation.modules
            assert_true_of(report, model.module, fabric.strategy)
            said = {parameter.name: parameter.computes_in.split()[0] for parameter in report.parameters}
            output, computed = dtypes_in_forward(model, torch.randn(4, 8))
            assert {name: said[f"{name}.bias"] for name in computed} == computed, (number, seed)
            assert _without_memory(fabric) == replace(explanation, memory=None), "whole parameters look the same"
            _assert_gradients(kind, model, output, fabric, report, number, seed)
            assert explanation.optimizers[0].tensors == len(report.parameters)
            found.append((kind, report.parameters))
            del model, optimizer, output
    return found


def _without_memory(fabric):
    return replace(fabric.explain(), memory=None)


def _assert_gradients(kind, model, output, fabric, report, number, seed):
    with dtypes_on_the_way(pytest.MonkeyPatch()) as sent:
        fabric.backward(output.float().square().mean())
    said = {parameter.gradients for parameter in report.parameters if parameter.trainable}
    if kind == "split":
        assert said == {""}
    elif kind == "ddp":  # which adds up in C++
        assert said == {f"averaged over 2 ranks in {report.parameters[0].dtype}"}
    else:
        assert said == {f"averaged over 2 ranks in {dtype}" for dtype in sent}, f"{said} {sent} {number} {seed}"
    after = {parameter.name: parameter.has_gradient for parameter in fabric.explain().modules[0].parameters}
    for name, parameter in model.module.named_parameters():
        assert after[name] == (parameter.grad is not None if parameter.requires_grad else None)


def test_two_ranks():
    first, second = on_ranks(2, _explain_each, [0, 3], timeout=120)
    for (kind, here), (_, there) in zip(first, second, strict=True):
        for mine, other in zip(here, there, strict=True):
            copies = 1 if "1/2" in mine.layout else 2
            assert mine.numel_here + other.numel_here == copies * mine.numel, (kind, mine.name)


# ---- marks -----------------------------------------------------------------------------------------------------------


def _marks():
    from lightning.fabric.strategies import FSDPStrategy

    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    blocks[1][0].compile(backend="eager")
    strategy = FSDPStrategy(
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or module is blocks[0],
        activation_checkpointing_policy=lambda module, recurse, nonwrapped_numel: recurse or module is blocks[2],
    )
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    model = fabric.setup(torch.compile(blocks, backend="eager"))
    (report,) = fabric.explain().modules
    page = str(fabric.explain())
    del model
    return report, page


def test_units_recomputation_and_compilation():
    report, page = on_ranks(1, _marks)[0]
    assert "OptimizedModule" in report.wrappers
    assert report.is_compiled
    assert [part.name for part in report.parts if part.is_unit] == ["0"]
    assert [part.name for part in report.parts if part.recomputes] == ["2"]
    assert [part.name for part in report.parts if part.is_compiled] == ["1.0"]
    assert "computed again in backward: 2" in page
    assert "as a whole; 1 module by themselves: 1.0" in page


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_parameters_of_optimizers_that_look_like_mistakes_are_named():
    fabric = Fabric(accelerator="cpu", devices=1)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].bias.requires_grad = False
    stray = nn.Parameter(torch.zeros(5))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        first = torch.optim.SGD([module[0].weight, module[0].weight, stray], lr=0.1)
    second = torch.optim.SGD([module[0].weight, module[0].bias], lr=0.1)
    model, *optimizers = fabric.setup(module, first, second)
    explanation = fabric.explain()
    report, other = explanation.optimizers
    assert (report.tensors, report.numel, report.groups) == (2, 11, 1)
    assert (report.duplicates, report.foreign) == (("0.weight",), ("param_groups[0]['params'][2], of shape (5,)",))
    assert report.coverage[0].missing == ("1.weight", "1.bias")
    assert (other.frozen, other.coverage[0].covered, other.coverage[0].trainable) == (1, 1, 3)
    assert explanation.attention == (
        "No optimizer updates 2 trainable parameters of Sequential: 1.weight, 1.bias.",
        "optimizer 1 (SGD) has 1 parameter more than once: 0.weight.",
        "optimizer 1 (SGD) has 1 parameter that no set-up model has: param_groups[0]['params'][2], of shape (5,).",
        "Several optimizers update 1 parameter: 0.weight.",
    )
    assert str(explanation).endswith("\n".join(f"attention: {sentence}" for sentence in explanation.attention))
    assert len(optimizers) == 2
    assert model is not None


def test_one_optimizer_for_each_of_two_models_needs_no_attention():
    fabric = Fabric(accelerator="cpu", devices=1)
    kept = [fabric.setup(m := nn.Linear(2, 2), torch.optim.SGD(m.parameters(), lr=0.1)) for _ in range(2)]
    explanation = fabric.explain()
    assert explanation.attention == ()
    assert [each.coverage[0].module for each in explanation.optimizers] == [0, 1]
    assert "covers  2 of 2 trainable tensors of model 2 (Linear)" in str(explanation)
    assert len(kept) == 2


def test_a_parameter_without_a_gradient_is_named_once_others_have_one():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert fabric.explain().attention == ()
    fabric.backward(model.module[0](torch.ones(1, 2)).sum())
    (sentence,) = fabric.explain().attention
    assert sentence == "2 trainable parameters of Sequential got no gradient, others did: 1.weight, 1.bias."
    assert "without a gradient" in str(fabric.explain())


# ---- loaders ---------------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Pairs:
    """A batch sampler that makes its batches out of nothing."""

    def __len__(self):
        return 5

    def __iter__(self):
        return iter([[index, index + 1] for index in range(5)])


class Backwards(BatchSampler):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def _loaders():
    data = TensorDataset(torch.arange(11))
    return [
        DataLoader(data, batch_size=2),
        DataLoader(data, batch_size=2, shuffle=True, drop_last=True),
        DataLoader(data, batch_sampler=Backwards(SequentialSampler(data), 3, drop_last=False)),
        DataLoader(data, batch_sampler=Pairs()),
        DataLoader(data, batch_size=None),
        DataLoader(Endless(), batch_size=2),
    ]


def _explain_loaders(devices):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    loaders = [fabric.setup_dataloaders(loader) for loader in _loaders()]
    loaders.append(fabric.setup_dataloaders(DataLoader(range(4)), use_distributed_sampler=False, move_to_device=False))
    counted = []
    for loader in loaders:
        batches = [batch[0] if isinstance(batch, list) else batch for batch in loader]
        counted.append((len(batches), [int(i) for batch in batches for i in batch.reshape(-1)]))
    return counted, fabric.explain()


@pytest.mark.parametrize("devices", [1, 2])
def test_loaders(devices):
    ranks = on_ranks(devices, _explain_loaders, devices)
    for counted, explanation in ranks:
        assert len(counted) == len(explanation.loaders) == 7
        for (batches, samples), said in zip(counted, explanation.loaders, strict=True):
            assert said.batches_here in (batches, None)
            drawn = len(samples) + (len(samples) != said.samples_here and said.drop_last)
            assert said.samples_here in (drawn, None)
            assert (said.workers, said.pin_memory) == (0, False)
        assert [said.device for said in explanation.loaders] == ["cpu"] * 6 + [None]
        assert [said.sees_all for said in explanation.loaders] == [False] * 5 + [devices > 1] * 2
        assert len(explanation.attention) == (2 if devices > 1 else 0)
    for number, said in enumerate(ranks[0][1].loaders[:5]):
        drawn = sorted(index for counted, _ in ranks for index in counted[number][1])
        if said.after.of == "samples" and not said.drop_last:
            assert len(drawn) == said.dataset_length + said.repeated - said.left_out
    before, after = ranks[-1][1].loaders[1].before, ranks[-1][1].loaders[1].after
    assert (before.kind, before.shuffle) == ("RandomSampler", True)
    if devices == 2:
        assert (after.kind, after.shuffle, after.rank, after.num_replicas) == ("DistributedSampler", True, 1, 2)
        assert ranks[0][1].loaders[3].after.of == "batches"
        assert ranks[0][1].loaders[2].after.batch_sampler == "Backwards"
    else:
        assert after == before


# ---- the outline -----------------------------------------------------------------------------------------------------


def parameter(name, shape=(4, 4), **facts):
    numel = shape[0] * shape[1]
    common = {"dtype": "float32", "device": "cpu", "computes_in": "float32", "trainable": True, "layout": "whole"}
    return ParameterReport(
        **{"name": name, "aliases": (), "shape": shape, "shape_here": shape, **common, "gradients": "averaged"}
        | {"has_gradient": None, "numel": numel, "numel_here": numel, "bytes_here": 4 * numel}
        | facts
    )


def outline(names, parameters, buffers=(), **marks):
    """Of linear layers in a list, by name."""
    lists = {name.rpartition(".")[0]: "ModuleList" for name in names if "." in name}
    parts = [PartReport("", "Net"), *(PartReport(name, kind) for name, kind in lists.items())]
    parts += [PartReport(name, "Linear", **marks.get(name.replace(".", "_"), {})) for name in names]
    module = ModuleReport("Net", (), True, False, tuple(parameters), tuple(buffers), tuple(parts))
    return [tuple(row) for row in rows(module, common_facts(module))]


def test_equal_siblings_share_a_row_and_a_different_one_has_its_own():
    names = [f"blocks.{number}" for number in range(100)]
    every = [parameter(f"{name}.weight") for name in names]
    assert outline(names, every) == [("blocks.0 - blocks.99", "100 x Linear", "100 x 16", "100 x 64 B", "")]
    every[50] = parameter("blocks.50.weight", trainable=False, gradients="")
    every[60] = parameter("blocks.60.weight", dtype="float64", computes_in="float64")
    found = outline(names, every, blocks_70={"is_unit": True, "recomputes": True})
    assert [(row[0], row[1], row[4]) for row in found] == [
        ("blocks.0 - blocks.49", "50 x Linear", ""),
        ("blocks.50", "Linear", "frozen"),
        ("blocks.51 - blocks.59", "9 x Linear", ""),
        ("blocks.60", "Linear", "float64 on cpu; computes in float64"),
        ("blocks.61 - blocks.69", "9 x Linear", ""),
        ("blocks.70", "Linear", "gathered as a unit; activations computed again"),
        ("blocks.71 - blocks.99", "29 x Linear", ""),
    ]


def test_siblings_of_many_shapes_share_a_row_if_the_same_is_said_of_them():
    names = [f"layers.{number}" for number in range(40)]
    every = [parameter(f"{name}.weight", (4, 4 + number)) for number, name in enumerate(names)]
    every[20] = parameter("layers.20.weight", (4, 24), layout="1/2")
    assert [(row[0], row[4]) for row in outline(names, every)] == [
        ("layers.0 - layers.19", ""),
        ("layers.20", "1/2"),
        ("layers.21 - layers.39", ""),
    ]


def test_within_a_module_what_differs_is_named():
    found = outline(
        ["up"],
        [parameter("up.weight", layout="1/2 of dim 1"), parameter("up.bias", (1, 4)), parameter("scale", (64, 1))],
        [BufferReport("up.mean", (4,), "float32", "cpu", 16), BufferReport("up.count", (), "int64", "cpu", 8)],
    )
    assert found == [
        ("(its own)", "", "64", "256 B", ""),
        ("up", "Linear", "20", "80 B", "weight: 1/2 of dim 1; buffers: count: int64 on cpu"),
    ]
