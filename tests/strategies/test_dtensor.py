"""Split tensors: the part of a rank, and norms and clipping over all parts, against one process that has it all."""

import copy
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from lightning.fabric.strategies._dtensor import (
    clip_norm,
    clip_value,
    distribute_like,
    full_tensor,
    local_shard,
    local_tensor,
    shard_optimizer_state,
    sync_from_rank_zero,
    total_norm,
)
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

LAYOUTS: list[tuple[Placement, ...]] = [
    (Shard(0),),
    (Shard(1),),
    (Replicate(),),
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
]
SHAPES = [(8, 4), (5, 3), (1, 2), (3, 1)]
NORMS = [1.0, 2.0, 3.0, inf]


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _mesh(dims: int, size: int) -> Any:
    return init_device_mesh("cpu", (size,) if dims == 1 else (2, size // 2))


def _distributed(full: Tensor, layout: tuple[Placement, ...], size: int) -> DTensor:
    return distribute_tensor(full, _mesh(len(layout), size), layout, src_data_rank=None)


def _feed_forward(width: int = 6, hidden: int = 10) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.LayerNorm(width))


def _shard_2d(module: nn.Sequential) -> nn.Sequential:
    """Tensor parallel inside of FSDP: the layer norm is split by FSDP only, so there are two meshes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(module, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(module, mesh=mesh["dp"])


# ---- whole and part --------------------------------------------------------------------------------------------------


def _parts_of_every_layout() -> list[str]:
    dist.init_process_group("gloo")
    wrong = []
    for layout in LAYOUTS:
        for shape in SHAPES:
            full = _numbers(*shape)
            like = _distributed(full, layout, dist.get_world_size())
            again = distribute_like(full.double(), like)
            if not torch.equal(local_shard(full, like), like.to_local()):
                wrong.append(f"part {shape} {layout}")
            if not (torch.equal(again.to_local(), like.to_local().double()) and again.placements == like.placements):
                wrong.append(f"distributed {shape} {layout}")
            if not torch.equal(full_tensor(like), full):
                wrong.append(f"whole {shape} {layout}")
    return wrong


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_part_is_what_torch_makes_of_the_layout(ranks: int) -> None:
    assert on_ranks(ranks, _parts_of_every_layout) == [[]] * ranks


def _parts_of_a_2d_module(width: int, hidden: int) -> list[str]:
    dist.init_process_group("gloo")
    whole = dict(_feed_forward(width, hidden).named_parameters())
    sharded = _shard_2d(_feed_forward(width, hidden))
    return [
        name
        for name, parameter in sharded.named_parameters()
        if not torch.equal(local_shard(whole[name].detach(), parameter), parameter.to_local())
    ]


@pytest.mark.parametrize("sizes", [(6, 10), (4, 8), (3, 5), (1, 3)])
def test_a_part_of_two_kinds_of_parallelism(sizes: tuple[int, int]) -> None:
    """As FSDP and tensor parallelism cut it, also where it does not divide evenly."""
    assert on_ranks(4, _parts_of_a_2d_module, *sizes) == [[]] * 4


def _memory_and_errors() -> None:
    dist.init_process_group("gloo")
    full = _numbers(4, 4)
    split, copied = _distributed(full, (Shard(0),), 2), _distributed(full, (Replicate(),), 2)
    assert local_shard(full, split).untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
    part = distribute_like(full, split)
    assert isinstance(part, DTensor)
    assert part.to_local().untyped_storage().nbytes() == full.nbytes // 2
    assert torch.equal(distribute_like(full, copied).to_local(), full)
    plain = distribute_like(full, torch.empty(4, 4))
    assert type(plain) is Tensor
    assert torch.equal(plain, full)
    assert full_tensor(plain) is not None
    with pytest.raises(ValueError, match=r"shape \(2, 4\) cannot be split like one of shape \(4, 4\)"):
        local_shard(full[:2], split)
    outstanding = DTensor.from_local(full, split.device_mesh, [Partial()])
    with pytest.raises(ValueError, match="a sum that is not taken yet"):
        distribute_like(full, outstanding)


def test_parts_share_memory_only_where_that_is_said() -> None:
    on_ranks(2, _memory_and_errors)


# ---- norms -----------------------------------------------------------------------------------------------------------


def _norms(make: Callable[[], list[Tensor]]) -> list[float]:
    dist.init_process_group("gloo")
    norms = [total_norm(make(), norm_type) for norm_type in NORMS]
    assert all(type(norm) is Tensor and norm.ndim == 0 for norm in norms)
    return [norm.item() for norm in norms]


def _whole() -> list[Tensor]:
    return [_numbers(8, 4), _numbers(5, 3, seed=1), _numbers(1, 2, seed=2), _numbers(7, seed=3)]


def _every_layout() -> list[Tensor]:
    one = [layout for layout in LAYOUTS if len(layout) == 1]
    return [_distributed(full, layout, dist.get_world_size()) for layout in one for full in _whole()[:3]]


def _in_every_layout() -> list[Tensor]:
    return [_distributed(full, layout, 4) for layout in LAYOUTS for full in _whole()[:3]] + [_whole()[3]]


def _split_rows() -> list[Tensor]:
    return [_distributed(full, (Shard(0),), dist.get_world_size()) for full in _whole()]


def _all_on_the_first_rank() -> list[Tensor]:
    return [_distributed(_whole()[2], (Shard(0),), dist.get_world_size())]


def _outstanding_sums() -> list[Tensor]:
    mesh = _mesh(1, dist.get_world_size())
    return [DTensor.from_local(full / dist.get_world_size(), mesh, [Partial()]) for full in _whole()]


def _expected(grads: list[Tensor]) -> list[float]:
    return [nn.utils.get_total_norm(grads, norm_type).item() for norm_type in NORMS]


@pytest.mark.parametrize(
    ("ranks", "make", "whole"),
    [
        (1, _split_rows, _whole()),
        (2, _whole, _whole()),
        (2, _split_rows, _whole()),
        (4, _split_rows, _whole()),
        (2, _all_on_the_first_rank, _whole()[2:3]),
        (2, _every_layout, _whole()[:3] * 3),
        (4, _in_every_layout, [*_whole()[:3] * len(LAYOUTS), _whole()[3]]),
        (2, _outstanding_sums, _whole()),
    ],
)
def test_the_norm_is_that_of_the_whole_gradients(
    ranks: int, make: Callable[[], list[Tensor]], whole: list[Tensor]
) -> None:
    """What is split, replicated, empty on some rank or summed later counts once, and all ranks agree to the bit."""
    norms = on_ranks(ranks, _norms, make)
    assert all(rank == norms[0] for rank in norms)
    if make is _whole or ranks == 1:
        assert norms[0] == _expected(whole)
    else:
        assert norms[0] == pytest.approx(_expected(whole), rel=1e-6)


def test_no_gradients_have_norm_zero() -> None:
    assert total_norm([], 2.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm_type", NORMS)
def test_in_one_process_it_is_torchs_norm(dtype: torch.dtype, norm_type: float) -> None:
    grads = [grad.to(dtype) for grad in _whole()]
    ours, torchs = total_norm(grads, norm_type), nn.utils.get_total_norm(grads, norm_type)
    assert ours.dtype == torchs.dtype
    assert torch.equal(ours, torchs)


def _low_precision_norm() -> tuple[torch.dtype, float]:
    dist.init_process_group("gloo")
    norm = total_norm([_distributed(torch.full((64, 2), 300.0).half(), (Shard(0),), 2)], 2.0)
    return norm.dtype, norm.item()


def test_squares_of_half_precision_do_not_overflow_between_ranks() -> None:
    """Each rank's norm is 2400, whose square is beyond half precision."""
    results = on_ranks(2, _low_precision_norm)
    assert [dtype for dtype, _ in results] == [torch.float16] * 2
    assert results[0][1] == results[1][1] == pytest.approx(300 * 128**0.5, rel=1e-3)


# ---- clipping --------------------------------------------------------------------------------------------------------


def _with_gradients(module: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(module.parameters()):
        grad = _numbers(*parameter.shape, seed=seed)
        parameter.grad = distribute_like(grad, parameter)
    return module


def _whole_gradients(module: nn.Module) -> list[Tensor]:
    return [full_tensor(parameter.grad) for parameter in module.parameters() if parameter.grad is not None]


def _clipped(kind: str) -> tuple[float, list[Tensor]]:
    dist.init_process_group("gloo")
    module = _feed_forward()
    if kind == "2d":
        module = _shard_2d(module)
    elif kind == "hsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "mixed":  # the other layers stay plain
        fully_shard(module[0])
    else:
        fully_shard(module)
    _with_gradients(module)
    total = clip_norm(module.parameters(), 0.5, 2.0, True, module)
    return total.item(), _whole_gradients(module)


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 2), ("mixed", 2), ("hsdp", 4), ("2d", 4)])
def test_clipping_by_norm_scales_like_one_process(kind: str, ranks: int) -> None:
    reference = _with_gradients(_feed_forward())
    total = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    for got, grads in on_ranks(ranks, _clipped, kind):
        assert got == pytest.approx(total.item(), rel=1e-6)
        torch.testing.assert_close(grads, _whole_gradients(reference), rtol=1e-6, atol=1e-7)


