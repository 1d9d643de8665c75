"""DDP: its options, its processes, and what two real ranks make of them."""

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.accelerators.cuda import CUDAAccelerator
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.testing import on_ranks

CPU = torch.device("cpu")


def _strategy(processes: int = 1, **kwargs: Any) -> DDPStrategy:
    kwargs.setdefault("timeout", timedelta(seconds=20))
    return DDPStrategy(CPUAccelerator(), [CPU] * processes, LightningEnvironment(), **kwargs)


def _joined(processes: int, **kwargs: Any) -> DDPStrategy:
    strategy = _strategy(processes, **kwargs)
    strategy.setup_environment()
    return strategy


class TestOptions:
    def test_a_misspelt_one_is_known_at_once(self) -> None:
        with pytest.raises(TypeError, match="no option 'find_unused_parameter'. Did you mean 'find_unused_parameters'"):
            DDPStrategy(find_unused_parameter=True)

    def test_one_that_resembles_nothing_lists_all(self) -> None:
        with pytest.raises(TypeError, match=r"no option 'xyzzy'\. Known: .*ddp_comm_hook.*static_graph"):
            DDPStrategy(xyzzy=1)

    @pytest.mark.parametrize("name", ["device_ids", "output_device", "module"])
    def test_what_follows_from_devices_is_refused(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"`{name}` cannot be passed"):
            DDPStrategy(**{name: None})

    @pytest.mark.parametrize("name", ["ddp_comm_state", "ddp_comm_wrapper"])
    def test_what_belongs_to_a_hook_needs_one(self, name: str) -> None:
        with pytest.raises(TypeError, match="do nothing without a hook"):
            DDPStrategy(**{name: object()})

    def test_no_hook_is_no_hook(self) -> None:
        DDPStrategy(ddp_comm_hook=None, ddp_comm_state=None)

    def test_they_reach_ddp(self) -> None:
        strategy = _joined(1, static_graph=True, gradient_as_bucket_view=True, bucket_cap_mb=1)
        module = strategy.setup_module(nn.Linear(1, 1))
        assert isinstance(module, DistributedDataParallel)
        assert (module.static_graph, module.gradient_as_bucket_view, module.bucket_bytes_cap) == (True, True, 2**20)
        strategy.teardown()


class TestProcesses:
    def test_popen_runs_the_script_again(self) -> None:
        strategy = _strategy(2)
        strategy._configure_launcher()
        assert isinstance(strategy.launcher, _SubprocessScriptLauncher)

    @pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
    def test_the_others_run_a_function(self, start_method: Any) -> None:
        strategy = _strategy(2, start_method=start_method)
        strategy._configure_launcher()
        assert isinstance(strategy.launcher, _MultiProcessingLauncher)
        assert strategy.start_method == start_method

    def test_other_methods_are_unknown(self) -> None:
        with pytest.raises(ValueError, match=r"start_method must be one of \('popen', .* got 'thread'"):
            DDPStrategy(start_method="thread")

    def test_a_launcher_needs_the_environment(self) -> None:
        with pytest.raises(RuntimeError, match="cluster environment"):
            DDPStrategy()._configure_launcher()

    def test_it_pickles_with_its_options(self) -> None:
        strategy = _strategy(2, start_method="spawn", ddp_comm_hook=default_hooks.fp16_compress_hook)
        strategy._configure_launcher()
        copy = pickle.loads(pickle.dumps(strategy))
        assert copy._ddp == strategy._ddp

    def test_the_backend_is_the_one_asked_for(self) -> None:
        assert _strategy(process_group_backend="mpi").process_group_backend == "mpi"


