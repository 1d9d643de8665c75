"""``Fabric`` in one process: one class for each promise."""

import contextlib
import os
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning.fabric import Fabric, is_wrapped
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.fabric.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer


def on_cpu(**flags):
    return Fabric(accelerator="cpu", **{"devices": 1, **flags})


def model_and_optimizer():
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def loader(**kwargs):
    return DataLoader(TensorDataset(torch.arange(10.0)), **{"batch_size": 2, **kwargs})


class TestConstruction:
    def test_arguments_are_keywords(self):
        with pytest.raises(TypeError):
            Fabric("cpu")

    def test_one_device_is_described(self):
        fabric = on_cpu()
        assert isinstance(fabric.strategy, SingleDeviceStrategy)
        assert (fabric.device, fabric.world_size) == (torch.device("cpu"), 1)
        assert (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.is_global_zero) == (0, 0, 0, True)

    def test_several_devices_before_launch_are_a_main_process(self):
        fabric = on_cpu(devices=3, num_nodes=2)
        assert isinstance(fabric.strategy, DDPStrategy)
        assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (6, 0, True)

    def test_printing_shows_the_plan_and_reasons(self):
        text = str(on_cpu(precision="bf16-mixed"))
        assert "bf16-mixed" in text
        assert "precision='bf16-mixed'" in text
        assert "single_device" in text

    def test_construction_starts_nothing(self):
        on_cpu(devices=2)
        assert not torch.distributed.is_initialized()
        assert "MASTER_PORT" not in os.environ

    def test_pickles_before_launch(self):
        clone = pickle.loads(pickle.dumps(on_cpu(devices=2, strategy="ddp_spawn")))
        assert clone.world_size == 2

    def test_private_attributes_that_programs_read(self):
        fabric = on_cpu(callbacks="one")
        assert fabric._strategy is fabric.strategy
        assert fabric._accelerator is fabric.accelerator
        assert fabric._precision is fabric.strategy.precision
        assert fabric._connector.strategy is fabric.strategy
        assert (fabric._callbacks, fabric._loggers, fabric._launched, fabric._models_setup) == (["one"], [], False, 0)

    def test_alias_of_the_package(self):
        import lightning as L
        from lightning.fabric.fabric import Fabric as same

        assert L.Fabric is Fabric is same


class TestLaunch:
    def test_single_device_runs_the_function_with_its_arguments(self):
        assert on_cpu().launch(lambda fabric, a, b=0: (fabric.world_size, a, b), 1, b=2) == (1, 1, 2)

    def test_without_a_function_it_just_goes_on(self):
        assert on_cpu().launch() is None

    def test_twice_is_harmless(self):
        fabric = on_cpu()
        fabric.launch()
        assert fabric.launch(lambda fabric: "again") == "again"

    def test_function_without_arguments_is_refused(self):
        def train():
            pass

        with pytest.raises(TypeError, match=r"`train\(\)` takes no argument"):
            on_cpu().launch(train)

    def test_not_a_function_is_refused(self):
        with pytest.raises(TypeError, match="takes a function, but got 3"):
            on_cpu().launch(3)

    @pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
    def test_strategies_that_spawn_need_a_function(self, strategy):
        with pytest.raises(TypeError, match="needs the function that the processes run"):
            on_cpu(devices=2, strategy=strategy).launch()

    @pytest.mark.parametrize(
        "use",
        [
            lambda f: f.setup(nn.Linear(1, 1)),
            lambda f: f.setup_module(nn.Linear(1, 1)),
            lambda f: f.setup_optimizers(model_and_optimizer()[1]),
            lambda f: f.setup_dataloaders(loader()),
            lambda f: f.init_module(),
            lambda f: f.barrier(),
            lambda f: f.broadcast(1),
            lambda f: f.all_gather(1),
            lambda f: f.all_reduce(1),
            lambda f: f.rank_zero_first().__enter__(),
            lambda f: f.save("nowhere", {}),
            lambda f: f.load("nowhere"),
            lambda f: f.load_raw("nowhere", nn.Linear(1, 1)),
        ],
    )
    def test_use_before_launch_on_several_devices_raises_and_says_so(self, use):
        with pytest.raises(RuntimeError, match=r"Call `fabric\.launch\(\)` first"):
            use(on_cpu(devices=2))

    def test_single_device_needs_no_launch(self):
        fabric = on_cpu()
        fabric.setup(*model_and_optimizer())
        fabric.barrier()
        assert fabric.broadcast("x") == "x"

    def test_wrap_with_setup_records_arguments_only_inside(self):
        seen = on_cpu()._wrap_with_setup(lambda: vars(loader(shuffle=True)))
        assert any("dataset" in str(key) for key in seen)
        assert "__pl_saved" not in str(vars(loader()))
        before = DataLoader.__init__
        on_cpu()._wrap_with_setup(lambda: None)
        assert DataLoader.__init__ is before

    def test_wrap_with_setup_restores_after_an_error(self):
        before = DataLoader.__init__, BatchSampler.__init__

        def fails():
            assert (DataLoader.__init__, BatchSampler.__init__) != before
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            on_cpu()._wrap_with_setup(fails)
        assert (DataLoader.__init__, BatchSampler.__init__) == before


