"""Modules that stay in 32 bit under every precision: what they store, what they compute in, what surrounds them."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import (
    DeepSpeedPrecision,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    XLAPrecision,
)
from lightning.fabric.plugins.precision._kept import Kept, is_kept, outermost_kept
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KEEP = ["head", nn.LayerNorm]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 8))
        self.header = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.header(self.head(x))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


class Computed(TorchDispatchMode):
    """Notes the dtypes that operators are really run with."""

    SHOWN = ("addmm", "native_layer_norm", "native_batch_norm", "gelu")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, list[torch.dtype]] = {}
        self.reduced: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        found = [leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if name in self.SHOWN:
            assert len(set(found)) == 1, (name, found)
            self.dtypes.setdefault(name, []).append(found[0])
        elif "reduce_scatter" in name or "allreduce" in name:
            self.reduced += found
        return func(*args, **(kwargs or {}))


def _net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def _input() -> Tensor:
    return torch.linspace(-2, 2, 32).reshape(4, 8)


def _forward(precision: Precision, module: nn.Module, x: Tensor | None = None) -> Tensor:
    """Call ``module`` as Fabric's wrapper does."""
    x = precision.convert_input(_input() if x is None else x)
    with precision.forward_context():
        output = module(x)
    return precision.convert_output(output)


