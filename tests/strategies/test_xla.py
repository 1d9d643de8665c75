"""One replica per XLA device: on one device against torch_xla and the stand-in, on two against the stand-in."""

import ast
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.xla_stand_in import batches, install, reduce_gradients, sync, xla  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning.fabric
from lightning.fabric import Fabric
from lightning.fabric.accelerators import XLAAccelerator
from lightning.fabric.plugins import HalfPrecision, MixedPrecision, XLAPrecision
from lightning.fabric.strategies.xla import XLAStrategy
from lightning.fabric.testing import RankError, on_ranks
from lightning.fabric.testing.contract import check_strategy
from lightning.fabric.utilities.distributed import ReduceOp

# which torch_xla itself calls
pytestmark = pytest.mark.filterwarnings("ignore:Use torch_xla.device instead:DeprecationWarning")


class Tied(nn.Module):
    """A module with a parameter that has two names, and buffers of several kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, math.inf]))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def _model(seed=0):
    torch.manual_seed(seed)
    return Tied()


def _plain(max_norm=None, clip_val=None, micro_batches=1):
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for index, (x, y) in enumerate(batches()):
        (nn.functional.cross_entropy(model(x), y) / micro_batches).backward()
        if (index + 1) % micro_batches:
            continue
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if clip_val:
            nn.utils.clip_grad_value_(model.parameters(), clip_val)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _train(fabric, micro_batches=1, closure=False, **clip):
    model = _model()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9))
    for index, (x, y) in enumerate(batches(fabric.global_rank, fabric.world_size)):
        x, y = fabric.to_device((x, y))

        def compute(x=x, y=y):
            loss = nn.functional.cross_entropy(model(x), y) / micro_batches
            fabric.backward(loss)
            return loss

        is_last = (index + 1) % micro_batches == 0
        if closure:
            optimizer.step(compute)
        else:
            with fabric.no_backward_sync(model, enabled=not is_last):
                compute()
        if not is_last:
            continue
        if clip:
            fabric.clip_gradients(model, optimizer, **clip)
        if not closure:
            optimizer.step()
        optimizer.zero_grad()
    return model


def _state(module):
    return {name: value.cpu() for name, value in module.state_dict().items()}


def _assert_same(state, module):
    torch.testing.assert_close(state, dict(module.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["single_xla", "xla"])
def fabric(request, xla):  # noqa: F811
    fabric = Fabric(accelerator="tpu", devices=1, strategy=request.param)
    fabric.launch(_nothing)
    yield fabric
    fabric.strategy.teardown()


def _nothing(fabric):
    pass


class TestOnOneDevice:
    """All of it runs against torch_xla, too."""

    def test_training_is_that_without_fabric(self, fabric):
        _assert_same(_state(_train(fabric)), _plain())

    def test_clipping_by_norm_and_by_value(self, fabric):
        _assert_same(_state(_train(fabric, max_norm=0.1)), _plain(max_norm=0.1))
        _assert_same(_state(_train(fabric, clip_val=0.01)), _plain(clip_val=0.01))

    def test_the_norm_comes_back_and_must_be_finite(self, fabric):
        module = nn.Linear(2, 1, bias=False)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=1.0))
        model(torch.tensor([[3.0, 4.0]], device=fabric.device)).sum().backward()
        assert fabric.clip_gradients(model, optimizer, max_norm=1.0).item() == pytest.approx(5.0)
        model.weight.grad.fill_(math.nan)
        with pytest.raises(RuntimeError, match="non-finite.*weight"):
            fabric.clip_gradients(model, optimizer, max_norm=1.0)

    def test_a_closure(self, fabric):
        _assert_same(_state(_train(fabric, closure=True)), _plain())

    def test_a_tied_parameter_stays_one(self, fabric):
        module = _model()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        model, _ = fabric.setup(module, optimizer)
        assert model.first.weight is model.second.weight
        assert model.first.weight.device == fabric.device
        parameters = optimizer.param_groups[0]["params"]
        assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]

    def test_a_checkpoint_is_restored_and_can_be_read_without_xla(self, fabric, tmp_path):
        model = _train(fabric)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fabric.save(tmp_path / "a.pt", {"model": model, "optimizer": optimizer, "step": 3})
        written = torch.load(tmp_path / "a.pt")
        assert {value.device.type for value in written["model"].values()} == {"cpu"}
        _assert_same(written["model"], _plain())

        module = _model(seed=1)
        other, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.5))
        state = {"model": other, "optimizer": optimizer, "step": 0}
        assert fabric.load(tmp_path / "a.pt", state) == {}
        _assert_same(_state(other), _plain())
        assert (state["step"], optimizer.param_groups[0]["lr"]) == (3, 0.1)

    def test_collectives(self, fabric):
        shape = () if fabric.strategy.start_method is None else (1,)
        gathered = fabric.all_gather({"a": 1.5, "b": torch.tensor([True, False])})
        assert gathered["a"].shape == shape
        assert gathered["b"].cpu().reshape(2).tolist() == [True, False]
        assert fabric.all_reduce(torch.tensor([3]), reduce_op="sum").item() == 3
        assert fabric.all_reduce(torch.tensor(3.0)).item() == 3.0
        assert fabric.broadcast({"x": [1]}) == {"x": [1]}
        assert fabric.strategy.reduce_boolean_decision(True)
        assert not fabric.strategy.reduce_boolean_decision(False, all=False)
        fabric.barrier()
        with pytest.raises(KeyError, match="mine"):
            fabric.strategy.raise_on_all(KeyError("mine"), "testing")
        fabric.strategy.raise_on_all(None, "testing")

    def test_modules_are_made_on_the_device(self, fabric):
        with fabric.init_module():
            assert nn.Linear(2, 2).weight.device == fabric.device
        with fabric.init_tensor():
            assert torch.ones(2).device == fabric.device

    def test_random_numbers_on_the_device_follow_the_seed(self, fabric):
        torch.manual_seed(3)
        fabric.strategy.setup_environment()
        first = torch.rand(4, device=fabric.device).cpu()
        torch.manual_seed(3)
        fabric.strategy.setup_environment()
        assert torch.equal(torch.rand(4, device=fabric.device).cpu(), first)


class TestBatches:
    def test_are_on_the_device_and_all_there(self, fabric):
        loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.arange(7), torch.arange(7.0)), batch_size=2))
        assert len(loader) == 4
        for _ in range(2):
            seen = list(loader)
            assert {tensor.device for batch in seen for tensor in batch} == {fabric.device}
            assert [batch[0].tolist() for batch in seen] == [[0, 1], [2, 3], [4, 5], [6]]

    def test_an_epoch_may_be_left_early(self, fabric):
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(100)))
        assert next(iter(loader)).item() == 0
        assert len(list(loader)) == 100

    def test_an_error_of_the_dataset_is_not_the_end_of_the_epoch(self, fabric):
        seen = []
        with pytest.raises(ZeroDivisionError):
            for batch in fabric.setup_dataloaders(DataLoader(FailsAtThree(), batch_size=1)):
                seen.append(batch.item())
        assert seen == [0, 1, 2]

    def test_attributes_are_the_loaders_own(self, fabric):
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(4), batch_size=2, shuffle=True))
        assert loader.batch_size == 2
        assert sorted(torch.cat(list(loader)).tolist()) == [0, 1, 2, 3]


class FailsAtThree(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return 1 // 0 if index == 3 else torch.tensor(index)


class TestPrecision:
    def test_bfloat16_weights(self, xla):  # noqa: F811
        fabric = Fabric(accelerator="tpu", devices=1, strategy="xla", precision="bf16-true")
        fabric.launch(_nothing)
        model = _train(fabric)
        assert model.head.weight.dtype is torch.bfloat16
        assert model(torch.ones(1, 5, device=fabric.device)).dtype is torch.float32
        torch.testing.assert_close(_state(model)["head.weight"].float(), _plain().head.weight, rtol=0.1, atol=0.05)

    @pytest.mark.parametrize("name", ["xla", "single_xla", "xla_fsdp"])
    def test_another_precision_is_refused(self, xla, name):  # noqa: F811
        with pytest.raises(ValueError, match="16-mixed"):
            Fabric(accelerator="tpu", devices=1, strategy=name, precision="16-mixed")

    def test_a_plugin_of_another_precision_is_refused(self):
        with pytest.raises(ValueError, match="XLAStrategy computes in one dtype.*MixedPrecision is for 'bf16-mixed'"):
            XLAStrategy(precision=MixedPrecision("bf16-mixed", "cpu"))
        strategy = XLAStrategy(precision=HalfPrecision("bf16-true"))
        with pytest.raises(ValueError, match="bf16-mixed"):
            strategy.precision = MixedPrecision("bf16-mixed", "cpu")
        strategy.precision = XLAPrecision("16-true")
        assert strategy.precision.precision == "16-true"


def test_an_optimizer_alone_is_refused(xla):  # noqa: F811
    fabric = Fabric(accelerator="tpu", devices=1, strategy="xla")
    model = fabric.setup_module(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"fabric.setup\(model, optimizer\)"):
        fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))


class TestBeforeLaunch:
    def test_no_device_is_touched(self):
        devices = [torch.device("xla", 0), torch.device("xla", 1)]
        strategy = XLAStrategy(parallel_devices=devices)
        assert strategy.root_device == devices[0]
        assert (strategy.world_size, strategy.global_rank, strategy.start_method) == (2, 0, "xla")

    def test_one_device_is_the_first(self):
        with pytest.raises(ValueError, match=r"strategy='single_xla' for devices=\[3\]"):
            XLAStrategy(parallel_devices=[torch.device("xla", 3)])._configure_launcher()

    def test_the_others_cannot_be_talked_to(self):
        with pytest.raises(RuntimeError, match="`barrier` talks to the other processes"):
            XLAStrategy(parallel_devices=[torch.device("xla", 0)]).barrier()

    def test_without_torch_xla_the_error_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr("lightning.fabric.utilities.imports.package_available", lambda name: False)
        with pytest.raises(ModuleNotFoundError, match="pip install torch_xla"):
            XLAStrategy(parallel_devices=[torch.device("xla", 0)]).setup_environment()

    def test_torch_xla_is_imported_on_first_use_alone(self):
        for path in Path(lightning.fabric.__file__).parent.rglob("*xla*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    assert "torch_xla" not in ast.unparse(node), path


# ---- two devices -----------------------------------------------------------------------------------------------------


def _on_two(what, *args):
    install()
    fabric = Fabric(accelerator="tpu", devices=2, strategy="xla")
    fabric._join()  # the ranks are there
    return what(fabric, *args)


def _train_in_all_ways(fabric):
    reduce_gradients.count = 0
    plain = _state(_train(fabric))
    counts = [reduce_gradients.count]
    by_norm = _state(_train(fabric, max_norm=0.1))
    counts.append(reduce_gradients.count)
    return {
        "plain": plain,
        "max_norm": by_norm,
        "clip_val": _state(_train(fabric, clip_val=0.01)),
        "closure": _state(_train(fabric, closure=True)),
        "micro_batches": _state(_train(fabric, micro_batches=2)),
        "counts": counts,
    }


def test_two_ranks_train_like_one_process():
    first, second = on_ranks(2, _on_two, _train_in_all_ways)
    for ours in (first, second):
        _assert_same(ours["plain"], _plain())
        _assert_same(ours["max_norm"], _plain(max_norm=0.1))
        _assert_same(ours["clip_val"], _plain(clip_val=0.01))
        _assert_same(ours["closure"], _plain())
        _assert_same(ours["micro_batches"], _plain(micro_batches=2))
        assert ours["counts"] == [4, 8]  # what clipping has averaged is not averaged again
    for name, value in first["plain"].items():
        assert torch.equal(value, second["plain"][name])


def _gradients_after_clipping(fabric):
    """A backward between clipping and the step adds what is not averaged yet."""
    module = nn.Linear(1, 1, bias=False)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.0))
    x = torch.tensor([[1.0 + fabric.global_rank]])
    fabric.backward(model(x).sum())
    fabric.clip_gradients(model, optimizer, clip_val=10.0)
    clipped = model.weight.grad.item()
    fabric.backward(model(x).sum())
    optimizer.step()
    return clipped, model.weight.grad.item()


def test_gradients_that_come_after_clipping_are_averaged_too():
    assert on_ranks(2, _on_two, _gradients_after_clipping) == [(1.5, 3.0)] * 2


def _weights_after_setup(fabric, sync_module_states):
    fabric.strategy._sync_module_states = sync_module_states
    module = _model(seed=fabric.global_rank)
    if fabric.global_rank == 1:
        with torch.no_grad():
            module.mask.fill_(math.nan)
            module.flags.fill_(True)
    model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    return _state(model)


def test_all_ranks_start_with_the_weights_of_the_first():
    own = [dict(_model(seed=rank).state_dict()) for rank in range(2)]
    for ours in on_ranks(2, _on_two, _weights_after_setup, True):
        torch.testing.assert_close(ours, own[0], rtol=0, atol=0)
    without = on_ranks(2, _on_two, _weights_after_setup, False)
    assert torch.equal(without[1]["head.weight"], own[1]["head.weight"])
    assert without[1]["mask"].isnan().all()


def _talk(fabric):
    rank, strategy = fabric.global_rank, fabric.strategy
    leaf = torch.tensor([1.0 + rank], requires_grad=True)
    (fabric.all_gather(leaf, sync_grads=True).flatten() * torch.tensor([1.0, 10.0]) * (rank + 1)).sum().backward()
    return {
        "world": (fabric.world_size, fabric.local_rank, fabric.node_rank, fabric.is_global_zero),
        "sampler": strategy.distributed_sampler_kwargs,
        "gathered": fabric.all_gather(torch.tensor([rank, 7])).tolist(),
        "number": fabric.all_gather(rank).tolist(),
        "truth": fabric.all_gather(torch.tensor(rank == 1)).tolist(),
        "no_grad": fabric.all_gather(leaf).requires_grad,
        "grad": leaf.grad.item(),
        "mean": fabric.all_reduce(torch.tensor([rank, 2])).tolist(),
        "sum": fabric.all_reduce(rank + 1, reduce_op="sum").item(),
        "ops": [
            fabric.all_reduce(torch.tensor(rank + 2), reduce_op=op).item()
            for op in (ReduceOp.MAX, "min", ReduceOp.PRODUCT, "bor", ReduceOp.AVG)
        ],
        "objects": [
            fabric.broadcast({"from": rank, "big": "x" * 5000 * (rank + 1)}, src=src)["from"] for src in (0, 1)
        ],
        "size": len(fabric.broadcast("y" * 3000 * (rank + 1), src=1)),
        "tensor": fabric.broadcast(torch.tensor([rank + 0.5]), src=1).item(),
        "nothing": fabric.broadcast(None if rank == 0 else 3),
        "votes": [strategy.reduce_boolean_decision(rank == 0, all=all) for all in (True, False)],
        "not a tensor": strategy.all_reduce("text"),
        "barrier": fabric.barrier("here"),
    }


def test_ranks_talk_to_each_other():
    first, second = on_ranks(2, _on_two, _talk)
    assert [first.pop("world"), second.pop("world")] == [(2, 0, 0, True), (2, 1, 0, False)]
    assert [first.pop("sampler"), second.pop("sampler")] == [{"num_replicas": 2, "rank": rank} for rank in (0, 1)]
    assert [first.pop("grad"), second.pop("grad")] == [3.0, 30.0]
    assert first == second
    assert first == {
        "gathered": [[0, 7], [1, 7]],
        "number": [0, 1],
        "truth": [False, True],
        "no_grad": False,
        "mean": [0.5, 2.0],
        "sum": 3,
        "ops": [3, 2, 6, 3, 2.5],
        "objects": [0, 1],
        "size": 6000,
        "tensor": 1.5,
        "nothing": None,
        "votes": [False, True],
        "not a tensor": "text",
        "barrier": None,
    }


def _refusals(fabric):
    for call in (
        lambda: fabric.all_gather(torch.ones(1), group="some"),
        lambda: fabric.all_reduce(torch.ones(1), group="some"),
    ):
        with pytest.raises(ValueError, match="Leave `group` out"):
            call()
    with pytest.raises(ValueError, match="'bxor' is not a reduction of XLA"):
        fabric.all_reduce(torch.ones(1), reduce_op="bxor")
    error = KeyError("no such thing") if fabric.global_rank == 1 else None
    expected = (KeyError, "no such") if error else (RuntimeError, "Rank 1 failed while looking.*KeyError: 'no such")
    with pytest.raises(expected[0], match=expected[1]):
        fabric.strategy.raise_on_all(error, "looking")
    return True


def test_what_cannot_be_is_refused_on_all_ranks():
    assert on_ranks(2, _on_two, _refusals) == [True, True]


def _save_and_load(fabric, folder):
    model = _train(fabric)
    before = sync.count
    fabric.save(folder / "a.pt", {"model": model, "rank": fabric.global_rank})
    assert sync.count > before, "a tensor that waits for a collective would be read on one rank alone"
    module = _model(seed=5)
    other, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    state = {"model": other}
    return fabric.load(folder / "a.pt", state), _state(other)


def test_one_file_for_all_ranks(tmp_path):
    for rest, state in on_ranks(2, _on_two, _save_and_load, tmp_path):
        assert rest == {"rank": 0}
        _assert_same(state, _plain())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def _fail_to_save(fabric, path):
    model = _train(fabric)
    fabric.save(path, {"model": model})


def test_a_save_that_fails_fails_on_all_ranks(tmp_path):
    with pytest.raises(RankError, match="IsADirectoryError"):
        on_ranks(2, _on_two, _fail_to_save, tmp_path)


def _sampled(fabric):
    loader = fabric.setup_dataloaders(DataLoader(torch.arange(8), batch_size=2, shuffle=True))
    return [torch.cat(list(loader)).tolist() for _ in range(2)]


def test_each_rank_gets_its_part_of_the_data():
    first, second = on_ranks(2, _on_two, _sampled)
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(8))
    assert first[0] != first[1]


def _disagree():
    install()
    strategy = XLAStrategy(XLAAccelerator(), [torch.device("xla", index) for index in range(3)])
    with pytest.raises(ValueError, match=r"3 device\(s\) on 1 machine\(s\) are asked for, but torch_xla runs on 2"):
        strategy.setup_environment()


def test_another_number_of_devices_than_there_are_is_an_error():
    on_ranks(2, _disagree)


class OnStandIn(XLAStrategy):
    """Lets the processes of the stand-in part."""

    def teardown(self):
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()


def _make():
    if "RANK" in os.environ:
        install()
        warnings.filterwarnings("ignore", message=".*cannot leave out gradient synchronisation")
    return OnStandIn()


@pytest.mark.slow
def test_the_contract_of_strategies_is_kept():
    check_strategy(_make, accelerator="tpu", tolerance_alone=1e-6)