class TestRun:
    def test_overridden_run_launches_first(self):
        class Mine(Fabric):
            def run(self, a, b=0):
                return self._launched, a, b

        assert Mine(accelerator="cpu", devices=1).run(1, b=2) == (True, 1, 2)

    def test_run_may_call_super(self):
        class Base(Fabric):
            def run(self):
                return ["base"]

        class Derived(Base):
            def run(self):
                return [*super().run(), "derived"]

        assert Derived(accelerator="cpu", devices=1).run() == ["base", "derived"]

    def test_run_and_the_cli_exclude_each_other(self, monkeypatch):
        class Mine(Fabric):
            def run(self):
                pass

        monkeypatch.setenv("LT_CLI_USED", "1")
        with pytest.raises(TypeError, match="overrides `run\\(\\)`"):
            Mine(accelerator="cpu", devices=1)


class TestSetup:
    def test_shapes_of_what_comes_back(self):
        fabric = on_cpu()
        model, optimizer = model_and_optimizer()
        other = torch.optim.Adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        assert isinstance(on_cpu().setup(nn.Linear(1, 1)), _FabricModule)
        m, o1, o2 = fabric.setup(model, optimizer, other)
        assert isinstance(m, _FabricModule)
        assert (o1.optimizer, o2.optimizer) == (optimizer, other)
        assert fabric.setup(nn.Linear(1, 1), scheduler=scheduler)[1] is scheduler
        model, optimizer = model_and_optimizer()
        m, o, s = fabric.setup(model, optimizer, scheduler=scheduler)
        assert (m.module, o.optimizer, s) == (model, optimizer, scheduler)

    def test_models_are_counted(self):
        fabric = on_cpu()
        fabric.setup(nn.Linear(1, 1))
        fabric.setup_module(nn.Linear(1, 1))
        assert fabric._models_setup == 2

    def test_twice_is_refused(self):
        fabric = on_cpu()
        model, optimizer = fabric.setup(*model_and_optimizer())
        with pytest.raises(ValueError, match="model is set up already"):
            fabric.setup(model)
        with pytest.raises(ValueError, match="model is set up already"):
            fabric.setup_module(model)
        with pytest.raises(ValueError, match="optimizer is set up already"):
            fabric.setup(nn.Linear(1, 1), optimizer)
        with pytest.raises(ValueError, match="optimizer is set up already"):
            fabric.setup_optimizers(optimizer)
        with pytest.raises(ValueError, match="part that is set up already"):
            fabric.setup(nn.Sequential(model))

    def test_wrong_types_are_refused_by_name(self):
        with pytest.raises(TypeError, match=r"takes a `torch\.nn\.Module` first, but got 3"):
            on_cpu().setup(3)
        with pytest.raises(TypeError, match="An optimizer is wanted, but got 3"):
            on_cpu().setup(nn.Linear(1, 1), 3)

    def test_the_same_optimizer_twice_in_one_call_is_refused(self):
        model, optimizer = model_and_optimizer()
        with pytest.raises(ValueError, match="passed twice"):
            on_cpu().setup(model, optimizer, optimizer)

    def test_setup_optimizers_gives_one_or_a_tuple_or_refuses(self):
        fabric = on_cpu()
        assert isinstance(fabric.setup_optimizers(model_and_optimizer()[1]), _FabricOptimizer)
        pair = fabric.setup_optimizers(model_and_optimizer()[1], model_and_optimizer()[1])
        assert isinstance(pair, tuple)
        assert len(pair) == 2
        with pytest.raises(ValueError, match="needs at least one optimizer"):
            fabric.setup_optimizers()

    def test_joint_and_separate_set_up_train_alike(self):
        results = []
        for joint in (True, False):
            torch.manual_seed(0)
            fabric = on_cpu()
            model, optimizer = model_and_optimizer()
            if joint:
                model, optimizer = fabric.setup(model, optimizer)
            else:
                model = fabric.setup_module(model)
                optimizer = fabric.setup_optimizers(optimizer)
            for _ in range(3):
                fabric.backward(model(torch.ones(2, 4)).sum())
                optimizer.step()
                optimizer.zero_grad()
            results.append(model.weight.detach().clone())
        assert torch.equal(*results)

    def test_a_module_without_parameters_is_fine(self):
        model = on_cpu().setup(nn.Identity())
        assert (model(torch.ones(1)).item(), model.device) == (1.0, torch.device("cpu"))

    def test_device_and_dtype_are_reported(self):
        model = on_cpu(precision="bf16-true").setup(nn.Linear(1, 1))
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)

    def test_move_to_device_off_leaves_and_reports_the_modules_own_device(self):
        model = on_cpu().setup(nn.Linear(1, 1, device="meta"), move_to_device=False)
        assert model.device == torch.device("meta")
        assert model.weight.is_meta

    def test_parameters_on_several_devices_are_warned_about(self, monkeypatch):
        fabric = on_cpu()
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
        monkeypatch.setattr(fabric.strategy, "module_to_device", lambda module: module.to_empty(device="cpu"))
        with pytest.warns(PossibleUserWarning, match=r"on several devices \(cpu, meta\)"):
            fabric.setup(model)

    def test_optimizer_follows_parameters_that_the_move_makes_new(self):
        fabric = on_cpu()
        model, optimizer = model_and_optimizer()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        old = set(map(id, model.parameters()))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model, optimizer = on_cpu(precision="64-true").setup(model, optimizer)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        assert not old & set(map(id, model.parameters()))
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        del fabric

    def test_lightning_module_gets_its_references(self):
        class LightningLike(nn.Linear):
            _fabric = None
            _fabric_optimizers = ()

        fabric = on_cpu()
        model = LightningLike(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        _, optimizer = fabric.setup(model, optimizer)
        assert model._fabric is fabric
        assert model._fabric_optimizers == [optimizer]

    def test_callbacks_hear_of_it(self):
        heard = []

        class Callback:
            def on_after_setup(self, fabric, module):
                heard.append((fabric, module))

        fabric = on_cpu(callbacks=Callback())
        model = fabric.setup(nn.Linear(1, 1))
        assert heard == [(fabric, model)]


class TestCompile:
    def test_compiled_module_is_compiled_again_on_the_outside(self):
        net = nn.Linear(2, 2)
        model = on_cpu().setup(torch.compile(net, backend="eager"))
        assert model.module is net
        assert type(model._forward_module).__name__ == "OptimizedModule"
        assert model._forward_module._orig_mod is net
        assert list(model.state_dict()) == ["weight", "bias"]
        x = torch.ones(1, 2)
        assert torch.allclose(model(x), net(x))

    def test_a_compiled_set_up_module_is_refused(self):
        model = on_cpu().setup(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="set up already"):
            on_cpu().setup(torch.compile(model, backend="eager"))

    def test_not_reapplied_it_stays_compiled_inside(self):
        net = nn.Linear(2, 2)
        compiled = torch.compile(net, backend="eager")
        model = on_cpu().setup(compiled, _reapply_compile=False)
        assert model._forward_module is compiled
        assert model.module is net


class TestDataloaders:
    def test_one_comes_back_alone_and_several_as_a_list(self):
        fabric = on_cpu()
        assert isinstance(fabric.setup_dataloaders(loader()), _FabricDataLoader)
        several = fabric.setup_dataloaders(loader(), loader())
        assert isinstance(several, list)
        assert list(map(is_wrapped, several)) == [True, True]

    def test_wrong_calls_are_refused(self):
        fabric = on_cpu()
        with pytest.raises(ValueError, match="needs at least one dataloader"):
            fabric.setup_dataloaders()
        with pytest.raises(TypeError, match=r"takes `torch\.utils\.data\.DataLoader` objects, but got range"):
            fabric.setup_dataloaders(range(3))
        ready = fabric.setup_dataloaders(loader())
        with pytest.raises(ValueError, match="dataloader is set up already"):
            fabric.setup_dataloaders(ready)

    def test_single_device_keeps_the_loader_itself(self):
        plain = loader(shuffle=True)
        assert on_cpu().setup_dataloaders(plain)._dataloader is plain

    def test_move_to_device_off(self):
        assert on_cpu().setup_dataloaders(loader(), move_to_device=False).device is None
        assert on_cpu().setup_dataloaders(loader()).device == torch.device("cpu")

    def test_the_older_argument_is_accepted_with_a_warning(self):
        with pytest.warns(DeprecationWarning, match="use_distributed_sampler"):
            on_cpu().setup_dataloaders(loader(), replace_sampler=False)

    def test_workers_are_seeded_on_request(self, monkeypatch):
        assert on_cpu().setup_dataloaders(loader()).worker_init_fn is None
        monkeypatch.setenv("PL_SEED_WORKERS", "1")
        assert on_cpu().setup_dataloaders(loader()).worker_init_fn is not None


class Rank:
    """A strategy on rank 1 of 2 as far as dataloaders can see."""

    def __init__(self, monkeypatch):
        self.fabric = on_cpu()
        kwargs = {"num_replicas": 2, "rank": 1}
        monkeypatch.setattr(type(self.fabric.strategy), "distributed_sampler_kwargs", kwargs, raising=False)


class TestDistributedDataloaders:
    @pytest.fixture
    def fabric(self, monkeypatch):
        return Rank(monkeypatch).fabric

    def test_shuffled_stays_shuffled_with_the_global_seed(self, fabric, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "7")
        ready = fabric.setup_dataloaders(loader(shuffle=True))
        assert isinstance(ready.sampler, DistributedSampler)
        expected = DistributedSampler(range(10), num_replicas=2, rank=1, shuffle=True, seed=7)
        assert list(ready.sampler) == list(expected)

    def test_sequential_stays_sequential(self, fabric):
        ready = fabric.setup_dataloaders(loader())
        assert [batch[0].tolist() for batch in ready] == [[1.0, 3.0], [5.0, 7.0], [9.0]]

    def test_own_sampler_is_wrapped(self, fabric):
        class Backwards(SequentialSampler):
            def __iter__(self):
                return iter(range(len(self.data_source) - 1, -1, -1))

        class Own(torch.utils.data.Sampler):
            def __init__(self, n):
                self.n = n

            def __iter__(self):
                return iter(range(self.n - 1, -1, -1))

            def __len__(self):
                return self.n

        ready = fabric.setup_dataloaders(loader(sampler=Own(10)))
        assert isinstance(ready.sampler, DistributedSamplerWrapper)
        assert list(ready.sampler) == [8, 6, 4, 2, 0]
        ready = fabric.setup_dataloaders(loader(sampler=Backwards(range(10))))
        assert list(ready.sampler) == [8, 6, 4, 2, 0]

    def test_left_alone_where_it_must_be(self, fabric):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(range(3))

        assert list(fabric.setup_dataloaders(DataLoader(Stream(), batch_size=None))) == [0, 1, 2]
        sampler = DistributedSampler(range(10), num_replicas=2, rank=0)
        assert fabric.setup_dataloaders(loader(sampler=sampler)).sampler is sampler
        plain = loader(shuffle=True)
        ready = fabric.setup_dataloaders(plain, use_distributed_sampler=False)
        assert isinstance(ready.sampler, RandomSampler)

    def test_own_subclass_is_rebuilt_from_the_arguments_it_was_made_with(self, fabric):
        class Own(DataLoader):
            def __init__(self, numbers, extra, *args, **kwargs):
                self.doubled = extra * 2
                super().__init__(TensorDataset(torch.arange(float(numbers))), *args, **kwargs)

        ready = fabric._wrap_with_setup(lambda: fabric.setup_dataloaders(Own(10, 3, batch_size=2)))
        assert type(ready._dataloader) is Own
        assert ready.doubled == 6
        assert isinstance(ready.sampler, DistributedSampler)

    def test_subclass_that_swallows_arguments_is_refused_with_a_hint(self, fabric):
        class Swallows(DataLoader):
            def __init__(self, size):
                super().__init__(TensorDataset(torch.arange(float(size))), batch_size=2)

        with pytest.raises((MisconfigurationException, TypeError), match="Swallows"):
            fabric.setup_dataloaders(Swallows(10))


class TestStep:
    def test_backward_passes_arguments_on(self):
        fabric, x = on_cpu(), torch.ones(2, requires_grad=True)
        fabric.backward(x * 3, torch.tensor([1.0, 2.0]), retain_graph=True)
        assert x.grad.tolist() == [3.0, 6.0]

    def test_backward_with_a_model_takes_a_set_up_one(self):
        fabric = on_cpu()
        with pytest.raises(TypeError, match="needs the module that `fabric.setup` returned"):
            fabric.backward(torch.ones(1, requires_grad=True), model=nn.Linear(1, 1))

    @pytest.mark.parametrize("given", [{}, {"clip_val": 1, "max_norm": 1}])
    def test_clipping_wants_one_of_two(self, given):
        model, optimizer = on_cpu().setup(*model_and_optimizer())
        with pytest.raises(ValueError, match="Pass one of them"):
            on_cpu().clip_gradients(model, optimizer, **given)

    def test_clipping_by_norm_returns_the_norm(self):
        fabric = on_cpu()
        model, optimizer = fabric.setup(*model_and_optimizer())
        fabric.backward(model(torch.ones(1, 4)).sum() * 100)
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
        assert torch.allclose(norm, expected)
        clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert clipped.item() == pytest.approx(1.0, abs=1e-4)

    def test_clipping_by_value_returns_nothing(self):
        fabric = on_cpu()
        model, optimizer = fabric.setup(*model_and_optimizer())
        fabric.backward(model(torch.ones(1, 4)).sum() * 100)
        assert fabric.clip_gradients(model, optimizer, clip_val=0.5) is None
        assert max(p.grad.abs().max().item() for p in model.parameters()) == 0.5

    def test_autocast_follows_the_precision(self):
        with on_cpu(precision="bf16-mixed").autocast():
            assert torch.is_autocast_enabled("cpu")
        with on_cpu().autocast():
            assert not torch.is_autocast_enabled("cpu")

    def test_no_backward_sync_is_a_no_op_on_one_device(self):
        fabric = on_cpu()
        model = fabric.setup(nn.Linear(1, 1))
        with fabric.no_backward_sync(model):
            fabric.backward(model(torch.ones(1, 1)))
        assert model.weight.grad is not None

    def test_no_backward_sync_wants_the_set_up_module(self):
        fabric = on_cpu()
        with pytest.raises(TypeError, match="needs the module that `fabric.setup` returned, but got Linear"):
            fabric.no_backward_sync(nn.Linear(1, 1))
        with fabric.no_backward_sync(nn.Linear(1, 1), enabled=False):
            pass

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_a_step_opens_no_file_and_inspects_nothing(self, precision, monkeypatch):
        import importlib.util
        import inspect
        import sys

        fabric = on_cpu(precision=precision)
        model, optimizer = fabric.setup(*model_and_optimizer())
        x = torch.ones(2, 4)

        def step():
            optimizer.zero_grad()
            fabric.backward(model(x).sum())
            optimizer.step()

        step()  # what torch looks up once
        events = []
        recording = [True]
        sys.addaudithook(lambda name, args: events.append(name) if recording[0] else None)
        for module, name in [(inspect, "signature"), (inspect, "stack"), (importlib.util, "find_spec")]:
            monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: events.append(name))
        try:
            step()
        finally:
            recording[0] = False
        assert not {"open", "os.listdir", "import", "signature", "stack", "find_spec"} & set(events)


