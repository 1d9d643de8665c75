"""Sharded folders and full files: what was saved on some ranks is what is loaded on others, or an error on all."""

import copy
import itertools
import os
import pickle
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.checkpoint.manifest import read_manifest
from lightning.fabric.checkpoint.safetensors_files import write_safetensors
from lightning.fabric.checkpoint.saving import SaveOptions, save
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies import _sharded_files as files
from lightning.fabric.strategies._dtensor import full_tensor
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.utilities.load import is_sharded_folder

preload(
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "lightning.fabric.strategies._sharded_files",
)
CPU = torch.device("cpu")
State = dict[str, Any]
LAYOUTS = {"plain": 1, "fsdp": 2, "2d": 4}  # on how many processes they are saved


class Net(nn.Module):
    """Tied weights, sizes that do not divide evenly, frozen parameters, buffers, and state that is no tensor."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, dtype=dtype)
        self.norm = nn.BatchNorm1d(5, dtype=dtype)
        self.up = nn.Linear(5, 10, dtype=dtype)
        self.down = nn.Linear(10, 5, dtype=dtype)
        self.frozen = nn.Linear(5, 5, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.seen = 0

    def forward(self, words: Tensor) -> Tensor:
        self.seen += len(words)
        x = self.norm(self.embed(words))
        return self.head(self.frozen(self.down(self.up(x).relu())))

    def get_extra_state(self) -> dict[Any, Any]:
        return {"seen": self.seen, 3: {}}

    def set_extra_state(self, state: dict[Any, Any]) -> None:
        assert state[3] == {}
        self.seen = state["seen"]


class Simple(Net):
    """With extra state that torch's own format keeps, which makes keys text and drops empty dicts."""

    def get_extra_state(self) -> State:
        return {"seen": self.seen}

    def set_extra_state(self, state: State) -> None:
        self.seen = state["seen"]


class Counter:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> State:
        return {"value": self.value}

    def load_state_dict(self, state: State) -> None:
        self.value = state["value"]


def _joined(processes: int) -> DDPStrategy:
    strategy = DDPStrategy(CPUAccelerator(), [CPU] * processes, LightningEnvironment(), timeout=timedelta(seconds=30))
    strategy.setup_environment()
    return strategy


def _saved(strategy: DDPStrategy, path: Any, state: State, *, sharded: bool, **how: Any) -> None:
    """Collective: as a strategy that shards saves."""
    save(files.prepare(strategy, state, sharded=sharded, **how), path, SaveOptions(durable=False), strategy._peers())


def _shard(model: nn.Module, layout: str, processes: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if layout == "plain":
        return model
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (processes,))
        fully_shard(model.up, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    mesh = init_device_mesh("cpu", (processes // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def _groups(model: nn.Module) -> list[State]:
    """Two groups, and parameters in another order than the model's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": trained[:0:-1], "lr": 0.5}, {"params": trained[:1], "weight_decay": 0.0}]


def _trained(
    processes: int, layout: str, seed: int, steps: int, dtype: torch.dtype = torch.float32, net: type[Net] = Net
) -> State:
    torch.manual_seed(seed)
    model = _shard(net(dtype), layout, processes)
    optimizer = torch.optim.AdamW(_groups(model), lr=0.1, betas=(0.8, 0.9), amsgrad=True)
    for step in range(steps):
        model(torch.arange(step, step + 6) % 7).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer, "counter": Counter(seed), "epoch": seed, "rng": torch.ones(2)}


def _full(state: State) -> State:
    """What a strategy that does not shard would have saved."""
    return {
        "model": files.full_module_state(state["model"], rank_zero_only=False),
        "optimizer": files.full_optimizer_state(state["optimizer"], rank_zero_only=False),
        "counter": state["counter"].state_dict(),
        "epoch": state["epoch"],
        "rng": state["rng"],
    }


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested states are not bit for bit the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: keys {sorted(a.keys() ^ b.keys(), key=str)}"] if a.keys() != b.keys() else []
        return found + [text for key in a.keys() & b.keys() for text in _differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            text
            for i, (one, other) in enumerate(zip(a, b, strict=True))
            for text in _differences(one, other, f"{where}.{i}")
        ]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [f"{where}: {a} is not {b}"]
    return [] if type(a) is type(b) and a == b else [f"{where}: {a!r} is not {b!r}"]


# -- there and back


def _save_both(folder: str, processes: int, layout: str) -> None:
    strategy = _joined(processes)
    fresh, plain = (_trained(processes, kind, seed=3, steps=0)["model"] for kind in (layout, "plain"))
    assert _differences(files.full_module_state(fresh, rank_zero_only=False), plain.state_dict()) == []
    state = _trained(processes, layout, seed=processes, steps=2)
    before = _full(state)
    _saved(strategy, f"{folder}/new/sharded", state, sharded=True)
    assert is_sharded_folder(f"{folder}/new/sharded")  # on every rank, at once
    _saved(strategy, f"{folder}/full.ckpt", state, sharded=False)
    assert Path(f"{folder}/full.ckpt").is_file()
    assert _differences(_full(state), before) == []
    if strategy.is_global_zero:
        torch.save(before, f"{folder}/expected.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a sharded and a full checkpoint each, of one state that was sharded in some way."""
    folder = tmp_path_factory.mktemp("saved")
    for layout, processes in LAYOUTS.items():
        (folder / layout).mkdir()
        on_ranks(processes, _save_both, str(folder / layout), processes, layout)
    return folder


def _load_all(folder: str, processes: int, layout: str) -> list[str]:
    strategy = _joined(processes)
    problems = []
    state = _trained(processes, layout, seed=9, steps=0)  # only the first load finds an optimizer without state
    model, counter = state["model"], state["counter"]
    for file, kind in itertools.product(("new/sharded", "full.ckpt"), LAYOUTS):
        expected = torch.load(f"{folder}/{kind}/expected.pt", weights_only=True)
        assert _differences(_full(state), expected)
        assert files.load_checkpoint(strategy, f"{folder}/{kind}/{file}", state) == {}
        problems += [f"{kind}/{file}: {text}" for text in _differences(_full(state), expected)]
        assert state["model"] is model
        assert state["counter"] is counter
        assert model.head.weight is model.embed.weight
    model(torch.arange(6)).sum().backward()
    state["optimizer"].step()
    return problems


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, "plain"),
        (1, "fsdp"),
        (2, "fsdp"),
        pytest.param(4, "fsdp", marks=pytest.mark.slow),
        pytest.param(4, "2d", marks=pytest.mark.slow),
    ],
)
def test_what_is_loaded_is_what_was_saved(saved: Path, processes: int, layout: str) -> None:
    assert on_ranks(processes, _load_all, str(saved), processes, layout) == [[]] * processes


