"""Quantised linear layers, by the real package, which computes on CPUs too."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import BitsandbytesPrecision
from lightning.fabric.plugins.precision import bitsandbytes as plugin
from lightning.fabric.strategies import ModelParallelStrategy, XLAStrategy
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities import imports
from lightning.fabric.utilities.init import _EmptyInit

bnb = pytest.importorskip("bitsandbytes")
preload("bitsandbytes")

FOUR_BIT = ("nf4", "nf4-dq", "fp4", "fp4-dq")
FROZEN = (*FOUR_BIT, "int8")
MODES = (*FROZEN, "int8-training")
# of the output of one layer, relative: what the codes allow, and half of that at least
ERRORS = {"nf4": (0.05, 0.11), "nf4-dq": (0.05, 0.11), "fp4": (0.06, 0.14), "fp4-dq": (0.06, 0.14)}


@pytest.fixture(autouse=True)
def _nothing_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_EmptyInit, "was_used", False)


class Model(nn.Module):
    """Rows that do not end with a block of 64, three dimensions, a layer without bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 96)
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(functional.gelu(self.first(x))))


def _fabric(mode: str, **kwargs: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision(mode, **kwargs))


def _relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().float(), wanted.detach().float()
    return float((got - wanted).norm() / wanted.norm())


def _decoded(linear: nn.Module) -> Tensor:
    """The weight that the codes of a layer stand for, by its own identity."""
    linear = copy.deepcopy(linear).train()
    linear.bias = None
    with torch.no_grad():
        return linear(torch.eye(linear.in_features, dtype=torch.float32)).t()


class TestArguments:
    @pytest.mark.parametrize("mode", ["nf8", "int8-dq", None, 4])
    def test_other_modes_are_refused(self, mode: Any) -> None:
        with pytest.raises(ValueError, match=f"mode must be one of 'nf4', 'nf4-dq', .* but got {mode!r}"):
            BitsandbytesPrecision(mode)

    def test_a_typo_gets_a_suggestion(self) -> None:
        with pytest.raises(ValueError, match=r"Did you mean 'int8-training'\?"):
            BitsandbytesPrecision("int8-trianing")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16"])
    def test_other_dtypes_are_refused(self, dtype: Any) -> None:
        with pytest.raises(ValueError, match="dtype must be one of .*float16"):
            BitsandbytesPrecision("nf4", dtype)

    @pytest.mark.parametrize("names", ["head", ["head", 3], [""], 3, nn.Linear])
    def test_names_are_a_list_of_names(self, names: Any) -> None:
        with pytest.raises(TypeError, match="`ignore_modules` is a list of names"):
            BitsandbytesPrecision("nf4", ignore_modules=names)

    def test_dtype_is_bfloat16_unless_given(self) -> None:
        assert BitsandbytesPrecision("nf4").dtype == torch.bfloat16
        assert BitsandbytesPrecision("int8", torch.float16).dtype == torch.float16

    def test_without_the_package_the_error_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert plugin._BITSANDBYTES_AVAILABLE
        monkeypatch.setattr(imports, "package_available", lambda name: False)
        with pytest.raises(ModuleNotFoundError, match="'nf4'.*pip install bitsandbytes"):
            BitsandbytesPrecision("nf4")

    def test_a_plugin_that_was_used_can_be_sent_to_another_process(self) -> None:
        precision = BitsandbytesPrecision("nf4", ignore_modules=["head"], keep_fp32=[nn.LayerNorm])
        precision.convert_module(Model())
        again = pickle.loads(pickle.dumps(precision))
        assert (again.mode, again.dtype) == ("nf4", torch.bfloat16)


