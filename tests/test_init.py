"""Modules made under `init_module`, and tensors under `init_tensor`: of what dtype, with what values, how filled."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision._dtypes import default_dtype
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
}

# ---- modules ---------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """Computed where the module is made, of all kinds of dtypes; some are in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = 1 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4, dtype=torch.bool)))
        self.register_buffer("positions", torch.arange(4))
        rotations = torch.polar(torch.ones(4, dtype=torch.float32), torch.arange(4, dtype=torch.float32))
        self.register_buffer("rotations", rotations, persistent=False)
        self.register_buffer("projection", nn.init.normal_(torch.empty(4, 4)), persistent=False)
        self.register_buffer("mixing", nn.init.xavier_uniform_(torch.empty(4, 4)), persistent=False)
        self.weight = nn.Parameter(torch.zeros(4))


class Values(nn.Module):
    """Parameters and tensors that no function of ``torch.nn.init`` fills."""

    def __init__(self) -> None:
        super().__init__()
        self.given = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.from_numpy = nn.Parameter(torch.from_numpy(np.arange(4, dtype=np.float32)))
        self.zeros = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.line = nn.Parameter(torch.linspace(0, 1, 5))
        self.one = nn.Parameter(torch.full((1,), 0.5))
        self.table = torch.arange(6.0)
        self.tables = {"list": [torch.ones(2)], "tuple": (torch.eye(2), "text")}


class Drawn(nn.Module):
    """Random numbers beside those of ``torch.nn.init``; and values that are looked at while the module is made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.scale = self.weight.max().item()
        self.noise = torch.rand(3)
        if (self.weight > 0).any():
            self.register_buffer("flag", torch.tensor(True))
        self.more = nn.Parameter(torch.randn(3, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=0)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.weights = [self.embedding.weight]

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(index)))


def _initialised_again(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        module.bias.data.zero_()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "buffers": Buffers,
    "values": Values,
    "drawn": Drawn,
    "tied": Tied,
    "initialised again": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).apply(_initialised_again),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "batch norm": lambda: nn.BatchNorm2d(3),
    "parameter list": lambda: nn.ParameterList([torch.ones(3), torch.randn(2)]),
    "parameter dict": lambda: nn.ParameterDict({"a": torch.ones(3), "b": nn.Parameter(torch.randn(2), False)}),
    "no parameters": nn.ReLU,
}
SEEN_WHEN_MADE = {"weight_norm", "spectral_norm"}  # their values come from parameters, by computation


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names, and tensors in attributes."""
    found = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if not attribute.startswith("_"):
                found.update(_in_tree(f"{name}.{attribute}", value))
    return found


