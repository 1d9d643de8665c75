"""What every strategy keeps: the public contract, over all registered ones; and the contract sees who breaks it."""

import importlib.util
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning.fabric.checkpoint.saving import Prepared
from lightning.fabric.strategies import STRATEGY_REGISTRY, Strategy
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.testing import RankError, preload
from lightning.fabric.testing.contract import STRATEGY_CHECKS, Trial, check_strategy, promise

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

NAMES = STRATEGY_REGISTRY.available_strategies()
# DeepSpeed has optimizers and collectives of its own, and compiles parts of itself the first time.
OPTIONS: dict[str, dict[str, Any]] = {"deepspeed": {"tolerance_alone": 1e-6, "timeout": 300.0}}


def _skip_unless_here(name: str) -> None:
    """Skip a strategy whose package or hardware this machine has not got."""
    entry = STRATEGY_REGISTRY.entry(name)
    if entry.runs_on is not None and "cpu" not in entry.runs_on:
        pytest.skip(f"{name} runs on {', '.join(entry.runs_on)} only")
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip(f"{name} needs the package deepspeed")
    if name.endswith("nvme"):
        pytest.skip(f"{name} needs an NVMe disk, and libaio")


def _names() -> list[Any]:
    """All names; those whose package takes seconds to import are slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name.startswith("deepspeed") else name for name in NAMES]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", _names())
def test_the_contract_is_kept(name: str) -> None:
    _skip_unless_here(name)
    check_strategy(name, **OPTIONS.get(name.partition("_")[0], {}))


@pytest.mark.parametrize("name", _names())
def test_the_table_and_the_classes_agree(name: str) -> None:
    _skip_unless_here(name)
    entry, strategy = STRATEGY_REGISTRY.entry(name), STRATEGY_REGISTRY.get(name)
    assert (strategy.start_method, type(strategy).runs_on) == (entry.start_method, entry.runs_on)


# ---- strategies that have no name ------------------------------------------------------------------------------------


def _split_layers(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


def _tensor_parallel() -> Strategy:
    from lightning.fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(_split_layers)


def _data_parallel() -> Strategy:
    from lightning.fabric.strategies import ModelParallelStrategy

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return ModelParallelStrategy(_shard, data_parallel_size=ranks, tensor_parallel_size=1)


def _both() -> Strategy:
    from lightning.fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(
        lambda model, mesh: _shard(_split_layers(model, mesh), mesh), data_parallel_size=2, tensor_parallel_size=2
    )


def test_tensor_parallel_keeps_the_contract() -> None:
    check_strategy(_tensor_parallel)


def test_data_parallel_over_a_mesh_keeps_the_contract() -> None:
    check_strategy(_data_parallel)


def test_tensor_and_data_parallel_keep_the_contract() -> None:
    check_strategy(_both, processes=4, alone=False)


# ---- a user's own ----------------------------------------------------------------------------------------------------


class AveragedAfterBackward(DDPStrategy):
    """No wrapper: gradients are averaged one by one, and ranks start from rank 0's weights."""

    def __init__(self) -> None:
        super().__init__()
        self._backward_sync_control = None  # it always synchronises
        self._pending: set[Tensor] = set()

    def setup_module(self, module: nn.Module) -> nn.Module:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)
        return module

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_pre_hook(lambda *_: self._average(optimizer))
        return optimizer

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("Gradients are averaged in the step, so they cannot be clipped before it.")

    def clip_gradients_value(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Gradients are averaged in the step, so they cannot be clipped before it.")

    def _average(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)


@pytest.fixture
def registered() -> Any:
    STRATEGY_REGISTRY.register("averaged", AveragedAfterBackward)
    yield "averaged"
    STRATEGY_REGISTRY.remove("averaged")


def test_a_strategy_that_a_user_registers_keeps_the_contract(registered: str) -> None:
    check_strategy(registered)


# ---- who breaks a promise is told so ---------------------------------------------------------------------------------


class _KeepsGradientsApart(DDPStrategy):
    def setup_module(self, module: nn.Module) -> nn.Module:
        wrapped = super().setup_module(module)
        wrapped.register_comm_hook(None, lambda _, bucket: _done(bucket.buffer()))
        return wrapped


def _done(value: Tensor) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(value)
    return future


class _RefusesJointSetUp(DDPStrategy):
    def setup_module_and_optimizers(self, *_: Any) -> Any:
        raise RuntimeError("not like that")


class _SetsUpJointlyOtherwise(DDPStrategy):
    def setup_module_and_optimizers(self, module: nn.Module, optimizers: list[Any], scheduler: Any = None) -> Any:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.2
        return super().setup_module_and_optimizers(module, optimizers, scheduler)


class _ShowsTheWrapper(DDPStrategy):
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        return {f"module.{name}": value for name, value in super().get_module_state_dict(module).items()}


class _MakesAnOptimizerOfItsOwn(DDPStrategy):
    def setup_optimizer(self, optimizer: Any) -> Any:
        return type(optimizer)([p for group in optimizer.param_groups for p in group["params"]], lr=0.1, momentum=0.9)


class _ForgetsRates(DDPStrategy):
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = group.get("initial_lr", group["lr"])  # forgets what was set since
        return super().optimizer_step(optimizer, **kwargs)


class _DropsFirstMicroBatches(DDPStrategy):
    def backward(self, tensor: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        module.zero_grad()
        super().backward(tensor, module, *args, **kwargs)


class _ClipsEachForItself(DDPStrategy):
    def clip_gradients_norm(self, module: Any, optimizer: Any, max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                norm = nn.utils.clip_grad_norm_(parameter, max_norm)
        return norm


class _LetsInfinityThrough(DDPStrategy):
    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().clip_gradients_norm(*args, **{**kwargs, "error_if_nonfinite": False})


class _DoesNotClip(DDPStrategy):
    def clip_gradients_value(self, *args: Any, **kwargs: Any) -> None:
        pass


class _SumsForMean(DDPStrategy):
    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return super().all_reduce(tensor, group, "sum")


class _CutsTheGraph(DDPStrategy):
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return super().all_gather(tensor.detach(), group).requires_grad_()


class _DealsEveryoneTheSame(DDPStrategy):
    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": 0}


class _KeepsErrorsToItself(DDPStrategy):
    def raise_on_all(self, error: BaseException | None, doing: str) -> None:
        if error is not None:
            raise error


class _ForgetsOptimizers(DDPStrategy):
    def get_optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {**super().get_optimizer_state(optimizer), "state": {}}


class _SavesWhatIsThereLater(DDPStrategy):
    def _prepare_checkpoint(self, *args: Any) -> Prepared:
        prepared = super()._prepare_checkpoint(*args)
        write = lambda staged: (time.sleep(0.5), prepared.write(staged))[1]
        return replace(prepared, write=write, detach=lambda copy: None)


class _LoadsAnything(DDPStrategy):
    def opened_checkpoint(self, path: Any, digests: bool) -> Any:
        return nullcontext(path)


class _FillsWhatIsEmpty(DDPStrategy):
    def load_module_state_dict(self, module: nn.Module, state_dict: Any, strict: bool = True) -> None:
        super().load_module_state_dict(module, {name: value * 0 for name, value in state_dict.items()})


class _IsNeverStrict(DDPStrategy):
    def load_checkpoint(self, path: Any, state: Any = None, strict: bool = True, weights_only: Any = None) -> Any:
        return super().load_checkpoint(path, state, False, weights_only)


class _DoesNotFilter(DDPStrategy):
    def save_checkpoint(self, path: Any, state: Any, storage_options: Any = None, filter: Any = None) -> None:
        super().save_checkpoint(path, state, storage_options)


class _MakesTensorsElsewhere(DDPStrategy):
    def tensor_init_context(self) -> Any:
        return torch.device("meta")


class _StaysInTheGroup(DDPStrategy):
    def teardown(self) -> None:
        pass


BREAKERS: dict[type[Strategy], tuple[str, str]] = {
    _KeepsGradientsApart: ("trains_like_torch", "training has losses other than expected"),
    _RefusesJointSetUp: ("sets_up_jointly_and_separately_alike", "is refused without naming `setup_module`"),
    _SetsUpJointlyOtherwise: ("sets_up_jointly_and_separately_alike", "depends on whether set-up was joint"),
    _ShowsTheWrapper: ("keeps_the_names_of_the_model", "other names or shapes: {'module.0.weight'"),
    _MakesAnOptimizerOfItsOwn: ("the_optimizer_goes_on_updating_the_model", "learning rates of the optimizer's groups"),
    _ForgetsRates: ("the_optimizer_goes_on_updating_the_model", "set to 0 after set-up has no effect"),
    _MakesTensorsElsewhere: ("made_inside_init_module_is_where_it_belongs", "makes tensors on meta, not on cpu"),
    _DropsFirstMicroBatches: ("accumulates_gradients", "after accumulation it computes outputs other"),
    _ClipsEachForItself: ("clips_by_norm_like_torch", "clipping by the 2-norm returns norms other"),
    _LetsInfinityThrough: ("tells_of_a_norm_that_is_not_finite", "not finite is let through"),
    _DoesNotClip: ("clips_by_value_like_torch", "after a bounded step it computes outputs other"),
    _SumsForMean: ("collectives_combine_all_ranks", "`all_reduce` by 'mean' gives other"),
    _CutsTheGraph: ("gradients_flow_through_all_gather", "no gradient flows through"),
    _DealsEveryoneTheSame: ("ranks_share_out_the_data", "cut into 2 parts, of which the ranks get [0, 0]"),
    _KeepsErrorsToItself: ("a_failure_is_raised_on_all_ranks", "does not hear of an error that another rank has"),
    _ForgetsOptimizers: ("goes_on_from_a_checkpoint", "ends with other weights than training that went on"),
    _SavesWhatIsThereLater: ("saves_while_training_goes_on", "is not what was there when `save` was called"),
    _LoadsAnything: ("refuses_a_checkpoint_that_is_damaged", "of which a byte has changed is loaded"),
    _FillsWhatIsEmpty: ("loads_into_a_model_that_was_made_empty", "has other weights than the checkpoint"),
    _IsNeverStrict: ("misses_a_key_that_is_not_in_the_checkpoint", "is passed over by `load(strict=True)`"),
    _DoesNotFilter: ("a_filter_leaves_entries_out", "is not missed by `load(strict=True)`"),
}
CHECKS = {check.__name__: check for check in STRATEGY_CHECKS}


@pytest.mark.parametrize("strategy", BREAKERS, ids=lambda strategy: strategy.__name__)
def test_a_broken_promise_is_told_in_a_sentence(strategy: type[Strategy]) -> None:
    check, sentence = BREAKERS[strategy]
    with pytest.raises(RankError) as raised:
        check_strategy(strategy, checks=[CHECKS[check]], alone=False)
    assert f"breaks a promise, {check}: " in str(raised.value)
    assert sentence in str(raised.value)


def test_each_check_has_somebody_who_breaks_it() -> None:
    untested = {"refuses_to_set_up_twice"}  # Fabric keeps that promise, whatever the strategy
    assert CHECKS.keys() - {check for check, _ in BREAKERS.values()} == untested


def test_a_group_that_is_left_behind_is_told() -> None:
    with pytest.raises(RankError, match="leaves its process group behind at `teardown`"):
        check_strategy(_StaysInTheGroup, checks=[])


# ---- how the checks are run ------------------------------------------------------------------------------------------


def _world_is_one(trial: Trial) -> None:
    promise(trial.fabric.world_size == 1, "there is more than one process")


def test_a_strategy_of_one_process_is_checked_in_one_alone() -> None:
    check_strategy("single_device", processes=4, checks=[_world_is_one])
    with pytest.raises(RankError, match="DDPStrategy on rank . of 2 breaks .* there is more than one process"):
        check_strategy("ddp", checks=[_world_is_one])


def test_processes_that_cannot_share_out_the_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="processes=3 cannot share out batches of 8"):
        check_strategy("ddp", processes=3)


def test_differences_within_the_tolerance_are_let_through() -> None:
    with pytest.raises(RankError, match="allowed is 1e-06"):
        check_strategy(_KeepsGradientsApart, checks=[CHECKS["clips_by_value_like_torch"]], alone=False)
    check_strategy(_KeepsGradientsApart, checks=[CHECKS["clips_by_value_like_torch"]], alone=False, tolerance=1.0)
