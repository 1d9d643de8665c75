"""How fast training goes, and how much of the hardware it uses."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning.fabric.utilities.rank_zero import rank_zero_warn

_Number = int | float


class _Fabric(Protocol):
    """What :class:`ThroughputMonitor` needs of a Fabric object."""

    @property
    def strategy(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def world_size(self) -> int: ...

    def log_dict(self, metrics: Any, step: int | None = None) -> None: ...


class _Point(NamedTuple):
    """Totals since the start of training; ``flops`` of this device."""

    time: float
    batches: int
    samples: int
    lengths: int | None
    flops: int | None


class Throughput:
    """Rates of batches, samples, items and floating-point operations over the last ``window_size`` updates.

    Args:
        available_flops: what the device can do at best, per second: for the model FLOPs utilisation (``mfu``).
        world_size: number of devices; above 1, rates over all of them are reported beside those per device.
        window_size: number of updates that a rate is taken over, 2 or more.
        separator: between ``device`` and the name of a rate.
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if window_size < 2:
            raise ValueError(f"`window_size` must be 2 or more: a rate lies between two updates. Got {window_size!r}.")
        if world_size < 1:
            raise ValueError(f"`world_size` must be 1 or more, but got {world_size!r}.")
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._points: deque[_Point] = deque(maxlen=window_size)

    def update(
        self,
        *,
        time: float,
        batches: int,
        samples: int,
        lengths: int | None = None,
        flops: int | None = None,
    ) -> None:
        """Note how far this process has come since training began.

        Args:
            time: seconds since the start. Greater than at the last update.
            batches: number of batches so far, on this device.
            samples: number of samples so far, on this device; at least ``batches``.
            lengths: number of items (tokens, say) so far, on this device; at least ``samples``.
            flops: floating-point operations of this device since the last update.

        Raises:
            ValueError: a total is less than it was at the last update, or less than it can be.
        """
        last = self._points[-1] if self._points else None
        for name, value in (("time", time), ("batches", batches), ("samples", samples), ("lengths", lengths)):
            before = getattr(last, name, None)
            if value is not None and (value < 0 or (before is not None and value < before)):
                raise ValueError(f"`{name}` is a total that cannot go down: got {value!r} after {before or 0!r}.")
        if last is not None and time == last.time:
            raise ValueError(f"`time` must be greater than at the last update, but got {time!r} again.")
        if last is not None and (lengths is None) != (last.lengths is None):
            raise ValueError("`lengths` must be passed to every update or to none.")
        if samples < batches:
            raise ValueError(f"`samples` cannot be less than `batches`: got {samples!r} and {batches!r}.")
        if lengths is not None and lengths < samples:
            raise ValueError(f"`lengths` cannot be less than `samples`: got {lengths!r} and {samples!r}.")
        total_flops = None if flops is None else flops + ((last.flops or 0) if last is not None else 0)
        self._points.append(_Point(time, batches, samples, lengths, total_flops))

    def compute(self) -> dict[str, _Number]:
        """Return the totals of the last update and, from the second update on, the rates.

        Rates per device begin with ``device`` and the separator; ``mfu`` is between 0 and 1.
        """
        if not self._points:
            return {}
        first, last = self._points[0], self._points[-1]
        metrics: dict[str, _Number] = {"time": last.time, "batches": last.batches, "samples": last.samples}
        if last.lengths is not None:
            metrics["lengths"] = last.lengths
        if first is last:
            return metrics
        for name, rate in self._rates(first, last).items():
            metrics[f"device{self.separator}{name}"] = rate
            if self.world_size > 1:
                metrics[name] = rate * self.world_size
        if self.available_flops and (flops := metrics.get(f"device{self.separator}flops_per_sec")) is not None:
            metrics[f"device{self.separator}mfu"] = flops / self.available_flops
        return metrics

    @staticmethod
    def _rates(first: _Point, last: _Point) -> dict[str, float]:
        elapsed = last.time - first.time
        rates = {
            "batches_per_sec": (last.batches - first.batches) / elapsed,
            "samples_per_sec": (last.samples - first.samples) / elapsed,
        }
        if last.lengths is not None and first.lengths is not None:
            rates["items_per_sec"] = (last.lengths - first.lengths) / elapsed
        if last.flops is not None and first.flops is not None:
            rates["flops_per_sec"] = (last.flops - first.flops) / elapsed
        return rates

    def reset(self) -> None:
        """Forget all updates."""
        self._points.clear()


class ThroughputMonitor(Throughput):
    """A :class:`Throughput` that knows the device, precision and world size of ``fabric``, and logs through it.

    ``kwargs`` are the other arguments of :class:`Throughput`.
    """

    def __init__(self, fabric: _Fabric, **kwargs: Any) -> None:
        dtype = _compute_dtype(str(fabric.strategy.precision.precision))
        if "available_flops" not in kwargs:
            kwargs["available_flops"] = get_available_flops(fabric.device, dtype)
        kwargs.setdefault("world_size", fabric.world_size)
        super().__init__(**kwargs)
        self._fabric = fabric
        self.step = -1

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> dict[str, _Number]:
        """``compute(**kwargs)`` and log the result with ``fabric.log_dict``; ``step`` counts the calls by default."""
        self.step = self.step + 1 if step is None else step
        metrics = self.compute(**kwargs)
        self._fabric.log_dict(metrics, step=self.step)
        return metrics