class TestModes:
    @pytest.mark.parametrize("mode", FOUR_BIT)
    @pytest.mark.parametrize("shape", [(96, 48), (16, 64), (3, 10), (5, 7), (130, 66)])
    def test_4_bit_weights_are_near_the_originals(self, mode: str, shape: tuple[int, int]) -> None:
        linear = nn.Linear(shape[1], shape[0])
        weight = linear.weight.detach().clone()
        BitsandbytesPrecision(mode, torch.float32).convert_module(linear)
        assert isinstance(linear, bnb.nn.Linear4bit)
        assert linear.weight.dtype == torch.uint8
        assert linear.weight.numel() == -(-weight.numel() // 2)
        error = _relative(_decoded(linear), weight)
        assert error < ERRORS[mode][1]
        assert error > ERRORS[mode][0] or weight.numel() < 100

    @pytest.mark.parametrize("shape", [(96, 48), (3, 10), (5, 7)])
    def test_8_bit_weights_are_nearer(self, shape: tuple[int, int]) -> None:
        linear = nn.Linear(shape[1], shape[0])
        weight = linear.weight.detach().clone()
        BitsandbytesPrecision("int8", torch.float32).convert_module(linear)
        assert isinstance(linear, bnb.nn.Linear8bitLt)
        assert linear.weight.dtype == torch.int8
        assert 1e-4 < _relative(_decoded(linear), weight) < 0.01

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_outputs_and_gradients_are_near_those_in_32_bit(self, mode: str, dtype: torch.dtype) -> None:
        model = Model()
        reference = copy.deepcopy(model)
        fabric = _fabric(mode, dtype=dtype)
        prepared = fabric.setup(model)
        x = torch.randn(2, 3, 48, requires_grad=True)
        bound = 0.25 if mode in FOUR_BIT else 0.03
        for training in (True, False):
            prepared.train(training)
            output, wanted = prepared(x), reference(x)
            assert output.dtype == torch.float32
            assert 0 < _relative(output, wanted) < bound
            grad = torch.autograd.grad(output.square().sum(), x)[0]
            assert 0 < _relative(grad, torch.autograd.grad(wanted.square().sum(), x)[0]) < 2 * bound
        with torch.no_grad():
            assert 0 < _relative(prepared(x), reference(x)) < bound

    @pytest.mark.parametrize("mode", MODES)
    def test_forward_changes_nothing_in_the_model(self, mode: str) -> None:
        model = _fabric(mode).setup(Model())
        before = copy.deepcopy(model.state_dict())
        for training in (True, False):
            model.train(training)
            with torch.set_grad_enabled(training):
                model(torch.randn(4, 48))
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)

    def test_what_is_not_linear_has_the_dtype(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Embedding(4, 8))
        _fabric("nf4", dtype=torch.float16).setup(model)
        assert {model[0].bias.dtype, model[1].weight.dtype, model[1].running_mean.dtype} == {torch.float16}
        assert model[1].num_batches_tracked.dtype == torch.int64
        with _fabric("nf4").init_tensor():
            assert torch.zeros(1).dtype == torch.bfloat16
        assert torch.get_default_dtype() == torch.float32

    def test_tables_of_the_package_stay_in_32_bit(self) -> None:
        with _fabric("fp4-dq").init_module():
            model = nn.Linear(64, 64)
        assert model.quant_state.code.dtype == torch.float32
        assert model.quant_state.state2.code.dtype == torch.float32
        assert bnb.functional.name2qmap["dynamic"].dtype == torch.float32

    def test_other_modules_use_what_bitsandbytes_would_have(self) -> None:
        model = _fabric("nf4-dq", dtype=torch.float32).setup(nn.Linear(64, 32)).module
        weight = bnb.functional.dequantize_4bit(model.weight.data, model.weight.quant_state)
        assert torch.equal(weight, _decoded(model))


