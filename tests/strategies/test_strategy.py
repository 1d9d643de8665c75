"""What every strategy inherits: the contract's defaults, and state in one file."""

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import (
    Strategy,
    _apply_filter,
    _Sharded,
    _validate_keys_for_strict_loading,
)


class _OwnStrategy(Strategy):
    """The least that a user's strategy has to say."""

    root_device = torch.device("cpu")
    is_global_zero = True

    def module_to_device(self, module: nn.Module) -> None: ...

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor

    def barrier(self, name: str | None = None) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj


class _MemoryIO(CheckpointIO):
    """A plug-in from before there were more parameters than the path."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.files[str(path)] = checkpoint

    def load_checkpoint(self, path: Any, map_location: Any = None) -> dict[str, Any]:
        return copy.copy(self.files[str(path)])

    def remove_checkpoint(self, path: Any) -> None: ...


class _Counter:
    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.fixture
def strategy() -> SingleDeviceStrategy:
    return SingleDeviceStrategy()


def _stepped_adam(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


class TestContract:
    def test_what_has_no_default_is_abstract(self) -> None:
        assert Strategy.__abstractmethods__ == {
            *("root_device", "is_global_zero", "module_to_device"),
            *("all_gather", "all_reduce", "barrier", "broadcast"),
        }

    def test_a_strategy_of_ones_own_trains_saves_and_loads(self, tmp_path: Path) -> None:
        strategy = _OwnStrategy()
        strategy.setup_environment()
        model = nn.Linear(2, 1)
        model, [optimizer], _ = strategy.setup_module_and_optimizers(model, [torch.optim.SGD(model.parameters(), 0.1)])
        strategy.backward(model(torch.ones(1, 2)).sum(), model)
        strategy.optimizer_step(optimizer)
        strategy.save_checkpoint(tmp_path / "x.pt", {"model": model})
        weight = model.weight.detach().clone()
        nn.init.zeros_(model.weight)
        assert strategy.load_checkpoint(tmp_path / "x.pt", {"model": model}) == {}
        assert torch.equal(model.weight, weight)
        strategy.teardown()

    def test_it_is_one_process_unless_it_says_otherwise(self) -> None:
        strategy = _OwnStrategy()
        assert (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size) == (0, 0, 0, 1)
        assert strategy.launcher is None
        assert strategy.start_method is None
        assert strategy.distributed_sampler_kwargs is None
        assert strategy._backward_sync_control is None
        assert not isinstance(strategy, _Sharded)

    def test_asking_for_parts_chooses_none(self) -> None:
        strategy = _OwnStrategy()
        assert strategy.precision.precision == "32-true"
        assert strategy._precision is None
        assert strategy.accelerator is None

    def test_scheduler_and_optimizers_come_back_in_their_places(self, strategy: Strategy) -> None:
        model = nn.Linear(1, 1)
        optimizers = [torch.optim.SGD(model.parameters(), 1.0), torch.optim.SGD(model.parameters(), 2.0)]
        scheduler = object()
        assert strategy.setup_module_and_optimizers(model, optimizers, scheduler) == (model, optimizers, scheduler)

    def test_everything_pickles_before_launch(self) -> None:
        assert isinstance(pickle.loads(pickle.dumps(_OwnStrategy())), _OwnStrategy)

    def test_one_error_is_raised_as_it_is(self, strategy: Strategy) -> None:
        strategy.raise_on_all(None, "saving")
        error = OSError("disk full")
        with pytest.raises(OSError, match="disk full") as caught:
            strategy.raise_on_all(error, "saving")
        assert caught.value is error


class TestInitContexts:
    def test_tensors_and_modules_are_made_on_the_device(self) -> None:
        strategy = SingleDeviceStrategy("meta")
        with strategy.tensor_init_context():
            assert torch.ones(1).is_meta
        with strategy.module_init_context():
            assert nn.Linear(1, 1).weight.is_meta
        assert not torch.ones(1).is_meta

    @pytest.mark.parametrize(("empty_init", "expected"), [(None, 1.0), (False, 1.0), (True, 0.0)])
    def test_only_empty_init_leaves_initialisation_out(
        self, strategy: Strategy, empty_init: bool | None, expected: float
    ) -> None:
        with strategy.module_init_context(empty_init=empty_init):
            weight = nn.init.ones_(nn.Parameter(torch.zeros(300)))
        assert weight[1] == expected  # every fifth carries the mark of an empty parameter

    def test_the_precision_has_its_say(self, strategy: Strategy) -> None:
        from lightning.fabric.plugins.precision.half import HalfPrecision

        strategy.precision = HalfPrecision("bf16-true")
        with strategy.module_init_context():
            assert nn.Linear(1, 1).weight.dtype == torch.bfloat16
        with strategy.tensor_init_context():
            assert torch.zeros(1).dtype == torch.bfloat16


class TestStep:
    def test_backward_and_step_go_through_the_precision(self) -> None:
        calls: list[str] = []

        class Spy(Precision):
            def pre_backward(self, tensor: Any, module: Any) -> Any:
                calls.append("pre")

            def backward(self, tensor: Any, model: Any, *args: Any, **kwargs: Any) -> None:
                calls.append(f"backward {sorted(kwargs)}")

            def post_backward(self, tensor: Any, module: Any) -> Any:
                calls.append("post")

            def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
                return f"step {sorted(kwargs)}"

        strategy = SingleDeviceStrategy(precision=Spy())
        strategy.backward(torch.ones(()), None, retain_graph=True)
        assert calls == ["pre", "backward ['retain_graph']", "post"]
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        assert strategy.optimizer_step(optimizer, closure=lambda: 1.0) == "step ['closure']"

    def test_a_closure_gives_its_loss(self, strategy: Strategy) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        assert strategy.optimizer_step(optimizer, closure=lambda: 7.0) == 7.0


class TestClipping:
    @given(
        grads=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5),
        max_norm=st.floats(0.1, 10),
        norm_type=st.sampled_from([1.0, 2.0, float("inf")]),
    )
    def test_the_norm_is_at_most_what_is_asked(self, grads: list[float], max_norm: float, norm_type: float) -> None:
        model = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in grads])
        for parameter, grad in zip(model, grads, strict=True):
            parameter.grad = torch.tensor(grad)
        before = torch.linalg.vector_norm(torch.tensor(grads), norm_type)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        total = SingleDeviceStrategy().clip_gradients_norm(model, optimizer, max_norm, norm_type)
        after = torch.linalg.vector_norm(torch.stack([p.grad for p in model if p.grad is not None]), norm_type)
        assert type(total) is Tensor
        assert total.shape == ()
        torch.testing.assert_close(total, before)
        torch.testing.assert_close(after, before.clamp(max=max_norm), rtol=1e-4, atol=1e-5)

    def test_no_gradients_have_the_norm_zero(self, strategy: Strategy) -> None:
        model = nn.Linear(1, 1)
        total = strategy.clip_gradients_norm(model, torch.optim.SGD(model.parameters(), 1.0), max_norm=1.0)
        assert total.item() == 0.0

    def test_a_norm_that_is_not_finite_names_the_parameters_and_changes_nothing(self, strategy: Strategy) -> None:
        model = nn.Linear(1, 1)
        model.weight.grad, model.bias.grad = torch.full((1, 1), float("nan")), torch.ones(1)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        with pytest.raises(RuntimeError, match=r"non-finite \(nan\).* those of: weight\."):
            strategy.clip_gradients_norm(model, optimizer, max_norm=0.1)
        assert model.bias.grad.item() == 1.0
        assert strategy.clip_gradients_norm(model, optimizer, max_norm=0.1, error_if_nonfinite=False).isnan()

    def test_finite_gradients_may_overflow_together(self, strategy: Strategy) -> None:
        model = nn.Linear(1, 1)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3e38)
        with pytest.raises(RuntimeError, match="their norm overflows"):
            strategy.clip_gradients_norm(model, torch.optim.SGD(model.parameters(), 1.0), max_norm=1.0)

    def test_values_are_bounded(self, strategy: Strategy) -> None:
        model = nn.Linear(1, 1)
        model.weight.grad, model.bias.grad = torch.full((1, 1), -5.0), torch.full((1,), 0.25)
        strategy.clip_gradients_value(model, torch.optim.SGD(model.parameters(), 1.0), clip_val=0.5)
        assert (model.weight.grad.item(), model.bias.grad.item()) == (-0.5, 0.25)


class TestSave:
    def test_tensors_are_written_from_where_they_are(self) -> None:
        io = _MemoryIO()
        model = nn.Linear(2, 2)
        optimizer = _stepped_adam(model)
        plain = torch.ones(2)
        state = {"model": model, "optimizer": optimizer, "counter": _Counter(3), "plain": plain, "step": 7}
        SingleDeviceStrategy(checkpoint_io=io).save_checkpoint("x", state)
        saved = io.files["x"]
        assert saved["model"].keys() == {"weight", "bias"}
        assert saved["model"]["weight"].data_ptr() == model.weight.data_ptr()
        assert saved["optimizer"]["state"][0]["exp_avg"] is optimizer.state[model.weight]["exp_avg"]
        assert saved["counter"] == {"value": 3}
        assert saved["plain"] is plain
        assert saved["step"] == 7

    def test_rank_zero_alone_writes_but_every_rank_is_asked_for_state(self) -> None:
        class SecondRank(_OwnStrategy):
            is_global_zero = False

        class Asked(_Counter):
            def state_dict(self) -> dict[str, Any]:
                self.value += 1
                return super().state_dict()

        io, asked = _MemoryIO(), Asked()
        SecondRank(checkpoint_io=io).save_checkpoint("x", {"asked": asked})
        assert asked.value == 1
        assert io.files == {}

    def test_an_optimizer_in_shards_is_gathered_first(self) -> None:
        class Sharded(torch.optim.SGD):
            consolidated = False

            def consolidate_state_dict(self) -> None:
                self.consolidated = True

        class SecondRank(_OwnStrategy):
            is_global_zero = False

        optimizer = Sharded([nn.Parameter(torch.ones(1))], lr=1.0)
        assert SecondRank().get_optimizer_state(optimizer) == {}
        assert optimizer.consolidated
        assert _OwnStrategy().get_optimizer_state(optimizer)["param_groups"]

    @given(entries=st.dictionaries(st.text(max_size=3), st.integers()), kept=st.sets(st.integers()))
    def test_a_filter_keeps_exactly_what_it_wants(self, entries: dict[str, int], kept: set[int]) -> None:
        target: dict[str, Any] = {}
        _apply_filter("a", {"a": lambda name, value: value in kept}, entries, target)
        _apply_filter("b", {"a": lambda name, value: False}, entries, target)
        assert target == {"a": {k: v for k, v in entries.items() if v in kept}, "b": entries}

    def test_a_filter_needs_entries_to_choose_from(self, strategy: Strategy) -> None:
        with pytest.raises(TypeError, match=r"filter\['step'\] chooses among the entries .*is 3"):
            strategy.save_checkpoint("never", {"step": 3}, filter={"step": lambda name, value: True})


class TestLoad:
    def _save(self, strategy: Strategy, path: Path, **extra: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        optimizer = _stepped_adam(model)
        strategy.save_checkpoint(path, {"model": model, "optimizer": optimizer, **extra})
        return model, optimizer

    def test_objects_in_place_values_replaced_the_rest_returned(self, strategy: Strategy, tmp_path: Path) -> None:
        model, optimizer = self._save(strategy, tmp_path / "x.pt", counter=_Counter(3), step=7, other=[1, 2])
        new_model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        new_optimizer = torch.optim.AdamW(new_model.parameters())
        state = {"model": new_model, "optimizer": new_optimizer, "counter": (counter := _Counter()), "step": 0}
        assert strategy.load_checkpoint(tmp_path / "x.pt", state) == {"other": [1, 2]}
        assert state == {"model": new_model, "optimizer": new_optimizer, "counter": counter, "step": 7}
        torch.testing.assert_close(new_model.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(new_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
        assert counter.value == 3

    @pytest.mark.parametrize("state", [None, {}])
    def test_without_state_all_of_the_file(self, strategy: Strategy, tmp_path: Path, state: Any) -> None:
        self._save(strategy, tmp_path / "x.pt", step=7)
        checkpoint = strategy.load_checkpoint(tmp_path / "x.pt", state)
        assert checkpoint.keys() == {"model", "optimizer", "step"}
        assert checkpoint["step"] == 7

    def test_a_key_that_is_not_there_names_both_sets(self, strategy: Strategy, tmp_path: Path) -> None:
        self._save(strategy, tmp_path / "x.pt")
        state = {"step": 1, "model": nn.Linear(9, 9)}
        with pytest.raises(KeyError, match=r"'step'.*\['model', 'step'\], the checkpoint has \['model', 'optimizer'\]"):
            strategy.load_checkpoint(tmp_path / "x.pt", state)

    def test_not_strict_takes_what_is_there(self, strategy: Strategy, tmp_path: Path) -> None:
        model, _ = self._save(strategy, tmp_path / "x.pt")
        new_model = nn.Sequential(nn.Linear(2, 3), nn.Identity())
        state = {"model": new_model, "step": 1}
        remainder = strategy.load_checkpoint(tmp_path / "x.pt", state, strict=False)
        assert remainder.keys() == {"optimizer"}
        assert state["step"] == 1
        assert torch.equal(new_model[0].weight, model[0].weight)

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(
        ("misfit", "error", "text"),
        [
            (lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(3)), RuntimeError, 'size mismatch for "0.weight"'),
            (lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))]), ValueError, r"\[4\] parameters .* has \[1\]"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(
        self, strategy: Strategy, tmp_path: Path, misfit: Any, error: type[Exception], text: str, strict: bool
    ) -> None:
        self._save(strategy, tmp_path / "x.pt", model2=nn.Linear(2, 2), step=7)
        wrong = misfit()
        good = nn.Linear(2, 2)
        before = copy.deepcopy(good.state_dict())
        key = "model" if isinstance(wrong, nn.Module) else "optimizer"
        state = {"step": 0, "model2": good, key: wrong}
        with pytest.raises(error, match=text):
            strategy.load_checkpoint(tmp_path / "x.pt", state, strict=strict)
        assert state["step"] == 0
        torch.testing.assert_close(good.state_dict(), before, rtol=0, atol=0)

    def test_strict_lists_missing_and_unexpected_keys(self, strategy: Strategy, tmp_path: Path) -> None:
        self._save(strategy, tmp_path / "x.pt")
        with pytest.raises(RuntimeError) as caught:
            strategy.load_checkpoint(
                tmp_path / "x.pt", {"model": nn.ModuleDict({"0": nn.Linear(2, 3), "a": nn.Linear(1, 1)})}
            )
        assert 'Missing key(s) in state_dict: "a.weight"' in str(caught.value)
        assert 'Unexpected key(s) in state_dict: "1.weight"' in str(caught.value)

    def test_where_a_state_dict_should_be_must_be_one(self, strategy: Strategy, tmp_path: Path) -> None:
        strategy.save_checkpoint(tmp_path / "x.pt", {"model": 3})
        with pytest.raises(TypeError, match=r"has int where the state dict of state\['model'\] should be"):
            strategy.load_checkpoint(tmp_path / "x.pt", {"model": nn.Linear(1, 1)})

    def test_a_file_without_keys_is_told_from_a_checkpoint(self, strategy: Strategy, tmp_path: Path) -> None:
        torch.save([1], tmp_path / "x.pt")
        with pytest.raises(TypeError, match=r"holds list, not a dict with the keys \['step'\]"):
            strategy.load_checkpoint(tmp_path / "x.pt", {"step": 1})

    @given(
        requested=st.sets(st.text("abc", max_size=2)), found=st.sets(st.text("abc", max_size=2)), strict=st.booleans()
    )
    def test_key_validation(self, requested: set[str], found: set[str], strict: bool) -> None:
        if strict and not requested <= found:
            with pytest.raises(KeyError, match="does not exist in the loaded checkpoint"):
                _validate_keys_for_strict_loading(requested, found, strict)
        else:
            _validate_keys_for_strict_loading(requested, found, strict)


class TestModulesWithTheirOwnWayOfLoading:
    """What only the module can judge is not refused beforehand."""

    def _load(self, tmp_path: Path, saved: Any, model: nn.Module) -> None:
        torch.save(saved, tmp_path / "x.pt")
        SingleDeviceStrategy().load_checkpoint(tmp_path / "x.pt", model)

    def test_a_hook_that_renames(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1, bias=False)
        model.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update({prefix + "weight": state.pop(prefix + "old")})
        )
        self._load(tmp_path, {"old": torch.full((1, 1), 5.0)}, model)
        assert model.weight.item() == 5.0

    def test_batch_norm_from_before_it_counted(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.BatchNorm1d(1))
        saved = {name: torch.full((1,), 2.0) for name in ("0.weight", "0.bias", "0.running_mean", "0.running_var")}
        self._load(tmp_path, saved, model)
        assert model[0].running_mean.item() == 2.0

    def test_a_number_saved_as_a_vector_of_one(self, tmp_path: Path) -> None:
        model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(()))})
        self._load(tmp_path, {"a": torch.ones(1)}, model)
        assert model["a"].item() == 1.0

    def test_parameters_without_a_shape_yet(self, tmp_path: Path) -> None:
        model = nn.LazyLinear(2)
        self._load(tmp_path, nn.Linear(3, 2).state_dict(), model)
        assert model.weight.shape == (2, 3)


class _KeepsWhatItIsGiven(nn.Module):
    """Assigns in loading, as metrics do, instead of copying into what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1000))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._buffers["total"] = state_dict[prefix + "total"]


