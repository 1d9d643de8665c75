"""The wrappers: what they look like, what they reroute, and that nothing else changes."""

import copy
import pickle
import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning.fabric import is_wrapped
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.wrappers import (
    _FabricDataLoader,
    _FabricModule,
    _FabricOptimizer,
    _unwrap_compiled,
    _unwrap_objects,
)


class Net(nn.Module):
    """A module with a step method, a computing method, a plain method and a property."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(()))
        self.tag = "net"
        self.forward_calls = 0

    def forward(self, x):
        self.forward_calls += 1
        return self.layer(x) * self.scale

    def training_step(self, x, factor=1):
        return self(x).sum() * factor

    def generate(self, x):
        return self.layer(x).argmax(-1)

    def count(self):
        return sum(p.numel() for p in self.parameters())

    @property
    def width(self):
        return self.layer.in_features


class Around(nn.Module):
    """What a strategy's wrapper does: its ``forward`` calls the module, and it remembers how often."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def strategy_with(precision=None):
    return SingleDeviceStrategy(precision=precision or Precision())


def wrapped(around=True, precision=None):
    net = Net()
    return _FabricModule(Around(net) if around else net, strategy_with(precision), original_module=net)


class TestModule:
    def test_module_is_the_original_object(self):
        net = Net()
        wrapper = _FabricModule(net, strategy_with())
        assert wrapper.module is net
        assert isinstance(wrapper, nn.Module)
        assert is_wrapped(wrapper)
        assert not is_wrapped(net)

    def test_reads_fall_through_to_the_original(self):
        wrapper = wrapped()
        assert wrapper.layer is wrapper.module.layer
        assert wrapper.layer.weight is wrapper.module.layer.weight
        assert (wrapper.tag, wrapper.width, wrapper.count()) == ("net", 3, 8)

    def test_missing_attribute_names_the_users_class(self):
        with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
            wrapped().nothing  # noqa: B018

    def test_writes_go_to_the_original(self):
        wrapper = wrapped()
        wrapper.tag = "changed"
        wrapper.added = 1
        wrapper.head = nn.Linear(2, 2)
        assert wrapper.module.tag == "changed"
        assert wrapper.module.added == 1
        assert "head.weight" in wrapper.state_dict()
        del wrapper.tag
        assert not hasattr(wrapper.module, "tag")

    def test_names_of_parameters_and_state_are_the_originals(self):
        wrapper = wrapped()
        assert list(wrapper.state_dict()) == ["scale", "layer.weight", "layer.bias"]
        assert [name for name, _ in wrapper.named_parameters()] == ["layer.weight", "layer.bias"]
        assert [name for name, _ in wrapper.named_buffers()] == ["scale"]
        assert list(wrapper.modules()) == list(wrapper.module.modules())
        assert list(wrapper.children()) == [wrapper.module.layer]

    def test_load_state_dict_is_strict_on_the_original(self):
        wrapper, other = wrapped(), Net()
        wrapper.load_state_dict(other.state_dict())
        assert torch.equal(wrapper.module.layer.weight, other.layer.weight)
        with pytest.raises(RuntimeError, match="Missing key"):
            wrapper.load_state_dict({})
        assert wrapper.load_state_dict({}, strict=False).missing_keys == ["scale", "layer.weight", "layer.bias"]

    def test_a_module_around_it_saves_and_loads_it_by_the_originals_names(self):
        outer, other = nn.Sequential(wrapped()), nn.Sequential(Net())
        assert list(outer.state_dict()) == list(other.state_dict())
        outer.load_state_dict(other.state_dict())
        assert torch.equal(outer[0].layer.weight, other[0].layer.weight)
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.scale"'):
            outer.load_state_dict({name: value for name, value in other.state_dict().items() if name != "0.scale"})

    def test_mode_reaches_the_original_and_what_wraps_it(self):
        wrapper = wrapped()
        wrapper.eval()
        assert (wrapper.training, wrapper.module.training, wrapper._forward_module.training) == (False,) * 3
        wrapper.train()
        assert (wrapper.training, wrapper.module.layer.training) == (True, True)

    def test_wrapping_keeps_the_mode(self):
        assert not _FabricModule(Net().eval(), strategy_with()).training

    def test_to_and_apply_reach_the_original(self):
        wrapper, seen = wrapped(), []
        wrapper.double()
        assert wrapper.module.layer.weight.dtype == wrapper.dtype == torch.float64
        wrapper.apply(lambda part: seen.append(type(part).__name__))
        assert seen == ["Linear", "Net"]

    def test_zero_grad_and_requires_grad_reach_the_original(self):
        wrapper = wrapped()
        wrapper(torch.ones(1, 3)).sum().backward()
        wrapper.zero_grad()
        assert wrapper.module.layer.weight.grad is None
        wrapper.requires_grad_(False)
        assert not wrapper.module.layer.weight.requires_grad

    def test_deepcopy_copies_the_module_and_shares_the_strategy(self):
        wrapper = wrapped()
        clone = copy.deepcopy(wrapper)
        assert clone._strategy is wrapper._strategy
        assert clone.module is not wrapper.module
        assert clone._forward_module.module is clone.module
        x = torch.ones(1, 3)
        assert torch.equal(clone(x), wrapper(x))
        assert torch.equal(clone.training_step(x), wrapper.training_step(x))

    def test_repr_shows_what_runs(self):
        assert "Around" in repr(wrapped())
        assert "Linear" in repr(wrapped())


