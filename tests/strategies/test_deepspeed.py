"""DeepSpeed: what is refused without it, and what its engine makes of one and two real ranks."""

import inspect
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.plugins.precision.amp import MixedPrecision
from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies import deepspeed as module_under_test
from lightning.fabric.strategies._deepspeed_files import checkpoint_folder
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.imports import package_available

_HERE = package_available("deepspeed")
if _HERE:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for the process that ranks are forked from
    # the second takes seconds to import, and every engine with an optimizer imports it
    preload("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")

CPU = torch.device("cpu")


# ---- without the package ---------------------------------------------------------------------------------------------


@pytest.fixture
def _as_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "require", lambda *_: None)
    monkeypatch.delenv("PL_DEEPSPEED_CONFIG_PATH", raising=False)


@pytest.mark.skipif(_HERE, reason="deepspeed is installed")
def test_it_needs_the_package() -> None:
    with pytest.raises(ImportError, match="strategy='deepspeed' needs the package `deepspeed`.*pip install deepspeed"):
        DeepSpeedStrategy()


@pytest.mark.usefixtures("_as_if_installed")
class TestConstruction:
    def test_arguments_and_their_order_are_the_public_ones(self) -> None:
        parameters = list(inspect.signature(DeepSpeedStrategy).parameters.values())
        assert [p.name for p in parameters[:3]] == ["zero_optimization", "stage", "remote_device"]
        assert [p.name for p in parameters[27:31]] == [
            "config",
            "logging_level",
            "parallel_devices",
            "cluster_environment",
        ]
        assert [p.name for p in parameters[-2:]] == ["exclude_frozen_parameters", "accelerator"]
        assert all(p.default is not inspect.Parameter.empty for p in parameters)

    def test_it_is_a_ddp_strategy_that_runs_the_script_again(self) -> None:
        strategy = DeepSpeedStrategy(parallel_devices=[CPU, CPU], cluster_environment=LightningEnvironment())
        strategy._configure_launcher()
        assert isinstance(strategy, DDPStrategy)
        assert isinstance(strategy.launcher, _SubprocessScriptLauncher)
        assert DeepSpeedStrategy.runs_on == {"cpu", "cuda"}
        assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 0}

    def test_arguments_become_the_configuration(self) -> None:
        strategy = DeepSpeedStrategy(stage=3, offload_parameters=True, reduce_bucket_size=7.0)
        assert strategy.zero_stage_3
        assert strategy.config["zero_optimization"]["reduce_bucket_size"] == 7
        assert strategy.config["zero_optimization"]["offload_param"]["device"] == "cpu"
        assert not DeepSpeedStrategy(config={"zero_optimization": {"stage": 2}}).zero_stage_3

    def test_contradictions_are_seen_at_once(self) -> None:
        with pytest.raises(ValueError, match="but this is stage 2"):
            DeepSpeedStrategy(offload_parameters=True)
        with pytest.raises(ValueError, match="precision is set twice"):
            DeepSpeedStrategy(config={"bf16": {"enabled": True}}, precision=DeepSpeedPrecision("32-true"))

    def test_it_pickles(self) -> None:
        copy = pickle.loads(pickle.dumps(DeepSpeedStrategy(stage=1)))
        assert copy.config["zero_optimization"]["stage"] == 1
        assert len(copy._engines) == 0

    def test_precisions_are_deepspeeds(self) -> None:
        strategy = DeepSpeedStrategy()
        assert strategy.precision.precision == "32-true"
        strategy.precision = DeepSpeedPrecision("bf16-mixed")
        assert strategy.precision.precision == "bf16-mixed"
        strategy.precision = Precision()
        assert isinstance(strategy.precision, DeepSpeedPrecision)
        with pytest.raises(ValueError, match="needs a `DeepSpeedPrecision`, but got .*MixedPrecision"):
            strategy.precision = MixedPrecision("bf16-mixed", "cpu")

    def test_a_configuration_may_forbid_a_precision(self) -> None:
        strategy = DeepSpeedStrategy(config={"bf16": {"enabled": True}})
        with pytest.raises(ValueError, match="precision is set twice.*Pass precision='bf16-mixed'"):
            strategy.precision = DeepSpeedPrecision("16-mixed")

    @pytest.mark.parametrize("name", ["16-true", "16-mixed"])
    def test_float16_is_not_for_the_cpu(self, name: Any) -> None:
        strategy = DeepSpeedStrategy(parallel_devices=[CPU], precision=DeepSpeedPrecision(name))
        with pytest.raises(ValueError, match=f"cannot do on the CPU. Use precision='bf16-{name.split('-')[1]}'"):
            strategy.setup_environment()

    def test_checkpoints_are_its_own(self) -> None:
        strategy = DeepSpeedStrategy()
        with pytest.raises(NotImplementedError, match="writes and reads checkpoints itself, so DeepSpeedStrategy"):
            strategy.checkpoint_io = TorchCheckpointIO()

    def test_a_module_and_one_optimizer_go_together(self) -> None:
        strategy, module = DeepSpeedStrategy(), nn.Linear(1, 1)
        optimizer = SGD(module.parameters(), 0.1)
        for optimizers in ([], [optimizer, SGD(module.parameters(), 0.1)]):
            with pytest.raises(ValueError, match=f"one optimizer with each module, but got {len(optimizers)}"):
                strategy.setup_module_and_optimizers(module, optimizers)
        with pytest.raises(NotImplementedError, match=r"Call `fabric.setup\(model, optimizer\)` instead"):
            strategy.setup_optimizer(optimizer)

    def test_optimizers_and_schedulers_that_need_an_argument_in_step_are_refused(self) -> None:
        strategy, module = DeepSpeedStrategy(), nn.Linear(1, 1)
        optimizer = SGD(module.parameters(), 0.1)
        with pytest.raises(ValueError, match="LBFGS"):
            strategy.setup_module_and_optimizers(module, [torch.optim.LBFGS(module.parameters())])
        with pytest.raises(ValueError, match="ReduceLROnPlateau. Leave `scheduler` out"):
            strategy.setup_module_and_optimizers(module, [optimizer], ReduceLROnPlateau(optimizer))

    def test_before_launch_there_are_no_engines(self) -> None:
        strategy, module = DeepSpeedStrategy(stage=3), nn.Linear(1, 1)
        with pytest.raises(RuntimeError, match=r"Call `fabric.launch\(\)`"), strategy.module_init_context():
            pass
        with pytest.raises(NotImplementedError, match="empty_init=False"), strategy.module_init_context(False):
            pass
        with pytest.raises(RuntimeError, match="No model was set up with an optimizer"):
            strategy.backward(torch.ones(1), None)
        with pytest.raises(RuntimeError, match="SGD was not set up with a module"):
            strategy.optimizer_step(SGD(module.parameters(), 0.1))

    def test_before_stage_3_modules_are_made_whole(self) -> None:
        strategy = DeepSpeedStrategy(parallel_devices=[CPU], precision=DeepSpeedPrecision("bf16-true"))
        with strategy.module_init_context(empty_init=False):
            assert nn.Linear(2, 2).weight.dtype is torch.bfloat16
        with strategy.module_sharded_context():
            assert nn.Linear(2, 2).weight.shape == (2, 2)

    def test_clipping_is_for_the_configuration(self) -> None:
        strategy, module = DeepSpeedStrategy(), nn.Linear(1, 1)
        optimizer = SGD(module.parameters(), 0.1)
        with pytest.raises(NotImplementedError, match="'gradient_clipping': 0.5"):
            strategy.clip_gradients_norm(module, optimizer, max_norm=0.5)
        with pytest.raises(NotImplementedError, match="set `gradient_clipping` in its configuration"):
            strategy.clip_gradients_value(module, optimizer, clip_val=0.5)
        assert strategy._backward_sync_control is None

    def test_optimizer_state_has_no_plain_form(self) -> None:
        strategy, module = DeepSpeedStrategy(stage=1), nn.Linear(1, 1)
        optimizer = SGD(module.parameters(), 0.1)
        for call in (
            lambda: strategy.get_optimizer_state(optimizer),
            lambda: strategy.load_optimizer_state(optimizer, {}),
            lambda: strategy.load_checkpoint("file", optimizer),
        ):
            with pytest.raises(NotImplementedError, match="there is no plain state dict of it"):
                call()
        strategy = DeepSpeedStrategy(stage=0)
        strategy.load_optimizer_state(optimizer, strategy.get_optimizer_state(optimizer))

    def test_a_checkpoint_needs_a_model_that_was_set_up(self, tmp_path: Path) -> None:
        strategy, model = DeepSpeedStrategy(), nn.Linear(1, 1)
        for call in (
            lambda state: strategy._prepare_checkpoint(state, None, {}),
            lambda state: strategy.load_checkpoint(tmp_path, state),
        ):
            with pytest.raises(ValueError, match=r"has 0 such models among its keys \['model'\]. Pass the model"):
                call({"model": model})
        for nothing in (None, {}):
            with pytest.raises(ValueError, match="`state` is needed"):
                strategy.load_checkpoint(tmp_path, nothing)

    def test_what_its_files_cannot_do_is_refused(self) -> None:
        with pytest.raises(TypeError, match="cannot apply a `filter`"):
            DeepSpeedStrategy()._prepare_checkpoint({}, None, {"model": lambda name, value: True})
        with pytest.raises(TypeError, match="no use for storage_options=3"):
            DeepSpeedStrategy()._prepare_checkpoint({}, 3, {})


