"""Parameters shared out over XLA devices: on one against torch_xla and the stand-in, on two against the stand-in."""

import math
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from tests.xla_stand_in import batches, install, xla  # noqa: F401
from torch import nn

from lightning.fabric import Fabric
from lightning.fabric.checkpoint.manifest import DamagedCheckpointError
from lightning.fabric.strategies.xla_fsdp import XLAFSDPStrategy, _activation_checkpointing_auto_wrapper
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.testing.contract import check_strategy
from lightning.fabric.utilities.warnings import PossibleUserWarning

preload("torch.distributed.fsdp", "lightning.fabric.strategies.xla_fsdp")
# which torch_xla itself calls
pytestmark = pytest.mark.filterwarnings("ignore:Use torch_xla.device instead:DeprecationWarning")


class Block(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width, momentum=None)

    def forward(self, x):
        return x + self.inner(x).tanh()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TiedBlocks(nn.Sequential):
    def __init__(self):
        super().__init__(Block(), Block(), nn.Linear(5, 3))
        self[1].inner.weight = self[0].inner.weight


def _model(cls=Model, seed=0):
    torch.manual_seed(seed)
    return cls()


def _optimizer(module):
    return torch.optim.Adam(module if isinstance(module, list) else module.parameters(), lr=0.05)


def _plain(cls=Model, max_norm=None, micro_batches=1):
    model = _model(cls)
    optimizer = _optimizer(model)
    for index, (x, y) in enumerate(batches()):
        (nn.functional.cross_entropy(model(x), y) / micro_batches).backward()
        if (index + 1) % micro_batches:
            continue
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _fabric(devices=1, precision=None, **options):
    strategy = XLAFSDPStrategy(**{"auto_wrap_policy": {Block}, **options})
    fabric = Fabric(accelerator="tpu", devices=devices, strategy=strategy, precision=precision)
    fabric._join()  # the ranks are there
    return fabric


def _steps(fabric, model, optimizer, max_norm=None, micro_batches=1):
    for index, (x, y) in enumerate(batches(fabric.global_rank, fabric.world_size)):
        x, y = fabric.to_device((x, y))
        is_last = (index + 1) % micro_batches == 0
        with fabric.no_backward_sync(model, enabled=not is_last):
            fabric.backward(nn.functional.cross_entropy(model(x), y) / micro_batches)
        if not is_last:
            continue
        if max_norm:
            fabric.clip_gradients(model, optimizer, max_norm=max_norm)
        optimizer.step()
        optimizer.zero_grad()


def _train(fabric, cls=Model, **how):
    module = _model(cls)
    model, optimizer = fabric.setup(module, _optimizer(module))
    _steps(fabric, model, optimizer, **how)
    return model, optimizer


def _whole(fabric, model):
    return fabric.strategy.get_module_state_dict(model.module)


def _assert_same(state, module):
    # the other way to add up gradients goes through Adam's square root
    torch.testing.assert_close(state, dict(module.state_dict()), rtol=1e-4, atol=1e-4)


def _assert_same_optimizer(ours, optimizer):
    theirs = optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("xla")