class TestForward:
    def test_result_is_the_originals(self):
        wrapper, x = wrapped(), torch.randn(4, 3)
        assert torch.equal(wrapper(x), wrapper.module(x))
        assert wrapper._forward_module.calls == 1

    def test_precision_converts_inputs_and_outputs(self):
        class Recorder(Precision):
            def convert_input(self, data):
                return torch.utils._pytree.tree_map(lambda x: x * 2, data)

            def convert_output(self, data):
                return data + 1

        wrapper = _FabricModule(nn.Identity(), strategy_with(Recorder()))
        assert wrapper(torch.tensor(3.0)).item() == 7.0
        assert wrapper(input=torch.tensor(3.0)).item() == 7.0

    def test_autocast_is_on_inside_and_off_outside(self):
        seen = []

        class Probe(nn.Module):
            def forward(self, x):
                seen.append(torch.is_autocast_enabled("cpu"))
                return x @ x

        wrapper = _FabricModule(Probe(), strategy_with(MixedPrecision("bf16-mixed", "cpu")))
        out = wrapper(torch.ones(2, 2))
        assert seen == [True]
        assert not torch.is_autocast_enabled("cpu")
        assert out.dtype == torch.float32

    def test_a_forward_put_on_the_wrapper_is_run_inside_the_strategy(self):
        wrapper = wrapped()
        wrapper.forward = lambda x: x + 1
        assert wrapper(torch.ones(1)).item() == 2.0
        assert wrapper._forward_module.calls == 1

    def test_hooks_of_the_wrapper_run(self):
        wrapper, seen = wrapped(), []
        wrapper.register_forward_pre_hook(lambda module, args: seen.append("before"))
        wrapper.register_forward_hook(lambda module, args, output: seen.append("after"))
        wrapper(torch.ones(1, 3))
        assert seen == ["before", "after"]

    @pytest.mark.parametrize("precision", [Precision(), MixedPrecision("bf16-mixed", "cpu")])
    def test_it_compiles_as_a_whole_and_in_place(self, precision):
        x = torch.ones(1, 3)
        for compile_it in (
            lambda module: torch.compile(module, backend="eager", fullgraph=True),
            lambda module: module.compile(backend="eager", fullgraph=True) or module,
        ):
            net = Net()
            wrapper = _FabricModule(net, strategy_with(precision))
            expected = wrapper(x)
            assert torch.equal(compile_it(wrapper)(x), expected)
        assert net._compiled_call_impl is not None

    def test_error_in_forward_leaves_autocast(self):
        class Fails(nn.Module):
            def forward(self, x):
                raise ValueError("mine")

        wrapper = _FabricModule(Fails(), strategy_with(MixedPrecision("bf16-mixed", "cpu")))
        with pytest.raises(ValueError, match="mine"):
            wrapper(torch.ones(1))
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("around", [True, False], ids=["strategy-wraps", "strategy-does-not"])
class TestMethodsThroughForward:
    def test_step_method_goes_through_the_strategys_module(self, around):
        wrapper, x = wrapped(around), torch.ones(2, 3)
        loss = wrapper.training_step(x, factor=3)
        assert torch.equal(loss, wrapper.module.layer(x).sum() * 3)
        assert wrapper.module.forward_calls == 1  # its own `self(x)` ran the original forward
        if around:
            assert wrapper._forward_module.calls == 1

    def test_step_method_runs_under_the_precision(self, around):
        wrapper = wrapped(around, precision=MixedPrecision("bf16-mixed", "cpu"))
        wrapper.module.training_step = lambda x: torch.is_autocast_enabled("cpu")
        assert wrapper.training_step(torch.ones(1, 3)) is True

    def test_forward_is_as_before_after_the_call(self, around):
        wrapper = wrapped(around)
        wrapper.training_step(torch.ones(1, 3))
        assert "forward" not in vars(wrapper.module)

    def test_forward_is_as_before_after_an_error(self, around):
        wrapper = wrapped(around)
        with pytest.raises(TypeError):
            wrapper.training_step()
        assert "forward" not in vars(wrapper.module)
        assert wrapper(torch.ones(1, 3)).shape == (1, 2)

    def test_a_patched_forward_is_used_and_kept(self, around):
        wrapper = wrapped(around)
        patched = vars(wrapper.module)["forward"] = lambda x: torch.full((1, 2), 5.0)
        assert wrapper.training_step(torch.ones(1, 3)).item() == 10.0
        assert vars(wrapper.module)["forward"] is patched

    def test_marked_method_goes_the_same_way(self, around):
        wrapper = wrapped(around)
        wrapper.mark_forward_method(wrapper.module.generate)
        assert wrapper.generate(torch.ones(2, 3)).shape == (2,)
        assert wrapper.generate is wrapper.generate  # made once, not at each call
        if around:
            assert wrapper._forward_module.calls == 1

    def test_marking_after_a_first_look_takes_effect(self, around):
        wrapper = wrapped(around)
        wrapper.generate  # noqa: B018
        wrapper.mark_forward_method("generate")
        assert wrapper.generate(torch.ones(2, 3)).shape == (2,)

    def test_routed_calls_nest(self, around):
        wrapper = wrapped(around)
        wrapper.module.outer = lambda x: wrapper.training_step(x) + wrapper(x).sum()
        wrapper.mark_forward_method("outer")
        x = torch.ones(1, 3)
        assert torch.allclose(wrapper.outer(x), 2 * wrapper.module.layer(x).sum())
        assert "forward" not in vars(wrapper.module)

    def test_threads_do_not_see_each_others_method(self, around):
        wrapper, x, wrong = wrapped(around), torch.ones(1, 3), []
        expected = {"training_step": wrapper.module.training_step(x), "forward": wrapper.module(x)}
        start = threading.Barrier(4)

        def work(name):
            start.wait(timeout=10)
            call = wrapper if name == "forward" else wrapper.training_step
            wrong.extend(name for _ in range(200) if not torch.equal(call(x), expected[name]))

        threads = [threading.Thread(target=work, args=(name,)) for name in ["training_step", "forward"] * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert "forward" not in vars(wrapper.module)


class TestMark:
    def test_forward_cannot_be_marked(self):
        with pytest.raises(ValueError, match="`forward` always runs through Fabric"):
            wrapped().mark_forward_method("forward")

    def test_unknown_method_is_refused_by_name(self):
        with pytest.raises(AttributeError, match="Net has no method 'generat'"):
            wrapped().mark_forward_method("generat")

    def test_not_a_method_is_refused(self):
        with pytest.raises(TypeError, match="takes a method or the name of one, but got 3"):
            wrapped().mark_forward_method(3)


class TestUnmarkedMethods:
    def test_computation_past_the_strategy_raises_and_says_what_to_do(self):
        wrapper = wrapped()
        with pytest.raises(RuntimeError, match=r"mark_forward_method\('generate'\)"):
            wrapper.generate(torch.ones(1, 3))
        assert wrapper(torch.ones(1, 3)).shape == (1, 2)

    def test_methods_that_do_not_compute_work(self):
        assert wrapped().count() == 8

    def test_nothing_is_refused_where_the_strategy_wraps_nothing(self):
        assert wrapped(around=False).generate(torch.ones(1, 3)).shape == (1,)

    def test_a_method_that_calls_the_set_up_module_is_right(self):
        wrapper = wrapped()
        type(wrapper.module).predict = lambda self, x: wrapper(x)
        try:
            assert wrapper.predict(torch.ones(1, 3)).shape == (1, 2)
        finally:
            del type(wrapper.module).predict

    def test_other_modules_may_run_inside(self):
        wrapper, other = wrapped(), nn.Linear(3, 3)
        type(wrapper.module).uses_other = lambda self, x: other(x)
        try:
            assert wrapper.uses_other(torch.ones(1, 3)).shape == (1, 3)
        finally:
            del type(wrapper.module).uses_other


class TestOptimizer:
    def make(self, callbacks=None, optimizer_class=torch.optim.Adam):
        net = nn.Linear(2, 2)
        optimizer = optimizer_class(net.parameters(), lr=0.1)
        net(torch.ones(1, 2)).sum().backward()
        return optimizer, _FabricOptimizer(optimizer, strategy_with(), callbacks)

    def test_is_both_ours_and_the_users_class(self):
        optimizer, wrapper = self.make()
        assert isinstance(wrapper, torch.optim.Adam)
        assert isinstance(wrapper, _FabricOptimizer)
        assert wrapper.optimizer is optimizer
        assert is_wrapped(wrapper)
        assert type(wrapper) is type(self.make()[1])

    def test_attributes_are_shared_in_both_directions(self):
        optimizer, wrapper = self.make()
        assert wrapper.param_groups is optimizer.param_groups
        assert wrapper.state is optimizer.state
        optimizer.param_groups = [*optimizer.param_groups]
        assert wrapper.param_groups is optimizer.param_groups
        wrapper.note = 1
        assert optimizer.note == 1

    def test_step_goes_through_the_strategy_and_returns_its_result(self, monkeypatch):
        _, wrapper = self.make()
        calls = []
        monkeypatch.setattr(wrapper._strategy, "optimizer_step", lambda *a, **k: calls.append((a, k)) or "result")
        assert wrapper.step() == "result"
        closure = lambda: 1.0
        wrapper.step(closure)
        wrapper.step(closure=closure)
        assert calls == [((wrapper.optimizer,), {})] + [((wrapper.optimizer,), {"closure": closure})] * 2

    def test_step_updates_like_the_plain_optimizer(self):
        optimizer, wrapper = self.make()
        before = [p.clone() for p in optimizer.param_groups[0]["params"]]
        wrapper.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
        wrapper.zero_grad()
        assert all(p.grad is None for p in optimizer.param_groups[0]["params"])

    @pytest.mark.parametrize("scheduled", ["original", "wrapper"])
    @pytest.mark.parametrize("created", ["before", "after"])
    def test_schedulers_take_either_object_without_warning(self, scheduled, created):
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler = StepLR(optimizer, 1, gamma=0.5) if created == "before" else None
        calls = []
        strategy = strategy_with()
        step = strategy.optimizer_step
        strategy.optimizer_step = lambda *args, **kwargs: calls.append(1) or step(*args, **kwargs)
        wrapper = _FabricOptimizer(optimizer, strategy)
        scheduler = scheduler or StepLR(wrapper if scheduled == "wrapper" else optimizer, 1, gamma=0.5)
        for _ in range(2):
            parameter.grad = torch.ones(1)
            wrapper.step()
            scheduler.step()
        assert wrapper.param_groups[0]["lr"] == 0.25
        assert parameter.item() == 1 - 1.0 - 0.5
        assert len(calls) == 2

    def test_scheduler_stepped_first_still_warns(self):
        _, wrapper = self.make()
        scheduler = LambdaLR(wrapper, lambda epoch: 1.0)
        with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
            scheduler.step()

    def test_state_dict_comes_from_the_strategy_and_loads_into_the_original(self, monkeypatch):
        optimizer, wrapper = self.make()
        wrapper.step()
        state = copy.deepcopy(wrapper.state_dict())
        wrapper.step()
        wrapper.load_state_dict(state)
        assert wrapper.state is optimizer.state
        assert optimizer.state_dict()["state"][0]["step"] == 1
        monkeypatch.setattr(wrapper._strategy, "get_optimizer_state", lambda _: "gathered")
        assert wrapper.state_dict() == "gathered"

    def test_step_can_be_replaced_by_the_user(self):
        _, wrapper = self.make()
        wrapper.step = lambda: "mine"
        assert wrapper.step() == "mine"

    def test_callbacks_run_around_the_step(self):
        events = []

        class Callback:
            def on_before_optimizer_step(self, optimizer):
                events.append(("before", optimizer))

            def on_after_optimizer_step(self, strategy, optimizer):
                events.append(("after", strategy, optimizer))

        optimizer, wrapper = self.make(callbacks=[object(), Callback()])
        wrapper.step()
        assert events == [("before", optimizer), ("after", wrapper._strategy, optimizer)]

    def test_copies_and_pickles_as_a_working_pair(self):
        _, wrapper = self.make(optimizer_class=torch.optim.SGD)
        for clone in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
            assert isinstance(clone, torch.optim.SGD)
            assert clone.param_groups is clone.optimizer.param_groups
            clone.step()

    def test_repr_shows_groups(self):
        assert "Parameter Group 0" in repr(self.make()[1])


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor(float(index))


class TestDataLoader:
    def test_moves_batches_to_the_device(self):
        loader = _FabricDataLoader(DataLoader(Numbers(), batch_size=4), torch.device("meta"))
        assert [batch.device.type for batch in loader] == ["meta", "meta"]
        assert loader.device == torch.device("meta")

    def test_without_a_device_batches_are_untouched(self):
        batches = [object(), object()]
        assert list(_FabricDataLoader(DataLoader(batches, batch_size=None))) == batches

    def test_length_and_attributes_are_the_loaders(self):
        plain = DataLoader(Numbers(), batch_size=4)
        loader = _FabricDataLoader(plain)
        assert (len(loader), loader.batch_size, loader.dataset) == (2, 4, plain.dataset)
        assert is_wrapped(loader)
        with pytest.raises(AttributeError):
            loader.nothing  # noqa: B018

    def test_copies_and_pickles(self):
        loader = _FabricDataLoader(DataLoader(Numbers(), batch_size=4), torch.device("cpu"))
        for clone in (copy.copy(loader), pickle.loads(pickle.dumps(loader))):
            assert [len(batch) for batch in clone] == [4, 4]

    def loader_with_sampler(self):
        sampler = DistributedSampler(Numbers(), num_replicas=1, rank=0, shuffle=True, seed=3)
        return sampler, _FabricDataLoader(DataLoader(Numbers(), batch_size=8, sampler=sampler))

    def test_each_iteration_is_a_new_epoch(self):
        sampler, loader = self.loader_with_sampler()
        orders = [next(iter(loader)).tolist() for _ in range(3)]
        assert sampler.epoch == 2
        for epoch, order in enumerate(orders):
            sampler.set_epoch(epoch)
            assert order == list(map(float, sampler))

    def test_an_epoch_set_by_the_user_is_kept_and_counted_from(self):
        sampler, loader = self.loader_with_sampler()
        epochs = []
        for user_sets in (5, None, 2, None):
            if user_sets is not None:
                sampler.set_epoch(user_sets)
            next(iter(loader))
            epochs.append(sampler.epoch)
        assert epochs == [5, 6, 2, 3]


class TestUnwrap:
    def test_nested_collections_are_unwrapped_and_others_untouched(self):
        net, tensor = Net(), torch.ones(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        module = _FabricModule(Around(net), strategy_with(), original_module=net)
        loader = DataLoader(Numbers())
        tree = {
            "model": module,
            "list": [_FabricOptimizer(optimizer, strategy_with()), tensor, 3],
            "tuple": (_FabricDataLoader(loader),),
            "ordered": OrderedDict(plain=net),
        }
        out = _unwrap_objects(tree)
        assert out["model"] is net
        assert out["list"][0] is optimizer
        assert out["list"][1] is tensor
        assert out["tuple"][0] is loader
        assert out["ordered"]["plain"] is net

    def test_compiled_modules_are_unwrapped_and_can_be_compiled_again(self):
        net = Net()
        compiled = torch.compile(net, backend="eager")
        inner, recompile = _unwrap_compiled(compiled)
        assert inner is net
        again = recompile(Around(net))
        assert _unwrap_compiled(again)[0].module is net
        assert _unwrap_objects({"m": compiled})["m"] is net
        assert _unwrap_compiled(net) == (net, None)

    def test_ddp_is_not_ours(self):
        assert not is_wrapped(DistributedDataParallel)
        assert not is_wrapped(3)