def test_a_folder_has_a_file_per_rank_and_the_plain_values(saved: Path) -> None:
    folder = saved / "fsdp/new/sharded"
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    assert sorted(os.listdir(folder)) == sorted([*files, "manifest.json"])
    assert sorted(read_manifest(folder).files) == files
    assert os.listdir(folder.parent) == ["sharded"]
    meta = torch.load(folder / "meta.pt", weights_only=True)
    assert _differences(meta, {"counter": {"value": 2}, "epoch": 2, "rng": torch.ones(2)}) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_file_is_the_plain_state_of_torch(saved: Path, layout: str) -> None:
    checkpoint = torch.load(saved / layout / "full.ckpt", weights_only=True)
    expected = torch.load(saved / layout / "expected.pt", weights_only=True)
    assert _differences(checkpoint, expected) == []
    model = Net()
    model.load_state_dict(checkpoint["model"])
    assert model.seen == 12  # what is no tensor
    optimizer = torch.optim.AdamW(_groups(model))
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    weight = checkpoint["model"]["embed.weight"]
    assert weight.untyped_storage().data_ptr() == checkpoint["model"]["head.weight"].untyped_storage().data_ptr()
    assert checkpoint["model"]._metadata["norm"] == {"version": 2}


def test_tools_of_torch_read_a_folder(saved: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(saved / "fsdp/new/sharded", tmp_path / "merged.pt")
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)
    expected = torch.load(saved / "fsdp/expected.pt", weights_only=True)
    assert _differences(merged["model"], dict(expected["model"])) == []
    assert merged["optimizer"]["param_groups"][1]["params"] == ["embed.weight"]
    name = merged["optimizer"]["param_groups"][0]["params"][3]
    assert _differences(merged["optimizer"]["state"][name], expected["optimizer"]["state"][3]) == []


# -- other states


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)