class _HasExtraState(nn.Module):
    extra: Any = torch.zeros(1000)

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


class _OwnLoading(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        self.kept = state_dict["kept"]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": torch.ones(1000)}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
class TestNothingRefersToTheFileAfterwards:
    """A file that is overwritten in place takes every process down that still has it mapped."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Iterator[Path]:
        path = tmp_path / "checkpoint-to-be-mapped.pt"
        yield path
        gc.collect()
        assert str(path) not in Path("/proc/self/maps").read_text()

    def test_the_file_is_mapped_while_it_is_read(self, strategy: Strategy, file: Path) -> None:
        strategy.save_checkpoint(file, {"a": torch.ones(1000)})
        checkpoint = strategy.checkpoint_io.load_checkpoint(file, mmap=True)
        assert str(file) in Path("/proc/self/maps").read_text()
        del checkpoint

    def _objects(self) -> dict[str, Any]:
        model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), _KeepsWhatItIsGiven(), _HasExtraState())
        return {
            "model": model,
            "optimizer": _stepped_adam(model[0]),
            "lbfgs": _stepped_lbfgs(),
            "own_loading": _OwnLoading([nn.Parameter(torch.ones(1))]),
            "counter": _Counter(torch.ones(1000)),
            "plain": {"nested": [torch.ones(1000)]},
        }

    def test_of_all_that_is_restored(self, strategy: Strategy, file: Path) -> None:
        strategy.save_checkpoint(file, {**self._objects(), "rest": [torch.ones(1000)]})
        self.state = self._objects()
        self.remainder = strategy.load_checkpoint(file, self.state)
        assert torch.equal(self.remainder["rest"][0], torch.ones(1000))
        assert str(file) not in Path("/proc/self/maps").read_text()

    def test_of_a_bare_optimizer(self, strategy: Strategy, file: Path) -> None:
        model = nn.Linear(40, 40)
        torch.save(_stepped_adam(model).state_dict(), file)
        self.optimizer = torch.optim.AdamW(model.parameters())
        assert strategy.load_checkpoint(file, self.optimizer) == {}
        assert self.optimizer.state[model.weight]["exp_avg"].abs().sum() > 0
        assert str(file) not in Path("/proc/self/maps").read_text()


def _stepped_lbfgs() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.LBFGS([parameter], max_iter=3)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (parameter**4).sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return optimizer


class TestBareStateDicts:
    def test_into_a_module(self, strategy: Strategy, tmp_path: Path) -> None:
        model = nn.Linear(2, 2)
        torch.save(model.state_dict(), tmp_path / "x.pt")
        other = nn.Linear(2, 2)
        assert strategy.load_checkpoint(tmp_path / "x.pt", other) == {}
        assert torch.equal(other.weight, model.weight)

    def test_into_nothing_that_can_hold_it(self, strategy: Strategy, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "x.pt")
        with pytest.raises(TypeError, match="must be a dict, a module or an optimizer, but got 3"):
            strategy.load_checkpoint(tmp_path / "x.pt", 3)

    def test_that_do_not_fit(self, strategy: Strategy, tmp_path: Path) -> None:
        torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "x.pt")
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
            strategy.load_checkpoint(tmp_path / "x.pt", nn.Linear(2, 2))


class TestCheckpointIO:
    def test_one_that_knows_the_path_alone(self) -> None:
        strategy = SingleDeviceStrategy(checkpoint_io=_MemoryIO())
        model = nn.Linear(2, 2)
        strategy.save_checkpoint("x", {"model": model, "step": 3})
        other = nn.Linear(2, 2)
        assert strategy.load_checkpoint("x", {"model": other}) == {"step": 3}
        assert torch.equal(other.weight, model.weight)

    def test_an_option_that_it_lacks_is_not_ignored(self) -> None:
        strategy = SingleDeviceStrategy(checkpoint_io=_MemoryIO())
        strategy.save_checkpoint("x", {"step": 3})
        with pytest.raises(TypeError, match=r"weights_only=True .* `_MemoryIO.load_checkpoint`"):
            strategy.load_checkpoint("x", weights_only=True)

    def test_one_that_takes_any_keyword_gets_them(self) -> None:
        class Any_(_MemoryIO):
            def load_checkpoint(self, path: Any, **kwargs: Any) -> dict[str, Any]:
                return {"got": kwargs}

        strategy = SingleDeviceStrategy(checkpoint_io=Any_())
        assert strategy.load_checkpoint("x")["got"] == {"weights_only": None}
        assert strategy.load_checkpoint("x", {"no": 0}, strict=False)["got"] == {"weights_only": None, "mmap": True}

    def test_storage_options_reach_it(self) -> None:
        with pytest.raises(TypeError, match="storage_options"):
            SingleDeviceStrategy().save_checkpoint("never", {}, storage_options={"a": 1})
