import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning.fabric.utilities.init import (
    _EmptyInit,
    _has_meta_device_parameters_or_buffers,
    _materialize_meta_tensors,
    refuse_meta,
    refuse_unfilled,
    unfilled,
)

INPLACE = [
    "uniform_",
    "normal_",
    "trunc_normal_",
    "ones_",
    "zeros_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
]


def _sevens() -> nn.Parameter:
    return nn.Parameter(torch.full((20, 20), 7.0))


def _untouched(weight: torch.Tensor) -> bool:
    """Still full of sevens, but for the marks, at both ends and in between."""
    entries = weight.detach().flatten()
    marked = entries.isnan()
    return bool(marked[0] and marked[-1] and 50 < marked.sum() < 70 and (entries[~marked] == 7).all())


class TestUnfilled:
    @pytest.fixture
    def model(self) -> nn.Module:
        with _EmptyInit():
            return nn.Sequential(nn.Linear(2, 3), nn.Embedding(3, 2, padding_idx=0), nn.LayerNorm(2))

    def test_every_parameter_of_an_empty_model_is_named(self, model: nn.Module) -> None:
        assert unfilled(model.named_parameters()) == [name for name, _ in model.named_parameters()]

    @pytest.mark.parametrize("change", [copy.deepcopy, nn.Module.double, lambda model: model.to(torch.bfloat16)])
    def test_copies_and_conversions_are_still_empty(
        self, model: nn.Module, change: Callable[[nn.Module], nn.Module]
    ) -> None:
        assert len(unfilled(change(model).named_parameters())) == 5

    @pytest.mark.parametrize("assign", [False, True])
    def test_what_was_loaded_is_filled(self, model: nn.Module, assign: bool) -> None:
        model.load_state_dict({"0.weight": torch.ones(3, 2)}, strict=False, assign=assign)
        assert unfilled(model.named_parameters()) == ["0.bias", "1.weight", "2.weight", "2.bias"]

    def test_what_was_written_past_autograd_is_filled(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.normal_()
        assert unfilled(model.named_parameters()) == []
        refuse_unfilled(model.named_parameters(), "A forward")

    def test_the_error_names_them(self, model: nn.Module) -> None:
        with pytest.raises(RuntimeError, match=r"A forward would use parameters .* empty.*: '0.weight', '0.bias'"):
            refuse_unfilled(model.named_parameters(), "A forward")

    @pytest.mark.parametrize("rows", [slice(0, 9), slice(0, 300), slice(2, 300), slice(100, 200)])
    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    def test_what_was_filled_in_part_is_still_empty(self, rows: slice, layout: str) -> None:
        weight = torch.empty(300, 8) if layout == "contiguous" else torch.empty(8, 300).T
        weight = nn.Parameter(weight.fill_(0.0))
        with _EmptyInit():
            nn.init.zeros_(weight)
        assert unfilled([("weight", weight)]) == ["weight"]
        with torch.no_grad():
            weight[rows] = 1.0
        assert unfilled([("weight", weight)]) == (["weight"] if rows != slice(0, 300) else [])
        assert unfilled([("weight", weight.contiguous())]) == unfilled([("weight", weight)])

    @pytest.mark.parametrize("shape", [(), (1,), (2,), (63,), (64,), (65,), (3, 5, 7), (0, 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float8_e4m3fn])
    def test_any_shape_and_dtype(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32).to(dtype), requires_grad=False)
        with _EmptyInit():
            nn.init.ones_(weight)
        assert unfilled([("weight", weight)]) == (["weight"] if weight.numel() else [])
        nn.init.ones_(weight)
        assert unfilled([("weight", weight)]) == []

    def test_a_lazy_parameter_is_not_asked(self) -> None:
        with _EmptyInit():
            model = nn.Sequential(nn.LazyLinear(2), nn.Linear(1, 1))
        assert unfilled(model.named_parameters()) == ["1.weight", "1.bias"]

    def test_other_tensors_are_not_asked(self) -> None:
        with _EmptyInit():
            nn.init.zeros_(nn.Parameter(torch.empty(2)))
        nan = torch.full((2,), float("nan"))
        tensors = {"int": torch.tensor([1]), "none": torch.empty(0), "meta": nan.to("meta"), "one": torch.tensor(1.0)}
        assert unfilled(tensors.items()) == []
        assert unfilled({"nan": nan}.items()) == ["nan"]


class TestEmptyInit:
    @pytest.mark.parametrize("name", INPLACE)
    def test_init_functions_leave_the_tensor_as_it_is(self, name: str) -> None:
        weight = _sevens()
        with _EmptyInit():
            returned = getattr(nn.init, name)(weight)
        assert returned is weight
        assert _untouched(weight)

    def test_constant_and_keyword(self) -> None:
        weight = _sevens()
        with _EmptyInit():
            assert nn.init.constant_(tensor=weight, val=1.0) is weight
        assert _untouched(weight)

    @pytest.mark.parametrize("name", INPLACE)
    def test_disabled(self, name: str) -> None:
        weight = _sevens()
        with _EmptyInit(enabled=False):
            getattr(nn.init, name)(weight)
        assert not (weight == 7).any()

    @pytest.mark.parametrize("name", INPLACE)
    def test_what_is_no_parameter_is_filled(self, name: str) -> None:
        """A buffer, a part of a parameter, what a parameter is made of later: no checkpoint need have it."""
        torch.manual_seed(0)
        expected = getattr(nn.init, name)(torch.full((3, 3), 7.0))
        torch.manual_seed(0)
        with _EmptyInit():
            found = getattr(nn.init, name)(torch.full((3, 3), 7.0))
        assert torch.equal(found, expected)

    def test_a_parameter_that_cannot_be_marked_is_filled(self) -> None:
        counts = nn.Parameter(torch.full((2,), 7), requires_grad=False)
        with _EmptyInit():
            assert nn.init.zeros_(counts).tolist() == [0, 0]

    def test_functions_that_compute_on_the_way_still_work(self) -> None:
        weight = torch.empty(4, 4)
        with _EmptyInit():
            nn.init.orthogonal_(weight)
        torch.testing.assert_close(weight @ weight.T, torch.eye(4))

    def test_other_operations_run(self) -> None:
        with _EmptyInit():
            tensor = torch.zeros(3).fill_(2.0).uniform_(5, 6)
            layer = nn.Linear(2, 2)
        assert ((tensor >= 5) & (tensor <= 6)).all()
        assert layer.weight.shape == (2, 2)
        assert layer.weight.requires_grad

    def test_no_random_number_is_drawn_for_common_layers(self) -> None:
        before = torch.get_rng_state()
        with _EmptyInit():
            (
                nn.Linear(2, 2),
                nn.Bilinear(2, 2, 2),
                nn.Conv2d(1, 1, 2),
                nn.Embedding(3, 2),
                nn.LSTM(2, 2),
                nn.MultiheadAttention(4, 2),
            )
        assert torch.equal(before, torch.get_rng_state())


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class TestMaterialize:
    def test_all_tensors_get_memory_and_values(self) -> None:
        with torch.device("meta"):
            model = _Tied()
        assert _has_meta_device_parameters_or_buffers(model)
        _materialize_meta_tensors(model, torch.device("cpu"))
        assert not _has_meta_device_parameters_or_buffers(model)
        assert model.norm.running_var.tolist() == [1, 1, 1]
        assert model.head.weight.abs().sum().isfinite()

    def test_tied_parameters_stay_tied(self) -> None:
        with torch.device("meta"):
            model = _Tied()
        _materialize_meta_tensors(model, "cpu")
        assert model.head.weight is model.embed.weight

    def test_submodules_with_values_keep_them(self) -> None:
        layer = nn.Linear(2, 2)
        expected = layer.weight.clone()
        model = nn.Sequential(layer, nn.Linear(2, 2, device="meta"))
        _materialize_meta_tensors(model, "cpu")
        assert torch.equal(layer.weight, expected)
        assert not model[1].weight.is_meta

    def test_a_module_that_cannot_initialise_itself_is_named(self) -> None:
        class Custom(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1, device="meta"))

        with pytest.raises(TypeError, match="`Custom` has parameters or buffers on the meta device"):
            _materialize_meta_tensors(nn.Sequential(Custom()), "cpu")


def test_meta_tensors_are_refused_by_name() -> None:
    refuse_meta(nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(1)))
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(2, affine=False, device="meta"))
    with pytest.raises(RuntimeError, match=r"Sequential has .* on the meta device.*: '1.running_mean', .*to_empty"):
        refuse_meta(model)


def test_who_has_meta_tensors() -> None:
    buffer_only = nn.BatchNorm1d(2, affine=False, device="meta")
    assert _has_meta_device_parameters_or_buffers(buffer_only)
    assert _has_meta_device_parameters_or_buffers(nn.Sequential(buffer_only))
    assert not _has_meta_device_parameters_or_buffers(nn.Sequential(buffer_only), recurse=False)
    assert not _has_meta_device_parameters_or_buffers(nn.Linear(1, 1))
    assert _has_meta_device_parameters_or_buffers(torch.optim.SGD(nn.Linear(1, 1, device="meta").parameters()))
    assert not _has_meta_device_parameters_or_buffers(torch.optim.SGD(nn.Linear(1, 1).parameters()))
    with pytest.raises(TypeError, match="a module or an optimizer"):
        _has_meta_device_parameters_or_buffers("model")  # type: ignore[arg-type]