class TestPlace:
    def test_what_is_no_checkpoint_is_told_from_one(self, tmp_path: Path) -> None:
        checkpoint = tmp_path / "last"
        (checkpoint / "checkpoint").mkdir(parents=True)
        assert checkpoint_folder(checkpoint) == checkpoint
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            checkpoint_folder(tmp_path / "other")
        with pytest.raises(ValueError, match="is not a checkpoint of DeepSpeed's.*'checkpoint' in it.$"):
            checkpoint_folder(tmp_path)
        with pytest.raises(ValueError, match=r"Did you mean .*last'\?"):
            checkpoint_folder(checkpoint / "checkpoint")
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"is a file. If it holds full.*`fabric\.load_raw`"):
            checkpoint_folder(tmp_path / "file")


# ---- with the package ------------------------------------------------------------------------------------------------

_STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "1 offloaded": {"stage": 1, "offload_optimizer": True},
    "2 offloaded": {"stage": 2, "offload_optimizer": True},
    "3 optimizer offloaded": {"stage": 3, "offload_optimizer": True},
    "3 offloaded": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
_SHARED = {name: options for name, options in _STAGES.items() if options["stage"]}

_real = pytest.mark.skipif(not _HERE, reason="needs the package deepspeed")
_long = pytest.mark.timeout(600)  # the first time DeepSpeed compiles its operators, for a minute or more


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.sometimes = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, with_all: bool = True) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) + (self.sometimes(hidden) if with_all else 0)

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).square().mean()


