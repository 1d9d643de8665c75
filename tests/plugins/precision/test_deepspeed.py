"""DeepSpeed's precisions: which there are, the dtypes around a forward, and that the engine does the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision

NAMES = ["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]
DTYPES = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


class _Engine:
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.calls.append(("backward", loss, kwargs))

    def step(self) -> None:
        self.calls.append("step")


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_computes_in_its_dtype_and_the_user_gets_32_bit(name: Any) -> None:
    precision = DeepSpeedPrecision(name)
    batch = {"x": torch.ones(2), "y": [torch.ones(2, dtype=torch.int64), "text"]}
    converted = precision.convert_input(batch)
    assert precision.precision == name
    assert converted["x"].dtype is precision.dtype is DTYPES[name.split("-")[0]]
    assert converted["y"][0].dtype is torch.int64
    assert converted["y"][1] == "text"
    assert precision.convert_output(converted)["x"].dtype is torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_only_a_true_precision_makes_modules_in_it(name: Any) -> None:
    precision = DeepSpeedPrecision(name)
    expected = precision.dtype if name.endswith("true") else torch.float32
    with precision.module_init_context():
        assert nn.Linear(1, 1).weight.dtype is expected
    with precision.tensor_init_context():
        assert torch.ones(1).dtype is expected
    with precision.forward_context():
        assert torch.ones(1).dtype is expected
    assert torch.ones(1).dtype is torch.float32
    module = nn.BatchNorm1d(1)
    assert precision.convert_module(module) is module
    assert module.weight.dtype is module.running_mean.dtype is expected  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["64-true", "transformer-engine", "int8"])
def test_others_do_not_exist(name: Any) -> None:
    with pytest.raises(ValueError, match=f"has no precision '{name}'. Use one of '32-true', '16-true'"):
        DeepSpeedPrecision(name)


class TestStep:
    def test_the_engine_runs_backward(self) -> None:
        engine, loss = _Engine(), torch.ones(1)
        DeepSpeedPrecision("32-true").step_hooks().backward(loss, engine, retain_graph=True)  # type: ignore[misc]
        assert engine.calls == [("backward", loss, {"retain_graph": True})]

    def test_what_the_engine_does_not_take_is_refused(self) -> None:
        engine = _Engine()
        with pytest.raises(TypeError, match="no option 'create_graph'. It takes retain_graph and scale_wrt_gas"):
            DeepSpeedPrecision("32-true").backward(torch.ones(1), engine, create_graph=True)
        with pytest.raises(ValueError, match=r"a tensor of shape \(2, 3\). Reduce it first"):
            DeepSpeedPrecision("32-true").backward(torch.ones(2, 3), engine)
        assert engine.calls == []

    def test_the_engine_steps(self) -> None:
        engine = _Engine()
        assert DeepSpeedPrecision("bf16-mixed").step_hooks().optimizer_step(engine) is None  # type: ignore[misc]
        assert engine.calls == ["step"]

    def test_a_closure_runs_first_with_gradients_on(self) -> None:
        engine = _Engine()

        def closure() -> float:
            engine.calls.append(torch.is_grad_enabled())
            return 0.5

        with torch.no_grad():
            assert DeepSpeedPrecision("32-true").optimizer_step(engine, closure=closure) == 0.5
        assert engine.calls == [True, "step"]