class Strange(Pair):
    """Loads in a way of its own."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.was_loaded = sorted(state_dict)
        return super().load_state_dict(state_dict, strict, assign)


def _pairs(seed: int, dtype: torch.dtype = torch.float32) -> State:
    """A generator and a discriminator, an optimizer for each, and one for parts of both."""
    torch.manual_seed(seed)
    gen = _shard(Pair().to(dtype), "fsdp", 2)
    dis = _shard(Strange().to(dtype), "fsdp", 2)
    state = {
        "gen": gen,
        "dis": dis,
        "empty": nn.ReLU(),
        "gen_sgd": torch.optim.SGD(gen.parameters(), lr=seed),
        "dis_adam": torch.optim.Adam(dis.parameters(), lr=torch.tensor(float(seed))),
        "both": torch.optim.SGD([*gen.up.parameters(), *dis.down.parameters()], lr=0.1, momentum=0.9),
    }
    for parameter in (*gen.parameters(), *dis.parameters()):
        parameter.grad = torch.full_like(parameter, seed)
    return state


def _flat(state: State) -> State:
    full = {
        key: files.full_module_state(obj, rank_zero_only=False)
        for key, obj in state.items()
        if isinstance(obj, nn.Module)
    }
    return full | {
        key: files.full_optimizer_state(obj, rank_zero_only=False)
        for key, obj in state.items()
        if isinstance(obj, torch.optim.Optimizer)
    }


def _several_models(folder: str) -> list[list[str]]:
    strategy = _joined(2)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for sharded in (True, False):
            path = f"{folder}/{dtype}-{sharded}"
            state = _pairs(1, dtype)
            state["both"].step()
            state["dis_adam"].step()
            expected = _flat(state)
            _saved(strategy, path, state, sharded=sharded)
            loaded = _pairs(2, dtype)
            assert files.load_checkpoint(strategy, path, loaded) == {}
            assert loaded["dis"].was_loaded == ["down.bias", "down.weight", "up.bias", "up.weight"]
            results.append(_differences(_flat(loaded), expected))
    return results


def test_several_models_and_optimizers_in_two_dtypes(tmp_path: Path) -> None:
    assert on_ranks(2, _several_models, str(tmp_path)) == [[[]] * 4] * 2


def _untrained(folder: str) -> None:
    strategy = _joined(2)
    state = _pairs(1)
    _saved(strategy, f"{folder}/c", state, sharded=True)
    assert all(not obj.state for obj in state.values() if isinstance(obj, torch.optim.Optimizer))
    loaded = _pairs(1)
    loaded["gen_sgd"].param_groups[0]["lr"] = 7
    loaded["dis_adam"].step()
    files.load_checkpoint(strategy, f"{folder}/c", loaded)
    assert loaded["gen_sgd"].param_groups[0]["lr"] == 1
    assert not loaded["dis_adam"].state


def test_saving_leaves_an_optimizer_untouched_that_has_not_made_a_step(tmp_path: Path) -> None:
    on_ranks(2, _untrained, str(tmp_path))


def _parts(folder: str) -> None:
    strategy = _joined(2)
    for sharded in (True, False):
        path = f"{folder}/{sharded}"
        saved = {**_pairs(1), "epoch": 3, "best": Counter(4)}
        _saved(strategy, path, saved, sharded=sharded)
        state = {"gen": _pairs(2)["gen"], "epoch": 0}
        remainder = files.load_checkpoint(strategy, path, state)
        assert state["epoch"] == 3
        others = {"best"} if sharded else {"best", "dis", "empty", "gen_sgd", "dis_adam", "both"}
        assert remainder.keys() == others  # of a folder, what is not asked for is not read
        assert remainder["best"] == {"value": 4}
        assert _differences(_flat(state), {"gen": _flat(saved)["gen"]}) == []
        # not strict: what is there
        state = {"gen": _pairs(2)["gen"], "new": 5, "new_model": (other := nn.Linear(2, 2))}
        weight = other.weight.clone()
        files.load_checkpoint(strategy, path, state, strict=False)
        assert state["new"] == 5
        assert torch.equal(other.weight, weight)
        assert _differences(_flat({"gen": state["gen"]}), {"gen": _flat(saved)["gen"]}) == []
        more = _pairs(2)["gen"]
        more.extra = nn.Linear(1, 1)
        del more.down
        files.load_checkpoint(strategy, path, {"gen": more}, strict=False)
        assert torch.equal(full_tensor(more.up.weight), full_tensor(saved["gen"].up.weight))


def test_a_part_of_the_state_is_loaded_alone(tmp_path: Path) -> None:
    on_ranks(2, _parts, str(tmp_path))


def _bare(folder: str) -> None:
    strategy = _joined(2)
    state = _pairs(1)
    state["dis_adam"].step()
    plain = nn.Module()
    plain.up, plain.down = nn.Linear(3, 5), nn.Linear(5, 2)
    plain.load_state_dict(files.full_module_state(state["dis"], rank_zero_only=False))
    optimizer = files.full_optimizer_state(state["dis_adam"], rank_zero_only=False)
    if strategy.is_global_zero:
        torch.save(plain.state_dict(), f"{folder}/model.pt")
        torch.save(optimizer, f"{folder}/optimizer.pt")
        write_safetensors(plain.state_dict(), Path(folder, "model.safetensors"))
        write_safetensors(plain.state_dict(), Path(folder, "several"), max_shard_size=80)
    strategy.barrier()
    for path in ("model.pt", "model.safetensors", "several"):
        loaded = _pairs(2)
        assert files.load_checkpoint(strategy, f"{folder}/{path}", loaded["dis"]) == {}
        assert files.load_checkpoint(strategy, f"{folder}/optimizer.pt", loaded["dis_adam"]) == {}
        keys = ("dis", "dis_adam")
        assert _differences(_flat({key: loaded[key] for key in keys}), _flat({key: state[key] for key in keys})) == []


def _bare_folder(folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    strategy = _joined(2)
    expected = _trained(2, "fsdp", seed=1, steps=2, net=Simple)["model"]
    dcp.save(expected.state_dict(), checkpoint_id=f"{folder}/bare")
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(expected.state_dict(), checkpoint_id=f"{folder}/without places", planner=planner)
    pair = _sharded_pair()
    dcp.save(pair.state_dict(), checkpoint_id=f"{folder}/pair")
    dcp.save({"model": pair.state_dict()}, checkpoint_id=f"{folder}/nested")
    for layout in ("fsdp", "plain"):
        for name in ("bare", "without places"):
            model = _trained(2, layout, seed=5, steps=1, net=Simple)["model"]
            assert files.load_checkpoint(strategy, f"{folder}/{name}", model, in_parts=layout == "fsdp") == {}
            full = (files.full_module_state(module, rank_zero_only=False) for module in (model, expected))
            assert _differences(*full) == []
    before = _flat({"pair": pair})
    for wrong, text in (
        (_pair_with(more=nn.Linear(1, 1)), 'Missing key.*"more.weight"'),
        (_pair_with(up=nn.Linear(4, 5)), r'size mismatch for "up.weight": the checkpoint has \(5, 3\)'),
        (nn.Linear(1, 1), 'Unexpected key.*"up.weight"'),
    ):
        with pytest.raises(RuntimeError, match=f"(?s)loading state_dict for .*nothing was changed.*{text}"):
            files.load_checkpoint(strategy, f"{folder}/pair", wrong)
    with pytest.raises(ValueError, match=r"a state with the keys \['model'\], not the bare state dict .* Use `load`"):
        files.load_checkpoint(strategy, f"{folder}/nested", pair)
    with pytest.raises(ValueError, match="not the bare state dict of a module"):
        files.load_checkpoint(strategy, f"{folder}/pair", _sgd(pair))
    with pytest.raises(KeyError, match=r"contains \['model'\], but .* holds the bare .* use `load_raw`"):
        files.load_checkpoint(strategy, f"{folder}/pair", {"model": pair})
    assert _differences(_flat({"pair": pair}), before) == []


def test_a_bare_folder_is_loaded_into_one_module(tmp_path: Path) -> None:
    on_ranks(2, _bare_folder, str(tmp_path))


def test_a_bare_state_dict_is_loaded_into_one_object(tmp_path: Path) -> None:
    on_ranks(2, _bare, str(tmp_path))


def _by_name(folder: str) -> list[str]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    strategy = _joined(1)
    state = _trained(1, "plain", seed=1, steps=1)
    saved = {
        "model": state["model"].state_dict(),
        "optimizer": get_optimizer_state_dict(state["model"], state["optimizer"]),
    }
    torch.save(saved, f"{folder}/by_name.pt")
    loaded = _trained(1, "fsdp", seed=2, steps=0)
    files.load_checkpoint(strategy, f"{folder}/by_name.pt", (wanted := {key: loaded[key] for key in saved}))
    assert wanted["model"] is loaded["model"]
    return _differences(_full(loaded)["optimizer"], state["optimizer"].state_dict())


def test_a_file_with_an_optimizer_by_names_is_loaded_too(tmp_path: Path) -> None:
    assert on_ranks(1, _by_name, str(tmp_path)) == [[]]


def _filtered(folder: str) -> None:
    strategy = _joined(2)
    state = {"gen": _pairs(1)["gen"], "epoch": 1}
    keep = {"gen": lambda name, value: name.startswith("up") and value.ndim == 2}
    _saved(strategy, f"{folder}/full", state, sharded=False, filter=keep)
    saved = torch.load(f"{folder}/full", weights_only=True)
    assert list(saved["gen"]) == ["up.weight"]
    assert saved["epoch"] == 1
    assert torch.equal(saved["gen"]["up.weight"], full_tensor(state["gen"].up.weight))


def test_a_filter_chooses_among_full_tensors(tmp_path: Path) -> None:
    on_ranks(2, _filtered, str(tmp_path))


# -- folders of other programs, and of ours under strategies that do not shard


def _foreign(folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    strategy = _joined(2)
    state = _trained(2, "fsdp", seed=1, steps=2, net=Simple)
    model, optimizer = state["model"], state["optimizer"]
    everything = {
        "nested": {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "epoch": 3,
            "counter": {"value": 7},
            "rng": torch.ones(2),
            "unasked": [1, 2],
        },
        "by number": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
        "flat": {**{f"model.{name}": value for name, value in model.state_dict().items()}, "epoch": 3},
        "with meta.pt": {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)},
    }
    for name, content in everything.items():
        dcp.save(content, checkpoint_id=f"{folder}/{name}")
    flat = _with_flat_optimizer(model, optimizer)
    everything["flat optimizer"] = everything["without places"] = flat
    dcp.save(flat, checkpoint_id=f"{folder}/flat optimizer")
    dcp.save(flat, checkpoint_id=f"{folder}/without places", planner=DefaultSavePlanner(flatten_state_dict=False))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    by_parameter = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"model": model.state_dict(), "optimizer": by_parameter}, checkpoint_id=f"{folder}/groups by parameter")
    if strategy.is_global_zero:
        torch.save({"epoch": 3}, f"{folder}/with meta.pt/meta.pt")
    strategy.barrier()
    expected = _full(state)
    for name, content in everything.items():
        for layout in ("fsdp", "plain"):
            loaded = _trained(2, layout, seed=5, steps=1, net=Simple)
            keys = [key for key in ("model", "optimizer", "epoch", "counter", "rng") if key in {*content, "epoch"}]
            wanted = {key: loaded[key] for key in keys} | {"model": loaded["model"]}
            if name in ("flat optimizer", "without places"):
                wanted["optimizer"] = loaded["optimizer"]
            remainder = files.load_checkpoint(strategy, f"{folder}/{name}", wanted, in_parts=layout == "fsdp")
            assert remainder == ({"unasked": [1, 2]} if name == "nested" else {})
            assert wanted["epoch"] == 3
            full = _full(loaded)
            assert _differences(full["model"], expected["model"]) == [], (name, layout)
            if "optimizer" in wanted:
                assert _differences(full["optimizer"], expected["optimizer"]) == [], (name, layout)
            if name == "nested":
                assert loaded["counter"].value == 7
                assert torch.equal(wanted["rng"], torch.ones(2))
    with pytest.raises(KeyError, match="a key 'lacking' that does not exist"):
        files.load_checkpoint(strategy, f"{folder}/nested", {"model": model, "lacking": 0})
    with pytest.raises(RuntimeError, match='Missing key.*"more.weight"'):
        files.load_checkpoint(strategy, f"{folder}/flat", {"model": _with_more(2)})
    with pytest.raises(ValueError, match="says neither of which parameter nor of which group it is"):
        files.load_checkpoint(strategy, f"{folder}/groups by parameter", {"model": model, "optimizer": optimizer})
    fewer = torch.optim.AdamW(list(model.parameters())[:2])
    for name in ("nested", "by number"):
        with pytest.raises(ValueError, match="nothing was changed"):
            files.load_checkpoint(strategy, f"{folder}/{name}", {"model": model, "optimizer": fewer})


def _with_flat_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = get_optimizer_state_dict(model, optimizer)
    return {
        **{f"model.{name}": value for name, value in model.state_dict().items()},
        **{
            f"optimizer.state.{name}.{entry}": value
            for name, entries in state["state"].items()
            for entry, value in entries.items()
        },
        "optimizer.param_groups": state["param_groups"],
        "epoch": 3,
    }


def _with_more(processes: int) -> nn.Module:
    model = Net()
    model.more = nn.Linear(1, 1)
    return _shard(model, "fsdp", processes)


def test_folders_that_torch_itself_has_written_are_loaded(tmp_path: Path) -> None:
    on_ranks(2, _foreign, str(tmp_path))


def test_a_folder_is_loaded_in_one_process_without_a_group(saved: Path) -> None:
    strategy = SingleDeviceStrategy(CPU)
    for kind in LAYOUTS:
        path = saved / kind / "new/sharded"
        expected = torch.load(saved / kind / "expected.pt", weights_only=True)
        state = _trained(1, "plain", seed=9, steps=1)
        assert strategy.load_checkpoint(path, state) == {}
        assert _differences(_full(state), expected) == []
        whole = strategy.load_checkpoint(path)
        assert _differences(whole, {**expected, "model": dict(expected["model"])}) == []
        assert strategy.load_checkpoint(path, {}).keys() == whole.keys()
        values = {"epoch": 0, "counter": (counter := Counter(0))}
        remainder = strategy.load_checkpoint(path, values)
        assert values["epoch"] == counter.value == LAYOUTS[kind]
        assert remainder.keys() == {"rng"}
        with pytest.raises(ValueError, match="that is in no module of the state"):
            strategy.load_checkpoint(path, {"optimizer": state["optimizer"]})
        with pytest.raises(ValueError, match="not the bare state dict of a module"):
            strategy.load_checkpoint(path, state["model"])
        with pytest.raises(KeyError, match="a key 'hop' that does not exist"):
            strategy.load_checkpoint(path, {"model": state["model"], "hop": 0})


def test_a_module_keeps_its_dtypes_and_an_optimizer_what_was_saved(saved: Path) -> None:
    state = _trained(1, "plain", seed=9, steps=0, dtype=torch.bfloat16)
    SingleDeviceStrategy(CPU).load_checkpoint(saved / "fsdp/new/sharded", state)
    expected = torch.load(saved / "fsdp/expected.pt", weights_only=True)
    assert torch.equal(state["model"].up.weight, expected["model"]["up.weight"].bfloat16())
    own = SingleDeviceStrategy(CPU)
    plain = _trained(1, "plain", seed=9, steps=0, dtype=torch.bfloat16)
    own.load_checkpoint(saved / "fsdp/full.ckpt", plain)
    assert _differences(state["optimizer"].state_dict(), plain["optimizer"].state_dict()) == []


def _detached(folder: str) -> list[str]:
    strategy = _joined(2)
    problems = []
    for sharded in (True, False):
        state = _trained(2, "fsdp", seed=1, steps=2)
        state["history"] = [torch.ones(2), {"loss": 1.0}]
        expected = copy.deepcopy(_full(state))
        prepared = files.prepare(strategy, state, sharded=sharded)
        prepared.detach(lambda tensor: tensor.clone())
        with torch.no_grad():
            for tensor in (*state["model"].parameters(), *state["model"].buffers(), state["history"][0]):
                tensor.zero_()
            for values in state["optimizer"].state.values():
                for value in values.values():
                    value.zero_()
        state["model"].seen = 0
        state["history"][1]["loss"] = 0.0
        save(prepared, f"{folder}/{sharded}", SaveOptions(), strategy._peers())
        loaded = {**_trained(2, "fsdp", seed=2, steps=1), "history": None}
        files.load_checkpoint(strategy, f"{folder}/{sharded}", loaded)
        problems += _differences(_full(loaded), expected)
        problems += _differences(loaded["history"], [torch.ones(2), {"loss": 1.0}])
    return problems


def test_what_is_detached_is_saved_as_it_was(tmp_path: Path) -> None:
    assert on_ranks(2, _detached, str(tmp_path)) == [[]] * 2


def _few(folder: str) -> list[str]:
    strategy = _joined(2)
    _saved(strategy, f"{folder}/c", {"model": nn.Linear(2, 2)}, sharded=True)
    return sorted(os.listdir(f"{folder}/c"))


def test_a_rank_with_nothing_to_write_makes_no_file(tmp_path: Path) -> None:
    files = [".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]
    assert on_ranks(2, _few, str(tmp_path)) == [files] * 2


# -- replacing


def _again(folder: str) -> None:
    strategy = _joined(2)
    path = Path(folder, "c")

    def saved(epoch: int, sharded: bool) -> None:
        _saved(strategy, path, {**_pairs(epoch), "epoch": epoch}, sharded=sharded)
        state = {"gen": _pairs(9)["gen"], "epoch": 0}
        files.load_checkpoint(strategy, path, state)
        assert state["epoch"] == epoch
        assert _differences(_flat(state), {"gen": _flat(_pairs(epoch))["gen"]}) == []
        strategy.barrier()

    for epoch, sharded in enumerate((True, True, False, False, True), start=1):
        saved(epoch, sharded)
        assert os.listdir(folder) == ["c"]
        strategy.barrier()
    if strategy.is_global_zero:
        (path / "notes.txt").write_text("mine")
    strategy.barrier()
    saved(6, sharded=True)
    assert (path / "notes.txt").read_text() == "mine"
    try:
        saved(7, sharded=False)
    except (IsADirectoryError, RuntimeError) as error:
        assert "folder of that name" in str(error)  # noqa: PT017
    else:
        raise AssertionError
    assert sorted(os.listdir(path)) == sorted(
        [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt", "notes.txt"]
    )


def test_a_checkpoint_takes_the_place_of_an_older_one_and_of_nothing_else(tmp_path: Path) -> None:
    on_ranks(2, _again, str(tmp_path))


def _fails(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


# who fails, in what, of which kind of checkpoint
FAILURES: dict[str, tuple[int, str, bool]] = {
    "a shard": (1, "torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", True),
    "the index": (0, "torch.distributed.checkpoint.filesystem.FileSystemWriter.finish", True),
    "plain values": (0, "lightning.fabric.utilities.sharded_folder.write_meta", True),
    "the fresh folder": (0, "pathlib.Path.mkdir", True),
    "the last step": (0, "lightning.fabric.checkpoint.transaction._put_in_place", True),
    "planning, all alone": (1, "torch.distributed.checkpoint.DefaultSavePlanner.create_local_plan", True),
    "planning, for all": (0, "torch.distributed.checkpoint.DefaultSavePlanner.create_global_plan", True),
    "the file": (0, "torch.save", False),
}


def _failing(folder: str, failures: dict[str, tuple[int, str, bool]]) -> dict[str, str]:
    from unittest import mock

    strategy = _joined(2)
    path = f"{folder}/c"
    told = {}
    for name, (rank, what, sharded) in failures.items():
        _saved(strategy, path, {**_pairs(1), "epoch": 1}, sharded=sharded)
        try:
            with mock.patch(what, _fails) if strategy.global_rank == rank else mock.patch("os.getcwd"):
                _saved(strategy, path, {**_pairs(2), "epoch": 2}, sharded=sharded)
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        state = {"gen": _pairs(9)["gen"], "epoch": 0}
        files.load_checkpoint(strategy, path, state)
        assert state["epoch"] == 1
        assert _differences(_flat(state), {"gen": _flat(_pairs(1))["gen"]}) == []
        assert os.listdir(folder) == ["c"]
        strategy.barrier()
    return told


def test_where_one_rank_fails_all_raise_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    told = on_ranks(2, _failing, str(tmp_path), FAILURES)
    for name, (rank, _, _) in FAILURES.items():
        assert told[rank][name].startswith("OSError: [Errno 28]"), name
        doing = "planning which rank saves what" if "planning" in name else f"saving '{tmp_path}/c'"
        assert told[1 - rank][name].startswith(f"RuntimeError: Rank {rank} failed while {doing}"), name


# -- errors


def _sharded_pair() -> nn.Module:
    return _pairs(2)["gen"]


def _pair_with(**parts: nn.Module) -> nn.Module:
    pair = Pair()
    for name, part in parts.items():
        setattr(pair, name, part)
    return _shard(pair, "fsdp", 2)


def _sgd(pair: nn.Module, *params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params or pair.parameters(), lr=1)


def _renamed(pair: nn.Module) -> State:
    return {
        "gen": pair,
        "gen_sgd": _sgd(pair, {"params": list(pair.up.parameters())}, {"params": list(pair.down.parameters())}),
    }


Wrong = Callable[[DDPStrategy, str], Any]
SAVING: dict[str, tuple[Wrong, str]] = {
    "storage_options": (
        lambda s, p: _saved(s, p, {}, sharded=True, storage_options={"a": 1}),
        "TypeError: DDPStrategy takes no `storage_options`, but got {'a': 1}",
    ),
    "filter": (
        lambda s, p: _saved(s, p, {}, sharded=True, filter={"gen": lambda *_: True}),
        "NotImplementedError: `filter` chooses among full tensors",
    ),
    "no module": (
        lambda s, p: _saved(s, p, {"epoch": 1}, sharded=True),
        "ValueError: Saving shards needs the module, but the state has none: its keys are ['epoch']. Pass the model",
    ),
    "state dict": (
        lambda s, p: _saved(s, p, {"model": _sharded_pair().state_dict()}, sharded=True),
        "ValueError: state['model'] has sharded tensors in it (DTensor, the first of shape (5, 3)), as the "
        "`state_dict()` of a model does. Pass the model itself",
    ),
    "state dict beside a model": (
        lambda s, p: _saved(s, p, {"gen": _sharded_pair(), "model": _sharded_pair().state_dict()}, sharded=True),
        "ValueError: state['model'] has sharded tensors in it",
    ),
    "state dict in full": (
        lambda s, p: _saved(s, p, {"model": _sharded_pair().state_dict()}, sharded=False),
        "ValueError: state['model'] has sharded tensors in it",
    ),
    "optimizer of another model": (
        lambda s, p: _saved(s, p, {"gen": _sharded_pair(), "gen_sgd": _sgd(_sharded_pair())}, sharded=True),
        "ValueError: state['gen_sgd'] (SGD) optimizes a parameter of shape (5, 3) that is in no module of the state, "
        "which has the modules ['gen']. Pass the optimizer's model too",
    ),
    "keys that are one": (
        lambda s, p: _saved(s, p, {"a": nn.ModuleDict({"b": nn.Linear(1, 1)}), "a.b": nn.Linear(1, 1)}, sharded=True),
        "ValueError: Two values would get the same name in the checkpoint: ['a.b.bias', 'a.b.weight']",
    ),
    "a folder of other things": (
        lambda s, p: _saved(s, Path(p).parent, {"gen": nn.Linear(1, 1)}, sharded=False),
        "IsADirectoryError: Cannot save a file as",
    ),
}
LOADING: dict[str, tuple[Wrong, str]] = {
    "nothing there": (
        lambda s, p: files.load_checkpoint(s, f"{p}/gone", {"gen": _sharded_pair()}),
        "FileNotFoundError: There is no checkpoint",
    ),
    "no checkpoint": (
        lambda s, p: files.load_checkpoint(s, Path(p).parent, {"gen": _sharded_pair()}),
        "holds no complete sharded checkpoint: it has no `.metadata`. It has ['sharded', 'whole']",
    ),
    "no state": (
        lambda s, p: files.load_checkpoint(s, p, None),
        "ValueError: Loading works in place, so it needs the module",
    ),
    "empty state": (lambda s, p: files.load_checkpoint(s, p, {}), "but the state has none: its keys are []"),
    "no module": (lambda s, p: files.load_checkpoint(s, p, {"epoch": 0}), "none: its keys are ['epoch']"),
    "no state at all": (lambda s, p: files.load_checkpoint(s, p, [1]), "TypeError: `state` must be a dict"),
    "a key": (
        lambda s, p: files.load_checkpoint(s, p, {"gen": _sharded_pair(), "hop": 1}),
        "KeyError: \"The requested state contains a key 'hop' that does not exist in the loaded checkpoint. The state "
        "asks for ['gen', 'hop'], the checkpoint has ['epoch', 'gen', 'gen_sgd']",
    ),
    "a missing name": (
        lambda s, p: files.load_checkpoint(s, p, {"gen": _pair_with(more=nn.Linear(1, 1))}),
        "RuntimeError: Error(s) in loading state_dict for Pair (state['gen']); nothing was changed:\n"
        '\tMissing key(s) in state_dict: "more.weight".\n\tMissing key(s) in state_dict: "more.bias".',
    ),
    "an unexpected name": (
        lambda s, p: files.load_checkpoint(s, p, {"gen": _pair_with(up=nn.Linear(3, 5, bias=False))}),
        'Unexpected key(s) in state_dict: "up.bias".',
    ),
    "a shape": (
        lambda s, p: files.load_checkpoint(s, p, {"gen": _pair_with(up=nn.Linear(4, 5))}, strict=False),
        'size mismatch for "up.weight": the checkpoint has (5, 3), the model (5, 4).',
    ),
    "memory": (
        lambda s, p: files.load_checkpoint(s, p, {"gen": Pair().to("meta")}),
        "RuntimeError: state['gen'] has parameters on the meta device, which have no memory to load into",
    ),
    "other groups": (
        lambda s, p: files.load_checkpoint(s, p, _renamed(_sharded_pair())),
        "nothing was changed",
    ),
    "fewer parameters": (
        lambda s, p: files.load_checkpoint(
            s, p, {"gen": (pair := _sharded_pair()), "gen_sgd": _sgd(pair, pair.up.weight, pair.up.bias)}
        ),
        "nothing was changed",
    ),
    "a module's key is a value's": (
        lambda s, p: files.load_checkpoint(s, p, {"gen": _sharded_pair(), "epoch": nn.Linear(1, 1)}),
        "Error",
    ),
    "an optimizer's key is a model's": (
        lambda s, p: files.load_checkpoint(s, p, {"gen_sgd": _sharded_pair()}),
        "Error",
    ),
    "a bare module": (lambda s, p: files.load_checkpoint(s, p, _sharded_pair()), "Error"),
}


def _errors(folder: str) -> dict[str, str]:
    strategy = _joined(2)
    paths = {"sharded": f"{folder}/sharded", "whole": f"{folder}/whole"}
    for kind, path in paths.items():
        state = {"gen": (gen := _pairs(1)["gen"]), "gen_sgd": _sgd(gen), "epoch": 1}
        _saved(strategy, path, state, sharded=kind == "sharded")
    calls = {f"saving {name}": (call, f"{folder}/new") for name, (call, _) in SAVING.items()}
    for kind, path in paths.items():
        calls |= {f"{kind} {name}": (call, path) for name, (call, _) in LOADING.items()}
    told = {}
    for name, (call, path) in calls.items():
        try:
            call(strategy, path)
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    assert sorted(os.listdir(folder)) == ["sharded", "whole"]
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    one, other = on_ranks(2, _errors, str(tmp_path_factory.mktemp("errors")))
    assert one == other
    return one


@pytest.mark.parametrize("name", SAVING)
def test_a_save_that_cannot_be_is_refused_on_every_rank(told: dict[str, str], name: str) -> None:
    assert SAVING[name][1] in told[f"saving {name}"]


@pytest.mark.parametrize("kind", ["sharded", "whole"])
@pytest.mark.parametrize("name", LOADING)
def test_a_load_that_cannot_be_is_refused_on_every_rank(told: dict[str, str], name: str, kind: str) -> None:
    assert LOADING[name][1] in told[f"{kind} {name}"]


def _nothing_changed(folder: str) -> None:
    strategy = _joined(2)
    for sharded in (True, False):
        path = f"{folder}/{sharded}"
        gen = _pairs(1)["gen"]
        _saved(strategy, path, {"gen": gen, "gen_sgd": _sgd(gen), "epoch": 1}, sharded=sharded)
        for state in (
            {"gen": _sharded_pair(), "dis": _sharded_pair(), "epoch": 5},
            {"gen": _pair_with(more=nn.Linear(1, 1)), "epoch": 5},
            {"gen": _pair_with(up=nn.Linear(4, 5)), "epoch": 5},
            {**_renamed(_sharded_pair()), "epoch": 5},
        ):
            before = _flat(state)
            with pytest.raises((RuntimeError, KeyError, ValueError)):
                files.load_checkpoint(strategy, path, state)
            assert _differences(_flat(state), before) == []
            assert state["epoch"] == 5


def test_a_load_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    on_ranks(2, _nothing_changed, str(tmp_path))


# -- damage and malice


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


def _try_to_load(path: str, weights_only: bool | None) -> str:
    strategy = _joined(2)
    model = _trained(2, "fsdp", seed=2, steps=0)["model"]
    try:
        files.load_checkpoint(strategy, path, {"model": model}, weights_only=weights_only)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_no_code_of_a_checkpoint_runs_unless_it_is_trusted(saved: Path, tmp_path: Path) -> None:
    for file, text in (("meta.pt", "refuses"), (".metadata", "which is no part of an index")):
        shutil.copytree(saved / "fsdp/new/sharded", tmp_path / file)
        ran = tmp_path / f"ran-{file}"
        if file == "meta.pt":
            torch.save({"epoch": Evil(ran)}, tmp_path / file / file)
        else:
            (tmp_path / file / file).write_bytes(pickle.dumps(Evil(ran)))
        for answer in on_ranks(2, _try_to_load, str(tmp_path / file), None):
            assert answer.startswith("UnpicklingError")
            assert text in answer
            assert "weights_only=False" in answer
        assert not ran.exists()


class Kept(nn.Module):
    """Has state that is an object of a class of the user's."""

    def get_extra_state(self) -> Any:
        return Path("somewhere")

    def set_extra_state(self, state: Any) -> None:
        self.path = state