def test_clipping_by_norm_in_one_process_is_torchs_to_the_bit() -> None:
    ours, torchs = _with_gradients(_feed_forward()), _with_gradients(_feed_forward())
    total = clip_norm(ours.parameters(), 0.5, 2.0, True, ours)
    assert torch.equal(total, nn.utils.clip_grad_norm_(torchs.parameters(), 0.5))
    assert all(map(torch.equal, _whole_gradients(ours), _whole_gradients(torchs)))


def test_small_gradients_are_not_scaled_up() -> None:
    module = _with_gradients(_feed_forward())
    before = copy.deepcopy(_whole_gradients(module))
    clip_norm(module.parameters(), 1e6, 2.0, True, module)
    assert all(map(torch.equal, _whole_gradients(module), before))


def _nonfinite(two_meshes: bool) -> tuple[str, bool, float]:
    dist.init_process_group("gloo")
    module = _shard_2d(_feed_forward()) if two_meshes else fully_shard(_feed_forward())
    _with_gradients(module)
    if dist.get_rank() == 0:
        local_tensor(module[2].weight.grad)[0, 0] = torch.nan
    before = [local_tensor(parameter.grad).clone() for parameter in module.parameters()]
    with pytest.raises(RuntimeError) as error:
        clip_norm(module.parameters(), 0.5, 2.0, True, module)
    after = [local_tensor(parameter.grad) for parameter in module.parameters()]
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    return str(error.value), same, clip_norm(module.parameters(), 0.5, 2.0, False, module).item()