class TestOnOneDevice:
    """All of it runs against torch_xla, too."""

    @pytest.mark.parametrize("options", [{}, {"auto_wrap_policy": None}, {"activation_checkpointing_policy": {Block}}])
    def test_training_is_that_without_fabric(self, options):
        fabric = _fabric(**options)
        model, optimizer = _train(fabric)
        plain, plain_optimizer = _plain()
        _assert_same(_whole(fabric, model), plain)
        _assert_same_optimizer(optimizer.state_dict(), plain_optimizer)

    def test_the_module_first_and_then_the_optimizer(self):
        fabric = _fabric()
        model = fabric.setup_module(_model())
        named = dict(fabric.strategy.named_parameters(model.module))
        assert list(named) == [name for name, _ in _model().named_parameters()]
        optimizer = fabric.setup_optimizers(_optimizer(list(named.values())))
        _steps(fabric, model, optimizer)
        _assert_same(_whole(fabric, model), _plain()[0])

    def test_an_optimizer_of_other_parameters_is_refused(self):
        fabric = _fabric()
        module = _model()
        optimizer = _optimizer(module)
        fabric.setup_module(module)
        with pytest.raises(ValueError, match="not those of a set-up module"):
            fabric.setup_optimizers(optimizer)

    def test_clipping_by_norm(self):
        fabric = _fabric()
        _assert_same(_whole(fabric, _train(fabric, max_norm=0.1)[0]), _plain(max_norm=0.1)[0])

    @pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
    def test_the_norm(self, norm_type):
        fabric = _fabric()
        model, optimizer = _train(fabric)
        x, y = fabric.to_device(next(batches()))
        nn.functional.cross_entropy(model(x), y).backward()
        plain, _ = _plain()
        nn.functional.cross_entropy(plain(x.cpu()), y.cpu()).backward()
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=norm_type)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 1.0, norm_type)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-3)

    def test_what_cannot_be_clipped_is_refused(self):
        fabric = _fabric()
        model, optimizer = _train(fabric)
        with pytest.raises(NotImplementedError, match="max_norm"):
            fabric.clip_gradients(model, optimizer, clip_val=1.0)
        with pytest.raises(ValueError, match="norm_type > 0"):
            fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=-1)
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.full_like(group["params"][0], math.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
        assert fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False).isnan()

    def test_micro_batches(self):
        fabric = _fabric()
        _assert_same(_whole(fabric, _train(fabric, micro_batches=2)[0]), _plain(micro_batches=2)[0])

    def test_tied_parameters_stay_in_the_unit_around(self):
        fabric = _fabric()
        with pytest.warns(PossibleUserWarning, match=r"0.inner.weight, 1.inner.weight are one parameter"):
            model, _ = _train(fabric, TiedBlocks)
        _assert_same(_whole(fabric, model), _plain(TiedBlocks)[0])

    def test_bfloat16_is_the_dtype_of_computation(self):
        fabric = _fabric(precision="bf16-true")
        model, _ = _train(fabric)
        assert {part.dtype for _, part in fabric.strategy.named_parameters(model.module)} == {torch.float32}
        assert model._forward_module.compute_dtype is torch.bfloat16
        x = torch.ones(2, 5, device=fabric.device)
        assert model(x).dtype is torch.float32
        assert model._forward_module(x).dtype is torch.bfloat16
        state, plain = _whole(fabric, model), _plain()[0]
        torch.testing.assert_close(state["head.weight"], plain.head.weight.detach(), rtol=0.2, atol=0.1)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_a_module_of_the_meta_device_is_initialised(self, precision):
        fabric = _fabric(precision=precision)
        torch.manual_seed(0)
        with fabric.init_module(empty_init=True):
            module = Model()
        assert all(parameter.is_meta for parameter in module.parameters())
        model = fabric.setup_module(module)
        made = _fabric(precision=precision)
        with made.init_module():
            plain = _model().float()
        for name, value in _whole(fabric, model).items():
            assert torch.equal(value.float(), plain.state_dict()[name].float()), name
        fabric.backward(model(torch.ones(2, 5, device=fabric.device)).sum())

    def test_a_module_is_made_in_the_memory_of_the_host(self):
        with _fabric().init_module():
            assert nn.Linear(2, 2).weight.device == torch.device("cpu")

    def test_no_backward_sync_needs_the_wrapped_module(self):
        control = XLAFSDPStrategy()._backward_sync_control
        with pytest.raises(TypeError, match="but got Linear"):
            control.no_backward_sync(nn.Linear(1, 1), enabled=True)
        with control.no_backward_sync(nn.Linear(1, 1), enabled=False):
            pass

    @pytest.mark.parametrize("state_dict_type", ["sharded", "full"])
    def test_a_checkpoint_is_restored(self, tmp_path, state_dict_type):
        fabric = _fabric(state_dict_type=state_dict_type)
        model, optimizer = _train(fabric)
        fabric.save(tmp_path / "ck", {"model": model, "optimizer": optimizer, "step": 3, "more": [1]})
        assert (tmp_path / "ck").is_dir() is (state_dict_type == "sharded")

        module = _model(seed=1)
        other, optimizer = fabric.setup(module, _optimizer(module))
        state = {"model": other, "optimizer": optimizer, "step": 0}
        assert fabric.load(tmp_path / "ck", state) == {"more": [1]}
        assert state["step"] == 3
        plain, plain_optimizer = _plain()
        _assert_same(_whole(fabric, other), plain)
        _assert_same_optimizer(optimizer.state_dict(), plain_optimizer)

    def test_a_full_file_is_an_ordinary_one_and_back(self, tmp_path):
        fabric = _fabric(state_dict_type="full")
        model, optimizer = _train(fabric)
        keep = {"model": lambda name, value: name.startswith("head")}
        fabric.save(tmp_path / "part.pt", {"model": model}, filter=keep)
        assert list(torch.load(tmp_path / "part.pt")["model"]) == ["head.weight", "head.bias"]
        fabric.save(tmp_path / "a.pt", {"model": model, "optimizer": optimizer})
        saved, (plain, plain_optimizer) = torch.load(tmp_path / "a.pt"), _plain()
        _assert_same(saved["model"], plain)
        plain.load_state_dict(saved["model"])
        plain_optimizer.load_state_dict(saved["optimizer"])

        torch.save(plain.state_dict(), tmp_path / "raw.pt")
        fresh = fabric.setup_module(_model(seed=1))
        fabric.load_raw(tmp_path / "raw.pt", fresh)
        _assert_same(_whole(fabric, fresh), plain)

    def test_states_that_do_not_fit_change_nothing(self, tmp_path):
        fabric = _fabric()
        model = fabric.setup_module(_model())
        wrong = dict(_model(seed=1).state_dict())
        wrong["head.weight"], wrong["new"] = torch.ones(2, 2), wrong.pop("head.bias")
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(
            RuntimeError, match=r'Missing.*head.bias(.|\n)*Unexpected.*"new"(.|\n)*mismatch.*head.weight'
        ):
            fabric.load_raw(tmp_path / "wrong.pt", model)
        _assert_same(_whole(fabric, model), _model())

    def test_loading_what_is_there_only(self, tmp_path):
        fabric = _fabric()
        model = fabric.setup_module(_model())
        torch.save({"head.bias": torch.ones(3)}, tmp_path / "some.pt")
        fabric.load_raw(tmp_path / "some.pt", model, strict=False)
        state = _whole(fabric, model)
        assert state["head.bias"].tolist() == [1.0] * 3
        assert torch.equal(state["head.weight"], _model().head.weight)

    def test_what_cannot_be_saved_or_loaded(self, tmp_path):
        fabric = _fabric()
        model, other = fabric.setup_module(_model()), fabric.setup_module(_model())
        strategy = fabric.strategy
        for state in ({}, {"a": 1}, {"a": model, "b": other}):
            with pytest.raises(ValueError, match="exactly one module"):
                fabric.save(tmp_path / "x", state)
        with pytest.raises(NotImplementedError, match="state_dict_type='full'"):
            fabric.save(tmp_path / "x", {"model": model}, filter={"model": lambda name, value: True})
        with pytest.raises(TypeError, match="storage_options"):
            strategy.save_checkpoint(tmp_path / "x", {"model": model.module}, storage_options={})
        with pytest.raises(ValueError, match="'shard_metadata'"):
            fabric.save(tmp_path / "x", {"model": model, "shard_metadata": 1})
        for state in (None, {}):
            with pytest.raises(ValueError, match="must have the set-up module"):
                fabric.load(tmp_path / "x", state)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="not a checkpoint of XLAFSDPStrategy"):
            fabric.load(tmp_path / "empty", {"model": model})
        fabric.save(tmp_path / "x", {"model": model})
        with pytest.raises(ValueError, match="Pass the folder"):
            fabric.load(next((tmp_path / "x").glob("*.pth")), {"model": model})
        (file,) = (tmp_path / "x").glob("*.pth")
        file.rename(tmp_path / "x" / "checkpoint_rank-00000001-of-00000002.pth")
        with pytest.raises(DamagedCheckpointError, match=f"'{file.name}' is missing"):
            fabric.load(tmp_path / "x", {"model": model})
        (tmp_path / "x" / "manifest.json").unlink()
        with pytest.raises(ValueError, match="for each rank, but has 1"):
            fabric.load(tmp_path / "x", {"model": model})
        fabric.save(tmp_path / "y", {"model": model})
        with pytest.raises(KeyError, match="missing"):
            fabric.load(tmp_path / "y", {"model": model, "missing": 1})
        with pytest.raises(ValueError, match="Linear is not a module that XLAFSDPStrategy has set up"):
            strategy.get_module_state_dict(nn.Linear(1, 1))


