from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning.fabric.utilities import throughput
from lightning.fabric.utilities.throughput import (
    Throughput,
    ThroughputMonitor,
    _flops_of_chip,
    get_available_flops,
    measure_flops,
)


class TestThroughput:
    def test_totals_from_the_first_update(self) -> None:
        monitor = Throughput()
        assert monitor.compute() == {}
        monitor.update(time=2.0, batches=1, samples=2, lengths=8, flops=3)
        assert monitor.compute() == {"time": 2.0, "batches": 1, "samples": 2, "lengths": 8}

    def test_rates_lie_between_the_ends_of_the_window(self) -> None:
        monitor = Throughput(available_flops=50, window_size=2)
        for step in (1, 2, 3):
            monitor.update(time=step**2, batches=step, samples=4 * step, lengths=40 * step, flops=100)
        assert monitor.compute() == {
            "time": 9,
            "batches": 3,
            "samples": 12,
            "lengths": 120,
            "device/batches_per_sec": 1 / 5,
            "device/samples_per_sec": 4 / 5,
            "device/items_per_sec": 40 / 5,
            "device/flops_per_sec": 100 / 5,
            "device/mfu": 100 / 5 / 50,
        }

    def test_global_rates(self) -> None:
        monitor = Throughput(world_size=4, separator="_")
        for step in (1, 2):
            monitor.update(time=step, batches=step, samples=2 * step, flops=10)
        metrics = monitor.compute()
        assert metrics["device_samples_per_sec"] == 2
        assert metrics["samples_per_sec"] == 8
        assert metrics["batches_per_sec"] == 4
        assert metrics["flops_per_sec"] == 40
        assert not any("mfu" in name for name in metrics)

    @settings(deadline=None, max_examples=50)
    @given(
        st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 5), st.integers(0, 9)), min_size=2, max_size=20),
        st.integers(2, 8),
    )
    def test_a_window_forgets_what_came_before(self, steps: list[tuple[float, int, int]], window: int) -> None:
        """The rates of all updates with a window are those of the last few updates without one."""
        totals, time, batches, samples = [], 0.0, 0, 0
        for seconds, new_batches, extra in steps:
            time, batches = time + seconds, batches + new_batches
            samples += new_batches + extra
            totals.append({"time": time, "batches": batches, "samples": samples})
        windowed, fresh = Throughput(window_size=window), Throughput(window_size=1000)
        for total in totals:
            windowed.update(**total)  # type: ignore[arg-type]
        for total in totals[-window:]:
            fresh.update(**total)  # type: ignore[arg-type]
        assert windowed.compute() == fresh.compute()

    def test_reset(self) -> None:
        monitor = Throughput()
        monitor.update(time=9, batches=9, samples=9)
        monitor.reset()
        monitor.update(time=1, batches=1, samples=1)
        assert monitor.compute()["time"] == 1

    @pytest.mark.parametrize(
        ("update", "message"),
        [
            ({"time": 4}, "`time` is a total that cannot go down: got 4 after 5"),
            ({"time": 5}, "`time` must be greater"),
            ({"batches": 4}, "`batches` is a total"),
            ({"samples": 9}, "`samples` is a total"),
            ({"lengths": 99}, "`lengths` is a total"),
            ({"lengths": None}, "every update or to none"),
            ({"batches": 20}, "`samples` cannot be less than `batches`"),
            ({"samples": 200}, "`lengths` cannot be less than `samples`"),
        ],
    )
    def test_totals_that_make_no_sense(self, update: dict[str, Any], message: str) -> None:
        monitor = Throughput()
        monitor.update(time=5, batches=5, samples=10, lengths=100)
        before = monitor.compute()
        with pytest.raises(ValueError, match=message):
            monitor.update(**({"time": 6, "batches": 6, "samples": 12, "lengths": 120} | update))
        assert monitor.compute() == before, "a refused update leaves no trace"

    @pytest.mark.parametrize("options", [{"window_size": 1}, {"world_size": 0}])
    def test_settings_that_make_no_sense(self, options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            Throughput(**options)  # type: ignore[arg-type]


class TestMonitor:
    @pytest.fixture
    def fabric(self) -> Any:
        logged: list[Any] = []
        return SimpleNamespace(
            strategy=SimpleNamespace(precision=SimpleNamespace(precision="bf16-mixed")),
            device=torch.device("cuda"),
            world_size=2,
            logged=logged,
            log_dict=lambda metrics, step: logged.append((metrics, step)),
        )

    def test_knows_world_and_device(self, fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(throughput, "get_available_flops", lambda *args: asked.append(args) or 100.0)
        monitor = ThroughputMonitor(fabric, window_size=5)
        assert asked == [(torch.device("cuda"), torch.bfloat16)]
        assert (monitor.available_flops, monitor.world_size) == (100.0, 2)

    def test_logs(self, fabric: Any) -> None:
        monitor = ThroughputMonitor(fabric, available_flops=None, separator=".")
        for step in (1, 2):
            monitor.update(time=step, batches=step, samples=step)
            metrics = monitor.compute_and_log()
        assert [step for _, step in fabric.logged] == [0, 1]
        assert fabric.logged[1][0] == metrics
        assert metrics["samples_per_sec"] == 2
        monitor.compute_and_log(step=7)
        assert fabric.logged[-1][1] == 7

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [
            ("32-true", torch.float32),
            ("64-true", torch.float64),
            ("16-mixed", torch.float16),
            ("16-true", torch.float16),
            ("bf16-true", torch.bfloat16),
            ("transformer-engine-float16", torch.float8_e4m3fn),
        ],
    )
    def test_dtype_of_a_precision(self, precision: str, dtype: torch.dtype) -> None:
        assert throughput._compute_dtype(precision) == dtype


class TestMeasureFlops:
    def test_forward_and_backward_on_meta(self) -> None:
        with torch.device("meta"):
            model = torch.nn.Linear(4, 8, bias=False)
            x = torch.randn(2, 4)
        forward = 2 * 2 * 4 * 8
        assert measure_flops(model, lambda: model(x)) == forward
        assert measure_flops(model, lambda: model(x), lambda y: y.sum()) == 2 * forward  # x needs no gradient


class TestAvailableFlops:
    @pytest.mark.parametrize(
        ("chip", "dtype", "tera"),
        [
            ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312),
            ("NVIDIA A100 80GB PCIe", torch.float32, 19.5),
            ("NVIDIA H100 80GB HBM3", torch.float16, 989.4),
            ("NVIDIA H100 PCIe", torch.float16, 756),
            ("NVIDIA H100 NVL", torch.float16, 835.5),
            ("NVIDIA H200", torch.float8_e4m3fn, 1978.9),
            ("NVIDIA L4", torch.bfloat16, 121),
            ("NVIDIA L40S", torch.bfloat16, 362),
            ("Tesla T4", torch.float16, 65),
            ("Tesla V100-SXM2-16GB", torch.float16, 125),
            ("Tesla V100-PCIE-32GB", torch.float16, 112),
            ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71),
            ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, 80),
            ("NVIDIA GeForce RTX 4070 Ti SUPER", torch.bfloat16, 88.2),
            ("NVIDIA RTX 6000 Ada Generation", torch.int8, 728.5),
            ("tpu v4-8", torch.bfloat16, 275),
            ("tpu v5litepod-16", torch.bfloat16, 197),
        ],
    )
    def test_names_that_drivers_report(self, chip: str, dtype: torch.dtype, tera: float) -> None:
        assert _flops_of_chip(chip, dtype) == pytest.approx(tera * 1e12)

    @pytest.mark.parametrize(
        ("chip", "dtype"),
        [
            ("Some GPU 3000", torch.float32),
            ("NVIDIA GeForce RTX 3080 Laptop GPU", torch.float32),
            ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.float32),
            ("Tesla V100-SXM2-16GB", torch.bfloat16),
            ("NVIDIA A100-SXM4-40GB", torch.complex64),
        ],
    )
    def test_unknown(self, chip: str, dtype: torch.dtype) -> None:
        assert _flops_of_chip(chip, dtype) is None

    @pytest.mark.parametrize("rates", throughput._TERA_FLOPS.values(), ids=throughput._TERA_FLOPS)
    def test_narrower_types_are_not_slower(self, rates: dict[str, float]) -> None:
        order = [kind for kind in ("fp64", "fp32", "tf32", "fp16", "fp8") if kind in rates]
        values = [rates[kind] for kind in order]
        assert values == sorted(values)

    def test_on_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
        assert get_available_flops(device, torch.float32) == 19.5e12
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert get_available_flops(device, torch.float32) == 156e12
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        with pytest.warns(UserWarning, match="'Some GPU' for torch.float32 are not known"):
            assert get_available_flops(device, torch.float32) is None

    def test_cpu(self) -> None:
        assert get_available_flops(torch.device("cpu"), torch.float32) is None

    @pytest.mark.gpu
    def test_the_gpu_of_this_machine(self) -> None:
        assert get_available_flops(torch.device("cuda", 0), torch.bfloat16) > 1e12
