"""Float8 through torchao: what is converted and what is not, what is computed, and that training goes on as in bf16."""

import copy
import importlib.util
import io
import logging
import pickle
import warnings
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import Float8Precision, HalfPrecision, MixedPrecision, Precision
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.testing import on_ranks, preload

if importlib.util.find_spec("torchao") is None:
    pytest.skip("needs torchao", allow_module_level=True)

from lightning.fabric.plugins.precision._float8_linear import Float8LinearConfig, _quiet

preload(
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "lightning.fabric.plugins.precision._float8_linear",
    "torch._inductor.codegen.triton",  # torchao mends something there, in each process
)

E4M3, E5M2, BF16, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Products(TorchDispatchMode):
    """Notes what is multiplied in float8: the dtypes of the factors, and of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and hasattr(args[0], "_data"):
            self.found.append((args[0]._data.dtype, args[1]._data.dtype, result.dtype))
        return result


def _net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def _input(rows: int = 16) -> Tensor:
    return torch.linspace(-2, 2, rows * 16).reshape(rows, 16).sin()


def _forward(precision: Precision, module: nn.Module, x: Tensor | None = None) -> Tensor:
    x = precision.convert_input(_input() if x is None else x)
    with precision.forward_context():
        output = module(x)
    return precision.convert_output(output)


class TestArguments:
    def test_what_is_unknown_is_refused(self) -> None:
        with pytest.raises(ValueError, match="needs a base of 'bf16-mixed' or 'bf16-true', but got '16-mixed'"):
            Float8Precision("16-mixed")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"Unknown recipe 'rowise'. Did you mean 'rowwise'\?"):
            Float8Precision(recipe="rowise")
        with pytest.raises(TypeError, match="the name of one, or a Float8LinearConfig of torchao, but got 8"):
            Float8Precision(recipe=8)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`enable_fsdp_float8_all_gather=True` makes weights a class of torchao's"):
            Float8Precision(recipe=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
        with pytest.raises(TypeError, match=r"`skip` is a list .* but got 'head'. Pass \['head'\]"):
            Float8Precision(skip="head")
        with pytest.raises(TypeError, match="`keep_fp32` is a list"):
            Float8Precision(keep_fp32="head")

    def test_without_torchao(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"needs the package `torchao`.* pip install torchao$"):
            Float8Precision()

    def test_where_it_can_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
        precision = Float8Precision()
        precision.computes_on("cuda")
        assert not precision.emulates
        with pytest.raises(
            ValueError, match=r"capability 8.9 or more, but A100 has 8.0. Use precision='bf16-mixed', or"
        ):
            precision.convert_module(_net())
        emulated = Float8Precision(emulate=True)
        emulated.computes_on("cuda")
        emulated.convert_module(_net())
        assert any("emulated" in remark for remark in emulated.remarks())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        precision.convert_module(_net())
        assert not any("emulated" in remark for remark in precision.remarks())
        with pytest.raises(ValueError, match="but not for 'mps'. Use precision='bf16-mixed'"):
            precision.computes_on("mps")
        precision.computes_on("cpu")
        assert precision.emulates
        with precision.forward_context():
            assert torch.is_autocast_enabled("cpu")

    def test_nothing_is_said_while_torchao_is_imported(self, caplog: pytest.LogCaptureFixture) -> None:
        with _quiet():
            logging.getLogger("torchao").warning("Failed to load")
            warnings.warn("deprecated", stacklevel=1)
        assert not caplog.records
        logging.getLogger("torchao").warning("afterwards")
        assert len(caplog.records) == 1


class TestConversion:
    def test_each_linear_layer_is_converted_or_has_a_reason(self) -> None:
        class OwnLinear(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        model = nn.ModuleDict(
            {
                "plain": nn.Linear(16, 32),
                "odd": nn.Linear(16, 30),
                "left": nn.Sequential(nn.Linear(16, 16)),
                "lefty": nn.Linear(16, 16, bias=False),
                "kept": nn.Linear(16, 16),
                "own": OwnLinear(16, 16),
                "lazy": nn.LazyLinear(16),
                "embedding": nn.Embedding(32, 16),
                "tied": nn.Linear(16, 32),
                "attention": nn.MultiheadAttention(16, 2),
                "patched": nn.Linear(16, 16),
            }
        )
        model["tied"].weight = model["embedding"].weight
        model["patched"].forward = lambda x: x
        precision = Float8Precision(skip=["left"], keep_fp32=["kept"])
        assert precision.conversion is None
        precision.convert_module(model)
        assert precision.conversion is not None
        assert precision.conversion.converted == ("plain", "lefty")
        assert dict(precision.conversion.skipped) == {
            "odd": "of 16 to 30 features, not both multiples of 16",
            "left.0": "named in `skip`",
            "kept": "kept in 32 bit",
            "own": "of the class OwnLinear, not nn.Linear itself",
            "lazy": "of the class LazyLinear, not nn.Linear itself",
            "tied": "tied to 'embedding' by its weight",
            "attention.out_proj": "used by MultiheadAttention past its `forward`",
            "patched": "of the class Linear, not nn.Linear itself",
        }
        with pytest.raises(FrozenInstanceError):
            precision.conversion.converted = ()  # type: ignore[misc]
        with pytest.raises(TypeError):
            precision.conversion.skipped["plain"] = ""  # type: ignore[index]
        remarks = precision.remarks()
        assert "Multiply in float8 (recipe 'tensorwise'): 'plain', 'lefty'." in remarks
        assert "Not in float8: 'left.0' (named in `skip`)." in remarks
        assert "Kept in float32: 'kept'." in remarks
        assert [precision.computes_in(name, model[name]) for name in ("plain", "odd", "kept")] == [
            "float8_e4m3fn",
            "bfloat16 (autocast)",
            "float32",
        ]

    @pytest.mark.parametrize(
        ("model", "why"),
        [
            (nn.Sequential(nn.Conv1d(1, 1, 1)), "It has no linear layers. Use precision='bf16-mixed'"),
            (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), r"Not in float8: '0', '1' \(of 2 to 2 features"),
        ],
    )
    def test_a_model_without_float8_is_refused(self, model: nn.Module, why: str) -> None:
        with pytest.raises(ValueError, match=f"nothing of Sequential in float8. {why}"):
            Float8Precision().convert_module(model)

    def test_what_is_skipped_must_be_there(self) -> None:
        with pytest.raises(ValueError, match=r"skip='heat' names no module of Net. Did you mean 'head'\?"):
            Float8Precision(skip=["heat"]).convert_module(_net())
        with pytest.raises(ValueError, match="skip has Conv2d, but Net has no such module"):
            Float8Precision(skip=[nn.Conv2d]).convert_module(_net())

    @pytest.mark.parametrize("base", ["bf16-mixed", "bf16-true"])
    def test_everything_stays_what_it_was(self, base: Any) -> None:
        module = _net()
        calls: list[nn.Module] = []
        module.blocks[0].up.register_forward_hook(lambda part, args, output: calls.append(part))
        parts, parameters, keys = list(module.modules()), list(module.parameters()), list(module.state_dict())
        precision = Float8Precision(base)
        assert precision.convert_module(module) is module
        assert all(now is then for now, then in zip(module.modules(), parts, strict=True))
        assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
        assert list(module.state_dict()) == keys
        assert isinstance(module.blocks[0].up, nn.Linear)
        assert {p.dtype for p in module.parameters()} == {F32 if base == "bf16-mixed" else BF16}
        output = _forward(precision, module)
        assert calls == [module.blocks[0].up]
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(_without_hooks(module)))):
            assert torch.equal(_forward(precision, again), output)
            with Products() as seen:
                _forward(precision, again)
            assert len(seen.found) == 4

    def test_the_next_precision_starts_afresh(self) -> None:
        module = Float8Precision().convert_module(_net())
        expected = _forward(Precision(), _net())
        assert not torch.equal(_forward(Precision(), module), expected)
        assert torch.equal(_forward(Precision(), Precision().convert_module(module)), expected)
        assert type(module.blocks[0].up) is nn.Linear
        for recipe, kind in (("tensorwise", "ten"), ("rowwise", "axs")):
            Float8Precision(recipe=recipe).convert_module(module)
            assert f"i:dyn_{kind}_e4m3" in repr(module)


def _without_hooks(module: nn.Module) -> nn.Module:
    for part in module.modules():
        part._forward_hooks.clear()
    return module


def _rounded(x: Tensor, dim: int | None, dtype: torch.dtype = E4M3, power_of_2: bool = False) -> Tensor:
    """Return ``x`` in 32 bit, as float8 with a scale for all of it, or for each slice, has it."""
    amax = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / amax.double()).float()
    scale = torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale
    return (x.float() * scale).to(dtype).float() / scale


class TestComputation:
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("base", ["bf16-mixed", "bf16-true"])
    def test_is_what_float8_is_by_hand(self, base: Any, recipe: str) -> None:
        """Inputs are bf16 first, whatever they were, then float8; so are weights; the product is bf16."""
        rows = recipe != "tensorwise"
        precision = Float8Precision(base, recipe)
        module = precision.convert_module(nn.Sequential(nn.Linear(16, 32)))
        weight, bias = module[0].weight, module[0].bias
        x = torch.linspace(-3, 2, 160).reshape(10, 16)
        left = _rounded(x.bfloat16(), -1 if rows else None, power_of_2=rows)
        right = _rounded(weight.detach(), 1 if rows else None, power_of_2=rows)
        by_hand = (left @ right.t()).bfloat16() + bias.bfloat16()
        outputs: list[Tensor] = []
        module[0].register_forward_hook(lambda part, args, output: outputs.append(output))
        with Products() as seen:
            output = _forward(precision, module, x)
            output.backward(torch.ones_like(output))
        assert torch.equal(outputs[0], by_hand)
        assert outputs[0].dtype is BF16
        assert output.dtype is F32
        gradients = E5M2 if recipe == "tensorwise" else E4M3
        assert seen.found[:2] == [(E4M3, E4M3, BF16), (gradients, E4M3, BF16)]
        assert len(seen.found) == (2 if recipe == "rowwise_with_gw_hp" else 3)
        assert weight.grad is not None
        assert weight.grad.dtype is weight.dtype

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_imitation_is_like_the_processor_has_it(self, recipe: str) -> None:
        gradients = []
        for emulate in (True, False):
            precision = Float8Precision(recipe=recipe, emulate=emulate)
            module = precision.convert_module(_net())
            output = _forward(precision, module, _input(10))  # not a multiple of 16 either
            output.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()

    def test_with_a_configuration_of_ones_own(self) -> None:
        config = replace(Float8LinearConfig.from_recipe_name("rowwise"), round_scales_to_power_of_2=False)
        precision = Float8Precision(recipe=config)
        module = precision.convert_module(_net())
        assert module.blocks[0].up.config == replace(config, emulate=True)
        assert "Multiply in float8 (recipe 'own')" in precision.remarks()[0]

    def test_without_autocast_there_is_none(self) -> None:
        precision = Float8Precision()
        module = precision.convert_module(nn.Sequential(nn.Linear(16, 16)))
        with precision.forward_context(), torch.autocast("cpu", enabled=False):
            assert module(_input()).dtype is F32

    def test_torch_does_not_take_a_fast_path_around_it(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        precision = Float8Precision("bf16-true")
        precision.convert_module(layer).eval()
        with torch.no_grad(), Products() as seen:
            _forward(precision, layer, torch.ones(1, 3, 16))
        assert len(seen.found) == 2

    def test_compiled_in_one_graph(self) -> None:
        gradients = []
        for compiles in (False, True):
            precision = Float8Precision()
            module = precision.convert_module(_net().blocks[0])
            call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiles else module
            _forward(precision, call).square().sum().backward()
            gradients.append([p.grad for p in module.parameters()])
        for now, then in zip(*gradients, strict=True):
            assert torch.allclose(now, then, rtol=0.02, atol=0.02)


# ---- with Fabric -----------------------------------------------------------------------------------------------------


def _train(fabric: Fabric, empty_init: bool = False, steps: int = 2) -> tuple[list[float], dict[str, Tensor], int]:
    torch.manual_seed(0)
    with fabric.init_module(empty_init=empty_init):
        model = Net()
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = []
    for _ in range(steps):
        with Products() as seen:
            loss = (model(_input()) - 1).square().mean()
            fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.state_dict().items()}, len(seen.found)


def _single(precision: Any, **kwargs: Any) -> tuple[list[float], dict[str, Tensor], int]:
    plugins = {"precision": precision} if isinstance(precision, str) else {"plugins": precision}
    return _train(Fabric(accelerator="cpu", devices=1, **plugins), **kwargs)


def test_trains_like_bfloat16() -> None:
    exact = _single("bf16-mixed", steps=20)
    for precision in ("float8", Float8Precision("bf16-true"), Float8Precision(recipe="rowwise")):
        losses, _, products = _single(precision, steps=20)
        assert losses == pytest.approx(exact[0], abs=0.05 * exact[0][0])
        assert losses[-1] < 0.3 * losses[0]
        assert products == 12  # three for each of four layers
    assert exact[2] == 0


def test_checkpoints_go_from_float8_to_bfloat16_and_back() -> None:
    _, state, _ = _single(Float8Precision())
    assert state.keys() == _net().state_dict().keys()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for precision in (MixedPrecision("bf16-mixed", "cpu"), HalfPrecision("bf16-true"), Float8Precision("bf16-true")):
        fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
        model = fabric.setup(_net())
        model.load_state_dict(state)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name].to(value.dtype))
    model = fabric.setup(_net())
    model.load_state_dict(state)


def _fully_shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


def _tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in model.blocks:
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def _many() -> list[tuple[list[float], int]]:
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

    found = []
    for strategy, plugin, empty_init in (
        ("ddp", "float8", False),
        ("fsdp", "float8", False),
        (FSDPStrategy(auto_wrap_policy={Block}), "float8", True),
        (FSDPStrategy(auto_wrap_policy={nn.Linear}), Float8Precision("bf16-true"), True),
        (ModelParallelStrategy(_fully_shard, data_parallel_size=2, tensor_parallel_size=1), "float8", True),
        (ModelParallelStrategy(_tensor_parallel, data_parallel_size=1, tensor_parallel_size=2), "float8", False),
    ):
        plugins = {"precision": plugin} if isinstance(plugin, str) else {"plugins": plugin}
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, **plugins)
        fabric.launch()
        losses, _, products = _train(fabric, empty_init)
        found.append((losses, products))
    return found


def test_on_two_ranks_as_on_one() -> None:
    (mixed, _, _), (true, _, _) = _single("float8"), _single(Float8Precision("bf16-true"))
    for rank in on_ranks(2, _many, timeout=180):
        ddp, fsdp, in_units, half, sharded, split = rank
        assert ddp[0] == sharded[0] == mixed
        assert half[0] == true
        assert fsdp[0] == pytest.approx(mixed, rel=1e-4)  # gradients are reduced in 16 bit
        assert in_units[0] == fsdp[0]
        assert split[0] == pytest.approx(mixed, rel=0.02)  # partial sums are 16-bit, and rounded once more
        assert [products for _, products in rank[:5]] == [12] * 5