class TestOptions:
    def test_state_dict_type(self):
        with pytest.raises(ValueError, match="'full' or 'sharded', but got 'whole'"):
            XLAFSDPStrategy(state_dict_type="whole")

    def test_policies(self):
        with pytest.raises(TypeError, match="`auto_wrap_policy`"):
            XLAFSDPStrategy(auto_wrap_policy=3)
        with pytest.raises(TypeError, match="`activation_checkpointing_policy`.*'Linear'"):
            XLAFSDPStrategy(activation_checkpointing_policy={"Linear"})

    def test_a_function_says_what_to_wrap(self, xla):  # noqa: F811
        def policy(module, recurse, unwrapped_params):
            return recurse or (unwrapped_params < 25 and isinstance(module, nn.Linear))

        model = _fabric(auto_wrap_policy=policy).setup_module(_model())
        kind = type(model._forward_module)
        assert isinstance(model.head, kind)
        assert not any(isinstance(block.inner, kind) for block in model.blocks)

    def test_options_of_torch_xla_are_passed_on(self, xla):  # noqa: F811
        fabric = _fabric(compute_dtype=torch.bfloat16)
        assert fabric.setup_module(_model())._forward_module.compute_dtype is torch.bfloat16
        with pytest.raises(TypeError, match="no_such_option"):
            _fabric(no_such_option=1).setup_module(_model())

    def test_checkpointing_while_wrapping(self, xla):  # noqa: F811
        _fabric()
        wrapped = _activation_checkpointing_auto_wrapper({Block}, block := Block())
        assert "forward" in vars(block)
        assert type(wrapped).__name__ == "XlaFullyShardedDataParallel"
        _activation_checkpointing_auto_wrapper({nn.Linear}, block := Block())
        assert "forward" not in vars(block)