def _compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products under a precision setting such as ``bf16-mixed``."""
    if precision.startswith(("float8", "transformer-engine")):
        return torch.float8_e4m3fn
    names = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}
    return names.get(precision.partition("-")[0], torch.float32)


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None
) -> int:
    """Return the floating-point operations of ``forward_fn()``, and with ``loss_fn`` also of the backward pass.

    With ``model`` and its inputs on the meta device this costs neither time nor memory.

    Args:
        model: what ``forward_fn`` runs.
        forward_fn: runs the model and returns its output.
        loss_fn: makes the loss of that output; its backward pass leaves gradients in ``model``.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()
    return counter.get_total_flops()


# ---- what devices can do -----------------------------------------------------------------------------------------


def get_available_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak operations per second of ``device`` with dense matrices of ``dtype``, from its data sheet.

    ``None`` on the CPU, and with a warning for devices that are not in the table. ``float32`` on CUDA is the rate of
    TF32 where ``torch.set_float32_matmul_precision`` allows it.
    """
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    elif device.type == "xla":
        from torch_xla._internal import tpu

        chip = f"tpu {tpu.get_tpu_env()['ACCELERATOR_TYPE']}"
    else:
        return None
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    flops = _flops_of_chip(chip, dtype, tf32)
    if flops is None:
        rank_zero_warn(f"The peak FLOPs of {chip!r} for {dtype} are not known, so `mfu` is not reported.")
    return flops


def _flops_of_chip(chip: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Look up ``chip``, the name that its driver reports. The entry with the most words of the name wins."""
    words = set(chip.lower().replace("-", " ").split())
    if words & {"laptop", "mobile", "max", "mig", "d"}:  # slower than the card of that name
        return None
    fitting = [name for name in _TERA_FLOPS if words.issuperset(name.split())]
    if not fitting:
        return None
    rates = _TERA_FLOPS[max(fitting, key=lambda name: len(name.split()))]
    kind = _KINDS.get(dtype, "")
    rate = rates.get("tf32" if kind == "fp32" and tf32 and "tf32" in rates else kind)
    return None if rate is None else rate * 1e12


_KINDS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.int8: "int8",
}


def _chip(
    fp64: float | None = None,
    fp32: float | None = None,
    tf32: float | None = None,
    half: float | None = None,
    fp16: float | None = None,
    bf16: float | None = None,
    fp8: float | None = None,
    int8: float | None = None,
) -> dict[str, float]:
    """``half`` is for both 16-bit types."""
    rates = {
        "fp64": fp64,
        "fp32": fp32,
        "tf32": tf32,
        "fp16": fp16 or half,
        "bf16": bf16 or half,
        "fp8": fp8,
        "int8": int8,
    }
    return {kind: rate for kind, rate in rates.items() if rate is not None}


