"""FSDP: what can be asked for, and what one, two and four real ranks make of it."""

import copy
import warnings
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning.fabric import Fabric
from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.plugins.precision.amp import MixedPrecision as MixedPrecisionPlugin
from lightning.fabric.plugins.precision.double import DoublePrecision
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.plugins.precision.half import HalfPrecision
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._fsdp_options import Casting
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.testing import on_ranks, preload
from lightning.fabric.wrappers import _FabricModule

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

CPU = torch.device("cpu")


class Block(nn.Module):
    """Of sizes that two or four ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(5, 2)
        self.register_buffer("factor", torch.tensor([0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x) * self.factor

    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self(x) - y) ** 2).mean()

    def penalty(self) -> Tensor:
        return self.last.weight.square().sum()


def _model(seed: int = 1) -> Model:
    torch.manual_seed(seed)
    return Model()


def _strategy(processes: int = 1, **kwargs: Any) -> FSDPStrategy:
    kwargs.setdefault("timeout", timedelta(seconds=20))
    return FSDPStrategy(CPUAccelerator(), [CPU] * processes, LightningEnvironment(), **kwargs)


def _joined(processes: int, **kwargs: Any) -> FSDPStrategy:
    strategy = _strategy(processes, **kwargs)
    strategy.setup_environment()
    return strategy


def _full(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def _batch(index: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch of 8."""
    generator = torch.Generator().manual_seed(index)
    x, y = torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)
    return x[rank::world], y[rank::world]