@pytest.mark.parametrize(("two_meshes", "ranks"), [(False, 2), (True, 4)])
def test_a_gradient_that_is_not_finite_on_one_rank_is_named_on_all(two_meshes: bool, ranks: int) -> None:
    for message, untouched, regardless in on_ranks(ranks, _nonfinite, two_meshes):
        assert "non-finite (nan)" in message
        assert "Not finite are those of: 2.weight." in message
        assert untouched
        assert regardless != regardless  # nan


def _clipped_by_value() -> list[Tensor]:
    dist.init_process_group("gloo")
    module = _with_gradients(fully_shard(_feed_forward()))
    clip_value(module.parameters(), 0.25)
    return _whole_gradients(module)


def test_clipping_by_value_bounds_every_part() -> None:
    reference = _with_gradients(_feed_forward())
    nn.utils.clip_grad_value_(reference.parameters(), 0.25)
    for grads in on_ranks(2, _clipped_by_value):
        assert all(map(torch.equal, grads, _whole_gradients(reference)))


def _outstanding_sum_by_value() -> list[float]:
    dist.init_process_group("gloo")
    mesh = _mesh(1, 2)
    parameter = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.tensor([3.0, -0.1]), mesh, [Partial()])
    clip_value([parameter], 1.0)
    return full_tensor(parameter.grad).tolist()


def test_sums_are_taken_before_they_are_bounded() -> None:
    assert on_ranks(2, _outstanding_sum_by_value) == [[1.0, pytest.approx(-0.2)]] * 2


# ---- optimizers and modules ------------------------------------------------------------------------------------------


def _optimizer_state_sharded_late() -> list[Tensor]:
    """A step in one process, then sharding, then a step on shards."""
    dist.init_process_group("gloo")
    module = _with_gradients(_feed_forward())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    optimizer.step()
    states = [optimizer.state[parameter] for parameter in module.parameters()]
    fully_shard(module)
    optimizer.param_groups[0]["params"] = list(module.parameters())
    optimizer.state.clear()
    optimizer.state.update(zip(module.parameters(), states, strict=True))
    shard_optimizer_state(optimizer)
    assert all(isinstance(state["exp_avg"], DTensor) for state in states)
    assert all(type(state["step"]) is Tensor for state in states)
    _with_gradients(module)
    optimizer.step()
    return [full_tensor(parameter) for parameter in module.parameters()]


def test_an_optimizer_steps_on_with_its_state_sharded() -> None:
    module = _with_gradients(_feed_forward())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    optimizer.step()
    optimizer.step()
    for parameters in on_ranks(2, _optimizer_state_sharded_late):
        assert all(map(torch.equal, parameters, module.parameters()))


def _synchronised() -> tuple[list[Tensor], bool]:
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    module[0].weight.data = module[0].weight.data.t()  # not contiguous
    module[1].running_mean.normal_()
    module[1].num_batches_tracked.fill_(dist.get_rank() + 5)
    fully_shard(module[2])
    own = local_tensor(module[2].weight).clone()
    sync_from_rank_zero(module, torch.device("cpu"))
    values = [*module[0].parameters(), *module[1].parameters(), *module[1].buffers()]
    return [value.detach().contiguous() for value in values], torch.equal(own, local_tensor(module[2].weight))


def test_every_rank_gets_the_values_of_the_first() -> None:
    """Plain ones only: parts stay, and what is on the meta device has no values."""
    (first, first_stays), (second, second_stays) = on_ranks(2, _synchronised)
    assert all(map(torch.equal, first, second))
    assert first[-1] == 5
    assert first_stays
    assert second_stays
