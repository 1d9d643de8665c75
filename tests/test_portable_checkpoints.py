"""A checkpoint of any strategy and number of ranks goes on under any other: the next step is the same."""

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning.fabric import Fabric
from lightning.fabric.strategies._dtensor import full_tensor, local_shard
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.testing import on_ranks, preload

preload(
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "lightning.fabric.strategies.fsdp",
    "lightning.fabric.strategies.model_parallel",
)
TIMEOUT = timedelta(seconds=30)
STEPS = 2  # before a checkpoint
CLOSE = 1e-6
State = dict[str, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """Tied and frozen parameters, a buffer that changes, extra state, and sizes that ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.block = Block()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("forwards", torch.zeros(()))
        self.seen = 0

    def forward(self, words: Tensor) -> Tensor:
        self.forwards += 1
        self.seen += 1
        return self.head(self.frozen(self.block(self.embed(words))))

    def get_extra_state(self) -> State:
        return {"seen": self.seen}

    def set_extra_state(self, state: State) -> None:
        self.seen = state["seen"]


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


# -- strategies


def _by_tensor(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    if isinstance(module, Critic):
        return module  # on every rank
    plan = {"block.up": ColwiseParallel(), "block.down": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


def _by_both(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    module = _by_tensor(module, mesh)
    if isinstance(module, Net):
        fully_shard(module.block, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def _strategy(name: str, ranks: int) -> str | Strategy:
    made: dict[str, Any] = {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(timeout=TIMEOUT),
        "fsdp": lambda: FSDPStrategy(auto_wrap_policy={Block}, timeout=TIMEOUT),
        "hybrid": lambda: FSDPStrategy(
            sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2), auto_wrap_policy={Block}, timeout=TIMEOUT
        ),
        "tensor parallel": lambda: ModelParallelStrategy(_by_tensor, 1, ranks, timeout=TIMEOUT),
        "2-D": lambda: ModelParallelStrategy(_by_both, 2, 2, timeout=TIMEOUT),
    }
    return made[name]()


RANKS = (1, 2, 4)
# which strategies there are on a number of ranks: hybrid and 2-D are those with two axes, of two ranks each
NAMES = {
    1: ("single", "ddp", "fsdp", "tensor parallel"),
    2: ("ddp", "fsdp", "tensor parallel"),
    4: ("ddp", "fsdp", "hybrid", "tensor parallel", "2-D"),
}
SHARDING = ("fsdp", "hybrid", "tensor parallel", "2-D")


def _sources() -> Iterator[tuple[str, int, str]]:
    """Who saves, on how many ranks, in which form."""
    for ranks in RANKS:
        for name in NAMES[ranks]:
            yield name, ranks, "file"
            if name in SHARDING:
                yield name, ranks, "folder"


# -- training


def _set_up(name: str, ranks: int, seed: int, compiled: bool = False) -> tuple[Fabric, State]:
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=_strategy(name, ranks))
    fabric.launch()
    torch.manual_seed(seed)
    net: Any = Net()
    critic = fabric.setup_module(Critic())
    net = fabric.setup_module(torch.compile(net, backend="eager") if compiled else net)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:0:-1]}, {"params": trained[:1], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.05, eps=1e-6)
    sgd = torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(adam, step_size=1, gamma=0.7)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    adam, sgd = fabric.setup_optimizers(adam, sgd)
    state = {"net": net, "critic": critic, "adam": adam, "sgd": sgd, "scheduler": scheduler, "scaler": scaler}
    return fabric, {**state, "step": 0, "history": []}


def _step(fabric: Fabric, state: State) -> float:
    generator = torch.Generator().manual_seed(state["step"])
    words = torch.randint(13, (16,), generator=generator)
    features = torch.randn(16, 6, generator=generator)
    replicas = getattr(fabric.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
    mine = slice(replicas["rank"], None, replicas["num_replicas"])
    loss = nn.functional.cross_entropy(state["net"](words[mine]), words.roll(1)[mine])
    loss = loss + state["critic"](features[mine]).square().mean()
    fabric.backward(loss)
    for optimizer in (state["adam"], state["sgd"]):
        optimizer.step()
        optimizer.zero_grad()
    state["scheduler"].step()
    state["step"] += 1
    mean: float = fabric.all_reduce(loss.detach()).item()
    state["history"] = [*state["history"], mean]
    return mean


def _weights(state: State) -> dict[str, Tensor]:
    """Return parameters and buffers, on this rank as they are."""
    return {
        f"{key}.{name}".replace("_orig_mod.", ""): value.detach()
        for key in ("net", "critic")
        for name, value in state[key].module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }


def _distance(own: Tensor, expected: Tensor) -> float:
    """The largest difference in what this rank has."""
    if isinstance(own, DTensor):
        own, expected = own.to_local(), local_shard(expected, own)
    assert own.shape == expected.shape
    return (own - expected).abs().max().item() if own.numel() else 0.0


def _plain(state: State) -> State:
    """What has to be the very same, as only a load makes it."""
    return {
        "step": state["step"],
        "history": state["history"],
        "scaler": state["scaler"].state_dict(),
        "scheduler": state["scheduler"].state_dict(),
        "rates": [group["lr"] for key in ("adam", "sgd") for group in state[key].param_groups],
        "seen": state["net"].module.get_extra_state(),
    }


def _path(folder: str, source: tuple[str, int, str]) -> Path:
    return Path(folder, "-".join(map(str, source)))


def _save_all(folder: str, ranks: int) -> None:
    """Train under each strategy, save in each form, and note how it goes on."""
    for name in NAMES[ranks]:
        fabric, state = _set_up(name, ranks, seed=1)
        for _ in range(STEPS):
            _step(fabric, state)
        for source in _sources():
            if source[:2] == (name, ranks):
                in_folder = source[2] == "folder"
                with mock.patch.object(type(fabric.strategy), "_writes_folders", in_folder, create=True):
                    fabric.save(_path(folder, source), state, blocking=not in_folder)
        expected = {"plain": _plain(state), "loss": _step(fabric, state), "weights": {}}
        for key, value in _weights(state).items():
            expected["weights"][key] = full_tensor(value)
        fabric.strategy.wait_for_saves()  # folders are written while the step is made
        if fabric.is_global_zero:
            torch.save(expected, Path(folder, f"{name}-{ranks}.expected"))


def _load_all(folder: str, ranks: int, compiled: bool = False) -> dict[tuple[Any, ...], str]:
    """Load every checkpoint under each strategy, and return what is wrong in each cell."""
    problems = {}
    for name in ("single",) if compiled else NAMES[ranks]:
        fabric, state = _set_up(name, ranks, seed=2, compiled=compiled)
        for source in _sources():
            expected = torch.load(Path(folder, f"{source[0]}-{source[1]}.expected"), weights_only=True)
            remainder = fabric.load(_path(folder, source), state)
            plain, loss, weights = _plain(state), _step(fabric, state), _weights(state)
            off = {key: _distance(weights[key], value) for key, value in expected["weights"].items()}
            off["loss"] = abs(loss - expected["loss"])
            found = [f"{key} is off by {by:g}" for key, by in off.items() if not by <= CLOSE]
            found += [f"{key} is {plain[key]}" for key, value in expected["plain"].items() if plain[key] != value]
            found += [f"{sorted(remainder)} is left"] if remainder else []
            problems[(*source, name, ranks)] = "; ".join(found)
    return problems


@pytest.mark.slow
def test_what_any_strategy_has_saved_goes_on_under_any_other(tmp_path: Path) -> None:
    for ranks in RANKS:
        on_ranks(ranks, _save_all, str(tmp_path), ranks)
    cells: dict[tuple[Any, ...], str] = {}
    for ranks in RANKS:
        (first, *others) = on_ranks(ranks, _load_all, str(tmp_path), ranks)
        assert all(other.keys() == first.keys() for other in others)
        cells |= {cell: "; ".join({told[cell] for told in (first, *others)} - {""}) for cell in first}
    (compiled,) = on_ranks(1, _load_all, str(tmp_path), 1, compiled=True)
    assert {cell: text for cell, text in cells.items() if text} == {}
    assert {cell: text for cell, text in compiled.items() if text} == {}
    targets = [(name, ranks) for ranks in RANKS for name in NAMES[ranks]]
    assert cells.keys() == {(*source, *target) for source, target in itertools.product(_sources(), targets)}
    print(f"{len(cells) + len(compiled)} cells loaded")


def _behind_a_url(folder: str) -> list[float]:
    """Shards go to a file system that only fsspec knows, and come back; so do their copies on a disk."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    url = f"simplecache::file://{folder}/remote/checkpoint"
    losses = []
    for path in (url, f"{folder}/remote/checkpoint"):
        torch.manual_seed(0)
        model, optimizer = fabric.setup(model := nn.Linear(4, 4), torch.optim.Adam(model.parameters()))
        if not losses:
            fabric.save(url, {"model": model, "optimizer": optimizer})
            losses.append(float(model(torch.ones(1, 4)).sum()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        fabric.load(path, {"model": model, "optimizer": optimizer})
        losses.append(float(model(torch.ones(1, 4)).sum()))
    return losses


def test_shards_go_behind_a_url_and_come_back(tmp_path):
    for losses in on_ranks(2, _behind_a_url, str(tmp_path)):
        assert len(set(losses)) == 1
        assert losses[0] != 0