class TestData:
    def test_to_device_moves_modules_in_place_and_collections_by_copy(self):
        fabric, net, tensor = on_cpu(), nn.Linear(1, 1), torch.ones(1)
        assert fabric.to_device(net) is net
        moved = fabric.to_device({"a": [tensor, 3]})
        assert moved["a"][0].device == fabric.device
        assert moved["a"][1] == 3

    def test_print_is_print_on_the_main_process(self, capsys, monkeypatch):
        fabric = on_cpu()
        fabric.print("a", "b", sep="-")
        monkeypatch.setattr(type(fabric.strategy), "is_global_zero", False)
        fabric.print("not me")
        assert capsys.readouterr().out == "a-b\n"


class TestCollectivesOnOneDevice:
    def test_all_gather_makes_tensors_of_unchanged_shape(self):
        out = on_cpu().all_gather({"a": 1, "b": [2.0, torch.ones(3)]})
        assert (out["a"].item(), out["b"][0].item(), out["b"][1].shape) == (1, 2.0, (3,))

    def test_all_reduce_is_the_identity(self):
        assert on_cpu().all_reduce([torch.tensor(2.0), 3])[1].item() == 3

    def test_rank_zero_first_runs_the_block_and_lets_errors_through(self):
        done = []
        with on_cpu().rank_zero_first():
            done.append(1)
        assert done == [1]
        with pytest.raises(ValueError, match="mine"), on_cpu().rank_zero_first(local=True):
            raise ValueError("mine")