class TestWhich:
    @pytest.mark.parametrize("keep", ["head", nn.LayerNorm, 3, None, [3], [""], [int], [nn.LayerNorm(2)]])
    def test_a_list_of_names_and_classes(self, keep: Any) -> None:
        for make in (Kept, HalfPrecision, DoublePrecision):
            with pytest.raises(TypeError, match=r"`keep_fp32` .*\['head', nn.LayerNorm\]"):
                make(keep_fp32=keep)

    def test_by_name_is_with_all_inside_and_by_class_wherever_it_is(self) -> None:
        kept = Kept(["blocks.1", nn.LayerNorm, "head.0", "head"])
        assert kept
        assert kept.names(_net()) == ["blocks.1", "blocks.0.norm", "head"]
        inside = ["blocks.1", "blocks.1.linear", "blocks.0.norm", "head", "head.3"]
        assert [name for name, _ in _net().named_modules() if kept.holds(name)] == [
            "blocks.0.norm",
            "blocks.1",
            "blocks.1.linear",
            "blocks.1.norm",
            *(f"head{part}" for part in ("", ".0", ".1", ".2", ".3")),
        ]
        assert all(name in kept for name in inside)
        assert "header" not in kept
        assert not Kept()

    def test_what_is_never_called_gives_way_to_its_parts(self) -> None:
        assert Kept(["blocks"]).names(_net()) == ["blocks.0", "blocks.1"]

    def test_a_compiled_module_has_the_plain_names(self) -> None:
        assert Kept(["head"]).names(torch.compile(_net(), backend="eager")) == ["head"]

    @pytest.mark.parametrize(
        ("keep", "message"),
        [
            (["hed"], r"keep_fp32='hed' names no module of Net. Did you mean 'head'\?"),
            (["head.0.weight"], "names no module of Net"),
            ([nn.Conv2d], "keep_fp32 has Conv2d, but Net has no such module"),
            ([Net], "the whole model. Use precision='32-true'"),
            ([nn.Module], "the whole model"),
        ],
    )
    def test_what_means_nothing_is_refused(self, keep: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HalfPrecision("bf16-true", keep_fp32=keep).convert_module(_net())

    def test_what_is_used_past_its_forward_is_refused(self) -> None:
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "scales": nn.ParameterList([torch.ones(2)])})
        with pytest.raises(ValueError, match=r"used by the MultiheadAttention around it. Keep 'attention' instead"):
            Kept([nn.Linear]).names(model)
        with pytest.raises(ValueError, match="'scales', a ParameterList without a `forward`"):
            Kept(["scales"]).names(model)
        model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
        model[1].forward = lambda x: x
        with pytest.raises(ValueError, match="'0' of keep_fp32 has parameters without a shape"):
            Kept(["0"]).names(model)
        with pytest.raises(ValueError, match="'1' of keep_fp32 has a Linear whose `forward` is not that of its class"):
            Kept(["1"]).names(model)

    def test_a_tensor_is_kept_or_not(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are one tensor"):
            Kept(["1"]).convert(model, BF16)
        optimizer = torch.optim.SGD(model.parameters())
        Kept(["0", "1"]).convert(model, BF16)
        assert model[0].weight is model[1].weight is optimizer.param_groups[0]["params"][0]
        assert [p.dtype for p in model.parameters()] == [F32, F32, F32, BF16, BF16]


PRECISIONS = {
    "16-true": (lambda keep: HalfPrecision("16-true", keep), F16, F16),
    "bf16-true": (lambda keep: HalfPrecision("bf16-true", keep), BF16, BF16),
    "64-true": (DoublePrecision, F64, F64),
    "16-mixed": (lambda keep: MixedPrecision("16-mixed", "cpu", keep_fp32=keep), F32, F16),
    "bf16-mixed": (lambda keep: MixedPrecision("bf16-mixed", "cpu", keep_fp32=keep), F32, BF16),
    "bf16-true on xla": (lambda keep: XLAPrecision("bf16-true", keep), BF16, BF16),
    "bf16-true in fsdp": (lambda keep: FSDPPrecision("bf16-true", keep_fp32=keep), BF16, BF16),
}


@pytest.mark.parametrize("name", PRECISIONS)
class TestEveryPrecision:
    def test_stores_and_computes(self, name: str) -> None:
        make, stored, computed = PRECISIONS[name]
        precision, module = make(KEEP), _net()
        assert precision.convert_module(module) is module
        dtypes = {key: value.dtype for key, value in module.state_dict().items() if value.is_floating_point()}
        assert {key for key, dtype in dtypes.items() if dtype is F32 and stored is not F32} == (
            {key for key in dtypes if key.startswith("head.") or "norm" in key} if stored is not F32 else set()
        )
        assert set(dtypes.values()) == {F32, stored}
        outputs: list[torch.dtype] = []
        module.head.register_forward_hook(lambda _, args, output: outputs.append(output.dtype))
        with Computed() as seen:
            output = _forward(precision, module)
        assert seen.dtypes["addmm"] == [computed, computed, F32, F32, computed]
        assert seen.dtypes["native_layer_norm"] == [F32, F32]
        assert seen.dtypes["native_batch_norm"] == seen.dtypes["gelu"] == [F32]
        assert outputs == [stored]
        assert output.dtype is F32
        assert torch.get_default_dtype() is F32
        output.square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype is p.dtype for p in module.parameters())

    def test_tells_what_it_did(self, name: str) -> None:
        make, stored, _ = PRECISIONS[name]
        precision = make(KEEP)
        assert precision.remarks() == []
        module = precision.convert_module(_net())
        assert precision.remarks() == ["Kept in float32: 'head', 'blocks.0.norm', 'blocks.1.norm'."]
        plain = f"{name.removesuffix('-mixed')}"
        expected = {"16": "float16 (autocast)", "bf16": "bfloat16 (autocast)"}.get(plain, str(stored)[6:])
        assert precision.computes_in("header", module.header) == expected
        assert precision.computes_in("head.0", module.head[0]) == "float32"

    def test_32_bit_values_are_never_rounded(self, name: str) -> None:
        make, stored, _ = PRECISIONS[name]
        with make(KEEP).module_init_context():
            module = _net()
        with make(()).module_init_context():
            assert {p.dtype for p in _net().parameters()} == {stored}
        exact = _net()
        if stored is F64:
            return  # made in more than 32 bit
        for key, value in make(KEEP).convert_module(module).state_dict().items():
            assert torch.equal(value, exact.state_dict()[key].to(value.dtype))

    def test_the_next_precision_starts_afresh(self, name: str) -> None:
        make, *_ = PRECISIONS[name]
        module = make(KEEP).convert_module(_net())
        for again in (Precision(), MixedPrecision("bf16-mixed", "cpu"), HalfPrecision("bf16-true"), DoublePrecision()):
            copied = again.convert_module(copy.deepcopy(module))
            assert not list(outermost_kept(copied))
            assert type(copied.head) is nn.Sequential
        twice = make(["blocks.0"]).convert_module(make(KEEP).convert_module(_net()))
        assert [is_kept(part) for part in (twice.blocks[0].norm, twice.blocks[1].norm, twice.head)] == [
            True,
            False,
            False,
        ]