def _in_tree(name: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (list, tuple, dict)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _in_tree(f"{name}.{key}", value)


def made_plainly(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """As bare PyTorch has it after conversion; what is neither real nor complex stays what it is, and so do those."""
    torch.manual_seed(1)
    with default_dtype(dtype):
        module = make()
    return module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def differences(found: nn.Module, expected: nn.Module, only: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Return what is not, in dtype and value to the bit, as it should be; and what is still on the meta device."""
    mine, theirs = tensors_of(found), tensors_of(expected)
    if mine.keys() != theirs.keys():
        return [f"other tensors: {mine.keys() ^ theirs.keys()}"]
    wrong = [f"{name} is on the meta device" for name, tensor in mine.items() if tensor.is_meta]
    values = {name: whole(tensor) for name, tensor in mine.items()}  # collective, so all of them
    for name in filter(only, values if not wrong else ()):
        value, other = values[name], theirs[name].detach()
        if value.dtype != other.dtype:
            wrong.append(f"{name} is {value.dtype}, not {other.dtype}")
        elif not torch.equal(value, other):
            wrong.append(f"{name} has other values")
        elif mine[name].requires_grad != theirs[name].requires_grad:
            wrong.append(f"{name}.requires_grad is {mine[name].requires_grad}")
    ties = [[[n for n, t in each.items() if t is tensor] for tensor in each.values()] for each in (mine, theirs)]
    return wrong if ties[0] == ties[1] else [*wrong, f"ties are {ties[0]}, not {ties[1]}"]


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
class TestOneDevice:
    def test_modules_are_made_of_the_dtype_at_once(self, precision: Any) -> None:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        with fabric.init_module():
            module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Embedding(2, 2))
        assert {parameter.dtype for parameter in module.parameters()} == {DTYPES[precision]}
        assert module[1].running_mean.dtype == DTYPES[precision]
        assert module[1].num_batches_tracked.dtype == torch.int64

    def test_tensors_are_made_of_the_dtype_at_once(self, precision: Any) -> None:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        with fabric.init_tensor():
            made = torch.ones(1), torch.tensor([1, 2]), torch.tensor(True), torch.randn(2), torch.arange(3.0)
        dtype = DTYPES[precision]
        assert [tensor.dtype for tensor in made] == [dtype, torch.int64, torch.bool, dtype, dtype]
        assert torch.get_default_dtype() == torch.float32

    @pytest.mark.parametrize("name", MODULES)
    def test_after_set_up_all_is_as_torch_makes_it(self, precision: Any, name: str) -> None:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        expected = made_plainly(MODULES[name], DTYPES[precision])
        torch.manual_seed(1)
        with fabric.init_module():
            module = MODULES[name]()
        fabric.setup(module)
        assert differences(module, expected) == []

    @pytest.mark.parametrize("name", sorted(MODULES.keys() - SEEN_WHEN_MADE))
    def test_empty_parameters_are_all_that_is_empty(self, precision: Any, name: str) -> None:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        with fabric.init_module(empty_init=True):
            module = MODULES[name]()
        fabric.setup(module)
        expected = made_plainly(MODULES[name], DTYPES[precision])
        others = set(tensors_of(module).values()) - set(module.parameters())
        assert all(tensor.isfinite().all() for tensor in others)
        fixed = {"values": lambda key: True, "buffers": lambda key: key not in ("projection", "mixing")}
        assert differences(module, expected, fixed.get(name, lambda key: False)) == []

    def test_an_empty_model_is_filled_before_or_after_set_up(self, precision: Any, tmp_path: Path) -> None:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        expected = made_plainly(Tied, DTYPES[precision])
        fabric.save(tmp_path / "file", {"model": expected})
        for first in (False, True):
            with fabric.init_module(empty_init=True):
                model = Tied()
            if first:
                fabric.load(tmp_path / "file", {"model": model})
            wrapped = fabric.setup(model)
            if not first:
                with pytest.raises(RuntimeError, match=r"A forward of Tied would use .*: 'embedding.weight', 'norm.w"):
                    wrapped(torch.tensor([1, 2]))
                fabric.load(tmp_path / "file", {"model": wrapped})
            assert differences(model, expected) == []
            wrapped(torch.tensor([1, 2]))


# ---- loading into what is empty --------------------------------------------------------------------------------------


class TestLoading:
    @pytest.mark.parametrize(("saved", "precision"), [("32-true", "bf16-true"), ("bf16-true", "32-true")])
    def test_a_file_of_another_dtype_is_converted(self, saved: Any, precision: Any, tmp_path: Path) -> None:
        expected = made_plainly(Buffers, DTYPES[saved])
        nn.init.normal_(expected.weight)
        torch.save(expected.state_dict(), tmp_path / "file")
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        with fabric.init_module(empty_init=True):
            model = Buffers()
        frequencies = model.frequencies.clone()
        fabric.setup(model)
        fabric.load_raw(tmp_path / "file", model)
        assert torch.equal(model.weight, expected.weight.to(DTYPES[precision]))
        assert torch.equal(model.frequencies, frequencies.to(DTYPES[precision]))
        assert model.rotations.is_complex()

    def test_a_checkpoint_that_lacks_something_leaves_that_refused(self, tmp_path: Path) -> None:
        torch.save({"0.weight": torch.ones(30, 30)}, tmp_path / "file")
        fabric = Fabric(accelerator="cpu", devices=1)
        with fabric.init_module(empty_init=True):
            model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped, optimizer = fabric.setup(model, optimizer)
        with pytest.raises(RuntimeError, match="Missing key"):
            fabric.load_raw(tmp_path / "file", wrapped)
        fabric.load_raw(tmp_path / "file", wrapped, strict=False)
        with torch.no_grad():
            model[0].bias.zero_()
            model[1].bias.zero_()
            model[1].weight[:, :20] = 1  # and the rest is still as it was allocated
        with pytest.raises(RuntimeError, match=r"would use .*: '1.weight'\. Load"):
            wrapped(torch.ones(1, 30))
        with pytest.raises(RuntimeError, match="A step of SGD would use"):
            optimizer.step()
        nn.init.ones_(model[1].weight)
        assert wrapped(torch.ones(1, 30)).item() == 900

    def test_meta_tensors_are_refused_rather_than_left_as_they_are(self, tmp_path: Path) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "file")
        model = nn.Linear(1, 1, device="meta")
        with pytest.raises(RuntimeError, match=r"no memory to load into: \['weight', 'bias'\].*init_module"):
            fabric.load_raw(tmp_path / "file", model)
        with pytest.raises(RuntimeError, match=r"Linear has parameters .* on the meta.*'weight', 'bias'.*init_module"):
            fabric.setup(model)

    def test_a_lazy_module_is_filled_by_its_first_forward(self) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        with fabric.init_module(empty_init=True):
            model = nn.Sequential(nn.LazyLinear(3))
        wrapped = fabric.setup(model)
        assert wrapped(torch.ones(2, 5)).isfinite().all()


MEGABYTE = 1e6


def _large() -> nn.Module:
    return nn.Sequential(*(nn.Linear(1600, 1600, bias=False) for _ in range(6)))  # 61 MB in 32 bit


def _own_memory() -> int:
    """Bytes of the process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _peak_of(function: Callable[[], Any]) -> float:
    """Return by how many megabytes the process's own memory rose above where it was, at the most."""
    levels, over = [start := _own_memory()], threading.Event()

    def watch() -> None:
        while not over.wait(0.0005):
            levels.append(_own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        over.set()
        watcher.join()
    del result
    return (max(*levels, _own_memory()) - start) / MEGABYTE


def _filled(fabric: Fabric, path: Path) -> nn.Module:
    with fabric.init_module(empty_init=True):
        model = _large()
    model = fabric.setup(model)
    fabric.load(path, {"model": model})
    return model


@pytest.mark.parametrize(
    ("saved", "precision"), [("32-true", "32-true"), ("32-true", "bf16-true"), ("bf16-true", "32-true")]
)
def test_loading_never_holds_two_copies(saved: Any, precision: Any, tmp_path: Path) -> None:
    torch.save({"model": _large().to(DTYPES[saved]).state_dict()}, tmp_path / "file")
    size = 61.44 if precision == "32-true" else 30.72
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    assert _peak_of(partial(_filled, fabric, tmp_path / "file")) < 1.15 * size


# ---- two ranks -------------------------------------------------------------------------------------------------------


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=mesh["data_parallel"])


def _two_ranks(strategy: str, precision: Any) -> Fabric:
    from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy

    made: Any = {
        "ddp": lambda: "ddp",
        "fsdp": FSDPStrategy,
        "model_parallel": lambda: ModelParallelStrategy(_shard, data_parallel_size=2, tensor_parallel_size=1),
    }[strategy]()
    fabric = Fabric(accelerator="cpu", devices=2, strategy=made, precision=precision)
    fabric.launch()
    return fabric


def _set_up_all(path: Path) -> list[str]:
    """Return what is not as a process alone makes it."""
    wrong = []
    for strategy in ("ddp", "fsdp", "model_parallel"):
        for precision in ("32-true", "bf16-true"):
            fabric = _two_ranks(strategy, precision)
            for name in MODULES if precision == "32-true" else ("buffers", "values", "tied"):
                for empty in (False, True):
                    found = _set_up(fabric, strategy, MODULES[name], precision, empty)
                    wrong += [f"{strategy}, {precision}, {name}, empty={empty}: {text}" for text in found]
        wrong += [f"{strategy}: {text}" for text in [*_loaded(strategy, path), *_refused(strategy)]]
    return wrong


def _set_up(fabric: Fabric, strategy: str, make: Callable[[], nn.Module], precision: str, empty: bool) -> list[str]:
    expected = made_plainly(make, DTYPES[precision])
    torch.manual_seed(1 + fabric.global_rank)
    with fabric.init_module(empty_init=empty):
        module = make()
    fabric.setup(module)
    if strategy == "ddp" and empty:  # without the random numbers of `torch.nn.init`, others are others
        return [] if make is not Values else differences(module, expected)
    registered = {*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers())}
    own = fabric.global_rank and not empty  # attributes are no part of what ranks share
    return differences(module, expected, lambda name: not own or name in registered)


def _loaded(strategy: str, path: Path) -> list[str]:
    fabric = _two_ranks(strategy, "32-true")
    expected = made_plainly(Tied, torch.bfloat16)
    if fabric.global_rank == 0:
        torch.save({"model": expected.state_dict()}, path / strategy)
    fabric.barrier()
    with fabric.init_module(empty_init=True):
        model = Tied()
    wrapped = fabric.setup_module(model)
    fabric.load(path / strategy, {"model": wrapped})
    return differences(model, expected.float())


def _refused(strategy: str) -> list[str]:
    """Modules that cannot be set up: return whose error has not got the words."""
    fabric = _two_ranks(strategy, "32-true")
    lazy = "Parameters without a shape cannot be shared out: 'weight'" if strategy != "ddp" else "uninitialized param"
    cases: list[tuple[nn.Module, str]] = [(nn.LazyLinear(3), lazy)]
    if strategy == "ddp":
        cases.append((nn.Linear(1, 1, device="meta"), "Linear has parameters or buffers on the meta device"))
    wrong = []
    for module, words in cases:
        try:
            fabric.setup_module(module)
            wrong.append(f"{words!r} was not raised")
        except (RuntimeError, ValueError) as error:
            wrong += [f"{words!r} is not in {error}"] if words not in str(error) else []
    return wrong


@pytest.mark.slow
def test_ranks_hold_what_one_process_makes(tmp_path: Path) -> None:
    assert on_ranks(2, _set_up_all, tmp_path) == [[], []]


_M_MMAP_THRESHOLD = -3


def _peak_under_fsdp(path: Path) -> float:
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)  # what is freed goes back at once
    fabric = _two_ranks("fsdp", "32-true")
    return _peak_of(partial(_filled, fabric, path))


def test_a_rank_never_holds_more_than_its_part_and_two_tensors(tmp_path: Path) -> None:
    torch.save({"model": _large().state_dict()}, tmp_path / "file")
    for peak in on_ranks(2, _peak_under_fsdp, tmp_path / "file"):
        assert peak < 61.44 / 2 + 2.5 * 61.44 / 6