class TestConversion:
    def test_layers_stay_the_same_objects_with_all_they_have(self) -> None:
        model = Model()
        seen: list[str] = []
        linear, bias = model.first, model.first.bias
        linear.register_forward_hook(lambda *_: seen.append("hook"))
        linear.note = "kept"
        linear.eval()
        BitsandbytesPrecision("nf4").convert_module(model)
        assert model.first is linear
        assert linear.bias is bias
        assert linear.note == "kept"
        assert not linear.training
        linear(torch.randn(2, 48))
        assert seen == ["hook"]

    def test_names_begin_with_what_is_ignored(self) -> None:
        model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "ab", "b", "bc", "d")})
        precision = BitsandbytesPrecision("nf4", ignore_modules=["a", "b."])
        precision.convert_module(model)
        assert {name for name, part in model.items() if type(part) is nn.Linear} == {"a", "ab", "b"}
        assert model["a"].weight.dtype == torch.bfloat16
        assert "'b' is not quantised: it is in `ignore_modules`." in precision.remarks()
        with pytest.raises(ValueError, match=r"ignore_modules has 'first\.x'.*Did you mean 'first'"):
            BitsandbytesPrecision("nf4", ignore_modules=["first.x"]).convert_module(Model())

    def test_kept_layers_compute_in_32_bit(self) -> None:
        model = Model()
        precision = BitsandbytesPrecision("int8", keep_fp32=["head", nn.LayerNorm])
        fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
        prepared = fabric.setup(model)
        seen: list[torch.dtype] = []
        model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        prepared(torch.randn(2, 48))
        assert model.head.weight.dtype == model.norm.weight.dtype == torch.float32
        assert model.first.weight.dtype == torch.int8
        assert [precision.computes_in(name, getattr(model, name)) for name in ("first", "norm", "head")] == [
            "int8",
            "float32",
            "float32",
        ]
        assert any("1 of 2 linear layers are quantised" in text for text in precision.remarks())

    def test_what_is_not_exactly_linear_stays_and_is_told(self) -> None:
        class Scaled(nn.Linear):
            pass

        model = nn.ModuleDict(
            {
                "attention": nn.MultiheadAttention(8, 2),
                "scaled": Scaled(8, 8),
                "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
                "own": bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False),
                "plain": nn.Linear(8, 8),
            }
        )
        precision = BitsandbytesPrecision("nf4")
        precision.convert_module(model)
        told = "\n".join(precision.remarks())
        assert "1 of 5 linear layers are quantised (nf4)" in told
        assert "'attention.out_proj' is not quantised: it is a NonDynamicallyQuantizableLinear" in told
        assert "'scaled' is not quantised: it is a Scaled" in told
        assert "'normed' is not quantised" in told
        assert "'own' is not quantised: it is a layer of bitsandbytes already" in told

    def test_nothing_to_quantise_is_told_at_once(self) -> None:
        with pytest.warns(UserWarning, match="has quantised nothing in Conv2d"):
            BitsandbytesPrecision("nf4").convert_module(nn.Conv2d(1, 1, 1))

    def test_ties_are_kept(self) -> None:
        model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 16)})
        model["head"].weight = model["embedding"].weight
        frozen, trained = model, copy.deepcopy(model)
        precision = BitsandbytesPrecision("nf4")
        precision.convert_module(frozen)
        assert frozen["head"].weight is frozen["embedding"].weight
        assert frozen["head"].weight.dtype == torch.bfloat16
        assert "'head' is not quantised: it shares its weight: 'embedding.weight' and 'head.weight'." in (
            precision.remarks()
        )
        BitsandbytesPrecision("int8-training").convert_module(trained)
        assert isinstance(trained["head"], bnb.nn.Linear8bitLt)
        assert trained["head"].weight is trained["embedding"].weight

    def test_one_layer_under_two_names_is_quantised_once(self) -> None:
        model = nn.ModuleDict({"a": nn.Linear(8, 8)})
        model["b"] = model["a"]
        BitsandbytesPrecision("nf4").convert_module(model)
        assert model["a"] is model["b"]
        assert model["b"].weight.dtype == torch.uint8

    def test_setting_up_again_changes_nothing_and_another_mode_is_refused(self) -> None:
        model = Model()
        x = torch.randn(2, 48)
        first = _fabric("nf4").setup(model)(x)
        assert torch.equal(_fabric("nf4").setup(copy.deepcopy(model))(x), first)
        with pytest.raises(ValueError, match="'first' is quantised already, as 'nf4'"):
            _fabric("int8").setup(model)
        with pytest.raises(ValueError, match="'head' is in `ignore_modules`, but it is quantised already"):
            _fabric("nf4", ignore_modules=["head"]).setup(model)

    @pytest.mark.parametrize("mode", MODES)
    def test_transformer_layers_do_not_go_past_the_quantised_ones(self, mode: str) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        reference = copy.deepcopy(layer).eval()
        model = _fabric(mode, dtype=torch.float32).setup(layer).eval()
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            assert 1e-5 < _relative(model(x), reference(x)) < 0.2