@pytest.mark.parametrize("name", ["bf16-true", "bf16-mixed"])
def test_a_compiled_step_sees_through_it(name: str) -> None:
    make, *_ = PRECISIONS[name]
    precision = make(KEEP)
    module = precision.convert_module(_net())
    compiled = torch.compile(lambda x: _forward(precision, module, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(_input()), _forward(precision, module))


def test_copies_compute_the_same() -> None:
    precision = HalfPrecision("bf16-true", keep_fp32=KEEP)
    module = precision.convert_module(_net()).eval()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    expected = _forward(precision, module)
    for again in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(_forward(precision, again), expected)
        assert [type(part).__name__ for part in again.modules()] == [type(part).__name__ for part in _net().modules()]
        assert isinstance(again.head[0], nn.Linear)
        with Computed() as seen:
            _forward(precision, again)
        assert seen.dtypes["native_layer_norm"] == [F32, F32]
    assert module.state_dict().keys() == _net().state_dict().keys()


def test_activations_that_are_computed_again_are_the_same() -> None:
    gradients = []
    for again in (False, True):
        precision = HalfPrecision("bf16-true", keep_fp32=KEEP)
        module = precision.convert_module(_net())

        def forward(x: Tensor, module: Net = module, again: bool = again) -> Tensor:
            x = module.blocks[0](x)
            return module.header(checkpoint(module.head, x, use_reentrant=False) if again else module.head(x))

        x = precision.convert_input(_input()).requires_grad_()
        with precision.forward_context():
            loss = forward(x).square().mean()
        loss.backward()
        gradients.append([p.grad for p in (*module.head.parameters(), x)])
    assert all(map(torch.equal, *gradients))


def test_torch_does_not_take_a_fast_path_around_it() -> None:
    """In evaluation, the layer of torch computes with the weights of its parts, not with the parts."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    precision = HalfPrecision("bf16-true", keep_fp32=["norm1"])
    precision.convert_module(layer).eval()
    with torch.no_grad(), Computed() as seen:
        _forward(precision, layer, torch.ones(1, 3, 8))
    assert seen.dtypes["native_layer_norm"] == [F32, BF16]


def test_complex_numbers_stay() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("turns", torch.ones(2, dtype=torch.complex64))
    assert HalfPrecision("bf16-true").convert_module(module).turns.dtype is torch.complex64


@pytest.mark.parametrize("name", ["16-true", "bf16-true", "16-mixed", "bf16-mixed"])
def test_deepspeed_has_one_dtype_for_all(name: Any) -> None:
    with pytest.raises(ValueError, match=rf"cannot keep \['head', LayerNorm\] .*FSDPPrecision\('{name}'"):
        DeepSpeedPrecision(name, keep_fp32=KEEP)
    assert DeepSpeedPrecision("32-true", keep_fp32=KEEP).computes_in("", nn.Linear(1, 1)) == "float32"


def test_autocast_for_another_device_would_do_nothing() -> None:
    MixedPrecision("bf16-mixed", "cpu").computes_on("cpu")
    with pytest.raises(ValueError, match=r"device='cuda'\)` casts what 'cuda' devices compute.*Pass device='cpu'"):
        MixedPrecision("bf16-mixed", "cuda").computes_on("cpu")


# ---- with Fabric, on one device and on many --------------------------------------------------------------------------


def _train(fabric: Fabric, empty_init: bool = False) -> dict[str, Any]:
    """Train for 2 steps, every rank on the same samples; what was seen is of the last one."""
    torch.manual_seed(0)
    with fabric.init_module(empty_init=empty_init):
        model = Net()
    if not empty_init:
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    else:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    model.mark_forward_method("predict")
    losses = []
    for _ in range(2):
        seen = Computed()
        with seen:
            loss = model(_input()).square().mean()
            fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    parts = {name: part for name, part in model.module.named_modules() if hasattr(part, "unshard")}
    return {
        "losses": losses,
        "norms": seen.dtypes["native_layer_norm"],
        "products": seen.dtypes["addmm"][:5],
        "reduced": set(seen.reduced),
        "predicted": model.predict(_input()).tolist(),
        "dtypes": {name: p.dtype for name, p in model.named_parameters()},
        "units": sorted(parts),
    }


def _single(precision: Precision) -> dict[str, Any]:
    return _train(Fabric(accelerator="cpu", devices=1, plugins=precision))


def _many() -> list[dict[str, Any]]:
    found = []
    for strategy, precision, empty_init in (
        ("ddp", HalfPrecision("bf16-true", KEEP), False),
        ("ddp", MixedPrecision("bf16-mixed", "cpu", keep_fp32=KEEP), False),
        (FSDPStrategy(), FSDPPrecision("bf16-true", keep_fp32=KEEP), False),
        (FSDPStrategy(auto_wrap_policy={Block, nn.Linear}), FSDPPrecision("bf16-true", keep_fp32=KEEP), True),
        (FSDPStrategy(auto_wrap_policy={Block}), FSDPPrecision("bf16-mixed", keep_fp32=KEEP), True),
        (
            FSDPStrategy(activation_checkpointing_policy={Block, nn.LayerNorm}),
            FSDPPrecision("bf16-true", keep_fp32=KEEP),
            False,
        ),
    ):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=precision)
        fabric.launch()
        found.append(_train(fabric, empty_init))
    with pytest.raises(ValueError, match=r"one parameter, used in several modules of `keep_fp32`"):
        model = Net()
        model.head[0].weight = model.header.weight = nn.Parameter(torch.ones(8, 8))
        strategy, precision = FSDPStrategy(), FSDPPrecision("bf16-mixed", keep_fp32=["head", "header"])
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=precision)
        fabric.launch()
        fabric.setup(model)
    return found


def test_on_two_ranks_as_on_one() -> None:
    true, mixed = (
        _single(HalfPrecision("bf16-true", KEEP)),
        _single(MixedPrecision("bf16-mixed", "cpu", keep_fp32=KEEP)),
    )
    for rank in on_ranks(2, _many, timeout=180):
        for got, expected in zip(rank, (true, mixed, true, true, mixed, true), strict=True):
            for key in ("losses", "predicted", "dtypes"):
                assert got[key] == expected[key], key
            assert set(got["norms"]) == {F32}
            assert got["products"][:5] == [BF16, BF16, F32, F32, BF16]
            assert got["reduced"] == {F32, BF16} or expected is mixed
        assert [got["units"] for got in rank[2:4]] == [
            ["blocks.0.norm", "blocks.1.norm", "head"],
            [
                *("blocks.0", "blocks.0.linear", "blocks.0.norm", "blocks.1", "blocks.1.linear", "blocks.1.norm"),
                *("head", "head.0", "head.3", "header"),
            ],
        ]


def test_gradients_of_several_dtypes_are_clipped_by_one_norm() -> None:
    precision = HalfPrecision("bf16-true", keep_fp32=["1"])
    fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for parameter, value in zip(model.parameters(), (3.0, 4.0), strict=True):
        parameter.grad = torch.full_like(parameter, value / 2)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert norm == pytest.approx(5.0)
    assert [p.grad.unique().tolist() for p in model.parameters()] == [
        [pytest.approx(0.3, rel=1e-2)],
        [pytest.approx(0.4, rel=1e-5)],
    ]