def _objects(folder: str) -> None:
    strategy = _joined(2)
    state = {"model": _pair_with(kept=Kept()), "where": Path("here")}
    for sharded in (True, False):
        _saved(strategy, f"{folder}/{sharded}", state, sharded=sharded)
        loaded = {"model": _pair_with(kept=Kept()), "where": None}
        with pytest.raises(pickle.UnpicklingError, match="`weights_only=True` \\(the default\\) refuses"):
            files.load_checkpoint(strategy, f"{folder}/{sharded}", loaded)
        with pytest.raises(pickle.UnpicklingError, match="an object of pathlib.*refuses"):
            files.load_checkpoint(strategy, f"{folder}/{sharded}", {"model": loaded["model"]}, weights_only=True)
        files.load_checkpoint(strategy, f"{folder}/{sharded}", loaded, weights_only=False)
        assert loaded["where"] == Path("here")
        assert loaded["model"].kept.path == Path("somewhere")


def test_objects_of_other_classes_are_loaded_only_if_the_file_is_trusted(tmp_path: Path) -> None:
    on_ranks(2, _objects, str(tmp_path))


def _a_part_is_gone(index: Path) -> None:
    known = pickle.loads(index.read_bytes())
    known.state_dict_metadata["model.up.weight"].chunks.pop()
    index.write_bytes(pickle.dumps(known))


