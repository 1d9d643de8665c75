"""``Fabric`` on two real ranks (gloo on the CPU): answers of one process, failures that everybody hears of."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric import Fabric
from lightning.fabric.testing import on_ranks


def launched(strategy="ddp", **flags):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, **flags)
    fabric.launch()
    return fabric


def train(fabric, accumulate=1, clip=None, joint=True):
    """Eight samples, SGD on the mean loss over all of them; returns the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    if joint:
        model, optimizer = fabric.setup(model, optimizer)
    else:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(optimizer)
    data = TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=8 // fabric.world_size // accumulate))
    for _ in range(3):
        for index, (x,) in enumerate(loader):
            is_last = (index + 1) % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not is_last):
                fabric.backward(model(x).square().mean() / accumulate)
            if is_last:
                if clip is not None:
                    fabric.clip_gradients(model, optimizer, **clip)
                optimizer.step()
                optimizer.zero_grad()
    return {name: value.tolist() for name, value in model.state_dict().items()}


def _train(kwargs):
    return train(launched(), **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"joint": False}, {"accumulate": 2}, {"clip": {"max_norm": 0.1}}, {"clip": {"clip_val": 0.01}}],
    ids=["plain", "separate-set-up", "accumulated", "clipped-by-norm", "clipped-by-value"],
)
def test_two_ranks_train_like_one_process(kwargs, tmp_path):
    alone = train(Fabric(accelerator="cpu", devices=1), **kwargs)
    first, second = on_ranks(2, _train, kwargs, tmp=tmp_path)
    assert first == second
    for name, value in alone.items():
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def _collectives():
    fabric = launched()
    rank = fabric.global_rank
    gathered = fabric.all_gather({"rank": rank, "pair": [torch.tensor([rank, 1.0])]})
    return {
        "ranks": (fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.is_global_zero),
        "gathered": (gathered["rank"].tolist(), gathered["pair"][0].tolist()),
        "mean": fabric.all_reduce(float(rank)).item(),
        "sum": fabric.all_reduce(torch.tensor(float(rank + 1)), reduce_op="sum").item(),
        "broadcast": fabric.broadcast(f"from {rank}", src=1),
    }


def test_collectives(tmp_path):
    results = on_ranks(2, _collectives, tmp=tmp_path)
    assert [result.pop("ranks") for result in results] == [(2, 0, 0, True), (2, 1, 1, False)]
    expected = {"gathered": ([0, 1], [[0.0, 1.0], [1.0, 1.0]]), "mean": 0.5, "sum": 3.0, "broadcast": "from 1"}
    assert results == [expected, expected]


def _differentiable_gather():
    fabric = launched()
    x = torch.tensor([float(fabric.global_rank + 1)], requires_grad=True)
    (fabric.all_gather(x, sync_grads=True).sum() * (fabric.global_rank + 1)).backward()
    return x.grad.item()


def test_all_gather_lets_gradients_flow(tmp_path):
    assert on_ranks(2, _differentiable_gather, tmp=tmp_path) == [3.0, 3.0]


def _samples_of_epochs():
    fabric = launched()
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True))
    return [torch.cat([batch[0] for batch in loader]).tolist() for _ in range(2)]


def test_each_rank_sees_its_own_part_and_epochs_differ(tmp_path):
    first, second = on_ranks(2, _samples_of_epochs, tmp=tmp_path)
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(8))
    assert first[0] + second[0] != first[1] + second[1]


def _save_and_load(path):
    fabric = launched()
    torch.manual_seed(fabric.global_rank)  # DDP makes the ranks agree
    model = nn.Linear(2, 2)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    expected = model.weight.detach().clone()
    fabric.save(path, {"model": model, "opt": optimizer, "step": 3})
    with torch.no_grad():
        model.weight.zero_()
    state = {"model": model, "opt": optimizer, "step": 0}
    rest = fabric.load(path, state)  # at once: `save` has returned, so the file is there for this rank too
    return rest, state["step"], torch.equal(model.weight, expected)


def test_load_right_after_save_restores_every_rank(tmp_path):
    assert on_ranks(2, _save_and_load, tmp_path / "a.ckpt", tmp=tmp_path) == [({}, 3, True)] * 2


def _failing_save(folder):
    fabric = launched()
    state = {"n": (lambda: None) if fabric.global_rank == 0 else 1}
    try:
        fabric.save(folder / "a.ckpt", state)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return message, fabric.all_reduce(1.0, reduce_op="sum").item()


def test_a_save_that_fails_on_one_rank_raises_on_all_and_they_go_on(tmp_path):
    results = on_ranks(2, _failing_save, tmp_path, tmp=tmp_path)
    assert [total for _, total in results] == [2.0, 2.0]
    assert "Rank 0 failed" in results[1][0]
    assert not (tmp_path / "a.ckpt").exists()


def _rank_zero_first(folder, fails):
    fabric = launched()
    try:
        with fabric.rank_zero_first():
            if fails and fabric.global_rank == 0:
                raise ValueError("no network")
            (folder / f"{fabric.global_rank}").touch()
            seen = sorted(path.name for path in folder.iterdir() if path.name in "01")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return seen


def test_rank_zero_goes_first(tmp_path):
    (tmp_path / "out").mkdir()
    assert on_ranks(2, _rank_zero_first, tmp_path / "out", False, tmp=tmp_path) == [["0"], ["0", "1"]]


def test_an_error_on_rank_zero_reaches_the_waiting_ranks(tmp_path):
    first, second = on_ranks(2, _rank_zero_first, tmp_path, True, tmp=tmp_path)
    assert first == "ValueError: no network"
    assert "Rank 0 failed" in second
    assert "no network" in second


def _step_methods():
    class Net(nn.Linear):
        def training_step(self, x):
            return self(x).sum()

        def unmarked(self, x):
            return self(x).sum()

    fabric = launched()
    torch.manual_seed(0)
    model = fabric.setup(Net(2, 1))
    fabric.backward(model.training_step(torch.full((1, 2), float(fabric.global_rank))))
    try:
        model.unmarked(torch.ones(1, 2))
    except RuntimeError as error:
        refused = "mark_forward_method('unmarked')" in str(error)
    model.mark_forward_method("unmarked")
    model.zero_grad()
    fabric.backward(model.unmarked(torch.full((1, 2), float(fabric.global_rank))))
    return refused, model.weight.grad.tolist()


def test_step_methods_synchronise_gradients(tmp_path):
    assert on_ranks(2, _step_methods, tmp=tmp_path) == [(True, [[0.5, 0.5]])] * 2


def _several_models():
    """A generator and a discriminator, stepped in turn."""
    fabric = launched()
    torch.manual_seed(0)
    pairs = []
    for _ in range(2):
        model = nn.Linear(2, 2)
        pairs.append(fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    for _ in range(2):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            fabric.backward(model(torch.ones(1, 2) * (fabric.global_rank + 1)).square().sum())
            optimizer.step()
    return [model.weight.tolist() for model, _ in pairs]


def test_several_models_and_optimizers(tmp_path):
    first, second = on_ranks(2, _several_models, tmp=tmp_path)
    assert first == second
    assert first[0] != first[1]


def _fails_on_one_rank():
    fabric = launched()
    if fabric.global_rank == 1:
        raise ValueError("the cause")
    fabric.barrier()


def test_the_first_cause_is_what_the_user_sees(tmp_path):
    with pytest.raises(Exception, match="the cause") as caught:
        on_ranks(2, _fails_on_one_rank, tmp=tmp_path)
    assert "rank 1" in str(caught.value).lower()