@pytest.mark.xla
class TestOptionsOfTorchXLA:
    """What the stand-in has not got."""

    @pytest.fixture(autouse=True)
    def _torch_xla_alone(self, xla):  # noqa: F811
        if xla == "stand-in":
            pytest.skip("needs torch_xla")

    def test_parameters_may_be_cut_along_their_first_dimension(self, tmp_path):
        fabric = _fabric(shard_param_on_dim_0=True)
        model, optimizer = _train(fabric)
        plain, plain_optimizer = _plain()
        _assert_same(_whole(fabric, model), plain)
        _assert_same_optimizer(optimizer.state_dict(), plain_optimizer)
        fabric.strategy.load_module_state_dict(model.module, dict(_model(seed=3).state_dict()))
        _assert_same(_whole(fabric, model), _model(seed=3))

    def test_parameters_may_be_merged(self, tmp_path):
        fabric = _fabric(flatten_parameters=True)
        with pytest.raises(ValueError, match="setup_module"):
            fabric.setup(module := _model(), _optimizer(module))
        model = fabric.setup_module(_model())
        optimizer = fabric.setup_optimizers(_optimizer(list(model._forward_module.parameters())))
        _steps(fabric, model, optimizer)
        _assert_same(_whole(fabric, model), _plain()[0])
        fabric.strategy.load_module_state_dict(model.module, dict(_model(seed=3).state_dict()))
        _assert_same(_whole(fabric, model), _model(seed=3))
        with pytest.raises(ValueError, match="leave flatten_parameters out"):
            optimizer.state_dict()
        fabric.save(tmp_path / "a", {"model": model, "optimizer": optimizer})
        fabric.load(tmp_path / "a", {"model": model, "optimizer": optimizer})

    def test_its_own_tool_makes_one_file_of_a_folder(self, tmp_path):
        from torch_xla.distributed.fsdp import consolidate_sharded_model_checkpoints

        fabric = _fabric()
        model, optimizer = _train(fabric)
        fabric.save(tmp_path / "a", {"model": model, "optimizer": optimizer, "step": 1})
        state, _ = consolidate_sharded_model_checkpoints(str(tmp_path / "a" / "checkpoint_"), save_model=False)
        _assert_same(dict(state), _plain()[0])


# ---- two devices -----------------------------------------------------------------------------------------------------


def _on_ranks(n, what, *args, **options):
    return on_ranks(n, _run, what, *args, **options)


def _run(what, *args, **options):
    install()
    return what(int(os.environ["WORLD_SIZE"]), *args, **options)


def _train_in_all_ways(devices):
    results = {}
    for name, options, how in (
        ("plain", {}, {}),
        ("clipped", {}, {"max_norm": 0.1}),
        ("micro batches", {}, {"micro_batches": 2}),
        ("checkpointed", {"activation_checkpointing_policy": {Block}}, {}),
    ):
        fabric = _fabric(devices, **options)
        model, optimizer = _train(fabric, **how)
        results[name] = _whole(fabric, model)
        parts = sum(part.numel() for _, part in fabric.strategy.named_parameters(model.module))
    return results, optimizer.state_dict(), parts