def _model() -> _Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Model()


def _batches() -> Tensor:
    """Steps, backwards of each, ranks, samples, features."""
    return torch.randn(5, 2, 2, 4, 6, generator=torch.Generator().manual_seed(1))


def _adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2)


def _reference(ranks: int, loss: Callable[[nn.Module, Tensor], Tensor], make: Any = _adamw) -> dict[str, Tensor]:
    model = _model()
    optimizer = make(model)
    for step in _batches():
        for batch in step:
            for rank in range(ranks):
                (loss(model, batch[rank]) / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _fabric(ranks: int, precision: Any = None, **options: Any) -> Fabric:
    if "config" not in options:  # DeepSpeed allocates buckets in every backward
        options = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, **options}
    strategy = DeepSpeedStrategy(timeout=timedelta(seconds=60), **options)
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def _set_up(fabric: Fabric, make: Any = _adamw) -> Any:
    model = _model()
    return fabric.setup(model, make(model))


def _weights(fabric: Fabric, model: Any) -> dict[str, Tensor]:
    """Full weights, on rank 0 at least."""
    state = fabric.strategy.get_module_state_dict(model.module)
    return {name: tensor.detach().float().clone() for name, tensor in state.items()}


def _difference(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert weights.keys() == expected.keys()
    return max((weights[name] - tensor).abs().max().item() for name, tensor in expected.items())


def _mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def _on_stages(ranks: int, stages: dict[str, Any], check: Callable[[Fabric], Any], precision: Any = None) -> Any:
    """Run ``check`` on one stage after the other, each with a process group of its own."""
    results = {}
    for name, options in stages.items():
        fabric = _fabric(ranks, precision, **options)
        results[name] = check(fabric)
        fabric.strategy.teardown()
    return results


def _build_operators() -> None:
    _fabric(1)


@pytest.fixture(scope="module")
def _operators() -> None:
    # a launch of several ranks that is late and killed while one of them compiles would leave a lock behind
    on_ranks(1, _build_operators, timeout=580)


# ---- steps


def _step(fabric: Fabric, model: Any, optimizer: Any, number: int) -> None:
    for batch in _batches()[number]:
        fabric.backward(_mean(model, batch[fabric.global_rank]), model=model)
    optimizer.step()
    optimizer.zero_grad()


def _train(fabric: Fabric) -> dict[str, Tensor]:
    model, optimizer = _set_up(fabric)
    for number in range(5):
        _step(fabric, model, optimizer, number)
    return _weights(fabric, model)


def _train_with_discarded_gradients(fabric: Fabric) -> dict[str, Tensor]:
    model, optimizer = _set_up(fabric)
    for number in range(5):
        for _ in range(2):
            fabric.backward(100 * _mean(model, torch.ones(3, 6)))
        optimizer.zero_grad()
        _step(fabric, model, optimizer, number)
    return _weights(fabric, model)


def _train_with_forwards_first(fabric: Fabric) -> dict[str, Tensor]:
    model, optimizer = _set_up(fabric)
    for step in _batches():
        losses = [_mean(model, batch[fabric.global_rank]) for batch in step]
        for loss in losses:
            fabric.backward(loss)
        optimizer.step()
    return _weights(fabric, model)


def _train_partly(fabric: Fabric) -> dict[str, Tensor]:
    model, optimizer = _set_up(fabric, _sgd)
    for number in range(2):
        fabric.backward(model(torch.ones(1, 6), with_all=number == 0).square().sum())
        optimizer.step()
    return _weights(fabric, model)


def _sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


def _partly_reference() -> dict[str, Tensor]:
    model = _model()
    optimizer = _sgd(model)
    for number in range(2):
        model(torch.ones(1, 6), with_all=number == 0).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _train_in_all_ways(ranks: int) -> dict[str, dict[str, Any]]:
    ways = (_train, _train_with_discarded_gradients, _train_with_forwards_first, _train_partly)
    results = _on_stages(ranks, _STAGES, lambda fabric: [way(fabric) for way in map(_alone(fabric), ways)])
    return {
        name: {way.__name__: weights for way, weights in zip(ways, of, strict=True)} for name, of in results.items()
    }


def _alone(fabric: Fabric) -> Callable[[Any], Any]:
    """Forget the models of the way before, so that `backward` needs no `model`."""

    def start(way: Any) -> Any:
        fabric.strategy._engines.clear()  # type: ignore[attr-defined]
        return way

    return start


@_real
@_long
@pytest.mark.slow
@pytest.mark.usefixtures("_operators")
class TestSteps:
    @pytest.fixture(scope="class", params=[1, 2])
    @classmethod
    def trained(cls, request: pytest.FixtureRequest) -> tuple[int, dict[str, dict[str, Any]]]:
        """The number of ranks, and rank 0's weights by stage and way of training."""
        return request.param, on_ranks(request.param, _train_in_all_ways, request.param, timeout=120)[0]

    @pytest.mark.parametrize("stage", _STAGES)
    def test_weights_are_those_of_one_process(self, trained: Any, stage: str) -> None:
        ranks, weights = trained
        assert _difference(weights[stage]["_train"], _reference(ranks, _mean)) < 1e-7

    @pytest.mark.parametrize("stage", _STAGES)
    def test_zero_grad_lets_go_of_all_gradients(self, trained: Any, stage: str) -> None:
        ranks, weights = trained
        assert _difference(weights[stage]["_train_with_discarded_gradients"], _reference(ranks, _mean)) < 1e-7

    @pytest.mark.parametrize("stage", _STAGES)
    def test_forwards_may_all_come_before_the_backwards(self, trained: Any, stage: str) -> None:
        ranks, weights = trained
        assert _difference(weights[stage]["_train_with_forwards_first"], _reference(ranks, _mean)) < 1e-7

    @pytest.mark.parametrize("stage", _STAGES)
    def test_a_parameter_without_gradient_is_not_updated_with_an_earlier_one(self, trained: Any, stage: str) -> None:
        _, weights = trained
        assert _difference(weights[stage]["_train_partly"], _partly_reference()) < 1e-7


# ---- files


def _save_and_load(fabric: Fabric, folder: Path) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    seen: dict[str, Any] = {}
    path = folder / f"{fabric.world_size} ranks, stage {fabric.strategy.config['zero_optimization']['stage']}"  # type: ignore[attr-defined]

    def scheduled() -> Any:
        model = _model()
        optimizer = _adamw(model)
        return fabric.setup(model, optimizer, scheduler=StepLR(optimizer, 1, gamma=0.5))

    model, optimizer, scheduler = scheduled()
    _step(fabric, model, optimizer, 0)
    state = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler, "global_steps": 7, "x": torch.ones(2)}
    state["rank"] = fabric.global_rank
    fabric.save(path, {**state, "global_steps": 6})
    fabric.save(path, state)
    saved = _weights(fabric, model)
    fabric.barrier()
    seen["files"] = sorted(file.name for file in path.iterdir())
    if fabric.is_global_zero:
        seen["consolidated"] = _difference(saved, get_fp32_state_dict_from_zero_checkpoint(str(path)))
    for number in (1, 2):
        _step(fabric, model, optimizer, number)
    later, lr = _weights(fabric, model), optimizer.param_groups[0]["lr"]

    other, other_optimizer, other_scheduler = scheduled()
    target = {"model": other, "optimizer": other_optimizer, "lr_scheduler": other_scheduler, "global_steps": 0}
    seen["left"] = fabric.load(path, target)
    seen["global_steps"] = target["global_steps"]
    for name, (one, its_optimizer) in {"other": (other, other_optimizer), "same": (model, optimizer)}.items():
        if name == "same":
            fabric.load(path, {"model": one, "optimizer": its_optimizer})
        seen[f"{name}: loaded"] = _maximum(_weights(fabric, one), saved)
        for number in (1, 2):
            _step(fabric, one, its_optimizer, number)
        seen[f"{name}: goes on"] = _maximum(_weights(fabric, one), later)
        seen[f"{name}: lr"] = its_optimizer.param_groups[0]["lr"] - lr

    bare, bare_optimizer = _set_up(fabric)
    for number in range(3):
        _step(fabric, bare, bare_optimizer, number)
    fabric.load(path, {"model": bare})
    _set_lr(bare_optimizer, 0.0)
    _step(fabric, bare, bare_optimizer, 0)
    seen["weights alone"] = _maximum(_weights(fabric, bare), saved)
    return seen


