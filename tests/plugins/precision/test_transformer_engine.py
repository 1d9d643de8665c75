"""Layers of the Transformer Engine: by a stand-in everywhere, by the package itself where it and a GPU are."""

import copy
import importlib
import pickle
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from tests import transformer_engine_stand_in as stand_in
from torch import Tensor, nn

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import TransformerEnginePrecision
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.utilities.imports import package_available

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BY_STAND_IN = pytest.mark.parametrize("te", ["stand-in"], indirect=True)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def te(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package; it computes on :func:`_device`."""
    if request.param == "real":
        yield pytest.importorskip("transformer_engine.pytorch", exc_type=(ImportError, RuntimeError, OSError))
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    package_available.cache_clear()
    yield stand_in.install(monkeypatch)
    package_available.cache_clear()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _fabric(precision: TransformerEnginePrecision) -> Fabric:
    return Fabric(accelerator=_device(), devices=1, plugins=precision)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64, eps=1e-3)
        self.second = nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x))))


def _relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().float().cpu(), wanted.detach().float().cpu()
    return float((got - wanted).norm() / wanted.norm())


class TestArguments:
    @pytest.mark.parametrize(("given", "dtype"), [("bfloat16", BF16), ("float16", F16), (F32, F32), (BF16, BF16)])
    def test_dtypes_and_their_names(self, te: ModuleType, given: Any, dtype: torch.dtype) -> None:
        precision = TransformerEnginePrecision(weights_dtype=given)
        assert precision.weights_dtype == precision.fallback_compute_dtype == dtype
        names = {BF16: "transformer-engine", F16: "transformer-engine-float16", F32: "transformer-engine-float32"}
        assert precision.precision == names[dtype]

    def test_other_dtypes_are_refused(self, te: ModuleType) -> None:
        with pytest.raises(
            ValueError, match=r"weights_dtype must be one of .* but got 'bfloat6'. Did you mean 'bfloat16'"
        ):
            TransformerEnginePrecision(weights_dtype="bfloat6")
        with pytest.raises(ValueError, match="fallback_compute_dtype must be one of"):
            TransformerEnginePrecision(weights_dtype=BF16, fallback_compute_dtype=torch.float64)
        with pytest.raises(TypeError, match="weights_dtype must be a"):
            TransformerEnginePrecision(weights_dtype=16)
        with pytest.raises(TypeError, match="replace_layers must be True, False or None"):
            TransformerEnginePrecision(weights_dtype=BF16, replace_layers="yes")

    def test_a_recipe_is_a_recipe_or_a_dict_of_its_fields(self, te: ModuleType) -> None:
        recipes = importlib.import_module("transformer_engine.common.recipe")
        for given in ({"amax_history_len": 3, "fp8_format": "E4M3"}, recipes.DelayedScaling(amax_history_len=3)):
            precision = TransformerEnginePrecision(weights_dtype=BF16, recipe=given)
            precision.convert_module(Model())
            assert isinstance(precision._made_recipe, recipes.DelayedScaling)
            assert precision._made_recipe.amax_history_len == 3
        for wrong, error, text in (
            ({"amax_history_length": 3}, ValueError, "Did you mean 'amax_history_len'"),
            ("delayed", TypeError, "recipe must be a recipe of the Transformer Engine or a dict"),
        ):
            with pytest.raises(error, match=text):
                TransformerEnginePrecision(weights_dtype=BF16, recipe=wrong).convert_module(Model())

    def test_without_the_package_the_error_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if package_available("transformer_engine"):
            pytest.skip("the package is here")
        with pytest.raises(
            ModuleNotFoundError, match=r'pip install --no-build-isolation "transformer-engine\[pytorch\]"'
        ):
            TransformerEnginePrecision(weights_dtype="bfloat16")

    @BY_STAND_IN
    def test_nor_is_it_enough_without_its_part_for_pytorch(
        self, te: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        precision = TransformerEnginePrecision(weights_dtype="bfloat16")
        monkeypatch.setitem(importlib.import_module("sys").modules, "transformer_engine.pytorch", None)
        with pytest.raises(ModuleNotFoundError, match="with its part for PyTorch"):
            precision.convert_module(Model())


class TestReplacement:
    def test_layers_that_fit_are_replaced_and_the_others_told(self, te: ModuleType) -> None:
        class Scaled(nn.Linear):
            pass

        model = Model()
        model.scaled = Scaled(32, 32)
        model.image_norm, model.unscaled_norm = nn.LayerNorm((4, 4)), nn.LayerNorm(8, elementwise_affine=False)
        model.hooked = nn.Linear(32, 32)
        model.hooked.register_forward_hook(lambda *_: None)
        model.attention = nn.MultiheadAttention(32, 2)
        precision = TransformerEnginePrecision(weights_dtype=BF16)
        assert precision.convert_module(model) is model
        replaced = {name for name, part in model.named_modules() if isinstance(part, (te.Linear, te.LayerNorm))}
        assert replaced == {"first", "norm", "second"}
        told = "\n".join(precision.remarks())
        assert "Model: 3 of 9 Linear and LayerNorm layers are of the Transformer Engine now." in told
        assert "'head' is not replaced: it has 32 inputs and 3 outputs, but 8 bit needs inputs divisible by 16" in told
        for name in ("scaled", "image_norm", "unscaled_norm", "hooked", "attention.out_proj"):
            assert f"'{name}' is not replaced: it " in told

    def test_what_layers_had_they_keep(self, te: ModuleType) -> None:
        model = Model()
        model.first.weight.requires_grad_(False)
        model.norm.eval()
        before = dict(model.named_parameters())
        values = {name: parameter.detach().to(BF16) for name, parameter in before.items()}
        TransformerEnginePrecision(weights_dtype="bfloat16").convert_module(model)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[name] is before[name] for name in before)  # so optimizers need not know
        assert all(torch.equal(after[name], value) for name, value in values.items())
        assert not model.first.weight.requires_grad
        assert model.second.weight.requires_grad
        assert (model.first.training, model.norm.training) == (True, False)
        assert model.norm.eps == 1e-3

    def test_ties_and_layers_under_two_names(self, te: ModuleType) -> None:
        model = nn.ModuleDict({"embedding": nn.Embedding(32, 16), "a": nn.Linear(16, 16), "head": nn.Linear(16, 32)})
        model["b"] = model["a"]
        model["head"].weight = model["embedding"].weight
        TransformerEnginePrecision(weights_dtype=F16).convert_module(model)
        assert isinstance(model["head"], te.Linear)
        assert model["head"].weight is model["embedding"].weight
        assert model["a"] is model["b"]
        assert isinstance(model["b"], te.Linear)

    def test_a_model_of_one_layer_comes_back_as_another(self, te: ModuleType) -> None:
        linear = nn.Linear(16, 16)
        optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
        model, optimizer = _fabric(TransformerEnginePrecision(weights_dtype=BF16)).setup(linear, optimizer)
        assert isinstance(model.module, te.Linear)
        assert optimizer.param_groups[0]["params"][0] is model.module.weight

    def test_on_the_meta_device(self, te: ModuleType) -> None:
        with torch.device("meta"):
            model = Model()
        TransformerEnginePrecision(weights_dtype=BF16).convert_module(model)
        assert isinstance(model.first, te.Linear)
        assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", BF16)}

    def test_a_model_with_such_layers_keeps_its_own(self, te: ModuleType) -> None:
        def mixed() -> nn.Module:
            own = te.Linear(16, 16, params_dtype=F32, device="meta")
            return nn.Sequential(own, nn.Linear(16, 16, device="meta"))

        for replace_layers, replaced in ((None, False), (False, False), (True, True)):
            precision = TransformerEnginePrecision(weights_dtype=BF16, replace_layers=replace_layers)
            model = mixed()
            own = model[0]
            precision.convert_module(model)
            assert model[0] is own
            assert isinstance(model[1], te.Linear) is replaced
            assert "Sequential has 1 layers of the Transformer Engine already." in precision.remarks()

    def test_nothing_in_8_bit_is_told_at_once(self, te: ModuleType) -> None:
        with pytest.warns(UserWarning, match="replace_layers=False, so nothing computes in 8 bit"):
            TransformerEnginePrecision(weights_dtype=BF16, replace_layers=False).convert_module(Model())
        with pytest.warns(UserWarning, match=r"has replaced no layer of Sequential. '0' is not replaced"):
            TransformerEnginePrecision(weights_dtype=BF16).convert_module(nn.Sequential(nn.Linear(3, 3)))

    def test_kept_layers_stay_in_32_bit(self, te: ModuleType) -> None:
        model = Model()
        precision = TransformerEnginePrecision(weights_dtype=BF16, keep_fp32=["second"])
        precision.convert_module(model)
        assert isinstance(model.second, nn.Linear)
        assert model.second.weight.dtype == F32
        assert model.first.weight.dtype == BF16
        names = ("first", "norm", "second", "head")
        assert [precision.computes_in(name, getattr(model, name)) for name in names] == [
            "float8",
            "bfloat16",
            "float32",
            "bfloat16",
        ]


class TestUse:
    @pytest.mark.parametrize(("weights", "fallback"), [(BF16, None), (F32, BF16), (F32, None)])
    def test_outputs_and_gradients_are_near_those_in_32_bit(
        self, te: ModuleType, weights: torch.dtype, fallback: torch.dtype | None
    ) -> None:
        torch.manual_seed(0)
        model = Model()
        reference = copy.deepcopy(model)
        precision = TransformerEnginePrecision(weights_dtype=weights, fallback_compute_dtype=fallback)
        fabric = _fabric(precision)
        prepared = fabric.setup(model)
        seen: list[torch.dtype] = []
        model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        x = torch.randn(8, 32)
        output = prepared(x.to(fabric.device))
        assert output.dtype == F32
        assert seen == [fallback or weights]
        assert 1e-3 < _relative(output, reference(x)) < 0.1
        fabric.backward(output.square().mean())
        reference(x).square().mean().backward()
        assert 1e-3 < _relative(model.first.weight.grad, reference.first.weight.grad) < 0.15

    def test_it_trains(self, te: ModuleType) -> None:
        torch.manual_seed(0)
        fabric = _fabric(TransformerEnginePrecision(weights_dtype=F32, fallback_compute_dtype=BF16))
        model = Model()
        model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
        x, target = (t.to(fabric.device) for t in (torch.randn(16, 32), torch.randn(16, 3)))
        losses = []
        for _ in range(15):
            loss = nn.functional.mse_loss(model(x), target)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]

    @BY_STAND_IN
    @pytest.mark.parametrize("autocast_name", ["autocast", "fp8_autocast"])
    def test_the_recipe_reaches_the_layers_by_either_name_of_the_context(
        self, te: ModuleType, monkeypatch: pytest.MonkeyPatch, autocast_name: str
    ) -> None:
        stand_in.install(monkeypatch, autocast_name)
        recipe = stand_in.DelayedScaling(margin=2)
        for given, wanted in ((recipe, recipe), ({"margin": 2}, recipe), (None, None)):
            model = _fabric(TransformerEnginePrecision(weights_dtype=BF16, recipe=given)).setup(Model())
            model(torch.randn(8, 32))
            assert model.first.seen == [wanted]
        model.first(torch.randn(8, 32))
        assert len(model.first.seen) == 1, "outside of forward nothing is in 8 bit"

    @BY_STAND_IN
    def test_transformer_layers_do_not_go_past_the_replaced_ones(self, te: ModuleType) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        model = _fabric(TransformerEnginePrecision(weights_dtype=BF16)).setup(layer).eval()
        with torch.no_grad():
            model(torch.randn(2, 4, 16))
        assert len(layer.linear1.seen) == len(layer.linear2.seen) == 1

    def test_new_tensors_and_modules_have_the_dtype(self, te: ModuleType) -> None:
        fabric = _fabric(TransformerEnginePrecision(weights_dtype=F16))
        with fabric.init_tensor():
            assert torch.zeros(1).dtype == F16
        with fabric.init_module():
            assert nn.Linear(2, 2).weight.dtype == F16
        assert torch.get_default_dtype() == F32
        data = {"x": torch.zeros(1), "y": [torch.zeros(1, dtype=torch.int32)]}
        precision = pickle.loads(pickle.dumps(fabric.strategy.precision))
        assert [precision.convert_input(data)["x"].dtype, precision.convert_input(data)["y"][0].dtype] == [
            F16,
            torch.int32,
        ]
        assert precision.convert_output(precision.convert_input(data))["x"].dtype == F32

    def test_strategies_that_split_weights_refuse(self, te: ModuleType) -> None:
        for strategy in ("fsdp", "deepspeed", ModelParallelStrategy(lambda model, mesh: model)):
            with pytest.raises((TypeError, ValueError), match="TransformerEnginePrecision"):
                precision = TransformerEnginePrecision(weights_dtype=BF16)
                Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=precision)
