"""Two models in one program: two ranks train a GAN, and a student of a frozen teacher, as one process does."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from lightning.fabric import Fabric
from lightning.fabric.strategies import Strategy
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

STEPS = 4
BATCH = 8


def _fsdp() -> Strategy:
    from lightning.fabric.strategies import FSDPStrategy

    return FSDPStrategy(auto_wrap_policy={nn.Linear})


def _sharded_over_a_mesh() -> Strategy:
    from lightning.fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(_shard, data_parallel_size=2, tensor_parallel_size=1)


def _shard(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh["data_parallel"])


STRATEGIES: dict[str, Callable[[], str | Strategy]] = {
    "ddp": lambda: "ddp",
    "fsdp": _fsdp,
    "model_parallel": _sharded_over_a_mesh,
}
JOINT, SEPARATE, META = "joint", "separate", "made on meta"
WAYS = [
    ("ddp", JOINT),
    ("ddp", SEPARATE),
    ("fsdp", JOINT),
    ("fsdp", SEPARATE),
    ("fsdp", META),
    ("model_parallel", SEPARATE),
    ("model_parallel", META),
]


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 1))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def set_up(fabric: Fabric, make: Callable[[], nn.Module], way: str):
    with fabric.init_module(empty_init=True if way == META else None):
        model = make()
    if way == JOINT:
        return fabric.setup(model, optimizer_of(model))
    model = fabric.setup_module(model)
    return model, fabric.setup_optimizers(optimizer_of(model))


def shares(fabric: Fabric, *sizes: int) -> Iterator[list[Tensor]]:
    """This rank's part of each step's batches, of vectors of the given sizes."""
    source = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield [
            torch.randn(BATCH, size, generator=source)[fabric.global_rank :: fabric.world_size] + 1 for size in sizes
        ]


def weights(fabric: Fabric, *models) -> list[Tensor]:
    """All weights in plain form, the same on every rank."""
    states = [fabric.strategy.get_module_state_dict(model.module) for model in models]
    values = [value.detach() for state in states for value in state.values()]
    return [value.full_tensor() if isinstance(value, DTensor) else value.clone() for value in values]


def train_gan(fabric: Fabric, way: str) -> list[Tensor]:
    """Return the weights, and the losses over all ranks of both players."""
    torch.manual_seed(0)
    make_fake, make_fake_optimizer = set_up(fabric, generator, way)
    judge, judge_optimizer = set_up(fabric, discriminator, way)
    losses = []
    for noise, real in shares(fabric, 3, 2):
        fake = make_fake(noise)

        judge_optimizer.zero_grad()
        says_real, says_fake = judge(real), judge(fake.detach())
        judged = binary_cross_entropy_with_logits(says_real, torch.ones_like(says_real))
        judged = judged + binary_cross_entropy_with_logits(says_fake, torch.zeros_like(says_fake))
        fabric.backward(judged, model=judge)
        judge_optimizer.step()

        make_fake_optimizer.zero_grad()
        says_real = judge(fake)
        fooled = binary_cross_entropy_with_logits(says_real, torch.ones_like(says_real))
        fabric.backward(fooled, model=make_fake)
        make_fake_optimizer.step()
        losses.append(fabric.all_reduce(torch.stack([judged, fooled]).detach()))
    return [*weights(fabric, make_fake, judge), *losses]


def train_student(fabric: Fabric, way: str) -> list[Tensor]:
    """Return the weights of teacher and student; the student learns what the teacher computes."""
    torch.manual_seed(0)
    with fabric.init_module():
        teacher = generator().requires_grad_(False).eval()
    teacher = fabric.setup_module(teacher)
    student, optimizer = set_up(fabric, generator, way)
    for (batch,) in shares(fabric, 3):
        with torch.no_grad():
            target = teacher(batch)
        optimizer.zero_grad()
        fabric.backward(mse_loss(student(batch), target), model=student)
        optimizer.step()
    return weights(fabric, teacher, student)


def _on_a_rank(train: Callable[[Fabric, str], list[Tensor]], strategy: str, way: str) -> list[Tensor]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=STRATEGIES[strategy]())
    fabric.launch()
    return train(fabric, way)


@pytest.mark.parametrize("train", [train_gan, train_student])
@pytest.mark.parametrize(("strategy", "way"), WAYS)
def test_two_ranks_train_two_models_as_one_process_does(
    train: Callable[[Fabric, str], list[Tensor]], strategy: str, way: str
) -> None:
    alone = train(Fabric(accelerator="cpu", devices=1), JOINT)
    first, second = on_ranks(2, _on_a_rank, train, strategy, way)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-6)


def test_a_frozen_teacher_stays_as_it_is() -> None:
    torch.manual_seed(0)
    before = list(generator().state_dict().values())
    for way in ("ddp", "fsdp"):
        after = on_ranks(2, _on_a_rank, train_student, way, SEPARATE)[0]
        torch.testing.assert_close(after[: len(before)], before, rtol=0, atol=0)
        assert not torch.equal(after[len(before)], before[0])