class TestOneRank:
    @pytest.fixture
    def strategy(self) -> Any:
        strategy = _joined(1)
        yield strategy
        strategy.teardown()

    def test_state_has_the_users_names(self, strategy: DDPStrategy) -> None:
        module = strategy.setup_module(nn.Linear(1, 1))
        state = strategy.get_module_state_dict(module)
        assert state.keys() == {"weight", "bias"}
        strategy.load_module_state_dict(module, {name: torch.full_like(t, 3.0) for name, t in state.items()})
        assert state["weight"].item() == 3.0

    def test_a_module_in_which_nothing_is_trained_needs_no_replicas(self, strategy: DDPStrategy) -> None:
        for module in (nn.Identity(), nn.Linear(1, 1).requires_grad_(False)):
            assert strategy.setup_module(module) is module
            with strategy._backward_sync_control.no_backward_sync(module, enabled=True):
                pass

    def test_gradients_that_are_not_finite_have_the_users_names(self, strategy: DDPStrategy) -> None:
        module = strategy.setup_module(nn.Linear(1, 1))
        module.module.bias.grad = torch.full((1,), float("inf"))
        with pytest.raises(RuntimeError, match="those of: bias"):
            strategy.clip_gradients_norm(module, torch.optim.SGD(module.parameters(), 1.0), max_norm=1.0)

    def test_synchronisation_is_left_out_only_of_what_was_set_up(self, strategy: DDPStrategy) -> None:
        control = strategy._backward_sync_control
        with pytest.raises(TypeError, match="needs the module that `setup_module` returned, but got Linear"):
            control.no_backward_sync(nn.Linear(1, 1), enabled=True)
        with control.no_backward_sync(nn.Linear(1, 1), enabled=False):
            pass

    def test_synchronisation_is_left_out_inside_alone(self, strategy: DDPStrategy) -> None:
        module = strategy.setup_module(nn.Linear(1, 1))
        compiled = torch.compile(module, backend="eager")
        for handle in (module, compiled):
            with strategy._backward_sync_control.no_backward_sync(handle, enabled=True):
                assert module.require_backward_grad_sync is False
            assert module.require_backward_grad_sync is True

    def test_a_module_left_on_another_device_is_not_bound_to_this_one(
        self, strategy: DDPStrategy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(
            "lightning.fabric.strategies.ddp.DistributedDataParallel",
            lambda module, device_ids, **_: seen.append(device_ids) or module,
        )
        strategy.parallel_devices = [torch.device("meta")]
        strategy.setup_module(nn.Linear(1, 1))
        strategy.setup_module(nn.Linear(1, 1, device="meta"))
        assert seen == [None, [None]]


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _gradient_of_ranks(**options: Any) -> list[float]:
    """The gradient of ``w * rank``, and the weight that DDP starts with where each rank had its own."""
    strategy = _joined(2, **options)
    model = nn.Linear(4, 1, bias=False)
    nn.init.constant_(model.weight, float(strategy.global_rank))
    module = strategy.setup_module(model)
    for _ in range(3):
        model.weight.grad = None
        strategy.backward(module(torch.full((1, 4), float(strategy.global_rank))).sum(), module)
    assert model.weight.grad is not None
    return [model.weight.grad.mean().item(), model.weight.mean().item()]


def _with_hooks() -> dict[str, list[float]]:
    joined = _joined(2)
    hooks: dict[str, dict[str, Any]] = {
        "none": {},
        "bf16": {"ddp_comm_hook": default_hooks.bf16_compress_hook},
        "fp16": {"ddp_comm_hook": default_hooks.fp16_compress_hook},
        "bf16 around allreduce": {
            "ddp_comm_hook": default_hooks.allreduce_hook,
            "ddp_comm_wrapper": default_hooks.bf16_compress_wrapper,
        },
        "powerSGD": {
            "ddp_comm_hook": powerSGD_hook.powerSGD_hook,
            "ddp_comm_state": powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2),
        },
    }
    results = {name: _gradient_of_ranks(**options) for name, options in hooks.items()}
    joined.teardown()
    return results


def test_hooks_average_on_gloo() -> None:
    for results in on_ranks(2, _with_hooks):
        assert list(results) == ["none", "bf16", "fp16", "bf16 around allreduce", "powerSGD"]
        assert all(result == [0.5, 0.0] for result in results.values()), results