def _maximum(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Their difference; 0 on ranks that have no weights."""
    return _difference(weights, expected) if expected else 0.0


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _full_weights(fabric: Fabric, folder: Path) -> dict[str, float]:
    """Load full weights in three ways, each followed by a step that must change nothing."""
    model, optimizer = _set_up(fabric)
    _step(fabric, model, optimizer, 0)
    _set_lr(optimizer, 0.0)
    torch.manual_seed(5)
    weights = _Model().state_dict()
    bare, keyed = folder / f"bare{fabric.global_rank}.pt", folder / f"keyed{fabric.global_rank}.pt"
    torch.save(weights, bare)
    torch.save({"model": weights, "n": 3, "rest": 4}, keyed)
    seen = {}
    for name in ("load_raw", "load_state_dict", "load_full_weights"):
        model.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in weights.items()})
        if name == "load_raw":
            fabric.load_raw(bare, model)
        elif name == "load_state_dict":
            model.load_state_dict(weights)
        else:
            state = {"model": model, "n": 0}
            assert fabric.load(keyed, state) == {"rest": 4}
            assert state["n"] == 3
        _step(fabric, model, optimizer, 0)
        seen[name] = _maximum(after, weights) if (after := _weights(fabric, model)) else 0.0
    return seen


def _frozen(fabric: Fabric, folder: Path) -> float:
    def set_up() -> Any:
        model = _model()
        model.first.requires_grad_(False)
        return fabric.setup(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))

    path = folder / f"frozen {fabric.strategy.config['zero_optimization']['stage']}"  # type: ignore[attr-defined]
    model, optimizer = set_up()
    _step(fabric, model, optimizer, 0)
    saved = _weights(fabric, model)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    other, other_optimizer = set_up()
    other.load_state_dict({name: torch.zeros_like(t) for name, t in _model().state_dict().items()})
    fabric.load(path, {"model": other, "optimizer": other_optimizer})
    return _maximum(_weights(fabric, other), saved)


def _use_files(ranks: int, folder: Path, precision: Any = None) -> Any:
    return {
        "round trip": _on_stages(ranks, _SHARED, lambda fabric: _save_and_load(fabric, folder), precision),
        "full": _on_stages(
            ranks,
            {name: {**options, "load_full_weights": True} for name, options in _STAGES.items()},
            lambda fabric: _full_weights(fabric, folder),
        ),
        "frozen": _on_stages(ranks, _SHARED, lambda fabric: _frozen(fabric, folder)),
    }


@_real
@_long
@pytest.mark.slow
@pytest.mark.usefixtures("_operators")
class TestFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        return on_ranks(2, _use_files, 2, tmp_path_factory.mktemp("checkpoints"), timeout=120)

    @pytest.mark.parametrize("stage", _SHARED)
    def test_training_goes_on_as_if_nothing_had_happened(self, seen: Any, stage: str) -> None:
        for rank in seen:
            differences = {name: value for name, value in rank["round trip"][stage].items() if ": " in name}
            assert len(differences) == 6
            assert set(differences.values()) == {0.0}, differences

    @pytest.mark.parametrize("stage", _SHARED)
    def test_values_come_back_under_names_that_deepspeed_uses_too(self, seen: Any, stage: str) -> None:
        for rank in seen:
            assert rank["round trip"][stage]["global_steps"] == 7
            left = rank["round trip"][stage]["left"]
            assert list(left) == ["x", "rank"]
            assert left["x"].equal(torch.ones(2))
            assert left["rank"] == 0  # as everywhere, rank 0's values are saved

    @pytest.mark.parametrize("stage", _SHARED)
    def test_weights_may_be_loaded_alone(self, seen: Any, stage: str) -> None:
        assert [rank["round trip"][stage]["weights alone"] for rank in seen] == [0.0, 0.0]

    @pytest.mark.parametrize("stage", _SHARED)
    def test_the_folder_is_deepspeeds(self, seen: Any, stage: str) -> None:
        files = seen[0]["round trip"][stage]["files"]
        assert files == ["checkpoint", "latest", "manifest.json", "zero_to_fp32.py", "zero_to_torch.py"]
        assert seen[0]["round trip"][stage]["consolidated"] == 0.0

    @pytest.mark.parametrize("stage", _STAGES)
    def test_full_weights_stay_after_the_next_step(self, seen: Any, stage: str) -> None:
        for rank in seen:
            assert rank["full"][stage] == {"load_raw": 0.0, "load_state_dict": 0.0, "load_full_weights": 0.0}

    @pytest.mark.parametrize("stage", _SHARED)
    def test_frozen_parameters_are_saved_too(self, seen: Any, stage: str) -> None:
        assert [rank["frozen"][stage] for rank in seen] == [0.0, 0.0]


def _save_for_other_ranks(ranks: int, folder: Path) -> Any:
    def save(fabric: Fabric) -> dict[str, Tensor]:
        model, optimizer = _set_up(fabric)
        _step(fabric, model, optimizer, 0)
        stage = fabric.strategy.config["zero_optimization"]["stage"]  # type: ignore[attr-defined]
        fabric.save(folder / str(stage), {"model": model, "optimizer": optimizer})
        return _weights(fabric, model)

    return _on_stages(ranks, {name: _STAGES[name] for name in ("2", "3")}, save)


def _load_on_other_ranks(ranks: int, folder: Path) -> Any:
    def load(fabric: Fabric) -> tuple[list[str], dict[str, Tensor]]:
        stage = fabric.strategy.config["zero_optimization"]["stage"]  # type: ignore[attr-defined]
        model, optimizer = _set_up(fabric)
        before = _weights(fabric, model)
        errors = [
            _error(lambda: fabric.load(folder / str(stage), {"model": model, "optimizer": optimizer})),
            _error(lambda: fabric.load(folder / str(5 - stage), {"model": model})),
        ]
        assert _difference(_weights(fabric, model), before) == 0
        fabric.load(folder / str(stage), {"model": model})
        return errors, _weights(fabric, model)

    return _on_stages(ranks, {name: _STAGES[name] for name in ("2", "3")}, load)


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@_real
@_long
@pytest.mark.slow
@pytest.mark.usefixtures("_operators")
def test_another_number_of_ranks_loads_the_weights_alone(tmp_path: Path) -> None:
    saved = on_ranks(2, _save_for_other_ranks, 2, tmp_path)[0]
    loaded = on_ranks(1, _load_on_other_ranks, 1, tmp_path)[0]
    for stage, ((with_optimizer, of_other_stage), weights) in loaded.items():
        assert with_optimizer.startswith("ValueError: The checkpoint's optimizer state is in 2 parts")
        assert "Leave the optimizer out of `state`" in with_optimizer
        assert of_other_stage.startswith("ValueError: The checkpoint")
        assert f"which this rank needs at stage {stage}" in of_other_stage
        assert _difference(weights, saved[stage]) == 0


# ---- the rest


def _refuse(fabric: Fabric, folder: Path) -> dict[str, str]:
    model, optimizer = _set_up(fabric)
    path = folder / f"refusals {fabric.strategy.config['zero_optimization']['stage']}"  # type: ignore[attr-defined]
    fabric.save(path, {"model": model, "optimizer": optimizer, "n": 1})
    (folder / "file").write_text("no checkpoint")
    errors = {
        "strict": _error(lambda: fabric.load(path, {"model": model, "other": 1})),
        "weights_only": _error(lambda: fabric.load(path, {"model": model}, weights_only=True)),
        "onto a file": _error(lambda: fabric.save(folder / "file", {"model": model})),
        "load_raw": _error(lambda: fabric.load_raw(folder / "file", optimizer)),
        "clip": _error(lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0)),
        "loss": _error(lambda: fabric.backward(model(torch.ones(2, 6)))),
    }
    other, other_optimizer = fabric.setup(linear := nn.Linear(1, 1), _sgd(linear))
    before = _weights(fabric, other)
    errors["several"] = _error(lambda: fabric.backward(model(torch.ones(2, 6)).sum()))
    errors["two in a file"] = _error(lambda: fabric.save(path, {"model": model, "other": other}))
    errors["another model"] = _error(lambda: fabric.load(path, {"model": other, "optimizer": other_optimizer}))
    assert _maximum(_weights(fabric, other), before) == 0
    return errors


def _schedule(fabric: Fabric) -> tuple[list[float], str]:
    model = _model()
    optimizer = _adamw(model)
    model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=StepLR(optimizer, 1, gamma=0.5))
    rates = []
    for number in range(2):
        _step(fabric, model, optimizer, number)
        rates.append(optimizer.param_groups[0]["lr"])
    scheduler.step()
    return rates, _error(lambda: _step(fabric, model, optimizer, 0))


def _play_two_models(fabric: Fabric) -> float:
    """Two models whose losses go through each other, against the same in plain torch."""

    def make() -> list[nn.Module]:
        torch.manual_seed(3)
        return [nn.Linear(2, 2), nn.Linear(2, 1)]

    (g, d), (plain_g, plain_d) = make(), make()
    plain_g_optimizer, plain_d_optimizer = _sgd(plain_g), _sgd(plain_d)
    (g, g_optimizer), (d, d_optimizer) = fabric.setup(g, _sgd(g)), fabric.setup(d, _sgd(d))
    noise = torch.ones(3, 2)
    for _ in range(3):
        d_optimizer.zero_grad(), plain_d_optimizer.zero_grad()
        fabric.backward(d(g(noise).detach()).square().mean(), model=d)
        plain_d(plain_g(noise).detach()).square().mean().backward()
        d_optimizer.step(), plain_d_optimizer.step()
        g_optimizer.zero_grad(), plain_g_optimizer.zero_grad()
        fabric.backward((1 - d(g(noise))).square().mean(), model=g)
        (1 - plain_d(plain_g(noise))).square().mean().backward()
        g_optimizer.step(), plain_g_optimizer.step()
    pairs = [(_weights(fabric, g), plain_g), (_weights(fabric, d), plain_d)]
    return max(_maximum(weights, plain.state_dict()) if weights else 0.0 for weights, plain in pairs)


def _make_inside(fabric: Fabric) -> tuple[list[int], float]:
    """Train a model that was made under `init_module`; the sizes of its parameters before set-up, and a difference."""
    torch.manual_seed(0)
    with fabric.init_module():
        made = _Model()
    sizes = [parameter.numel() for parameter in made.parameters()]
    model, optimizer = fabric.setup(made, _adamw(made))
    for number in range(5):
        _step(fabric, model, optimizer, number)
    weights = _weights(fabric, model)
    return sizes, _difference(weights, _reference(fabric.world_size, _mean)) if weights else 0.0


def _infer(fabric: Fabric) -> tuple[float, str, str]:
    model = fabric.setup_module(_model())
    batch = torch.ones(2, 6)
    output = model(batch)
    return (
        (output - _model()(batch)).abs().max().item(),
        str(output.dtype),
        _error(lambda: fabric.backward(output.sum(), model=model)),
    )


def _call_methods(fabric: Fabric) -> float:
    model, optimizer = _set_up(fabric)
    for step in _batches():
        for batch in step:
            fabric.backward(model.training_step(batch[fabric.global_rank]), model=model)
        optimizer.step()
    weights = _weights(fabric, model)
    return _difference(weights, _reference(fabric.world_size, _mean)) if weights else 0.0


def _close_over(fabric: Fabric) -> tuple[float, float]:
    model, optimizer = _set_up(fabric)
    batch = _batches()[0, 0, fabric.global_rank]

    def closure() -> Tensor:
        loss = _mean(model, batch)
        fabric.backward(loss, model=model)
        return loss

    return optimizer.step(closure).item(), _mean(_model(), batch).item()


def _do_the_rest(ranks: int, folder: Path) -> Any:
    checks = {
        "refusals": lambda fabric: _refuse(fabric, folder),
        "schedule": _schedule,
        "two models": _play_two_models,
        "made inside": _make_inside,
        "inference": _infer,
        "methods": _call_methods,
        "closure": _close_over,
    }

    def check_all(fabric: Fabric) -> dict[str, Any]:
        results = {}
        for name, check in checks.items():
            fabric.strategy._engines.clear()  # type: ignore[attr-defined]
            results[name] = check(fabric)
        return results

    return _on_stages(ranks, {name: _STAGES[name] for name in ("1", "2", "3", "3 offloaded")}, check_all)


@_real
@_long
@pytest.mark.slow
@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("stage", ["1", "2", "3", "3 offloaded"])
class TestEngine:
    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        """By rank, stage and check: what came out."""
        return on_ranks(2, _do_the_rest, 2, tmp_path_factory.mktemp("rest"), timeout=120)

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("strict", "KeyError: \"The requested state contains a key 'other' that does not exist"),
            ("weights_only", "TypeError: weights_only=True cannot be honoured"),
            ("onto a file", "NotADirectoryError: DeepSpeed saves a folder, but"),
            ("load_raw", "NotImplementedError: DeepSpeed shares the optimizer's state out"),
            ("clip", "NotImplementedError: DeepSpeed clips gradients in its own step"),
            ("loss", "ValueError: DeepSpeed's backward starts from a loss of one element"),
            ("several", "RuntimeError: 2 models were set up with optimizers"),
            ("two in a file", "ValueError: DeepSpeed can save one model that was set up"),
            ("another model", "RuntimeError: Error(s) in loading state_dict for Linear"),
        ],
    )
    def test_refusals(self, seen: Any, stage: str, what: str, message: str) -> None:
        for rank in seen:
            assert rank[stage]["refusals"][what].startswith(message)

    def test_the_engine_steps_the_scheduler_and_nobody_else(self, seen: Any, stage: str) -> None:
        for rank in seen:
            rates, error = rank[stage]["schedule"]
            assert rates == [0.005, 0.0025]
            assert error.startswith("RuntimeError: StepLR was stepped twice")

    def test_losses_may_go_through_several_models(self, seen: Any, stage: str) -> None:
        assert max(rank[stage]["two models"] for rank in seen) < 1e-7

    def test_models_made_inside_are_initialised_as_outside(self, seen: Any, stage: str) -> None:
        for rank in seen:
            sizes, difference = rank[stage]["made inside"]
            assert difference < 1e-7
            assert (sizes == [0] * 6) if stage.startswith("3") else (sizes == [48, 8, 24, 3, 24, 3])

    def test_a_module_alone_is_for_inference(self, seen: Any, stage: str) -> None:
        for rank in seen:
            difference, dtype, error = rank[stage]["inference"]
            assert (difference, dtype) == (0.0, "torch.float32")
            assert error.startswith("RuntimeError: _Model was set up without an optimizer, which is for inference")

    def test_methods_go_through_the_engine(self, seen: Any, stage: str) -> None:
        assert max(rank[stage]["methods"] for rank in seen) < 1e-7

    def test_a_closure_gives_its_loss(self, seen: Any, stage: str) -> None:
        for rank in seen:
            loss, expected = rank[stage]["closure"]
            assert loss == pytest.approx(expected)


# ---- precisions and configurations


def _train_in_16_bits(ranks: int, precision: str) -> Any:
    def train(fabric: Fabric) -> tuple[str, str, dict[str, Tensor]]:
        model, optimizer = _set_up(fabric)
        output = model(torch.ones(1, 6))
        for number in range(5):
            _step(fabric, model, optimizer, number)
        return str(output.dtype), str(next(model.parameters()).dtype), _weights(fabric, model)

    return _on_stages(ranks, {name: _STAGES[name] for name in ("1", "2", "3", "3 offloaded")}, train, precision)


@_real
@_long
@pytest.mark.slow
@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_training_in_16_bits_is_close_to_that_in_32(precision: str) -> None:
    for output, weight, weights in on_ranks(2, _train_in_16_bits, 2, precision)[0].values():
        assert (output, weight) == ("torch.float32", "torch.bfloat16")
        assert 1e-5 < _difference(weights, _reference(2, _mean)) < 1e-2


_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "clips": {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.01},
    "counts": {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2},
    "overlaps": {"zero_optimization": {"stage": 1, "overlap_comm": True}, "zero_allow_untested_optimizer": True},
}


def _configured(ranks: int) -> Any:
    seen: dict[str, Any] = {}
    for name, config in _CONFIGURATIONS.items():
        fabric = _fabric(ranks, config={"zero_allow_untested_optimizer": True, **config})
        model, optimizer = _set_up(fabric, _sgd)
        if name == "clips":
            for number in range(5):
                _step(fabric, model, optimizer, number)
            seen[name] = _weights(fabric, model)
        else:
            fabric.backward(_mean(model, torch.ones(1, 6)))
            optimizer.zero_grad()
            fabric.backward(_mean(model, _batches()[0, 0, fabric.global_rank]))
            seen[f"{name}: second backward"] = _error(lambda m=model, f=fabric: f.backward(_mean(m, torch.ones(1, 6))))
            optimizer.step()
            fabric.backward(_mean(model, _batches()[0, 1, fabric.global_rank]))
            optimizer.step()
            seen[name] = _weights(fabric, model)
        fabric.strategy.teardown()
    return seen


def _clipped_reference(ranks: int) -> dict[str, Tensor]:
    model = _model()
    optimizer = _sgd(model)
    for step in _batches():
        for batch in step:
            for rank in range(ranks):
                (_mean(model, batch[rank]) / ranks).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _counted_reference(ranks: int, updates: int) -> dict[str, Tensor]:
    """Two backwards and one update, the mean of both; or two updates."""
    model = _model()
    optimizer = _sgd(model)
    for batch in _batches()[0]:
        for rank in range(ranks):
            (_mean(model, batch[rank]) / ranks / (1 if updates == 2 else 2)).backward()
        if updates == 2:
            optimizer.step()
            optimizer.zero_grad()
    optimizer.step()
    return model.state_dict()


@_real
@_long
@pytest.mark.slow
@pytest.mark.usefixtures("_operators")
class TestConfigurations:
    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls) -> Any:
        return on_ranks(2, _configured, 2)[0]

    def test_gradients_are_clipped_as_it_says(self, seen: Any) -> None:
        assert _difference(seen["clips"], _clipped_reference(2)) < 1e-6

    def test_where_it_counts_each_backward_has_its_step(self, seen: Any) -> None:
        assert (
            "RuntimeError: The DeepSpeed configuration says gradient_accumulation_steps=2"
            in (seen["counts: second backward"])
        )
        assert _difference(seen["counts"], _counted_reference(2, updates=1)) < 1e-7

    def test_where_it_overlaps_at_stage_1_too(self, seen: Any) -> None:
        assert "overlap_comm=true at a stage below 2" in seen["overlaps: second backward"]
        assert _difference(seen["overlaps"], _counted_reference(2, updates=2)) < 1e-7


def _variables_after(variables: list[str]) -> list[dict[str, str | None]]:
    """The variables before, during and after the life of a strategy whose launcher sets none."""
    for name in variables:
        os.environ.pop(name, None)
    seen = [{name: os.environ.get(name) for name in variables}]
    strategy = DeepSpeedStrategy(
        stage=3, parallel_devices=[CPU], cluster_environment=_Elsewhere(), accelerator=CPUAccelerator()
    )
    strategy.setup_environment()
    module = _model()
    engine, (optimizer,), _ = strategy.setup_module_and_optimizers(module, [_adamw(module)])
    for _ in range(2):
        strategy.backward(engine(torch.ones(1, 6)).sum(), None)
        strategy.optimizer_step(optimizer)
    seen.append({name: os.environ.get(name) for name in variables})
    strategy.teardown()
    return [*seen, {name: os.environ.get(name) for name in variables}]


class _Elsewhere(LightningEnvironment):
    """A cluster that says who a process is by other means than these variables."""

    def local_rank(self) -> int:
        return 0


@_real
@_long
@pytest.mark.slow
@pytest.mark.usefixtures("_operators")
def test_variables_tell_deepspeed_who_it_is_until_teardown() -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    before, during, after = on_ranks(1, _variables_after, names)[0]
    assert before == after == dict.fromkeys(names)
    assert during == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