class TestMoves:
    @pytest.mark.parametrize("mode", MODES)
    def test_copies_and_casts_keep_weight_and_scales_together(self, mode: str) -> None:
        model = BitsandbytesPrecision(mode, torch.float32).convert_module(Model())
        x = torch.randn(2, 48)
        wanted = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu")):
            assert torch.equal(other(x), wanted)
            assert type(other.first.weight) is type(model.first.weight)
            if mode != "int8-training":
                assert other.first.scales.data_ptr() != model.first.scales.data_ptr()
        if mode != "int8-training":
            cast = copy.deepcopy(model).half().float()
            assert torch.equal(cast.first.weight, model.first.weight)
            assert torch.equal(cast.first.scales, model.first.scales)
            assert _relative(cast(x), wanted) < 1e-2

    @pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
    @pytest.mark.parametrize("mode", FROZEN)
    def test_on_the_meta_device(self, mode: str) -> None:
        with torch.device("meta"):
            model = Model()
        BitsandbytesPrecision(mode, torch.float32).convert_module(model)
        assert model.first.weight.is_meta
        assert not model.first.weight.is_floating_point()
        weights = Model().state_dict()
        with pytest.raises(RuntimeError, match="on the meta device"):
            copy.deepcopy(model).load_state_dict(weights)
        model.load_state_dict(weights, assign=True)
        loaded = BitsandbytesPrecision(mode, torch.float32).convert_module(Model())
        loaded.load_state_dict(weights)
        x = torch.randn(2, 48)
        assert torch.equal(model(x), loaded(x))

    @pytest.mark.gpu
    @pytest.mark.parametrize("mode", MODES)
    def test_on_a_gpu_the_outputs_are_those_of_the_cpu(self, mode: str) -> None:
        fabric = Fabric(accelerator="cuda", devices=1, plugins=BitsandbytesPrecision(mode))
        on_cpu = BitsandbytesPrecision(mode).convert_module(Model())
        x = torch.randn(8, 48, requires_grad=True)
        wanted = on_cpu(x.bfloat16()).float()
        grad = torch.autograd.grad(wanted.square().sum(), x)[0]
        model = fabric.setup(copy.deepcopy(on_cpu))  # quantised there, moved here
        output = model(x.cuda())
        assert _relative(output.cpu(), wanted) < 0.03
        assert _relative(torch.autograd.grad(output.square().sum(), x)[0], grad) < 0.06
        with fabric.init_module():
            model = fabric.setup(Model())  # quantised here
        assert all(parameter.is_cuda for parameter in model.parameters())
        assert model(x.cuda()).isfinite().all()

    def test_memory_that_nothing_has_filled_is_not_used(self) -> None:
        with torch.device("meta"):
            model = Model()
        precision = BitsandbytesPrecision("nf4", torch.float32)
        precision.convert_module(model)
        model.to_empty(device="cpu")
        with pytest.raises(RuntimeError, match=r"'first\.weight' was created empty"):
            model(torch.randn(2, 48))
        torch.manual_seed(3)
        model.first.reset_parameters()
        torch.manual_seed(3)
        like = nn.Linear(48, 96)
        assert torch.equal(model.first.bias, like.bias)
        assert _relative(_decoded(model.first), like.weight) < 0.11


