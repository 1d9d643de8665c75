import pytest
import torch
from torch.amp import GradScaler

from lightning.fabric.plugins.precision import MixedPrecision


def _parameter_and_optimizer(value=1.0, lr=1.0):
    parameter = torch.nn.Parameter(torch.tensor([value]))
    return parameter, torch.optim.SGD([parameter], lr=lr)


class TestConstruction:
    @pytest.mark.parametrize("precision", ["16-true", "32-true", "bf16", 16])
    def test_other_precisions_are_refused(self, precision):
        with pytest.raises(ValueError, match=f"'16-mixed' or 'bf16-mixed', but got {precision!r}"):
            MixedPrecision(precision, "cpu")

    def test_a_scaler_is_for_float16_only(self):
        with pytest.raises(ValueError, match="needs no scaler"):
            MixedPrecision("bf16-mixed", "cpu", scaler=GradScaler("cpu"))

    def test_a_given_scaler_is_used(self):
        scaler = GradScaler("cpu", init_scale=4.0)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        assert precision.scaler is scaler
        parameter, _ = _parameter_and_optimizer()
        precision.backward(parameter.sum(), None)
        assert parameter.grad.item() == 4.0

    def test_only_float16_has_a_scaler(self):
        assert MixedPrecision("bf16-mixed", "cpu").scaler is None
        assert isinstance(MixedPrecision("16-mixed", "cpu").scaler, GradScaler)

    def test_making_one_asks_nothing_of_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked CUDA"))
        MixedPrecision("16-mixed", "cuda")
        MixedPrecision("bf16-mixed", "cuda")


class TestForwardContext:
    @pytest.mark.parametrize(("precision", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
    def test_matrix_products_run_in_16_bit_inside_only(self, precision, dtype):
        x = torch.ones(2, 2)
        plugin = MixedPrecision(precision, "cpu")
        for _ in range(2):
            with plugin.forward_context():
                assert (x @ x).dtype is dtype
            assert (x @ x).dtype is torch.float32

    def test_contexts_nest_in_each_other_and_in_autocast(self):
        precision = MixedPrecision("bf16-mixed", "cpu")
        x = torch.ones(2, 2)
        with precision.forward_context():
            with torch.autocast("cpu", enabled=False):
                with precision.forward_context():
                    assert (x @ x).dtype is torch.bfloat16
                assert (x @ x).dtype is torch.float32
            assert (x @ x).dtype is torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")

    def test_a_context_made_before_another_was_entered_still_restores_what_it_found(self):
        precision = MixedPrecision("bf16-mixed", "cpu")
        outer, inner = precision.forward_context(), precision.forward_context()
        with outer, inner:
            pass
        assert not torch.is_autocast_enabled("cpu")


class TestGradientScaling:
    def test_the_optimizer_sees_gradients_of_their_true_size(self):
        parameter, optimizer = _parameter_and_optimizer(value=1.0)
        precision = MixedPrecision("16-mixed", "cpu")
        precision.backward((3 * parameter).sum(), None)
        assert parameter.grad.item() == 3 * 2.0**16
        precision.optimizer_step(optimizer)
        assert parameter.item() == -2.0

    def test_unscaling_twice_before_a_step_changes_nothing(self):
        parameter, optimizer = _parameter_and_optimizer()
        precision = MixedPrecision("16-mixed", "cpu")
        for _ in range(2):
            optimizer.zero_grad()
            precision.backward(parameter.sum(), None)
            for _ in range(2):
                precision.unscale_gradients(optimizer)
                assert parameter.grad.item() == 1.0
            precision.optimizer_step(optimizer)
            precision.unscale_gradients(optimizer)
            assert parameter.grad.item() == 1.0
        assert parameter.item() == -1.0

    def test_infinite_gradients_skip_the_step_and_lower_the_scale(self):
        parameter, optimizer = _parameter_and_optimizer()
        precision = MixedPrecision("16-mixed", "cpu")
        precision.backward((parameter * torch.inf).sum(), None)
        precision.optimizer_step(optimizer)
        assert parameter.item() == 1.0
        assert precision.scaler.get_scale() == 2.0**15

    def test_the_scale_grows_after_good_steps(self):
        parameter, optimizer = _parameter_and_optimizer()
        precision = MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=4.0, growth_interval=2))
        scales = []
        for _ in range(4):
            precision.backward(parameter.sum(), None)
            precision.optimizer_step(optimizer)
            scales.append(precision.scaler.get_scale())
        assert scales == [4.0, 8.0, 8.0, 16.0]

    @pytest.mark.parametrize("clip", [False, True])
    def test_two_optimizers_after_one_backward_use_the_same_scale(self, clip):
        first, first_optimizer = _parameter_and_optimizer()
        second, second_optimizer = _parameter_and_optimizer()
        precision = MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=4.0, growth_interval=1))
        precision.backward((first + second).sum(), None)
        if clip:
            precision.unscale_gradients(first_optimizer)
            precision.unscale_gradients(second_optimizer)
        precision.optimizer_step(first_optimizer)
        precision.optimizer_step(second_optimizer)
        assert (first.item(), second.item()) == (0.0, 0.0)
        assert precision.scaler.get_scale() == 8.0

    def test_a_closure_runs_once_with_gradients_on_and_its_loss_is_returned(self):
        parameter, optimizer = _parameter_and_optimizer()
        precision = MixedPrecision("16-mixed", "cpu")
        calls = []

        def closure():
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (2 * parameter).sum()
            precision.backward(loss, None)
            return loss

        for expected in (2.0, -2.0):
            with torch.no_grad():
                assert precision.optimizer_step(optimizer, closure=closure).item() == expected
        assert calls == [True, True]
        assert parameter.item() == -3.0

    def test_lbfgs_is_refused_with_float16_and_works_with_bfloat16(self):
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.LBFGS([parameter])
        with pytest.raises(TypeError, match="does not work with the optimizer LBFGS"):
            MixedPrecision("16-mixed", "cpu").optimizer_step(optimizer, closure=lambda: None)

        def closure():
            optimizer.zero_grad()
            loss = (parameter**2).sum()
            loss.backward()
            return loss

        MixedPrecision("bf16-mixed", "cpu").optimizer_step(optimizer, closure=closure)
        assert abs(parameter.item()) < 0.1

    def test_a_disabled_scaler_leaves_gradients_alone(self):
        parameter, optimizer = _parameter_and_optimizer()
        precision = MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", enabled=False))
        precision.backward(parameter.sum(), None)
        precision.unscale_gradients(optimizer)
        precision.optimizer_step(optimizer)
        assert parameter.item() == 0.0
        assert precision.state_dict() == {}


class TestState:
    def test_the_scale_travels_in_the_state(self):
        parameter, optimizer = _parameter_and_optimizer()
        precision = MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=4.0, growth_interval=1))
        precision.backward(parameter.sum(), None)
        precision.optimizer_step(optimizer)
        resumed = MixedPrecision("16-mixed", "cpu")
        resumed.load_state_dict(precision.state_dict())
        assert resumed.scaler.get_scale() == 8.0
        resumed.backward(parameter.sum(), None)
        assert resumed.state_dict() == {**precision.state_dict(), "_growth_tracker": 0}

    def test_bfloat16_has_none(self):
        precision = MixedPrecision("bf16-mixed", "cpu")
        assert precision.state_dict() == {}
        precision.load_state_dict({"scale": 4.0})