class Stepper(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x)

    def training_step(self, x):
        return self(x).sum()


class TestInit:
    @pytest.mark.parametrize(
        ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
    )
    def test_tensors_and_modules_get_the_precisions_dtype(self, precision, dtype):
        fabric = on_cpu(precision=precision)
        with fabric.init_tensor():
            assert torch.ones(1).dtype == dtype
        with fabric.init_module():
            assert nn.Linear(1, 1).weight.dtype == dtype
        assert torch.ones(1).dtype == torch.float32

    def test_empty_init_draws_nothing_random(self):
        before = torch.get_rng_state()
        with on_cpu().init_module(empty_init=True):
            nn.Linear(8, 8)
        assert torch.equal(torch.get_rng_state(), before)
        with on_cpu().init_module():
            nn.Linear(8, 8)
        assert not torch.equal(torch.get_rng_state(), before)

    def test_what_nothing_has_filled_is_refused_by_name_at_the_first_forward_and_the_first_step(self):
        fabric = Fabric(accelerator="cpu", devices=1)
        with fabric.init_module(empty_init=True):
            model = Stepper()
        original = model.linear.weight
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for use in (model, model.training_step):
            with pytest.raises(RuntimeError, match=r"A forward of Stepper would use .* 'linear.weight', 'linear.bias'"):
                use(torch.ones(1, 2))
        with pytest.raises(RuntimeError, match=r"A step of SGD would use .* \"param_groups\[0\]\['params'\]\[0\]"):
            optimizer.step()
        model.load_state_dict({"linear.weight": torch.ones(1, 2)}, strict=False)
        with pytest.raises(RuntimeError, match=r"filled with NaN\): 'linear.bias'"):
            model(torch.ones(1, 2))
        model.load_state_dict({"linear.bias": torch.ones(1)}, strict=False)
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        torch.testing.assert_close(model.training_step(torch.ones(1, 2)).item(), 2.7)
        assert not model._forward_pre_hooks
        assert model.linear.weight is original

    def test_sharded_model_is_a_deprecated_name(self):
        with pytest.warns(DeprecationWarning, match="init_module"), on_cpu().sharded_model():
            nn.Linear(1, 1)