def _outside(index: Path) -> None:
    known = pickle.loads(index.read_bytes())
    next(iter(known.storage_data.values())).relative_path = "../other.distcp"
    index.write_bytes(pickle.dumps(known))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)


def _other(path: Path) -> None:
    with path.open("wb") as file:
        torch.save([1], file)


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        ("__1_0.distcp", Path.unlink, "is missing."),
        ("__1_0.distcp", _cut, "cannot be read: "),
        ("__1_0.distcp", _flip, "cannot be read: UnpicklingError: Unsupported operand"),
        (".metadata", _cut, "cannot be read: UnpicklingError: pickle data was truncated."),
        (".metadata", _empty, "cannot be read: EOFError: Ran out of input."),
        (".metadata", _other, "cannot be read: "),
        (".metadata", _a_part_is_gone, "has 25 of the 50 numbers of 'model.up.weight'."),
        (".metadata", _outside, "names the file '../other.distcp', which is not inside of the checkpoint."),
        ("meta.pt", _cut, "cannot be read: RuntimeError: PytorchStreamReader failed"),
        ("meta.pt", _empty, "cannot be read: EOFError."),
        ("meta.pt", _other, "holds list, no dict."),
    ],
)
def test_damage_is_told_on_every_rank(
    saved: Path, tmp_path: Path, file: str, damage: Callable[[Path], None], what: str
) -> None:
    folder = shutil.copytree(saved / "fsdp/new/sharded", tmp_path / "c")
    damage(folder / file)
    for answer in on_ranks(2, _try_to_load, str(folder), None):
        assert answer.startswith("RuntimeError")
        assert f"The checkpoint '{folder}' is damaged: its file '{file}' {what}" in answer
        assert "weights_only" not in answer