# Dense (no 2:4 sparsity), in 1e12 operations per second, accumulating 16-bit products in fp32.
# Keys are words of the driver's name. TPU v2 and v3: per core, which is what torch_xla calls a device.
_TERA_FLOPS: dict[str, dict[str, float]] = {
    # data centre: Blackwell, Hopper
    "gb200": _chip(fp64=40, fp32=80, tf32=1250, half=2500, fp8=5000, int8=5000),
    "b200": _chip(fp64=37, fp32=75, tf32=1125, half=2250, fp8=4500, int8=4500),
    "h200": _chip(fp64=33.5, fp32=66.9, tf32=494.7, half=989.4, fp8=1978.9, int8=1978.9),
    "h200 nvl": _chip(fp64=30, fp32=60, tf32=417.5, half=835.5, fp8=1670.5, int8=1670.5),
    "gh200": _chip(fp64=33.5, fp32=66.9, tf32=494.7, half=989.4, fp8=1978.9, int8=1978.9),
    "h100": _chip(fp64=33.5, fp32=66.9, tf32=494.7, half=989.4, fp8=1978.9, int8=1978.9),
    "h100 pcie": _chip(fp64=25.6, fp32=51.2, tf32=378, half=756, fp8=1513, int8=1513),
    "h100 nvl": _chip(fp64=30, fp32=60, tf32=417.5, half=835.5, fp8=1670.5, int8=1670.5),
    # data centre: Ada, Ampere, Turing, Volta, Pascal
    "l4": _chip(fp32=30.3, tf32=60, half=121, fp8=242.5, int8=242.5),
    "l40": _chip(fp32=90.5, tf32=90.5, half=181, fp8=362, int8=362),
    "l40s": _chip(fp32=91.6, tf32=183, half=362, fp8=733, int8=733),
    "a100": _chip(fp64=9.7, fp32=19.5, tf32=156, half=312, int8=624),
    "a30": _chip(fp64=5.2, fp32=10.3, tf32=82, half=165, int8=330),
    "a40": _chip(fp32=37.4, tf32=74.8, half=149.7, int8=299.3),
    "a10": _chip(fp32=31.2, tf32=62.5, half=125, int8=250),
    "a10g": _chip(fp32=35, tf32=35, half=70, int8=140),
    "a2": _chip(fp32=4.5, tf32=9, half=18, int8=36),
    "t4": _chip(fp32=8.1, fp16=65, int8=130),
    "v100": _chip(fp64=7.8, fp32=15.7, fp16=125),
    "v100 pcie": _chip(fp64=7, fp32=14, fp16=112),
    "v100s pcie": _chip(fp64=8.2, fp32=16.4, fp16=130),
    "p100": _chip(fp64=5.3, fp32=10.6, fp16=21.2),
    "p100 pcie": _chip(fp64=4.7, fp32=9.3, fp16=18.7),
    # workstation
    "rtx 6000 ada": _chip(fp32=91.1, tf32=182.1, half=364.2, fp8=728.5, int8=728.5),
    "rtx a6000": _chip(fp32=38.7, tf32=77.4, half=154.8, int8=309.7),
    "rtx a5000": _chip(fp32=27.8, tf32=55.6, half=111.1, int8=222.2),
    "rtx a4000": _chip(fp32=19.2, tf32=38.3, half=76.7, int8=153.4),
    "titan rtx": _chip(fp32=16.3, fp16=130.5, int8=261),
    # GeForce
    "rtx 5090": _chip(fp32=104.8, tf32=104.8, half=209.5, fp8=419, int8=838),
    "rtx 5080": _chip(fp32=56.3, tf32=56.3, half=112.6, fp8=225.1, int8=450.2),
    "rtx 5070 ti": _chip(fp32=43.9, tf32=43.9, half=87.9, fp8=175.8, int8=351.5),
    "rtx 5070": _chip(fp32=30.9, tf32=30.9, half=61.7, fp8=123.5, int8=246.9),
    "rtx 4090": _chip(fp32=82.6, tf32=82.6, half=165.2, fp8=330.3, int8=660.6),
    "rtx 4080 super": _chip(fp32=52.2, tf32=52.2, half=104.4, fp8=208.9, int8=417.8),
    "rtx 4080": _chip(fp32=48.7, tf32=48.7, half=97.5, fp8=194.9, int8=389.9),
    "rtx 4070 ti super": _chip(fp32=44.1, tf32=44.1, half=88.2, fp8=176.4, int8=352.8),
    "rtx 4070 ti": _chip(fp32=40.1, tf32=40.1, half=80.2, fp8=160.4, int8=320.7),
    "rtx 4070 super": _chip(fp32=35.5, tf32=35.5, half=71, fp8=141.9, int8=283.8),
    "rtx 4070": _chip(fp32=29.1, tf32=29.1, half=58.3, fp8=116.6, int8=233.2),
    "rtx 4060 ti": _chip(fp32=22.1, tf32=22.1, half=44.1, fp8=88.3, int8=176.5),
    "rtx 4060": _chip(fp32=15.1, tf32=15.1, half=30.2, fp8=60.5, int8=121),
    "rtx 3090 ti": _chip(fp32=40, tf32=40, half=80, int8=320),
    "rtx 3090": _chip(fp32=35.6, tf32=35.6, half=71, int8=284),
    "rtx 3080 ti": _chip(fp32=34.1, tf32=34.1, half=68.2, int8=272.8),
    "rtx 3080": _chip(fp32=29.8, tf32=29.8, half=59.5, int8=238),
    "rtx 3070 ti": _chip(fp32=21.7, tf32=21.7, half=43.5, int8=174),
    "rtx 3070": _chip(fp32=20.3, tf32=20.3, half=40.6, int8=162.6),
    "rtx 3060 ti": _chip(fp32=16.2, tf32=16.2, half=32.4, int8=129.6),
    "rtx 3060": _chip(fp32=12.7, tf32=12.7, half=25.5, int8=101.9),
    "rtx 2080 ti": _chip(fp32=13.4, fp16=53.8, int8=215.2),
    "rtx 2080 super": _chip(fp32=11.2, fp16=44.6, int8=178.4),
    "rtx 2080": _chip(fp32=10.1, fp16=40.3, int8=161.1),
    "rtx 2070 super": _chip(fp32=9.1, fp16=36.3, int8=145),
    "rtx 2070": _chip(fp32=7.5, fp16=29.9, int8=119.4),
    # TPU, under the names of their types: "v4-8" has the words "v4" and "8"
    "tpu v2": _chip(bf16=22.5),
    "tpu v3": _chip(bf16=61.5),
    "tpu v4": _chip(bf16=275, int8=275),
    "tpu v5litepod": _chip(bf16=197, int8=393),
    "tpu v5p": _chip(bf16=459, int8=918),
    "tpu v6e": _chip(bf16=918, int8=1836),
}