def _loss(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def _train_alone(model: nn.Module, steps: int = 3) -> tuple[dict[str, Tensor], list[float]]:
    """As `_train`, by plain torch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    norms = []
    for step in range(steps):
        for part in range(2):
            x, y = _batch(2 * step + part)
            (_loss(model(x), y) / 2).backward()
        norms.append(nn.utils.clip_grad_norm_(trained, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def _train(strategy: FSDPStrategy, model: nn.Module, joint: bool = False) -> tuple[dict[str, Tensor], list[float]]:
    """AdamW, two micro-batches per step of which only the second is synchronised, clipping."""
    rank, world = strategy.global_rank, strategy.world_size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if joint:
        forward, [optimizer], _ = strategy.setup_module_and_optimizers(model, [optimizer])
    else:
        forward = strategy.setup_module(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = strategy.setup_optimizer(torch.optim.AdamW(trained, lr=0.05))
    norms = []
    for step in range(3):
        for part in range(2):
            x, y = _batch(2 * step + part, rank, world)
            with strategy._backward_sync_control.no_backward_sync(forward, enabled=part == 0):
                strategy.backward(_loss(forward(x), y) / 2, forward)
        norms.append(strategy.clip_gradients_norm(forward, optimizer, 0.5).item())
        strategy.optimizer_step(optimizer)
        optimizer.zero_grad()
    return _full(model.state_dict()), norms


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=tolerance, atol=tolerance, msg=(name + ": {}").format)


# ---- what can be asked for -------------------------------------------------------------------------------------------


class TestOptions:
    def test_a_misspelt_one_is_known_at_once(self) -> None:
        with pytest.raises(TypeError, match="no option 'auto_warp_policy'"):
            FSDPStrategy(auto_warp_policy={Block})
        with pytest.raises(
            TypeError, match="no option 'forward_prefech'. Did you mean 'forward_prefetch'.*use_orig_params"
        ):
            FSDPStrategy(forward_prefech=True)

    @pytest.mark.parametrize("name", ["module", "mesh", "device_type"])
    def test_what_is_said_elsewhere_is_refused(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"`{name}` cannot be passed"):
            FSDPStrategy(**{name: None})

    def test_those_of_the_predecessor_that_leave_no_choice(self) -> None:
        FSDPStrategy(use_orig_params=True, limit_all_gathers=True)
        for name in ("use_orig_params", "limit_all_gathers"):
            with pytest.raises(ValueError, match=f"`{name}=False` is not possible"):
                FSDPStrategy(**{name: False})

    def test_ignored_states_are_modules_or_parameters(self) -> None:
        linear, parameter = nn.Linear(1, 1), nn.Parameter(torch.ones(1))
        options = FSDPStrategy(ignored_states=[linear, parameter])._options
        assert options.parameters_to_ignore() == {linear.weight, linear.bias, parameter}

    @pytest.mark.parametrize("given", ["full_shard", "FULL_SHARD", ShardingStrategy.FULL_SHARD])
    def test_the_sharding_strategy_is_a_name_or_torchs(self, given: Any) -> None:
        assert FSDPStrategy(sharding_strategy=given).sharding_strategy is ShardingStrategy.FULL_SHARD

    @pytest.mark.parametrize("given", ["FULL", 3, None])
    def test_any_other_sharding_strategy_is_unknown(self, given: Any) -> None:
        with pytest.raises(ValueError, match=f"Unknown sharding_strategy {given!r}.*Known: FULL_SHARD, .*NO_SHARD"):
            FSDPStrategy(sharding_strategy=given)

    @pytest.mark.parametrize("name", ["HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"])
    def test_a_hybrid_one_needs_to_know_more(self, name: str) -> None:
        with pytest.raises(RuntimeError, match="`device_mesh`.*`process_group` or `auto_wrap_policy`"):
            FSDPStrategy(sharding_strategy=name)
        FSDPStrategy(sharding_strategy=name, auto_wrap_policy={Block})
        FSDPStrategy(sharding_strategy=name, device_mesh=(2, 2))

    def test_a_mesh_of_the_wrong_kind(self) -> None:
        with pytest.raises(ValueError, match=r"has 2 dimension\(s\).*needs one: \(ranks,\).*use 'HYBRID_SHARD'"):
            FSDPStrategy(device_mesh=(2, 2))
        with pytest.raises(ValueError, match=r"has 1 dimension\(s\), .*needs two: \(groups, ranks per group\)"):
            FSDPStrategy(device_mesh=(4,), sharding_strategy="HYBRID_SHARD")
        for mesh in ("2x2", (2, 0), (2, 1.5)):
            with pytest.raises(TypeError, match="`device_mesh` must be a tuple of sizes"):
                FSDPStrategy(device_mesh=mesh, sharding_strategy="HYBRID_SHARD")

    def test_a_mesh_and_groups(self) -> None:
        with pytest.raises(ValueError, match="`device_mesh` and `process_group` both"):
            FSDPStrategy(device_mesh=(2,), process_group=object())
        with pytest.raises(TypeError, match="`process_group` must be made of process groups"):
            FSDPStrategy(process_group=object())
        with pytest.raises(ValueError, match="'HYBRID_SHARD' needs two groups"):
            FSDPStrategy(process_group=object(), sharding_strategy="HYBRID_SHARD")
        with pytest.raises(ValueError, match="'FULL_SHARD' needs one group"):
            FSDPStrategy(process_group=(object(), object()))
        with pytest.raises(ValueError, match="'NO_SHARD' .* takes no `process_group`"):
            FSDPStrategy(process_group=object(), sharding_strategy="NO_SHARD")

    def test_the_state_dict_type(self) -> None:
        assert FSDPStrategy().state_dict_type == "sharded"
        assert FSDPStrategy(state_dict_type="full").state_dict_type == "full"
        with pytest.raises(ValueError, match=r"state_dict_type must be one of \('sharded', 'full'\), but got 'local'"):
            FSDPStrategy(state_dict_type="local")

    def test_offloading(self) -> None:
        for given in (True, CPUOffload(offload_params=True), CPUOffloadPolicy()):
            assert isinstance(FSDPStrategy(cpu_offload=given)._offload, CPUOffloadPolicy)
        for given in (None, False, CPUOffload(offload_params=False)):
            assert FSDPStrategy(cpu_offload=given)._offload is None
        assert FSDPStrategy(offload_policy=OffloadPolicy())._offload is None
        with pytest.raises(TypeError, match="`cpu_offload` must be a bool, .* got 'yes'"):
            FSDPStrategy(cpu_offload="yes")
        with pytest.raises(ValueError, match="`cpu_offload` and `offload_policy` say the same"):
            FSDPStrategy(cpu_offload=True, offload_policy=CPUOffloadPolicy())

    def test_mixed_precision_is_torchs(self) -> None:
        with pytest.raises(
            TypeError, match=r"`mixed_precision` must be .*got 'bf16-mixed'. .*`Fabric\(precision=...\)`"
        ):
            FSDPStrategy(mixed_precision="bf16-mixed")
        with pytest.raises(ValueError, match="`mixed_precision` and `mp_policy` say the same"):
            FSDPStrategy(mixed_precision=MixedPrecision(), mp_policy=MixedPrecisionPolicy())
        with pytest.raises(ValueError, match="keep_low_precision_grads=True"):
            FSDPStrategy(mixed_precision=MixedPrecision(keep_low_precision_grads=True))

    def test_resharding_that_contradicts(self) -> None:
        assert FSDPStrategy(reshard_after_forward=2)._reshard_after_forward == 2
        assert FSDPStrategy()._reshard_after_forward is None
        assert FSDPStrategy(sharding_strategy="SHARD_GRAD_OP")._reshard_after_forward is False
        with pytest.raises(
            ValueError, match="reshard_after_forward=True contradicts sharding_strategy='SHARD_GRAD_OP'"
        ):
            FSDPStrategy(sharding_strategy="SHARD_GRAD_OP", reshard_after_forward=True)

    def test_the_older_name_of_activation_checkpointing(self) -> None:
        for given in (Block, [Block]):
            with pytest.warns(DeprecationWarning, match="activation_checkpointing_policy="):
                strategy = FSDPStrategy(activation_checkpointing=given)
            assert strategy._to_checkpoint is not None
        with pytest.raises(ValueError, match="say the same"):
            FSDPStrategy(activation_checkpointing=Block, activation_checkpointing_policy={Block})

    def test_policies_are_checked_at_once(self) -> None:
        for name in ("auto_wrap_policy", "activation_checkpointing_policy"):
            with pytest.raises(TypeError, match=f"`{name}`"):
                FSDPStrategy(**{name: 3})

    def test_checkpoint_io_cannot_be_chosen(self) -> None:
        with pytest.raises(NotImplementedError, match="writes and reads its files itself.*TorchCheckpointIO"):
            FSDPStrategy().checkpoint_io = TorchCheckpointIO()
        with pytest.raises(TypeError, match="no option 'checkpoint_io'"):
            FSDPStrategy(checkpoint_io=TorchCheckpointIO())


class _FloatEight(Precision):
    precision = "transformer-engine"


class TestPrecision:
    def test_what_it_can_compute(self) -> None:
        for plugin in (Precision(), FSDPPrecision("bf16-true"), HalfPrecision(), DoublePrecision()):
            strategy = FSDPStrategy(precision=plugin)
            assert strategy.precision is plugin
        strategy.precision = amp = MixedPrecisionPlugin("bf16-mixed", "cpu")
        assert strategy.precision is amp
        assert FSDPStrategy().precision.precision == "32-true"

    def test_what_it_cannot(self) -> None:
        with pytest.raises(TypeError, match="_FloatEight .*'transformer-engine'.*Use `FSDPPrecision`"):
            FSDPStrategy(precision=_FloatEight())
        with pytest.raises(TypeError, match="Use `FSDPPrecision`"):
            FSDPStrategy().precision = _FloatEight()

    def test_dtypes_of_a_precision(self) -> None:
        bf16 = torch.bfloat16
        true, mixed = (Casting.of(None, FSDPPrecision(name)) for name in ("bf16-true", "bf16-mixed"))
        assert (true.unit, true.whole, true.buffers) == (*[MixedPrecisionPolicy(bf16, bf16)] * 2, bf16)
        reduces = MixedPrecisionPolicy(None, bf16, cast_forward_inputs=False)
        assert (mixed.unit, mixed.whole, mixed.buffers) == (reduces, reduces, bf16)
        for plugin in (Precision(), FSDPPrecision("32-true"), HalfPrecision(), DoublePrecision()):
            plain = Casting.of(None, plugin)
            assert (plain.unit, plain.whole, plain.buffers) == (MixedPrecisionPolicy(), MixedPrecisionPolicy(), None)

    def test_dtypes_that_the_user_gives_win(self) -> None:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        casting = Casting.of(policy, FSDPPrecision("16-true"))
        assert casting.unit == policy
        assert casting.whole == MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
        keeps = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float64)
        assert Casting.of(keeps, Precision()).unit.output_dtype is None
        assert Casting.of(keeps, Precision()).whole.output_dtype is torch.float64

    def test_dtypes_as_the_predecessor_has_them(self) -> None:
        casting = Casting.of(MixedPrecision(torch.bfloat16, buffer_dtype=torch.float16), Precision())
        assert casting.unit == MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, cast_forward_inputs=False)
        assert casting.whole.cast_forward_inputs
        assert casting.buffers is torch.float16


class TestProcesses:
    def test_it_runs_the_script_again(self) -> None:
        strategy = _strategy(2)
        strategy._configure_launcher()
        assert isinstance(strategy.launcher, _SubprocessScriptLauncher)
        assert strategy.start_method == "popen"
        with pytest.raises(RuntimeError, match="cluster environment"):
            FSDPStrategy()._configure_launcher()

    def test_before_launch_there_is_no_mesh(self) -> None:
        with pytest.raises(RuntimeError, match="Launch first"):
            _ = FSDPStrategy().device_mesh
        with pytest.raises(RuntimeError, match="`setup_module` talks to the other processes"):
            _strategy().setup_module(nn.Linear(1, 1))

    def test_a_mesh_for_another_number_of_ranks(self) -> None:
        with pytest.raises(ValueError, match=r"device_mesh=\(2,\) is for 2 processes, but there are 1"):
            _joined(1, device_mesh=(2,))
        dist.destroy_process_group()

    def test_another_device(self) -> None:
        with pytest.raises(ValueError, match="device_id=0 is not the device of this process, which is cpu"):
            _joined(1, device_id=0)
        strategy = _joined(1, device_id=torch.device("cpu"))
        strategy.teardown()


# ---- one rank --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(request: Any) -> Any:
    strategy = _joined(1, **getattr(request, "param", {}))
    yield strategy
    strategy.teardown()


by_block = pytest.mark.parametrize("one_rank", [{"auto_wrap_policy": {Block}}], indirect=True)


class TestSetUp:
    @by_block
    def test_names_and_objects_stay(self, one_rank: FSDPStrategy) -> None:
        model = _model()
        before, parts = {name: t.clone() for name, t in model.state_dict().items()}, list(model.named_modules())
        forward = one_rank.setup_module(model)
        assert forward is not model
        assert one_rank._module_with_state(forward) is one_rank._module_with_state(model) is model
        assert list(model.named_modules()) == parts
        assert type(model) is Model
        assert all(isinstance(block, Block) and isinstance(block, FSDPModule) for block in model.blocks)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        after = _full(one_rank.get_module_state_dict(forward))
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert list(after) == list(before)

    @by_block
    def test_only_once(self, one_rank: FSDPStrategy) -> None:
        model = _model()
        forward = one_rank.setup_module(model)
        for again in (model, forward, model.blocks[0], nn.Sequential(model)):
            with pytest.raises(ValueError, match="is shared out already"):
                one_rank.setup_module(again)

    def test_what_another_engine_has_wrapped(self, one_rank: FSDPStrategy) -> None:
        with warnings.catch_warnings(action="ignore"):  # about one rank
            inside = FullyShardedDataParallel(nn.Linear(1, 1), device_id=CPU)
        with pytest.raises(TypeError, match="has `FullyShardedDataParallel` inside"):
            one_rank.setup_module(nn.Sequential(inside))
        with pytest.raises(ValueError, match="`ModelParallelStrategy`"):
            one_rank.setup_module(fully_shard(nn.Linear(1, 1), mesh=init_device_mesh("cpu", (1,))))

    def test_a_parameter_without_dimensions(self, one_rank: FSDPStrategy) -> None:
        model = nn.Linear(1, 1)
        model.scale = nn.Parameter(torch.tensor(1.0))
        with pytest.raises(ValueError, match="without dimensions cannot be shared out: 'scale'"):
            one_rank.setup_module(model)
        assert not isinstance(model.weight, DTensor)

    def test_dtypes_that_cannot_be_added_up_together(self, one_rank: FSDPStrategy) -> None:
        def mixed() -> nn.Module:
            return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, dtype=torch.float64))

        with pytest.raises(ValueError, match="need one dtype: '0.*' is torch.float32, '1.*' is torch.float64"):
            one_rank.setup_module(mixed())
        model = mixed()
        model[1].requires_grad_(False)
        one_rank.setup_module(model)
        one_rank._units = FSDPStrategy(auto_wrap_policy={nn.Linear})._units
        one_rank.setup_module(mixed())

    @pytest.mark.parametrize("module", [nn.Identity(), nn.Sequential(), nn.Linear(2, 2).requires_grad_(False)])
    def test_nothing_to_train(self, one_rank: FSDPStrategy, module: nn.Module) -> None:
        forward = one_rank.setup_module(copy.deepcopy(module))
        assert forward(torch.ones(1, 2)).shape == (1, 2)
        with one_rank._backward_sync_control.no_backward_sync(forward, enabled=True):
            forward(torch.ones(1, 2))

    def test_eval_mode_stays(self, one_rank: FSDPStrategy) -> None:
        assert not one_rank.setup_module(nn.Linear(1, 1).eval()).training

    def test_memory_in_any_order(self, one_rank: FSDPStrategy) -> None:
        conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        expected = conv(torch.ones(1, 3, 4, 4))
        assert torch.allclose(one_rank.setup_module(conv)(torch.ones(1, 3, 4, 4)), expected)

    def test_modules_are_made_on_the_cpu_unless_empty(self, one_rank: FSDPStrategy) -> None:
        for empty_init in (None, False):
            with one_rank.module_init_context(empty_init):
                assert nn.Linear(1, 1).weight.device == CPU
        for context in (one_rank.module_init_context(empty_init=True), one_rank.module_sharded_context()):
            with context:
                assert nn.Linear(1, 1).weight.is_meta

    def test_no_copies(self, one_rank: FSDPStrategy) -> None:
        with pytest.raises(AssertionError, match="does not support deepcopy"):
            copy.deepcopy(one_rank.setup_module(nn.Linear(1, 1)))

    @pytest.mark.parametrize("one_rank", [{"auto_wrap_policy": {nn.Linear, nn.Embedding}}], indirect=True)
    def test_ties_are_kept(self, one_rank: FSDPStrategy) -> None:
        model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2), nn.Linear(2, 4, bias=False))
        model[2].weight = model[0].weight
        with pytest.warns(
            UserWarning, match="'0.weight' and '2.weight' are one parameter.*'0' and '2' cannot be units"
        ):
            forward = one_rank.setup_module(model)
        assert model[2].weight is model[0].weight
        forward(torch.tensor([1])).sum().backward()
        assert model[2].weight is model[0].weight
        assert isinstance(model[1], FSDPModule)


class TestOptimizers:
    def test_one_from_before(self, one_rank: FSDPStrategy) -> None:
        model = nn.Linear(1, 1)
        before = torch.optim.SGD(model.parameters(), lr=1.0)
        one_rank.setup_module(model)
        stray = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        for optimizer in (before, stray):
            with pytest.raises(ValueError, match="FSDPStrategy replaces them. Create it after"):
                one_rank.setup_optimizer(optimizer)

    def test_one_that_is_half_from_before(self, one_rank: FSDPStrategy) -> None:
        model = nn.Linear(1, 1)
        before = model.bias
        one_rank.setup_module(model)
        with pytest.raises(ValueError, match="FSDPStrategy replaces them"):
            one_rank.setup_optimizer(torch.optim.SGD([model.weight, before], lr=1.0))

    def test_one_with_parameters_of_its_own_too(self, one_rank: FSDPStrategy) -> None:
        model, temperature = nn.Linear(1, 1), nn.Parameter(torch.ones(1))
        forward = one_rank.setup_module(model)
        groups = [{"params": list(model.parameters())}, {"params": [temperature]}]
        optimizer = one_rank.setup_optimizer(torch.optim.AdamW(groups, lr=1.0))
        (forward(torch.ones(1, 1)) * temperature).sum().backward()
        one_rank.optimizer_step(optimizer)
        assert temperature.item() != 1.0

    @pytest.mark.parametrize("one_rank", [{}, {"sharding_strategy": "SHARD_GRAD_OP"}], indirect=True)
    def test_one_made_while_parameters_are_whole(self, one_rank: FSDPStrategy) -> None:
        model = nn.Linear(1, 1)
        forward = one_rank.setup_module(model)
        with torch.no_grad():
            forward(torch.ones(1, 1))
        optimizer = one_rank.setup_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
        assert all(isinstance(parameter, DTensor) for parameter in optimizer.param_groups[0]["params"])

    def test_meta_parameters_come_first(self, one_rank: FSDPStrategy) -> None:
        with one_rank.module_init_context(empty_init=True):
            model = nn.Linear(1, 1)
        with pytest.raises(RuntimeError, match="Set the module up first, then create the optimizer"):
            one_rank.setup_module_and_optimizers(model, [torch.optim.SGD(model.parameters(), lr=1.0)])

    def test_what_it_has_stays(self, one_rank: FSDPStrategy) -> None:
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "weight_decay": 0.5}]
        optimizer = torch.optim.Adam(groups, lr=0.2)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        momentum = optimizer.state[model.weight]["exp_avg"].clone()
        _, [after], scheduler = one_rank.setup_module_and_optimizers(model, [optimizer], "scheduler")
        assert after is optimizer
        assert scheduler == "scheduler"
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
        assert optimizer.param_groups[1]["weight_decay"] == 0.5
        assert optimizer.param_groups[0]["params"][0] is model.weight
        state = optimizer.state[model.weight]
        assert isinstance(state["exp_avg"], DTensor)
        assert torch.equal(state["exp_avg"].full_tensor(), momentum)
        assert state["step"] == 1


class TestBackwardSync:
    def test_only_of_what_was_set_up(self, one_rank: FSDPStrategy) -> None:
        control = one_rank._backward_sync_control
        model = nn.Linear(1, 1)
        forward = one_rank.setup_module(model)
        for other in (model, nn.Linear(1, 1)):
            with pytest.raises(TypeError, match="needs the module that `setup_module` returned, but got .*Linear"):
                control.no_backward_sync(other, enabled=True)
            with control.no_backward_sync(other, enabled=False):
                pass
        with control.no_backward_sync(torch.compile(forward, backend="eager"), enabled=True):
            pass

    @by_block
    def test_it_comes_back(self, one_rank: FSDPStrategy) -> None:
        no_sync = partial(one_rank._backward_sync_control.no_backward_sync, enabled=True)
        forward = one_rank.setup_module(_model())
        x, y = _batch(0)

        def synchronises() -> bool:
            forward.zero_grad()
            _loss(forward(x), y).backward()
            return all(parameter.grad is not None for parameter in forward.parameters())

        with no_sync(forward):
            assert not synchronises()
            with no_sync(forward):
                assert not synchronises()
            assert not synchronises()
        assert synchronises()
        with pytest.raises(KeyError), no_sync(forward):
            raise KeyError
        assert synchronises()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise MemoryError


@by_block
class TestAfterAnError:
    """The next step is as if the failed one had not been."""

    def _assert_as_alone(self, strategy: FSDPStrategy, forward: nn.Module) -> None:
        expected = _model()
        x, y = _batch(0)
        _loss(expected(x), y).backward()
        strategy.backward(_loss(forward(x), y), forward)
        grads = {name: p.grad.full_tensor() for name, p in forward.module.named_parameters()}
        _assert_close(grads, {name: p.grad for name, p in expected.named_parameters()})

    @pytest.mark.parametrize("wrong", [torch.ones(2, 4), None])
    def test_in_forward(self, one_rank: FSDPStrategy, wrong: Any) -> None:
        forward = one_rank.setup_module(_model())
        for _ in range(2):
            with pytest.raises((RuntimeError, TypeError)):
                forward(wrong)
            forward.zero_grad()
            self._assert_as_alone(one_rank, forward)

    def test_in_a_unit(self, one_rank: FSDPStrategy) -> None:
        forward = one_rank.setup_module(_model())
        hook = forward.module.blocks[1].up.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(_batch(0)[0])
        hook.remove()
        self._assert_as_alone(one_rank, forward)

    def test_in_backward(self, one_rank: FSDPStrategy) -> None:
        forward = one_rank.setup_module(_model())
        optimizer = one_rank.setup_optimizer(torch.optim.SGD(forward.parameters(), lr=0.1))
        hook = forward.module.blocks[1].up.register_forward_hook(lambda _, __, output: _Fails.apply(output))
        with pytest.raises(MemoryError):
            one_rank.backward(forward(_batch(0)[0]).sum(), forward)
        hook.remove()
        optimizer.zero_grad()
        self._assert_as_alone(one_rank, forward)

    @pytest.mark.parametrize("by", ["optimizer", "module"])
    def test_an_accumulation_that_is_given_up(self, one_rank: FSDPStrategy, by: str) -> None:
        forward = one_rank.setup_module(_model())
        optimizer = one_rank.setup_optimizer(torch.optim.SGD(forward.parameters(), lr=0.1))
        with one_rank._backward_sync_control.no_backward_sync(forward, enabled=True):
            one_rank.backward(forward(_batch(5)[0]).sum(), forward)
        (optimizer if by == "optimizer" else _FabricModule(forward, one_rank, forward.module)).zero_grad()
        self._assert_as_alone(one_rank, forward)


@by_block
class TestStaleness:
    """After a forward, torch shows whole parameters in place of the rank's parts."""

    def test_state_read_after_a_forward(self, one_rank: FSDPStrategy) -> None:
        model = _model()
        forward = one_rank.setup_module(model)
        forward(_batch(0)[0])
        for state in (one_rank.get_module_state_dict(forward), model.state_dict()):
            assert all(isinstance(state[name], DTensor) for name, _ in model.named_parameters())

    def test_a_step_after_a_look_at_the_output(self, one_rank: FSDPStrategy) -> None:
        """What the look gathered must not be used after the step."""
        outputs = []
        for looks in (False, True):
            model = _model()
            forward = one_rank.setup_module(model)
            optimizer = one_rank.setup_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            x, y = _batch(0)
            _loss(forward(x), y).backward()
            if looks:
                with torch.no_grad():
                    forward(x)
            one_rank.optimizer_step(optimizer)
            outputs.append(forward(x))
        assert torch.equal(*outputs)

    def test_values_loaded_after_a_look_at_the_output(self, one_rank: FSDPStrategy) -> None:
        model, other = _model(1), _model(2)
        forward = one_rank.setup_module(model)
        x = _batch(0)[0]
        with torch.no_grad():
            forward(x)
        one_rank.load_module_state_dict(forward, other.state_dict())
        torch.testing.assert_close(forward(x), other(x))
        model.load_state_dict(one_rank.get_module_state_dict(forward))
        torch.testing.assert_close(forward(x), other(x))


class _Casts(nn.Module):
    """Writes down the dtypes that it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("buffer", torch.ones(2))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.seen = [x.dtype, self.linear.weight.dtype, y.dtype, self.buffer.dtype]
        return y


class TestDtypes:
    """Of input, weight, output of a unit and a buffer in it; then of what comes out, and of what is stored."""

    @pytest.mark.parametrize(
        ("one_rank", "inside", "outside"),
        [
            ({"mixed_precision": MixedPrecision(torch.bfloat16)}, ["bf16", "bf16", "bf16", "f32"], ["f32", "f32"]),
            (
                {"mixed_precision": MixedPrecision(torch.float16, torch.float32, torch.bfloat16)},
                ["f16", "f16", "f16", "bf16"],
                ["f32", "f32"],
            ),
            ({"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}, ["bf16", "bf16", "bf16", "f32"], ["f32", "f32"]),
            (
                {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float64)},
                ["bf16", "bf16", "bf16", "f32"],
                ["f64", "f32"],
            ),
            ({"precision": FSDPPrecision("32-true")}, ["f32"] * 4, ["f32", "f32"]),
            ({"precision": FSDPPrecision("64-true")}, ["f64"] * 4, ["f32", "f64"]),
            ({"precision": FSDPPrecision("bf16-true")}, ["bf16"] * 4, ["f32", "bf16"]),
            ({"precision": FSDPPrecision("16-true")}, ["f16"] * 4, ["f32", "f16"]),
            ({"precision": FSDPPrecision("bf16-mixed")}, ["bf16", "f32", "bf16", "bf16"], ["f32", "f32"]),
            ({"precision": HalfPrecision("bf16-true")}, ["bf16"] * 4, ["f32", "bf16"]),
            ({"precision": DoublePrecision()}, ["f64"] * 4, ["f32", "f64"]),
            (
                {"precision": MixedPrecisionPlugin("bf16-mixed", "cpu")},
                ["bf16", "f32", "bf16", "f32"],
                ["f32", "f32"],
            ),
            (
                {"precision": FSDPPrecision("bf16-true"), "mixed_precision": MixedPrecision(torch.float32)},
                ["f32", "f32", "f32", "bf16"],
                ["f32", "bf16"],
            ),
        ],
        indirect=["one_rank"],
    )
    def test_of_each_part(self, one_rank: FSDPStrategy, inside: list[str], outside: list[str]) -> None:
        one_rank._units = FSDPStrategy(auto_wrap_policy={_Casts})._units
        dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
        precision = one_rank.precision
        model = precision.convert_module(nn.Sequential(nn.Linear(2, 2), _Casts(), nn.Linear(2, 2)))
        forward = one_rank.setup_module(model)
        with precision.forward_context():
            output = forward(precision.convert_input(torch.ones(1, 2)))
        output = precision.convert_output(output)
        output.sum().backward()
        assert model[1].seen == [dtypes[name] for name in inside]
        assert output.dtype is dtypes[outside[0]]
        assert {parameter.dtype for parameter in model.parameters()} == {dtypes[outside[1]]}
        assert {parameter.grad.dtype for parameter in model.parameters()} == {dtypes[outside[1]]}

    @pytest.mark.parametrize(
        "one_rank",
        [
            {"mixed_precision": MixedPrecision(torch.bfloat16, buffer_dtype=torch.bfloat16)},
            {"precision": FSDPPrecision("bf16-mixed")},
            {"precision": FSDPPrecision("bf16-true")},
        ],
        indirect=True,
    )
    def test_batch_norms_compute(self, one_rank: FSDPStrategy) -> None:
        precision = one_rank.precision
        model = precision.convert_module(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
        stored = model[1].running_mean.dtype
        forward = one_rank.setup_module(model)
        with precision.forward_context():
            forward(precision.convert_input(torch.randn(4, 2))).sum().backward()
        assert model[1].running_mean.dtype is stored
        assert model[1].running_mean.abs().sum() > 0
        assert model[1].weight.grad is not None

    @by_block
    def test_checkpointed_activations_are_made_again_in_the_same_dtype(self, one_rank: FSDPStrategy) -> None:
        class MakesTensors(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x) * torch.ones(2)

        one_rank._to_checkpoint = FSDPStrategy(activation_checkpointing_policy={MakesTensors})._to_checkpoint
        one_rank.precision = precision = FSDPPrecision("bf16-true")
        forward = one_rank.setup_module(precision.convert_module(nn.Sequential(MakesTensors())))
        with precision.forward_context():
            output = forward(torch.ones(1, 2, dtype=torch.bfloat16))
        output.sum().backward()
        assert output.dtype is torch.bfloat16


class TestCompiled:
    @by_block
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
    def test_outside_and_inside(self, one_rank: FSDPStrategy) -> None:
        x, y = _batch(0)
        expected = _model()
        _loss(expected(x), y).backward()
        for inside in (False, True):
            model = _model()
            compiled = torch.compile(model, backend="eager") if inside else model
            forward = one_rank.setup_module(compiled)
            assert one_rank._module_with_state(forward) is model
            assert list(one_rank.get_module_state_dict(forward)) == list(expected.state_dict())
            forward = forward if inside else torch.compile(forward, backend="eager")
            for _ in range(2):
                forward.zero_grad()
                _loss(forward(x), y).backward()
            grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
            _assert_close(grads, {name: p.grad for name, p in expected.named_parameters()})


# ---- several ranks ---------------------------------------------------------------------------------------------------


def _train_each(world: int, options: list[dict[str, Any]]) -> list[Any]:
    """Train once for each set of options, alike on all ranks."""
    strategies = [_joined(world, **kwargs) for kwargs in options]
    results = [_train(strategy, _model()) for strategy in strategies]
    strategies[0].teardown()
    return results


BY_BLOCK = {"auto_wrap_policy": {Block}}


class TestTraining:
    def test_two_ranks_learn_what_one_does(self) -> None:
        options: list[dict[str, Any]] = [
            {},
            BY_BLOCK,
            {
                "auto_wrap_policy": partial(size_based_auto_wrap_policy, min_num_params=20),
                "reshard_after_forward": True,
            },
            {"sharding_strategy": "SHARD_GRAD_OP", "auto_wrap_policy": {Block, nn.Linear}},
            {"sharding_strategy": "NO_SHARD", **BY_BLOCK},
            {"activation_checkpointing_policy": {Block}, **BY_BLOCK},
            {"cpu_offload": True, **BY_BLOCK},
            {"forward_prefetch": True, "backward_prefetch": None, **BY_BLOCK},
            {"backward_prefetch": BackwardPrefetch.BACKWARD_PRE, **BY_BLOCK},
            {"sharding_strategy": "HYBRID_SHARD", **BY_BLOCK},
        ]
        expected, norms = _train_alone(_model())
        for of_rank in on_ranks(2, _train_each, 2, options):
            for state, seen in of_rank:
                _assert_close(state, expected)
                assert seen == pytest.approx(norms, rel=1e-5)

    def test_four_ranks_learn_what_one_does(self) -> None:
        """Of some parameters, some ranks hold nothing."""
        options: list[dict[str, Any]] = [
            BY_BLOCK,
            {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 2)},
            {"sharding_strategy": "_HYBRID_SHARD_ZERO2", "device_mesh": (2, 2), **BY_BLOCK},
            {"sharding_strategy": "NO_SHARD"},
        ]
        expected, norms = _train_alone(_model())
        for of_rank in on_ranks(4, _train_each, 4, options):
            for state, seen in of_rank:
                _assert_close(state, expected)
                assert seen == pytest.approx(norms, rel=1e-5)

    def test_set_up_together_is_bit_for_bit_set_up_apart(self) -> None:
        for together, apart, checkpointed, frozen in on_ranks(2, _together_and_apart):
            assert all(torch.equal(together[name], tensor) for name, tensor in apart.items())
            assert all(torch.equal(checkpointed[name], tensor) for name, tensor in apart.items())
            _assert_close(frozen, _train_alone(_partly_frozen())[0])


def _partly_frozen() -> Model:
    model = _model()
    model.blocks[0].requires_grad_(False)
    model.last.weight.requires_grad_(False)
    return model


def _together_and_apart() -> tuple[Any, ...]:
    strategy = _joined(2, **BY_BLOCK)
    together = _train(strategy, _model(), joint=True)[0]
    apart = _train(strategy, _model())[0]
    strategy._to_checkpoint = FSDPStrategy(activation_checkpointing_policy={Block})._to_checkpoint
    model = _model()
    checkpointed = _train(strategy, model)[0]
    assert model.blocks[0].forwards == 2 * 6  # each forward again in backward
    strategy._to_checkpoint = None
    frozen = _train(strategy, _partly_frozen(), joint=True)[0]
    strategy.teardown()
    return together, apart, checkpointed, frozen


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 5)
        self.block = Block()
        self.head = nn.Linear(5, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)))


def _two_ranks_and_values() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    strategy = _joined(2, **BY_BLOCK)
    rank = strategy.global_rank

    model = _model(seed=1 + rank)
    with torch.no_grad():
        model.factor += rank
    strategy.setup_module(model)
    seen["synced"] = _full(model.state_dict())

    unsynced = _joined(2, sync_module_states=False)
    linear = nn.Linear(1, 2, bias=False)
    nn.init.constant_(linear.weight, rank)
    unsynced.setup_module(linear)
    seen["unsynced"] = linear.weight.full_tensor().flatten().tolist()

    torch.manual_seed(3)
    tied = _Tied()
    forward = strategy.setup_module(tied)
    forward(torch.tensor([rank, 2])).pow(2).mean().backward()
    assert tied.head.weight is tied.embed.weight
    seen["tied"] = tied.embed.weight.grad.full_tensor()

    own = _model()
    ignores = _joined(2, ignored_modules=[own.first])
    before = own.first.weight
    forward = ignores.setup_module(own)
    assert own.first.weight is before
    optimizer = ignores.setup_optimizer(torch.optim.AdamW(own.parameters(), lr=0.05))
    _loss(forward(_batch(0, rank, 2)[0]), _batch(0, rank, 2)[1]).backward()
    seen["ignored"] = own.first.weight.grad.clone()
    norm = ignores.clip_gradients_norm(forward, optimizer, 1e9)
    seen["norm"] = norm.item()
    ignores.clip_gradients_value(forward, optimizer, 0.01)
    seen["largest"] = max(p.grad.abs().max().item() for p in map(_local, own.parameters()) if p.grad.numel())
    ignores.optimizer_step(optimizer)
    with pytest.raises(ValueError, match="foreach=True, which torch cannot do"):
        ignores.setup_optimizer(torch.optim.AdamW(own.parameters(), foreach=True))
    strategy.teardown()
    return seen


def _local(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.detach().to_local()
    local.grad = parameter.grad.to_local()
    return local


class TestValues:
    def test_two_ranks(self) -> None:
        results = on_ranks(2, _two_ranks_and_values)
        expected = _model(seed=1).state_dict()
        torch.manual_seed(3)
        tied = _Tied()
        tied(torch.tensor([0, 2, 1, 2])).pow(2).mean().backward()
        for rank, seen in enumerate(results):
            assert all(torch.equal(seen["synced"][name], tensor) for name, tensor in expected.items())
            assert seen["unsynced"] == [0.0, 1.0]
            torch.testing.assert_close(seen["tied"], tied.embed.weight.grad)
            alone = _model()
            _loss(alone(_batch(0, rank, 2)[0]), _batch(0, rank, 2)[1]).backward()
            torch.testing.assert_close(seen["ignored"], alone.first.weight.grad)  # this rank's own
            assert seen["norm"] > 0
            assert seen["largest"] == pytest.approx(0.01)


def _meshes() -> dict[str, Any]:
    hybrid = {"sharding_strategy": "HYBRID_SHARD", **BY_BLOCK}
    first = _joined(4, device_mesh=(4,))
    rank = first.global_rank
    shares = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    repeats = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    all_ranks = dist.new_group([0, 1, 2, 3])
    given = {
        "sizes": first,
        "hybrid": _joined(4, **hybrid),
        "mesh": _joined(4, device_mesh=init_device_mesh("cpu", (2, 2)), **hybrid),
        "group": _joined(4, process_group=all_ranks),
        "groups": _joined(4, process_group=(shares[rank // 2], repeats[rank % 2]), **hybrid),
        "none": _joined(4, sharding_strategy="NO_SHARD", device_mesh=init_device_mesh("cpu", (4,))),
    }
    seen = {}
    for name, strategy in given.items():
        linear = nn.Linear(2, 4, bias=False)
        strategy.setup_module(linear)
        seen[name] = (tuple(strategy.device_mesh.shape), linear.weight.placements, linear.weight.to_local().shape[0])
    with pytest.raises(ValueError, match=r"device_mesh=\(2, 3\) is for 6 processes, but there are 4"):
        _joined(4, device_mesh=(2, 3), **hybrid)
    seen["groups train"] = _train(given["groups"], _model())[0]
    first.teardown()
    return seen


class TestMeshes:
    def test_from_all_that_can_be_said(self) -> None:
        expected, _ = _train_alone(_model())
        for seen in on_ranks(4, _meshes):
            _assert_close(seen.pop("groups train"), expected)
            whole, split = (Shard(0),), (Replicate(), Shard(0))
            assert seen == {
                "sizes": ((4,), whole, 1),
                "hybrid": ((1, 4), split, 1),
                "mesh": ((2, 2), split, 2),
                "group": ((4,), whole, 1),
                "groups": ((2, 2), split, 2),
                "none": ((4, 1), split, 4),
            }


# ---- parameters on the meta device -----------------------------------------------------------------------------------


class _WithoutReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3))
        torch.nn.init.trunc_normal_(self.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _from_meta() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    strategy = _joined(2, auto_wrap_policy={Block, nn.Linear})
    torch.manual_seed(1 + 5 * strategy.global_rank)  # rank 0's counts
    with strategy.module_init_context(empty_init=True):
        model = nn.Sequential(Model(), _WithoutReset())
    assert all(parameter.is_meta for parameter in model.parameters())
    strategy.setup_module(model)
    seen["same"] = _full(model.state_dict())

    with torch.device("meta"):
        plain = nn.Linear(4, 3)
    torch.manual_seed(7)
    forward = strategy.setup_module(plain)
    seen["reset"] = _full(plain.state_dict())
    seen["output"] = forward(torch.ones(1, 4))

    offloads = _joined(2, cpu_offload=True, param_init_fn=_fill_with_three)
    with torch.device("meta"):
        plain = nn.Linear(4, 3)
    offloads.setup_module(plain)
    seen["filled"] = _full(plain.state_dict())
    with torch.device("meta"):
        unknown = nn.Sequential(_WithoutReset())
    with pytest.raises(TypeError, match="_WithoutReset"):
        strategy.setup_module(unknown)
    strategy.teardown()
    return seen


def _fill_with_three(module: nn.Module) -> None:
    module.to_empty(device="cpu", recurse=False)
    for tensor in module.parameters(recurse=False):
        with torch.no_grad():
            tensor.fill_(3.0)


class TestFromMeta:
    def test_values_are_what_one_process_would_have_made(self) -> None:
        torch.manual_seed(1)
        expected = nn.Sequential(Model(), _WithoutReset()).state_dict()
        for seen in on_ranks(2, _from_meta):
            assert list(seen["same"]) == list(expected)
            assert all(torch.equal(seen["same"][name], tensor) for name, tensor in expected.items())
            weight, bias = seen["reset"]["weight"], seen["reset"]["bias"]
            assert not torch.equal(weight[:2], weight[1:])  # ranks do not repeat each other
            torch.testing.assert_close(seen["output"], torch.ones(1, 4) @ weight.T + bias)
            assert {t.unique().item() for t in seen["filled"].values()} == {3.0}


# ---- through Fabric --------------------------------------------------------------------------------------------------


def _fabric(precision: Any = None, **kwargs: Any) -> Fabric:
    strategy = FSDPStrategy(timeout=timedelta(seconds=20), **{**BY_BLOCK, **kwargs})
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def _methods_through_fabric(compiled: bool) -> dict[str, Any]:
    fabric = _fabric()
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model = torch.compile(model, backend="eager") if compiled else model
    model, optimizer = fabric.setup(model, optimizer)
    model.mark_forward_method("penalty")
    x, y = _batch(0, fabric.global_rank, 2)
    for _ in range(3):
        loss = model.training_step(x, y) + model.penalty()
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert type(norm) is Tensor
    assert norm.ndim == 0
    state = _full(model.state_dict())
    fabric.strategy.teardown()
    return state


def _alone_with_methods() -> dict[str, Tensor]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        (model.training_step(*_batch(0)) + model.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _precisions_through_fabric() -> dict[str, list[Any]]:
    seen: dict[str, list[Any]] = {}
    fabrics = {name: _fabric(precision=name) for name in ("32-true", "64-true", "16-true", "bf16-true", "bf16-mixed")}
    for name, fabric in fabrics.items():
        assert isinstance(fabric.strategy.precision, FSDPPrecision)
        with fabric.init_module(empty_init=True):
            dtype = nn.Linear(1, 1).weight.dtype
        model = fabric.setup_module(_model())
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.05, fused=False))
        x, y = _batch(0, fabric.global_rank, 2)
        losses = []
        for _ in range(3):
            output = model(x)
            loss = _loss(output, y)
            losses.append(loss.item())
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        seen[name] = [dtype, model.first.weight.dtype, output.dtype, losses]
    next(iter(fabrics.values())).strategy.teardown()
    return seen


def _gan() -> tuple[Any, Any]:
    """Two models that are stepped in turns, one through the other."""
    fabric = _fabric()
    generator, critic = _model(1), nn.Sequential(nn.Linear(2, 5), Block(), nn.Linear(5, 1))
    torch.manual_seed(2)
    for layer in critic.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
    c_optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    generator, g_optimizer = fabric.setup(generator, g_optimizer)
    critic, c_optimizer = fabric.setup(critic, c_optimizer)
    states = _play(generator, critic, g_optimizer, c_optimizer, fabric.backward, (fabric.global_rank, 2))
    result = tuple(_full(state) for state in states)
    fabric.strategy.teardown()
    return result


def _play(generator: Any, critic: Any, g_optimizer: Any, c_optimizer: Any, backward: Any, part: Any) -> tuple[Any, Any]:
    for step in range(3):
        x, real = _batch(step, *part)
        fake = generator(x)
        c_loss = critic(fake.detach()).mean() - critic(real).mean()
        backward(c_loss)
        c_optimizer.step()
        c_optimizer.zero_grad()
        backward(-critic(fake).mean())  # the critic was stepped between the generator's forward and backward
        with torch.no_grad():
            generator(x)
        g_optimizer.step()
        g_optimizer.zero_grad()
        c_optimizer.zero_grad()
    return generator.state_dict(), critic.state_dict()


def _gan_alone() -> tuple[Any, Any]:
    generator, critic = _model(1), nn.Sequential(nn.Linear(2, 5), Block(), nn.Linear(5, 1))
    torch.manual_seed(2)
    for layer in critic.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
    c_optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    return _play(generator, critic, g_optimizer, c_optimizer, Tensor.backward, (0, 1))


class TestThroughFabric:
    def test_methods_other_than_forward(self) -> None:
        expected = _alone_with_methods()
        for state in on_ranks(2, _methods_through_fabric, False):
            _assert_close(state, expected)

    @pytest.mark.slow
    def test_methods_of_a_compiled_model(self) -> None:
        expected = _alone_with_methods()
        for state in on_ranks(2, _methods_through_fabric, True):
            _assert_close(state, expected)

    def test_every_precision_learns(self) -> None:
        f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
        stored = {"32-true": f32, "64-true": f64, "16-true": f16, "bf16-true": bf16, "bf16-mixed": f32}
        for seen in on_ranks(2, _precisions_through_fabric):
            assert {name: values[:3] for name, values in seen.items()} == {
                name: [dtype, dtype, f32] for name, dtype in stored.items()
            }
            for name, values in seen.items():
                assert values[3] == pytest.approx(seen["64-true"][3], rel=0.05), name
                assert values[3][2] < values[3][0]

    def test_two_models_in_turns(self) -> None:
        expected = _gan_alone()
        for states in on_ranks(2, _gan):
            for state, alone in zip(states, expected, strict=True):
                _assert_close(state, alone, 1e-5)


# ---- files -----------------------------------------------------------------------------------------------------------


def _save_and_load(folder: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for kind in ("sharded", "full"):
        fabric = _fabric(state_dict_type=kind)
        model = _model()
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        x, y = _batch(0, fabric.global_rank, 2)
        fabric.backward(_loss(model(x), y))
        optimizer.step()
        with torch.no_grad():
            model(x)  # shows whole parameters
        fabric.save(f"{folder}/{kind}", {"model": model, "optimizer": optimizer, "step": 3})
        saved = _full(model.state_dict())

        other = _model(seed=5)
        other, other_optimizer = fabric.setup(other, torch.optim.AdamW(other.parameters(), lr=0.05))
        with torch.no_grad():
            other(x)
        state = {"model": other, "optimizer": other_optimizer, "step": 0}
        assert fabric.load(f"{folder}/{kind}", state) == {}
        assert state["step"] == 3
        torch.testing.assert_close(other(x), model(x))
        loaded = _full(other.state_dict())
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        for o, m in ((optimizer, model), (other_optimizer, other)):
            o.zero_grad()
            fabric.backward(_loss(m(x), y))
            o.step()
        _assert_close(_full(other.state_dict()), _full(model.state_dict()), 0.0)
        if kind == "sharded":
            moment = optimizer.state_dict()["state"][0]["exp_avg"]
            expected = moment.full_tensor()
            other_optimizer.load_state_dict(optimizer.state_dict())
            after = other_optimizer.state_dict()["state"][0]["exp_avg"]
            assert after.placements == moment.placements
            assert torch.equal(after.full_tensor(), expected)
        state_dict = fabric.strategy.get_module_state_dict(model._forward_module)
        optimizer_state = optimizer.state_dict()
        seen[kind] = (len(state_dict), type(state_dict.get("first.weight")).__name__, len(optimizer_state))
    fabric.barrier()
    dist.destroy_process_group()
    return seen


class TestFiles:
    def test_what_was_saved_goes_on(self, tmp_path: Any) -> None:
        for rank, seen in enumerate(on_ranks(2, _save_and_load, str(tmp_path))):
            assert seen["sharded"] == (13, "DTensor", 2)
            assert seen["full"] == ((13, "Tensor", 2) if rank == 0 else (0, "NoneType", 0))
        assert (tmp_path / "sharded").is_dir()
        plain = torch.load(tmp_path / "full", weights_only=True)
        _model().load_state_dict(plain["model"])


# ---- speed and warnings ----------------------------------------------------------------------------------------------


def test_nothing_of_torchs_warns(one_rank: FSDPStrategy) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward = one_rank.setup_module(_model())
        _loss(forward(_batch(0)[0]), _batch(0)[1]).backward()