def _frozen_weights() -> float:
    strategy = _joined(2)
    module = nn.Linear(1, 1).requires_grad_(False)
    nn.init.constant_(module.weight, strategy.global_rank + 1.0)
    strategy.setup_module(module)
    strategy.teardown()
    return float(module.weight)


def test_a_frozen_module_is_the_same_on_all_ranks() -> None:
    assert on_ranks(2, _frozen_weights) == [1.0, 1.0]


def _sync_inside_and_outside() -> list[float]:
    """Gradients of ``w * (rank + 1)``: one step without synchronisation, then one with."""
    strategy = _joined(2)
    model = nn.Linear(1, 1, bias=False)
    module = strategy.setup_module(model)
    batch = torch.full((1, 1), strategy.global_rank + 1.0)
    seen = []
    for enabled in (True, False):
        with strategy._backward_sync_control.no_backward_sync(module, enabled):
            strategy.backward(module(batch).sum(), module)
        assert model.weight.grad is not None
        seen.append(float(model.weight.grad))
    strategy.teardown()
    return seen


def test_gradients_accumulate_on_each_rank_until_they_are_averaged() -> None:
    # alone: 1 and 2; then the mean of 1 + 1 and 2 + 2
    assert on_ranks(2, _sync_inside_and_outside) == [[1.0, 3.0], [2.0, 3.0]]


def _failures() -> list[str]:
    strategy = _joined(2)
    texts = []
    for failing_rank in (None, 1):
        error = OSError("disk full") if strategy.global_rank == failing_rank else None
        try:
            strategy.raise_on_all(error, "saving")
            texts.append("fine")
        except (OSError, RuntimeError) as caught:
            texts.append(f"{type(caught).__name__}: {caught}")
    strategy.teardown()
    return texts


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    assert on_ranks(2, _failures) == [
        ["fine", "RuntimeError: Rank 1 failed while saving, so no rank goes on. OSError: disk full"],
        ["fine", "OSError: disk full"],
    ]


def _broadcast_many_bytes() -> list[float]:
    strategy = _joined(2)
    sent = {"tensor": torch.full((2**21,), float(strategy.global_rank)), "rank": strategy.global_rank}
    got = strategy.broadcast(sent, src=1)
    assert (got is sent) == (strategy.global_rank == 1)
    strategy.teardown()
    assert not dist.is_initialized()
    return [float(got["tensor"].mean()), float(got["rank"])]


def test_broadcast_carries_large_tensors() -> None:
    assert on_ranks(2, _broadcast_many_bytes) == [[1.0, 1.0]] * 2


# ---- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_one_gpu(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    strategy = DDPStrategy(CUDAAccelerator(), [device], LightningEnvironment())
    strategy.setup_environment()
    assert dist.get_backend() == "nccl"
    model = nn.Linear(4, 4)
    strategy.module_to_device(model)
    module, [optimizer], _ = strategy.setup_module_and_optimizers(model, [torch.optim.AdamW(model.parameters())])
    assert module.device_ids == [0]
    strategy.backward(module(torch.ones(2, 4, device=device)).sum(), module)
    assert strategy.clip_gradients_norm(module, optimizer, max_norm=0.1).device == device
    strategy.optimizer_step(optimizer)
    strategy.barrier()
    assert strategy.reduce_boolean_decision(True)
    assert strategy.all_gather(torch.ones(2, device=device)).shape == (1, 2)
    strategy.raise_on_all(None, "testing")

    strategy.save_checkpoint(tmp_path / "x.pt", {"model": module, "optimizer": optimizer})
    expected = optimizer.state[model.weight]["exp_avg"].clone()
    optimizer.state[model.weight]["exp_avg"].zero_()
    strategy.load_checkpoint(tmp_path / "x.pt", {"model": module, "optimizer": optimizer})
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], expected)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    with strategy.module_init_context(empty_init=True):
        assert nn.Linear(1, 1).weight.device == device
    strategy.teardown()
