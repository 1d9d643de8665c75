"""``fabric.accumulate``: one gradient, however the batch is split over micro-batches and ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from lightning.fabric import Fabric
from lightning.fabric._accumulation import factors_of
from lightning.fabric.plugins import FSDPPrecision, MixedPrecision
from lightning.fabric.testing import RankError, on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

SIZES = [3, 40, 25, 6]  # of the micro-batches; rank by rank, where ranks have different data
MAX_NORM = 0.1
LR = 1.0
Batch = tuple[Tensor, Tensor]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)) for size in SIZES
    ]


def reference() -> dict[str, Tensor]:
    module = model()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    cross_entropy(module(inputs), targets).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def _tensor_parallel(module, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(module, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _strategy(name: str):
    from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy

    if name == "tensor_parallel":
        return ModelParallelStrategy(_tensor_parallel, data_parallel_size=1, tensor_parallel_size=2)
    return FSDPStrategy(auto_wrap_policy={nn.Linear}) if name == "fsdp" else name


def _set_up(strategy: str, devices: int, precision=None):
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=_strategy(strategy), plugins=precision)
    fabric.launch()
    module = model()
    if strategy == "tensor_parallel":
        wrapped = fabric.setup_module(module)
        return fabric, wrapped, fabric.setup_optimizers(torch.optim.SGD(wrapped.parameters(), lr=LR))
    return fabric, *fabric.setup(module, torch.optim.SGD(module.parameters(), lr=LR))


def _own(fabric: Fabric, everything: list) -> list:
    replica = (fabric.strategy.distributed_sampler_kwargs or {"rank": 0})["rank"]
    each = len(everything) // fabric.strategy.num_replicas
    return everything[replica * each : (replica + 1) * each]


def _accumulate(fabric, module, parts, reduction="mean", weight=lambda batch: len(batch[0])) -> None:
    with fabric.accumulate(module, parts, weight=weight, reduction=reduction) as micro_batches:
        for inputs, targets in micro_batches:
            fabric.backward(cross_entropy(module(inputs), targets, reduction=reduction))


def _gradients(module) -> dict[str, Tensor]:
    return {name: _whole(parameter.grad).clone() for name, parameter in module.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat = [torch.cat([grads[name].flatten().double() for name in expected]) for grads in (found, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def _error_and_norms(strategy: str, devices: int) -> dict[str, float]:
    expected = reference()
    fabric, module, optimizer = _set_up(strategy, devices)
    found = {}
    for reduction in ("mean", "sum"):
        _accumulate(fabric, module, _own(fabric, batches()), reduction)
        found[reduction] = _relative_error(_gradients(module), expected)
        norm = fabric.clip_gradients(module, optimizer, max_norm=MAX_NORM)
        whole = torch.cat([grad.flatten() for grad in expected.values()]).norm()
        found["norm"] = abs(norm / whole - 1).item()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("auto", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("tensor_parallel", 2)],
)
def test_gradient_is_that_of_the_whole_batch(strategy, ranks):
    for errors in on_ranks(ranks, _error_and_norms, strategy, ranks):
        assert set(errors) == {"mean", "sum", "norm"}
        assert max(errors.values()) < 1e-6, errors


def _errors_under_deepspeed() -> list[float]:
    return [_error_of_a_step(f"deepspeed_stage_{stage}", 2) for stage in (2, 3)]


def _error_of_a_step(strategy: str, devices: int) -> float:
    """DeepSpeed keeps gradients to itself; a step shows them."""
    fabric, module, optimizer = _set_up(strategy, devices)
    import deepspeed

    _accumulate(fabric, module, _own(fabric, batches()))
    optimizer.step()
    expected, before = reference(), dict(model().named_parameters())
    with deepspeed.zero.GatheredParameters(list(module.module.parameters())):
        after = {name: parameter.detach().double() for name, parameter in module.module.named_parameters()}
    return _relative_error({name: (before[name].double() - after[name]) / LR for name in after}, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first time DeepSpeed compiles its operators, for a minute or more
def test_gradient_is_that_of_the_whole_batch_under_deepspeed():
    assert max(itertools.chain(*on_ranks(2, _errors_under_deepspeed, timeout=580))) < 1e-6


def _scaled(strategy: str, precision) -> tuple[float, float]:
    fabric, module, optimizer = _set_up(strategy, 2, precision)
    _accumulate(fabric, module, _own(fabric, batches()))
    fabric.clip_gradients(module, optimizer, max_norm=1e6)  # brings them to their true size
    error = _relative_error(_gradients(module), reference())
    optimizer.step()
    return error, fabric.strategy.precision.scaler.get_scale()


@pytest.mark.parametrize(
    ("strategy", "precision"), [("ddp", MixedPrecision("16-mixed", "cpu")), ("fsdp", FSDPPrecision("16-mixed"))]
)
def test_a_gradient_scaler_changes_nothing(strategy, precision):
    for error, scale in on_ranks(2, _scaled, strategy, precision):
        assert error < 5e-3  # float16 has three digits
        assert scale == 65536.0  # no step was skipped


weights = st.lists(st.integers(0, 50), min_size=1, max_size=5)


class _World:
    """Stands for rank ``rank`` of a strategy whose ranks have ``sums``."""

    root_device = torch.device("cpu")

    def __init__(self, ranks: list[list[int]], rank: int) -> None:
        self._ranks = ranks
        self.num_replicas = len(ranks)
        self.distributed_sampler_kwargs = {"rank": rank}

    def all_gather(self, own: Tensor) -> Tensor:
        rows = [[len(parts), sum(parts), rank] for rank, parts in enumerate(self._ranks)]
        assert own.tolist() == rows[self.distributed_sampler_kwargs["rank"]]
        return torch.tensor(rows, dtype=own.dtype)


@given(st.data())
def test_factors_make_the_mean_over_ranks_the_weighted_mean(data):
    count = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 50), min_size=count, max_size=count)
    ranks = data.draw(st.lists(row, min_size=1, max_size=4).filter(lambda rows: any(map(any, rows))))
    losses = [[data.draw(st.floats(-10, 10)) for _ in parts] for parts in ranks]
    total = sum(map(sum, ranks))
    expected = sum(w * loss for row, own in zip(ranks, losses, strict=True) for w, loss in zip(row, own, strict=True))
    found = 0.0
    for rank, (parts, own) in enumerate(zip(ranks, losses, strict=True)):
        factors = factors_of(_World(ranks, rank), parts, lambda weight: weight, "mean")
        found += sum(f * loss for f, loss in zip(factors, own, strict=True)) / len(ranks)
    assert found == pytest.approx(expected / total, abs=1e-12)


def _micro_batch_of_nothing() -> float:
    fabric, module, _ = _set_up("ddp", 2)
    own = _own(fabric, batches())
    inputs, targets = own[0]
    own = own if fabric.global_rank == 0 else [(inputs[:0], targets[:0])] * 2
    _accumulate(fabric, module, own, reduction="sum")
    alone = model()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches()[:2], strict=True))
    cross_entropy(alone(inputs), targets).backward()
    return _relative_error(_gradients(module), {name: p.grad for name, p in alone.named_parameters()})


def test_a_rank_may_have_nothing():
    assert max(on_ranks(2, _micro_batch_of_nothing)) < 1e-6


def _with_rank_1_different(what: str) -> None:
    fabric, module, _ = _set_up("ddp", 2)
    own = _own(fabric, batches())
    different = fabric.global_rank == 1
    weight = [1, -1] if what == "negative" and different else [1, 1]
    if what == "fewer" and different:
        own, weight = own[:1], [1]
    _accumulate(fabric, module, own, weight=weight)


def test_ranks_with_different_numbers_of_micro_batches_are_refused():
    with pytest.raises(RankError, match=r"same number of micro-batches.*from rank 0 on: 2, 1\."):
        on_ranks(2, _with_rank_1_different, "fewer", timeout=30)


def test_a_wrong_weight_on_one_rank_fails_on_all():
    with pytest.raises(RankError, match="finite and not negative, but got -1.0"):
        on_ranks(2, _with_rank_1_different, "negative", timeout=30)


class TestOneProcess:
    @pytest.fixture
    def parts(self):
        fabric = Fabric(accelerator="cpu", devices=1)
        return fabric, fabric.setup(model()), batches()

    def test_without_weights_all_count_the_same(self, parts):
        fabric, module, own = parts
        _accumulate(fabric, module, own, weight=None)
        plain = model()
        for inputs, targets in own:
            (cross_entropy(plain(inputs), targets) / len(own)).backward()
        assert _relative_error(_gradients(module), {name: p.grad for name, p in plain.named_parameters()}) < 1e-6

    def test_weights_may_be_tensors(self, parts):
        fabric, module, own = parts
        _accumulate(fabric, module, iter(own), weight=torch.tensor(SIZES))
        assert _relative_error(_gradients(module), reference()) < 1e-6

    def test_several_modules_are_trained_in_one_step(self, parts):
        fabric, module, own = parts
        head = fabric.setup(nn.Linear(3, 3))
        with fabric.accumulate([module, head], own[:2], weight=SIZES[:2]) as micro_batches:
            for inputs, targets in micro_batches:
                fabric.backward(cross_entropy(head(module(inputs)), targets))
        assert all(p.grad is not None for part in (module, head) for p in part.parameters())

    def test_plain_backward_is_as_before_when_it_is_left(self, parts):
        fabric, module, own = parts
        _accumulate(fabric, module, own)
        module.zero_grad()
        fabric.backward(module(own[0][0]).sum())
        plain = model()
        plain(own[0][0]).sum().backward()
        assert torch.equal(module.module[0].weight.grad, plain[0].weight.grad)

    @pytest.mark.parametrize(
        ("weight", "reduction", "error", "message"),
        [
            ([1, 2], "mean", ValueError, "has 2 entries for 4"),
            ([0, 0, 0, 0], "mean", ValueError, "nothing to average"),
            ([1, 1, 1, float("nan")], "mean", ValueError, "finite"),
            (lambda batch: None, "mean", TypeError, "NoneType"),
            (None, "sum", ValueError, "`weight` is needed"),
            (None, "median", ValueError, "'mean' or 'sum'"),
        ],
    )
    def test_what_cannot_be_weighed_is_refused(self, parts, weight, reduction, error, message):
        fabric, module, own = parts
        with pytest.raises(error, match=message), fabric.accumulate(module, own, weight, reduction):
            pass

    def test_no_micro_batch_is_refused(self, parts):
        fabric, module, _ = parts
        with pytest.raises(ValueError, match="at least one"), fabric.accumulate(module, []):
            pass

    def test_a_module_that_is_not_set_up_is_refused(self, parts):
        fabric, _, own = parts
        with pytest.raises(TypeError, match="accumulate"), fabric.accumulate(nn.Linear(1, 1), own):
            pass

    def test_a_micro_batch_without_backward_is_refused(self, parts):
        fabric, module, own = parts
        refused = pytest.raises(RuntimeError, match=r"Micro-batch 1 of 4 went by without `fabric.backward")
        with refused, fabric.accumulate(module, own) as micro_batches:
            for inputs, _ in micro_batches:
                module(inputs).sum().backward()

    def test_leaving_early_is_refused(self, parts):
        fabric, module, own = parts
        refused = pytest.raises(RuntimeError, match="after 0 of 4 micro-batches")
        with refused, fabric.accumulate(module, own) as micro_batches:
            for inputs, _ in micro_batches:
                fabric.backward(module(inputs).sum())
                break
        _accumulate(fabric, module, own)  # can be entered again

    def test_entering_it_twice_is_refused(self, parts):
        fabric, module, own = parts
        refused = pytest.raises(RuntimeError, match="entered already")
        with refused, fabric.accumulate(module, own), fabric.accumulate(module, own):
            pass

    def test_an_error_inside_is_the_one_that_is_seen(self, parts):
        fabric, module, own = parts
        with pytest.raises(KeyError, match="mine"), fabric.accumulate(module, own) as micro_batches:
            for _ in micro_batches:
                raise KeyError("mine")