# -- full states


def _full_states() -> None:
    strategy = _joined(2)
    state = _trained(2, "fsdp", seed=1, steps=1)
    everywhere = _full(state)
    model = files.full_module_state(state["model"], rank_zero_only=True)
    optimizer = files.full_optimizer_state(state["optimizer"], rank_zero_only=True)
    if strategy.is_global_zero:
        assert _differences(model, everywhere["model"]) == []
        assert _differences(optimizer, everywhere["optimizer"]) == []
    else:
        assert model == optimizer == {}
    # full and sharded tensors are taken alike
    for given in (everywhere["model"], state["model"].state_dict()):
        other = _trained(2, "fsdp", seed=2, steps=0)["model"]
        assert files.load_full_module_state(other, given, strict=True) == ([], [])
        assert _differences(files.full_module_state(other, rank_zero_only=False), everywhere["model"]) == []
    before = {key: value.clone() for key, value in everywhere["optimizer"]["state"][0].items()}
    other_state = _trained(2, "fsdp", seed=2, steps=0)
    files.load_full_optimizer_state(other_state["optimizer"], everywhere["optimizer"])
    assert _differences(_full(other_state)["optimizer"], everywhere["optimizer"]) == []
    other_state["model"](torch.arange(6)).sum().backward()
    other_state["optimizer"].step()
    assert _differences(everywhere["optimizer"]["state"][0], before) == []  # what was given is not held on to

    # names that only parts of torch, which load in their own way, can judge
    given = {name: value for name, value in everywhere["model"].items() if name not in ("norm.weight", "up.bias")}
    other = _trained(2, "fsdp", seed=2, steps=0)["model"]
    missing, unexpected = files.load_full_module_state(other, given | {"odd": torch.ones(1)}, strict=False)
    assert (missing, unexpected) == (["up.bias", "norm.weight"], ["odd"])
    assert torch.equal(full_tensor(other.down.bias), given["down.bias"])
    assert torch.equal(other.norm.running_var, given["norm.running_var"])
    with pytest.raises(RuntimeError, match="Missing key.*norm.weight"):
        files.load_full_module_state(other, given | {"up.bias": everywhere["model"]["up.bias"]}, strict=True)


def test_full_states_go_out_and_in(tmp_path: Path) -> None:
    on_ranks(2, _full_states)