class TestInitModule:
    @pytest.mark.parametrize("mode", MODES)
    def test_each_layer_is_quantised_as_soon_as_it_exists(self, mode: str) -> None:
        float_bytes = []

        class Deep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList()
                for _ in range(5):
                    self.layers.append(nn.Linear(64, 64))
                    weights = [part.weight for part in self.layers if part.weight.is_floating_point()]
                    float_bytes.append(sum(weight.nbytes for weight in weights))

        fabric = _fabric(mode)
        with fabric.init_module():
            model = Deep()
        assert type(nn.Linear(2, 2)) is nn.Linear
        assert float_bytes == [0] * 5 if mode != "int8-training" else float_bytes[-1] == 5 * 64 * 64 * 2
        assert all(isinstance(part, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for part in model.layers)
        assert model.layers[0].bias.dtype == torch.bfloat16
        fabric.setup(model)

    @pytest.mark.parametrize("empty_init", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_a_checkpoint_of_ordinary_weights_is_quantised_as_it_is_loaded(
        self, mode: str, empty_init: bool, tmp_path: Path
    ) -> None:
        reference = Model()
        torch.save(reference.state_dict(), tmp_path / "weights.pt")
        x = torch.randn(2, 48)
        wanted = _fabric(mode).setup(copy.deepcopy(reference))(x)
        for before in (True, False):
            fabric = _fabric(mode)
            with fabric.init_module(empty_init=empty_init):
                model = Model()
            prepared = fabric.setup(model) if before else model
            if before and empty_init:
                with pytest.raises(RuntimeError, match=r"created empty.*nothing has filled"):
                    prepared(x)
            fabric.load_raw(tmp_path / "weights.pt", prepared)
            prepared = prepared if before else fabric.setup(model)
            assert torch.equal(prepared(x), wanted)

    @pytest.mark.parametrize("mode", FROZEN)
    def test_a_layer_left_empty_is_named(self, mode: str) -> None:
        fabric = _fabric(mode)
        with fabric.init_module(empty_init=True):
            model = Model()
        weights = Model().state_dict()
        del weights["head.weight"]
        model.load_state_dict(weights, strict=False)
        with pytest.raises(RuntimeError, match=r"'head\.weight' was created empty"):
            fabric.setup(model)(torch.randn(2, 48))

    @pytest.mark.parametrize("argument", [{"ignore_modules": ["head"]}, {"keep_fp32": ["head"]}])
    def test_names_are_not_known_there(self, argument: dict[str, list[str]]) -> None:
        context = _fabric("nf4", **argument).init_module()
        with pytest.raises(RuntimeError, match=f"no name yet that `{next(iter(argument))}`"):
            context.__enter__()

    def test_initialising_quantised_weights_is_refused(self) -> None:
        def initialise(model: nn.Module) -> None:
            nn.init.zeros_(model.head.weight)

        fabric = _fabric("nf4")
        with fabric.init_module():
            model = Model()
        with pytest.raises(RuntimeError, match="`zero_` is for ordinary weights"):
            initialise(model)
        for function in (nn.init.normal_, nn.init.xavier_uniform_, lambda weight: weight.mul_(2)):
            with pytest.raises(RuntimeError, match="for ordinary weights"):
                function(model.head.weight)
        with torch.no_grad(), pytest.raises(RuntimeError, match="for ordinary weights"):
            model.head.weight += 1
        with fabric.init_module(empty_init=True):
            model = Model()
            initialise(model)
        model.load_state_dict(Model().state_dict())
        fabric.setup(model)(torch.randn(2, 48))

    def test_ties_made_there_are_kept_or_refused(self) -> None:
        fabric = _fabric("nf4")
        with fabric.init_module():
            model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 16)})
            model["head"].weight = model["embedding"].weight
        fabric.setup(model)
        assert type(model["head"]) is nn.Linear
        assert model["head"].weight is model["embedding"].weight
        assert set(model["head"].state_dict()) == {"weight", "bias"}
        with fabric.init_module():
            model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "head": nn.Linear(8, 16)})
            model["embedding"].weight = model["head"].weight
            other = nn.Linear(8, 16)
            with pytest.raises(ValueError, match="would share a quantised weight"):
                other.weight = model["head"].weight
        with pytest.raises(
            ValueError, match=r"'embedding\.weight' and 'head\.weight' share a weight that is quantised"
        ):
            fabric.setup(model)


