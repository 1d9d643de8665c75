"""What every registered strategy keeps: the same training, files and answers as plain torch in one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies import STRATEGY_REGISTRY, ParallelStrategy, Strategy
from lightning.fabric.testing import on_ranks

NAMES = STRATEGY_REGISTRY.available_strategies()
STEPS = 3
BATCH = 4


def _ready(name: str, processes: int = 1) -> Strategy:
    strategy: Strategy = STRATEGY_REGISTRY.get(name)
    strategy.accelerator = CPUAccelerator()
    if isinstance(strategy, ParallelStrategy):
        strategy.parallel_devices = [torch.device("cpu")] * processes
        if strategy.start_method is not None:
            strategy.cluster_environment = LightningEnvironment()
    strategy.setup_environment()
    return strategy


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _batches(share: slice = slice(None)) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(BATCH, 3, generator=generator)[share]


def _trained_by(strategy: Strategy, share: slice = slice(None)) -> nn.Module:
    model = _model()
    strategy.module_to_device(model)
    module, [optimizer], _ = strategy.setup_module_and_optimizers(model, [_sgd(model)])
    for batch in _batches(share):
        optimizer.zero_grad()
        strategy.backward(module(strategy.batch_to_device(batch)).pow(2).mean(), module)
        strategy.optimizer_step(optimizer)
    return model


def _trained_by_torch() -> dict[str, Any]:
    model = _model()
    optimizer = _sgd(model)
    for batch in _batches():
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("name", NAMES)
class TestOneRank:
    @pytest.fixture
    def strategy(self, name: str) -> Iterator[Strategy]:
        strategy = _ready(name)
        yield strategy
        strategy.teardown()
        strategy.teardown()

    def test_training_is_that_of_torch_bit_by_bit(self, strategy: Strategy) -> None:
        torch.testing.assert_close(_trained_by(strategy).state_dict(), _trained_by_torch(), rtol=0, atol=0)

    def test_gradients_accumulate_without_synchronisation(self, strategy: Strategy) -> None:
        model = _model()
        module = strategy.setup_module(model)
        control = strategy._backward_sync_control
        for batch in _batches():
            if control is None:
                strategy.backward(module(batch).sum(), module)
                continue
            with control.no_backward_sync(module, enabled=True):
                strategy.backward(module(batch).sum(), module)
        reference = _model()
        reference(torch.cat(list(_batches()))).sum().backward()
        for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad)

    def test_what_is_saved_is_what_is_loaded(self, strategy: Strategy, tmp_path: Path) -> None:
        model = _model()
        module, [optimizer], _ = strategy.setup_module_and_optimizers(model, [_sgd(model)])
        strategy.backward(module(torch.ones(1, 3)).sum(), module)
        strategy.optimizer_step(optimizer)
        path = tmp_path / "below" / "x.pt"
        strategy.save_checkpoint(path, {"model": module, "optimizer": optimizer, "step": 7, "more": [1]})
        assert torch.load(path)["model"].keys() == _model().state_dict().keys()

        other = _model()
        state = {"model": strategy.setup_module(other), "optimizer": _sgd(other), "step": 0}
        assert strategy.load_checkpoint(path, state) == {"more": [1]}
        assert state["step"] == 7
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(state["optimizer"].state_dict(), optimizer.state_dict(), rtol=0, atol=0)

    def test_a_filter_drops_entries(self, strategy: Strategy, tmp_path: Path) -> None:
        state = {"model": strategy.setup_module(_model()), "step": 1}
        strategy.save_checkpoint(tmp_path / "x.pt", state, filter={"model": lambda name, value: "bias" not in name})
        checkpoint = strategy.load_checkpoint(tmp_path / "x.pt")
        assert checkpoint["model"].keys() == {"0.weight", "2.weight"}
        assert checkpoint["step"] == 1

    def test_gradients_are_clipped(self, strategy: Strategy) -> None:
        model = _model()
        module, [optimizer], _ = strategy.setup_module_and_optimizers(model, [_sgd(model)])
        strategy.backward(module(torch.full((1, 3), 10.0)).sum(), module)
        before = strategy.clip_gradients_norm(module, optimizer, max_norm=0.5)
        assert before > 0.5
        torch.testing.assert_close(strategy.clip_gradients_norm(module, optimizer, max_norm=9.0), torch.tensor(0.5))
        strategy.clip_gradients_value(module, optimizer, clip_val=0.01)
        assert all(p.grad is not None and p.grad.abs().max() <= 0.01 for p in model.parameters())

    def test_collectives_of_one(self, strategy: Strategy) -> None:
        tensor = torch.tensor([1.0, 2.0])
        for op in ("mean", "avg", "sum"):
            assert torch.equal(strategy.all_reduce(tensor, reduce_op=op), torch.tensor([1.0, 2.0]))
        assert torch.equal(strategy.all_gather(tensor).flatten(), tensor)
        assert strategy.all_reduce("text") == "text"
        assert strategy.broadcast(tensor) is tensor
        assert strategy.reduce_boolean_decision(True) is True
        assert strategy.reduce_boolean_decision(False, all=False) is False
        strategy.barrier("here")
        strategy.raise_on_all(None, "testing")
        with pytest.raises(ValueError, match="mine"):
            strategy.raise_on_all(ValueError("mine"), "testing")

    def test_what_is_made_inside_is_on_the_device(self, strategy: Strategy) -> None:
        with strategy.module_init_context(empty_init=None), strategy.tensor_init_context():
            assert nn.Linear(1, 1).weight.device == torch.ones(1).device == strategy.root_device


def test_the_table_and_the_classes_agree() -> None:
    for name in NAMES:
        entry, strategy = STRATEGY_REGISTRY.entry(name), STRATEGY_REGISTRY.get(name)
        assert (strategy.start_method, type(strategy).runs_on) == (entry.start_method, entry.runs_on), name


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _train_on_half(name: str) -> dict[str, Any]:
    strategy = _ready(name, processes=2)
    half = BATCH // 2
    start = half * strategy.global_rank
    model = _trained_by(strategy, slice(start, start + half))
    strategy.teardown()
    return {key: value.clone() for key, value in model.state_dict().items()}


def _talk(name: str, folder: str) -> dict[str, Any]:
    strategy = _ready(name, processes=2)
    rank = strategy.global_rank
    tensor = torch.tensor([float(rank), 1.0])
    leaf = torch.tensor([1.0], requires_grad=True)
    (strategy.all_gather(leaf, sync_grads=True) * (rank + 1.0)).sum().backward()
    answers = {
        "world": (rank, strategy.world_size, strategy.is_global_zero),
        "mean": strategy.all_reduce(tensor.clone()).tolist(),
        "sum": strategy.all_reduce(tensor.clone(), reduce_op="sum").tolist(),
        "gathered": strategy.all_gather(tensor).tolist(),
        "gathered gradient": leaf.grad.item() if leaf.grad is not None else None,
        "broadcast": strategy.broadcast({"from": rank}, src=1),
        "all say yes": strategy.reduce_boolean_decision(rank == 0),
        "one says yes": strategy.reduce_boolean_decision(rank == 0, all=False),
        "sampler": strategy.distributed_sampler_kwargs,
    }
    model = nn.Linear(1, 1)
    path = Path(folder) / "x.pt"
    strategy.save_checkpoint(path, {"model": strategy.setup_module(model), "rank": rank})
    strategy.barrier("saved")
    answers["rank that wrote"] = strategy.load_checkpoint(path)["rank"]
    strategy.teardown()
    return answers


@pytest.mark.parametrize("name", [name for name in NAMES if STRATEGY_REGISTRY.entry(name).start_method == "popen"])
class TestTwoRanks:
    def test_halves_of_a_batch_train_like_the_whole(self, name: str) -> None:
        expected = _trained_by_torch()
        first, second = on_ranks(2, _train_on_half, name)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)

    def test_ranks_talk(self, name: str, tmp_path: Path) -> None:
        for rank, answers in enumerate(on_ranks(2, _talk, name, str(tmp_path))):
            assert answers == {
                "world": (rank, 2, rank == 0),
                "mean": [0.5, 1.0],
                "sum": [1.0, 2.0],
                "gathered": [[0.0, 1.0], [1.0, 1.0]],
                "gathered gradient": 3.0,
                "broadcast": {"from": 1},
                "all say yes": False,
                "one says yes": True,
                "sampler": {"num_replicas": 2, "rank": rank},
                "rank that wrote": 0,
            }