class TestSaveAndLoad:
    @pytest.fixture
    def trained(self):
        fabric = on_cpu()
        model = nn.Linear(4, 2)
        model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
        fabric.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        return fabric, model, optimizer

    def test_round_trip_restores_in_place_and_returns_the_rest(self, trained, tmp_path):
        fabric, model, optimizer = trained
        fabric.save(tmp_path / "sub" / "a.ckpt", {"model": model, "opt": optimizer, "step": 3, "extra": "e"})
        other = nn.Linear(4, 2)
        other, other_optimizer = fabric.setup(other, torch.optim.Adam(other.parameters()))
        state = {"model": other, "opt": other_optimizer, "step": 0}
        rest = fabric.load(tmp_path / "sub" / "a.ckpt", state)
        assert rest == {"extra": "e"}
        assert state["step"] == 3
        assert state["model"] is other
        assert torch.equal(other.weight, model.weight)
        assert torch.equal(
            other_optimizer.state_dict()["state"][0]["exp_avg"], optimizer.state[model.weight]["exp_avg"]
        )

    def test_attribute_dict_is_a_state(self, trained, tmp_path):
        fabric, model, _ = trained
        state = AttributeDict(model=model, step=1)
        fabric.save(tmp_path / "a.ckpt", state)
        state.step = 0
        fabric.load(tmp_path / "a.ckpt", state)
        assert state.step == 1

    def test_without_state_the_whole_file_comes_back(self, trained, tmp_path):
        fabric, model, _ = trained
        fabric.save(tmp_path / "a.ckpt", {"model": model, "step": 3})
        whole = fabric.load(tmp_path / "a.ckpt")
        assert whole["step"] == 3
        assert torch.equal(whole["model"]["weight"], model.weight)

    def test_the_file_is_a_plain_torch_file(self, trained, tmp_path):
        fabric, model, _ = trained
        fabric.save(tmp_path / "a.ckpt", {"model": model, "n": 1})
        plain = torch.load(tmp_path / "a.ckpt")
        assert list(plain) == ["model", "n"]
        assert list(plain["model"]) == ["weight", "bias"]

    def test_the_1x_order_is_accepted_with_a_warning(self, trained, tmp_path):
        fabric, model, _ = trained
        with pytest.warns(DeprecationWarning, match="swap"):
            fabric.save({"model": model}, tmp_path / "a.ckpt")
        assert (tmp_path / "a.ckpt").is_file()

    def test_missing_key_names_both_sets(self, trained, tmp_path):
        fabric, model, _ = trained
        fabric.save(tmp_path / "a.ckpt", {"model": model})
        with pytest.raises(KeyError, match="absent") as caught:
            fabric.load(tmp_path / "a.ckpt", {"absent": 1})
        assert "model" in str(caught.value)
        state = {"absent": 1}
        assert set(fabric.load(tmp_path / "a.ckpt", state, strict=False)) == {"model"}
        assert state == {"absent": 1}

    def test_filter_keeps_what_it_picks(self, trained, tmp_path):
        fabric, model, _ = trained
        fabric.save(tmp_path / "a.ckpt", {"model": model}, filter={"model": lambda name, value: "bias" in name})
        assert list(fabric.load(tmp_path / "a.ckpt")["model"]) == ["bias"]

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            (3, TypeError),
            ({"absent": lambda name, value: True}, ValueError),
            ({"model": 3}, TypeError),
            ({"model": lambda name: True}, TypeError),
        ],
    )
    def test_wrong_filters_are_refused_before_anything_is_written(self, trained, tmp_path, wrong, error):
        fabric, model, _ = trained
        with pytest.raises(error):
            fabric.save(tmp_path / "a.ckpt", {"model": model}, filter=wrong)
        assert not (tmp_path / "a.ckpt").exists()

    def test_a_state_that_is_no_dict_is_refused(self, trained, tmp_path):
        with pytest.raises(TypeError, match="needs a dict"):
            trained[0].save(tmp_path / "a.ckpt", [1])

    def test_a_failing_save_keeps_the_older_file_and_leaves_nothing_behind(self, trained, tmp_path):
        fabric, model, _ = trained
        fabric.save(tmp_path / "a.ckpt", {"model": model})
        with pytest.raises(Exception, match="(?i)pickle"):
            fabric.save(tmp_path / "a.ckpt", {"model": model, "bad": lambda: None})
        assert os.listdir(tmp_path) == ["a.ckpt"]
        assert list(fabric.load(tmp_path / "a.ckpt")) == ["model"]

    def test_load_raw_takes_bare_state_dicts(self, trained, tmp_path):
        fabric, model, optimizer = trained
        torch.save(model.state_dict(), tmp_path / "raw.pt")
        torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
        other = nn.Linear(4, 2)
        other, other_optimizer = fabric.setup(other, torch.optim.Adam(other.parameters()))
        fabric.load_raw(tmp_path / "raw.pt", other)
        fabric.load_raw(tmp_path / "opt.pt", other_optimizer)
        assert torch.equal(other.weight, model.weight)
        assert other_optimizer.state_dict()["state"][0]["step"] == 1
        with pytest.raises(RuntimeError, match="Missing key"):
            fabric.load_raw(tmp_path / "raw.pt", nn.Sequential(nn.Linear(4, 2)))

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing.ckpt"):
            on_cpu().load(tmp_path / "nothing.ckpt")

    def test_an_overwritten_file_does_not_reach_what_was_loaded(self, trained, tmp_path):
        fabric, model, optimizer = trained
        path = tmp_path / "a.ckpt"
        fabric.save(path, {"model": model, "opt": optimizer, "t": torch.ones(1000)})
        state = {"model": model, "opt": optimizer}
        rest = fabric.load(path, state)
        with open(path, "r+b") as file:  # in place, as other programs do
            file.truncate(0)
        assert rest["t"].sum() == 1000
        optimizer.step()

    def test_own_checkpoint_io_is_used(self, tmp_path):
        used = []

        class Own(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                used.append("save")
                super().save_checkpoint(checkpoint, path, storage_options)

            def load_checkpoint(self, path, map_location=None):
                used.append("load")
                return super().load_checkpoint(path, map_location)

        fabric = on_cpu(plugins=Own())
        fabric.save(tmp_path / "a.ckpt", {"n": 1})
        assert fabric.load(tmp_path / "a.ckpt") == {"n": 1}
        assert used == ["save", "load"]


class TestCallbacksAndLoggers:
    def test_call_runs_the_hook_of_those_that_have_it_in_order(self):
        heard = []

        class First:
            def on_epoch(self, *args, **kwargs):
                heard.append(("first", args, kwargs))

        class Second(First):
            def on_epoch(self, n, end):
                heard.append(("second", n, end))

        on_cpu(callbacks=[First(), object(), Second()]).call("on_epoch", 1, end=2)
        assert heard == [("first", (1,), {"end": 2}), ("second", 1, 2)]

    def test_call_skips_what_is_no_method_with_a_warning(self):
        class Odd:
            on_epoch = 3

        with pytest.warns(UserWarning, match=r"Odd\.on_epoch is 3"):
            on_cpu(callbacks=Odd()).call("on_epoch")

    def test_log_reaches_every_logger_as_scalars(self):
        logged = []

        class Own:
            def log_metrics(self, metrics, step=None):
                logged.append((metrics, step))

        fabric = on_cpu(loggers=[Own(), Own()])
        fabric.log("loss", torch.tensor(0.5), step=3)
        fabric.log_dict({"a": 1, "b": torch.tensor([2])})
        assert logged == [({"loss": 0.5}, 3)] * 2 + [({"a": 1, "b": 2}, None)] * 2
        assert fabric.logger is fabric.loggers[0]

    def test_without_loggers_logging_does_nothing(self):
        fabric = on_cpu()
        fabric.log("loss", 1.0)
        assert fabric.loggers == []
        with pytest.raises(IndexError, match="There is no logger"):
            fabric.logger  # noqa: B018


class TestSeed:
    def test_workers_are_seeded_unless_turned_off(self):
        Fabric.seed_everything(3, verbose=False)
        assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == ("3", "1")
        Fabric.seed_everything(3, workers=False, verbose=False)
        assert os.environ["PL_SEED_WORKERS"] == "0"


class TestPrecisionEndToEnd:
    @pytest.mark.parametrize(
        ("precision", "weights", "inside"),
        [
            ("32-true", torch.float32, torch.float32),
            ("64-true", torch.float64, torch.float64),
            ("16-true", torch.float16, torch.float16),
            ("bf16-true", torch.bfloat16, torch.bfloat16),
            ("bf16-mixed", torch.float32, torch.bfloat16),
        ],
    )
    def test_weights_compute_and_output_dtypes(self, precision, weights, inside):
        seen = []

        class Net(nn.Linear):
            def forward(self, x, index):
                out = super().forward(x)
                seen.append((out.dtype, index.dtype))
                return {"out": out, "index": index}

        fabric = on_cpu(precision=precision)
        model = Net(2, 2)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        out = model(torch.ones(1, 2), index=torch.tensor([1]))
        fabric.backward(out["out"].sum())
        optimizer.step()
        assert model.weight.dtype == weights
        assert seen == [(inside, torch.int64)]
        assert out["out"].dtype == torch.float32
        assert out["index"].dtype == torch.int64

    def test_16_mixed_on_cpu_says_that_it_is_bf16(self):
        with pytest.warns(UserWarning, match="bf16-mixed"):
            fabric = on_cpu(precision="16-mixed")
        assert fabric._precision.precision == "bf16-mixed"


class TestDDPInOneProcess:
    """``ddp`` with one device makes a real group of one, without a launch."""

    @pytest.fixture
    def fabric(self):
        fabric = on_cpu(strategy=DDPStrategy(cluster_environment=LightningEnvironment()))
        yield fabric
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()

    def test_wraps_trains_and_saves_without_prefixes(self, fabric, tmp_path):
        model, optimizer = fabric.setup(*model_and_optimizer())
        assert isinstance(model._forward_module, DistributedDataParallel)
        with fabric.no_backward_sync(model):
            fabric.backward(model(torch.ones(1, 4)).sum())
        fabric.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        fabric.save(tmp_path / "a.ckpt", {"model": model})
        assert list(fabric.load(tmp_path / "a.ckpt")["model"]) == ["weight", "bias"]

    def test_collectives_add_the_world_dimension(self, fabric):
        fabric.launch()
        assert fabric.all_gather(torch.ones(3)).shape == (1, 3)
        assert fabric.all_reduce(torch.tensor(2.0), reduce_op="sum").item() == 2.0
        assert fabric.broadcast({"a": 1}) == {"a": 1}

    def test_modules_that_need_no_gradient_are_fine(self, fabric):
        assert fabric.setup(nn.Identity())(torch.ones(1)).item() == 1.0
        assert fabric.setup(nn.Linear(1, 1).requires_grad_(False))(torch.ones(1, 1)).shape == (1, 1)

    def test_a_step_method_runs_through_ddp(self, fabric):
        class Net(nn.Linear):
            def training_step(self, x):
                return self(x).sum()

        model = fabric.setup(Net(2, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fabric.backward(model.training_step(torch.ones(1, 2)))
        assert model.weight.grad is not None