def test_two_ranks_train_like_one_process():
    (first, optimizer, parts), (second, nothing, _) = _on_ranks(2, _train_in_all_ways)
    for ours in (first, second):
        _assert_same(ours["plain"], _plain()[0])
        _assert_same(ours["clipped"], _plain(max_norm=0.1)[0])
        _assert_same(ours["micro batches"], _plain(micro_batches=2)[0])
        _assert_same(ours["checkpointed"], _plain()[0])
    _assert_same_optimizer(optimizer, _plain()[1])
    assert nothing == {}
    assert parts == 128 * len(list(_model().parameters()))  # of each, one part of the smallest size


def _save(fabric, path, model, optimizer):
    fabric.save(path, {"model": model, "optimizer": optimizer, "rank": fabric.global_rank})


def _check_loaded(fabric, path):
    module = _model(seed=1)
    model, optimizer = fabric.setup(module, _optimizer(module))
    rest = fabric.load(path, {"model": model, "optimizer": optimizer})
    assert rest == {"rank": 0}
    plain, plain_optimizer = _plain()
    _assert_same(_whole(fabric, model), plain)
    whole = optimizer.state_dict()
    optimizer.load_state_dict(whole)  # which rank 0 alone has
    for state in (whole, optimizer.state_dict()):
        if fabric.is_global_zero:
            _assert_same_optimizer(state, plain_optimizer)


def _check_mixed(fabric, path):
    model = fabric.setup_module(_model())
    with pytest.raises(ValueError, match="files of different saves"):
        fabric.load(path, {"model": model})


def _save_and_load(devices, folder):
    fabric, full = _fabric(devices), _fabric(devices, state_dict_type="full")
    in_turn = _fabric(devices, sequential_save=True)
    for name, each in {"folder": fabric, "later": fabric, "in turn": in_turn, "file": full}.items():
        _save(each, folder / name, *_train(each))
    for name, each in {"folder": fabric, "in turn": in_turn}.items():
        assert not (folder / name / "checkpoint_rank-00000002-of-00000003.pth").exists()
        _check_loaded(each, folder / name)
    _check_loaded(fabric, folder / "file")
    if fabric.is_global_zero:
        name = "checkpoint_rank-00000001-of-00000002.pth"
        (folder / "mixed").mkdir()
        shutil.copy(folder / "later" / name, folder / "mixed")
        shutil.copy(folder / "folder" / name.replace("1-of", "0-of"), folder / "mixed")
    fabric.barrier()
    _check_mixed(fabric, folder / "mixed")


def _load_by_more(devices, folder):
    fabric = _fabric(devices)
    for name in ("folder", "in turn", "file"):
        _check_loaded(fabric, folder / name)
    _check_mixed(fabric, folder / "mixed")


def test_checkpoints_of_two_ranks_are_loaded_by_two_and_by_three(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "checkpoint_rank-00000002-of-00000003.pth").touch()  # of an earlier save by more ranks
    _on_ranks(2, _save_and_load, tmp_path)
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == [
        "checkpoint_rank-00000000-of-00000002.pth",
        "checkpoint_rank-00000001-of-00000002.pth",
        "manifest.json",
    ]
    _on_ranks(3, _load_by_more, tmp_path)
    plain, optimizer = _plain()
    saved = torch.load(tmp_path / "file")
    plain.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


def _initialise(devices):
    fabric = _fabric(devices)
    torch.manual_seed(3 + fabric.global_rank)
    with fabric.init_module(empty_init=True):
        module = Model()
    return _whole(fabric, fabric.setup_module(module))


def test_ranks_with_different_seeds_initialise_one_model():
    for state in _on_ranks(2, _initialise):
        torch.testing.assert_close(state, dict(_model(seed=3).state_dict()), rtol=0, atol=0)


class OnStandIn(XLAFSDPStrategy):
    """Lets the processes of the stand-in part."""

    def teardown(self):
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()


def _sharded():
    if "RANK" in os.environ:
        install()
    return OnStandIn()


def _full():
    if "RANK" in os.environ:
        install()
    return OnStandIn(state_dict_type="full")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [_sharded, _full])
def test_the_contract_of_strategies_is_kept(strategy):
    check_strategy(strategy, accelerator="tpu", tolerance=1e-5, tolerance_alone=1e-6)
