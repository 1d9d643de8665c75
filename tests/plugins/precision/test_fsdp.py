"""The precisions of FSDP: dtypes as data, and a gradient scaler about which ranks agree."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp import MixedPrecision as TorchMixedPrecision

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "16-true": (F16, F16, F16),
    "bf16-true": (BF16, BF16, BF16),
    "16-mixed": (F32, F16, F16),
    "bf16-mixed": (F32, BF16, BF16),
    "32-true": (F32, F32, F32),
    "64-true": (F64, F64, F64),
}


class TestArguments:
    @pytest.mark.parametrize("name", DTYPES)
    def test_dtypes_by_name(self, name: str) -> None:
        precision = FSDPPrecision(name)
        param, reduce, buffer = DTYPES[name]
        assert precision.precision == name
        assert (precision.dtypes.param, precision.dtypes.reduce, precision.dtypes.buffer) == (param, reduce, buffer)
        assert precision.mixed_precision_config == TorchMixedPrecision(param, reduce, buffer)

    @pytest.mark.parametrize("name", ["bf16-mixt", "transformer-engine", 16, None])
    def test_other_names_are_unknown(self, name: Any) -> None:
        with pytest.raises(
            ValueError, match=f"cannot compute in precision={name!r}.*It can in: '16-true', 'bf16-true'"
        ):
            FSDPPrecision(name)

    @pytest.mark.parametrize("name", [name for name in DTYPES if name != "16-mixed"])
    def test_a_scaler_is_for_16_mixed_alone(self, name: str) -> None:
        scaler = GradScaler("cpu")
        with pytest.raises(ValueError, match=f"precision='{name}' needs no scaler"):
            FSDPPrecision(name, scaler)
        with pytest.raises(ValueError, match=f"precision='{name}' needs no scaler"):
            FSDPPrecision(name).scaler = scaler
        assert FSDPPrecision(name).scaler is None
        assert FSDPPrecision("16-mixed", scaler).scaler is scaler

    def test_the_device_is_told_by_the_strategy(self) -> None:
        scaler = GradScaler("cpu", init_scale=2.0)
        precision = FSDPPrecision("16-mixed", scaler)
        precision.computes_on("cpu")
        assert precision.scaler is scaler
        with precision.forward_context():
            assert torch.is_autocast_enabled("cpu")


class TestForward:
    @pytest.mark.parametrize("name", DTYPES)
    def test_inputs_and_outputs(self, name: str) -> None:
        precision = FSDPPrecision(name)
        whole = torch.ones(1, dtype=torch.int32)
        data = precision.convert_input({"x": [torch.ones(1, dtype=F64)], "n": whole})
        assert data["n"] is whole
        assert data["x"][0].dtype is (F64 if name == "32-true" else DTYPES[name][0])
        assert precision.convert_output(torch.ones(1, dtype=BF16)).dtype is (BF16 if name == "32-true" else F32)

    @pytest.mark.parametrize("name", DTYPES)
    def test_what_is_made(self, name: str) -> None:
        precision = FSDPPrecision(name)
        with precision.tensor_init_context():
            assert torch.ones(1).dtype is DTYPES[name][0]
        with precision.module_init_context():
            assert nn.Linear(1, 1).weight.dtype is DTYPES[name][0]
        assert precision.convert_module(nn.Linear(1, 1)).weight.dtype is DTYPES[name][0]


def _scaled(sharding_strategy: str) -> dict[str, Any]:
    linear = nn.Linear(3, 5)  # ranks hold parts of different size
    kept = nn.Linear(5, 1)
    for parameter in (*linear.parameters(), *kept.parameters()):
        nn.init.constant_(parameter, 0.5)
    precision = FSDPPrecision("16-mixed", GradScaler("cpu", init_scale=16.0, growth_interval=2))
    strategy = FSDPStrategy(
        timeout=timedelta(seconds=20),
        precision=precision,
        sharding_strategy=sharding_strategy,
        ignored_modules=[kept],  # whole, beside what is shared out
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model, optimizer = fabric.setup(
        module := nn.Sequential(linear, kept), torch.optim.SGD(module.parameters(), lr=0.03)
    )
    seen: dict[str, Any] = {"scales": [], "norms": [], "moved": []}
    for infinite_on in (None, 0, 1, None, None):
        before = linear.weight.to_local().clone()
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 3)).mean())
        if fabric.global_rank == infinite_on:
            gradient = linear.weight.grad if sharding_strategy == "FULL_SHARD" else kept.weight.grad
            getattr(gradient, "_local_tensor", gradient)[0] = float("inf")
        else:
            norm = fabric.clip_gradients(model, optimizer, max_norm=1e9, error_if_nonfinite=False)
            seen["norms"].append(norm.item())
        if fabric.global_rank == infinite_on:
            fabric.clip_gradients(model, optimizer, max_norm=1e9, error_if_nonfinite=False)
        optimizer.step()
        seen["moved"].append(not torch.equal(before, linear.weight.to_local()))
        seen["scales"].append(precision.scaler.get_scale())
    state = precision.state_dict()
    other = FSDPPrecision("16-mixed", GradScaler("cpu"))
    other.load_state_dict(state)
    seen["restored"] = other.scaler.get_scale()
    fabric.strategy.teardown()
    return seen


@pytest.mark.parametrize("sharding_strategy", ["FULL_SHARD", "NO_SHARD"])
def test_ranks_step_together_or_not_at_all(sharding_strategy: str) -> None:
    first, second = on_ranks(2, _scaled, sharding_strategy)
    assert first["moved"] == second["moved"] == [True, False, False, True, True]
    assert first["scales"] == second["scales"] == [16.0, 8.0, 4.0, 4.0, 8.0]
    assert first["restored"] == second["restored"] == 8.0


def _steps_with_closure() -> list[Any]:
    precision = FSDPPrecision("16-mixed", GradScaler("cpu", init_scale=16.0))
    strategy = FSDPStrategy(timeout=timedelta(seconds=20), precision=precision)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    linear = nn.Linear(2, 1, bias=False)
    nn.init.ones_(linear.weight)
    model, optimizer = fabric.setup(linear, torch.optim.SGD(linear.parameters(), lr=0.5))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        fabric.backward(loss)
        return loss

    loss = optimizer.step(closure)
    weight = linear.weight.full_tensor().flatten().tolist()
    fabric.strategy.teardown()
    return [loss.item(), weight]


def test_a_closure_is_unscaled() -> None:
    assert on_ranks(2, _steps_with_closure) == [[2.0, [0.5, 0.5]]] * 2