class TestCheckpoints:
    @pytest.mark.parametrize("mode", MODES)
    def test_save_and_load_give_the_same_bits(self, mode: str, tmp_path: Path) -> None:
        fabric = _fabric(mode)
        model = fabric.setup(Model())
        fabric.save(tmp_path / "model.pt", {"model": model})
        torch.manual_seed(1)
        other = fabric.setup(Model())
        fabric.load(tmp_path / "model.pt", {"model": other})
        state, again = model.state_dict(), other.state_dict()
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) for key in state)
        x = torch.randn(2, 48)
        assert torch.equal(model(x), other(x))

    @pytest.mark.parametrize("mode", FOUR_BIT)
    def test_files_are_those_of_bitsandbytes(self, mode: str) -> None:
        model = _fabric(mode, dtype=torch.float32).setup(nn.Linear(64, 16)).module
        state = model.state_dict()
        stats = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
        theirs = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
        assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), _decoded(model))

    def test_8_bit_files_are_those_of_bitsandbytes(self) -> None:
        model = _fabric("int8", dtype=torch.float32).setup(nn.Linear(64, 16)).module
        theirs = bnb.nn.Linear8bitLt(64, 16, has_fp16_weights=False).to("cpu")
        theirs.load_state_dict(model.state_dict())
        x = torch.randn(2, 64)
        assert torch.equal(theirs(x), model(x))

    @pytest.mark.parametrize(("mode", "other"), [("nf4", "fp4"), ("nf4", "nf4-dq"), ("int8", "nf4"), ("nf4", "int8")])
    def test_weights_of_another_mode_are_refused(self, mode: str, other: str) -> None:
        state = _fabric(other).setup(Model()).state_dict()
        model = _fabric(mode).setup(Model())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=r'"first\.weight": the checkpoint has'):
            model.load_state_dict(state, strict=False)
        assert torch.equal(model.state_dict()["first.weight"], before["first.weight"])

    def test_quantised_weights_cannot_be_trained(self) -> None:
        state = _fabric("int8").setup(Model()).state_dict()
        with pytest.raises(RuntimeError, match=r"torch\.int8, which mode 'int8-training' cannot train"):
            _fabric("int8-training").setup(Model()).load_state_dict(state, strict=False)

    @pytest.mark.parametrize("mode", MODES)
    def test_what_does_not_fit_is_told(self, mode: str) -> None:
        model = _fabric(mode).setup(Model())
        state = Model().state_dict()
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({**state, "first.weight": torch.zeros(48, 96)})
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"first\.extra"'):
            model.load_state_dict({**state, "first.extra": torch.zeros(1)})
        del state["head.weight"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"head\.weight"'):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False).missing_keys in ([], ["head.weight"])


class Adapted(nn.Module):
    """A quantised layer, and beside it a small one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.up.weight)
        self.body.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.up(self.down(x))


def _trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class TestTraining:
    @pytest.mark.parametrize("mode", MODES)
    def test_quantised_weights_need_no_gradient(self, mode: str) -> None:
        model = Model()
        _fabric(mode).setup(model)
        needs = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        ordinary = {"first.bias", "norm.weight", "norm.bias"}
        assert needs == (ordinary | {"first.weight", "head.weight"} if mode == "int8-training" else ordinary)

    @pytest.mark.parametrize("mode", FROZEN)
    def test_an_adapter_learns_what_the_frozen_layer_lacks(self, mode: str) -> None:
        fabric = _fabric(mode, dtype=torch.float32, ignore_modules=["down", "up"])
        model = fabric.setup_module(Adapted())
        frozen = copy.deepcopy(model.body.state_dict())
        optimizer = fabric.setup_optimizers(torch.optim.Adam(_trained_parameters(model), lr=0.02))
        x = torch.randn(16, 32)
        target = x @ torch.randn(32, 2) @ torch.randn(2, 32) / 8
        losses = []
        for _ in range(40):
            loss = functional.mse_loss(model(x), target)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]
        assert all(torch.equal(frozen[key], value) for key, value in model.body.state_dict().items())

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_int8_training_trains_the_weights_it_computes_with(self, set_to_none: bool) -> None:
        torch.manual_seed(0)
        model, reference = Model(), Model()
        reference.load_state_dict(model.state_dict())
        fabric = _fabric("int8-training", dtype=torch.float32)
        optimizer, exact = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, reference))
        model, optimizer = fabric.setup(model, optimizer)
        assert model.first.weight.dtype == torch.float32
        x, target = torch.randn(4, 3, 48), torch.randn(4, 3, 20)
        start = model.first.weight.detach().clone()
        for _ in range(5):
            loss, wanted = functional.mse_loss(model(x), target), functional.mse_loss(reference(x), target)
            assert abs(loss.item() - wanted.item()) < 0.02 * wanted.item()  # goes on with the weights of now
            fabric.backward(loss)
            wanted.backward()
            for each in (optimizer, exact):
                each.step()
                each.zero_grad(set_to_none)
        assert _relative(model.first.weight - start, reference.first.weight - start) < 0.1
        model.eval()
        with torch.no_grad():
            assert _relative(model(x), reference(x)) < 0.05

    @pytest.mark.parametrize("mode", FROZEN)
    def test_optimizers_of_weights_that_are_quantised_away_are_refused(self, mode: str) -> None:
        precision = BitsandbytesPrecision(mode, ignore_modules=["down", "up"])
        model = Adapted()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adapter = torch.optim.SGD([*model.down.parameters(), *model.up.parameters()], lr=0.1)
        precision.convert_module(model)
        precision.check_optimizers([adapter])
        precision.check_optimizers([torch.optim.SGD(model.parameters(), lr=0.1)])
        with pytest.raises(ValueError, match=rf"mode='{mode}' does not train: 'body\.weight'\. Create it after"):
            precision.check_optimizers([adapter, optimizer])

    def test_set_up_refuses_such_an_optimizer(self) -> None:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fabric = _fabric("nf4")
        with pytest.raises(ValueError, match=r"does not train: 'first\.weight', 'head\.weight'"):
            fabric.setup(model, optimizer)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fabric.setup_module(model)
        with pytest.raises(ValueError, match=r"does not train: 'first\.weight', 'head\.weight'"):
            fabric.setup_optimizers(optimizer)


class TestStrategies:
    @pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
    def test_strategies_that_own_the_weights_refuse(self, strategy: str) -> None:
        with pytest.raises((TypeError, ValueError), match="BitsandbytesPrecision"):
            Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=BitsandbytesPrecision("nf4"))

    def test_so_does_model_parallelism(self) -> None:
        strategy = ModelParallelStrategy(lambda model, mesh: model)
        with pytest.raises(TypeError, match=r"ModelParallelStrategy .* BitsandbytesPrecision \(precision='int8'\)"):
            Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=BitsandbytesPrecision("int8"))

    def test_so_does_xla(self) -> None:
        with pytest.raises(ValueError, match="BitsandbytesPrecision is for 'nf4'"):
            XLAStrategy(precision=BitsandbytesPrecision("nf4"))

    def test_ddp_averages_gradients_of_adapters_and_sends_whole_weights(self) -> None:
        a, b = on_ranks(2, _two_ranks)
        assert a == b
        assert a["outputs"] == _steps(_alone, ["nf4", "int8"])


def _steps(make: Any, modes: list[str]) -> list[list[float]]:
    """Two steps with each mode; the ranks share the batch out."""
    outputs = []
    for mode in modes:
        fabric = make(mode, dtype=torch.float32, ignore_modules=["down", "up"])
        model = fabric.setup_module(Adapted())
        optimizer = fabric.setup_optimizers(torch.optim.SGD(_trained_parameters(model), lr=0.25))
        batch = torch.linspace(-1, 1, 4 * 32).view(4, 32)
        for _ in range(2):
            part = batch.chunk(fabric.world_size)[fabric.global_rank]
            fabric.backward(model(part).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        outputs.append([round(value, 5) for value in model.eval()(batch).sum(1).tolist()])
    return outputs


def _alone(mode: str, **kwargs: Any) -> Fabric:
    torch.manual_seed(0)
    return _fabric(mode, **kwargs)


def _ddp(mode: str, **kwargs: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=BitsandbytesPrecision(mode, **kwargs))
    fabric.launch()
    torch.manual_seed(fabric.global_rank)  # so that only rank 0 has the weights that count
    return fabric


def _two_ranks() -> dict[str, Any]:
    outputs = _steps(_ddp, ["nf4", "int8"])
    fabric = _ddp("nf4-dq")
    nothing_trained = fabric.setup(Model().requires_grad_(False))
    with fabric.init_module(empty_init=fabric.global_rank == 1):
        model = Model()
    sent = fabric.setup(model)  # rank 1 has nothing but what rank 0 sends
    x = torch.ones(1, 48)
    return {"outputs": outputs, "alone": nothing_trained(x).tolist(), "sent": sent(x).tolist()}
