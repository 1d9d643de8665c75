"""Model parallel: the mesh, what the user's function may return, and training that equals that of one process."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric import Fabric
from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.plugins.precision.amp import MixedPrecision
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.strategies.model_parallel import MeshSizes, ModelParallelStrategy
from lightning.fabric.testing import on_ranks, preload

preload("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint")

STEPS = 3
GLOBAL_BATCH = 8


class Net(nn.Module):
    """Positions, a layer that plans leave whole, and two that they split; of an uneven size for two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 5))
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 6)
        self.down = nn.Linear(6, 5)
        self.register_buffer("scale", torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x + self.positions)
        return (hidden + self.down(self.up(hidden).tanh())) * self.scale

    def training_step(self, batch: Tensor) -> Tensor:
        return self(batch).pow(2).mean()

    def hidden(self, x: Tensor) -> Tensor:
        return self.up(x)

    def by_hand(self, batch: Tensor) -> Tensor:
        hidden = self.norm(batch + self.positions)
        return ((hidden + self.down(self.up(hidden).tanh())) * self.scale).pow(2).mean()


def tensor_parallel(module: Net, mesh: DeviceMesh) -> Net:
    return parallelize_module(  # type: ignore[return-value]
        module, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )


def sharded(module: Net, mesh: DeviceMesh) -> Net:
    fully_shard(module.up, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def both(module: Net, mesh: DeviceMesh) -> Net:
    return sharded(tensor_parallel(module, mesh), mesh)


def ddp(module: Net, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(module, process_group=mesh.get_group("data_parallel"))


def as_it_is(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return module


def _fabric(plan: Any, data: Any = "auto", tensor: Any = "auto", **kwargs: Any) -> Fabric:
    strategy = ModelParallelStrategy(
        plan, data, tensor, timeout=timedelta(seconds=30), save_distributed_checkpoint=kwargs.pop("distributed", True)
    )
    devices = (data if data != "auto" else 1) * (tensor if tensor != "auto" else 1)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy, **kwargs)
    fabric.launch()
    return fabric


def _batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(GLOBAL_BATCH, 6, 5, generator=generator)


def _share(fabric: Fabric, batch: Tensor) -> Tensor:
    replicas = fabric.strategy.distributed_sampler_kwargs
    assert replicas is not None
    return batch.chunk(replicas["num_replicas"])[replicas["rank"]]


def _full(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
        for name, value in module.state_dict().items()
    }


def _train_step(fabric: Fabric, module: Any, optimizer: Any, batch: Tensor) -> float:
    optimizer.zero_grad()
    fabric.backward(module(_share(fabric, batch)).pow(2).mean())
    norm = fabric.clip_gradients(module, optimizer, max_norm=0.1)
    assert norm is not None
    optimizer.step()
    return norm.item()


def _trained(plan: Any, data: int, tensor: int, foreach: bool | None = None) -> tuple[list[float], dict[str, Tensor]]:
    fabric = _fabric(plan, data, tensor)
    torch.manual_seed(fabric.global_rank)  # rank 0's values are those that count
    module = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(AdamW(module.parameters(), lr=0.05, foreach=foreach))
    return [_train_step(fabric, module, optimizer, batch) for batch in _batches()], _full(module.module)


def _trained_by_torch() -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    module = Net()
    optimizer = AdamW(module.parameters(), lr=0.05)
    norms = []
    for batch in _batches():
        optimizer.zero_grad()
        module(batch).pow(2).mean().backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1).item())
        optimizer.step()
    return norms, {name: value.detach() for name, value in module.state_dict().items()}


def _strategy(plan: Any = as_it_is, processes: int = 1, nodes: int = 1, **kwargs: Any) -> ModelParallelStrategy:
    strategy = ModelParallelStrategy(plan, timeout=timedelta(seconds=20), **kwargs)
    strategy.accelerator = CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")] * processes
    strategy.cluster_environment = LightningEnvironment()
    strategy.num_nodes = nodes
    return strategy


@pytest.fixture
def one_rank() -> Iterator[Callable[..., ModelParallelStrategy]]:
    made: list[ModelParallelStrategy] = []

    def join(plan: Any = as_it_is) -> ModelParallelStrategy:
        made.append(_strategy(plan))
        made[-1].setup_environment()
        return made[-1]

    yield join
    for strategy in made:
        strategy.teardown()
        strategy.teardown()


class TestArguments:
    def test_the_function_can_be_called(self) -> None:
        with pytest.raises(TypeError, match="`parallelize_fn` must be a function .* got 'tensor'"):
            ModelParallelStrategy("tensor")  # type: ignore[arg-type]

    @pytest.mark.parametrize("size", [0, -1, 2.0, True, "all", None])
    def test_sizes_are_positive_integers(self, size: Any) -> None:
        with pytest.raises(ValueError, match=f"`data_parallel_size` must be 'auto' or a positive integer.* {size!r}"):
            ModelParallelStrategy(as_it_is, data_parallel_size=size)
        with pytest.raises(ValueError, match="`tensor_parallel_size` must be"):
            ModelParallelStrategy(as_it_is, tensor_parallel_size=size)

    def test_the_backend_is_the_one_asked_for(self) -> None:
        assert ModelParallelStrategy(as_it_is, process_group_backend="mpi").process_group_backend == "mpi"


class TestMeshSizes:
    @pytest.mark.parametrize(
        ("data", "tensor", "nodes", "processes", "sizes"),
        [
            ("auto", "auto", 1, 1, (1, 1)),
            ("auto", "auto", 2, 8, (2, 8)),
            (4, 4, 2, 8, (4, 4)),
            (16, 1, 2, 8, (16, 1)),
            ("auto", 3, 2, 3, (2, 3)),
            (2, "auto", 2, 3, (2, 3)),
        ],
    )
    def test_the_rest_follows_from_the_machines(
        self, data: Any, tensor: Any, nodes: int, processes: int, sizes: tuple[int, int]
    ) -> None:
        assert MeshSizes(data, tensor).resolve(nodes, processes) == sizes

    def test_they_cover_the_world(self) -> None:
        strategy = _strategy(processes=4, nodes=2, tensor_parallel_size=2)
        with pytest.raises(
            RuntimeError,
            match=r"data_parallel_size='auto' \(2\) times tensor_parallel_size=2 \(2\) is 4, but there are 8 processes "
            r"\(2 machine\(s\) with 4 each\). Choose sizes whose product is 8",
        ):
            strategy.setup_environment()
        assert not dist.is_initialized()


class TestProcesses:
    def test_the_script_runs_again(self) -> None:
        strategy = _strategy(processes=2)
        strategy._configure_launcher()
        assert isinstance(strategy.launcher, _SubprocessScriptLauncher)

    def test_a_launcher_needs_the_environment(self) -> None:
        with pytest.raises(RuntimeError, match="cluster environment"):
            ModelParallelStrategy(as_it_is)._configure_launcher()

    def test_the_mesh_is_there_from_launch_on(self, one_rank: Any) -> None:
        strategy = one_rank()
        assert strategy.device_mesh.mesh_dim_names == ("data_parallel", "tensor_parallel")
        strategy.teardown()
        with pytest.raises(RuntimeError, match="`device_mesh` is made of the processes"):
            _ = strategy.device_mesh
        with pytest.raises(RuntimeError, match="Launch first"):
            _ = strategy.distributed_sampler_kwargs

    def test_set_up_needs_the_other_processes(self) -> None:
        with pytest.raises(RuntimeError, match="Call `fabric.launch"):
            _strategy().setup_module(nn.Linear(1, 1))


def _mesh_and_data() -> dict[str, Any]:
    fabric = _fabric(both, 2, 2)
    mesh = fabric.strategy.device_mesh  # type: ignore[attr-defined]
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.arange(8)), batch_size=2))
    backend = mesh.get_group("tensor_parallel")._get_backend(torch.device("cpu"))
    return {
        "replicas": fabric.strategy.distributed_sampler_kwargs,
        "data": [batch.tolist() for [batch] in loader],
        "mesh": mesh.mesh.tolist(),
        "timeout": backend.options._timeout,
    }


def test_tensor_parallel_ranks_see_the_same_data() -> None:
    first, second, third, fourth = on_ranks(4, _mesh_and_data)
    assert first["mesh"] == [[0, 1], [2, 3]]
    assert first["replicas"] == second["replicas"] == {"num_replicas": 2, "rank": 0}
    assert third["replicas"] == fourth["replicas"] == {"num_replicas": 2, "rank": 1}
    assert first["data"] == second["data"] == [[0, 2], [4, 6]]
    assert third["data"] == fourth["data"] == [[1, 3], [5, 7]]
    assert first["timeout"] == timedelta(seconds=30)


class TestTraining:
    @pytest.mark.parametrize(
        ("plan", "data", "tensor", "foreach"),
        [
            (tensor_parallel, 1, 2, None),
            (sharded, 2, 1, True),
            (both, 2, 2, None),
            (both, 2, 2, True),
            (ddp, 2, 1, None),
        ],
        ids=["tensor", "sharded", "both", "both-foreach", "ddp"],
    )
    def test_it_is_that_of_one_process(self, plan: Any, data: int, tensor: int, foreach: bool | None) -> None:
        expected_norms, expected = _trained_by_torch()
        for norms, state in on_ranks(data * tensor, _trained, plan, data, tensor, foreach):
            assert norms == pytest.approx(expected_norms, rel=1e-5)
            torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)

    def test_gradients_of_a_split_sequence_are_summed_before_they_are_clipped(self) -> None:
        for norm, largest, state in on_ranks(2, _trained_on_a_split_sequence):
            expected = _sequential()
            loss = expected(next(_batches())).pow(2).sum()
            loss.backward()
            assert norm == pytest.approx(nn.utils.get_total_norm([p.grad for p in expected.parameters()]).item())
            nn.utils.clip_grad_value_(expected.parameters(), 0.5)
            assert largest == 0.5
            SGD(expected.parameters(), lr=0.1).step()
            torch.testing.assert_close(state, expected.state_dict())


def _sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


def split_sequence(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    mesh = mesh["tensor_parallel"]
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(module, mesh, plan)  # type: ignore[arg-type]
    enter = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=False)
    return parallelize_module(module, mesh, enter)


def _trained_on_a_split_sequence() -> tuple[float, float, dict[str, Tensor]]:
    fabric = _fabric(split_sequence, 1, 2)
    module = fabric.setup_module(_sequential())
    optimizer = fabric.setup_optimizers(SGD(module.parameters(), lr=0.1))
    fabric.backward(module(next(_batches())).pow(2).sum())
    assert any(placement.is_partial() for placement in module.module[0].weight.grad.placements)
    norm = fabric.clip_gradients(module, optimizer, max_norm=1e9)
    assert norm is not None
    fabric.clip_gradients(module, optimizer, clip_val=0.5)
    largest = max(parameter.grad.full_tensor().abs().max().item() for parameter in module.parameters())
    optimizer.step()
    return norm.item(), largest, _full(module.module)


def _from_meta(plan: Any, data: int, tensor: int) -> tuple[bool, dict[str, Tensor]]:
    fabric = _fabric(plan, data, tensor)
    torch.manual_seed(fabric.global_rank)
    with fabric.init_module(empty_init=True):
        module = Net()
    were_meta = all(tensor.is_meta for tensor in module.parameters())
    return were_meta, _full(fabric.setup_module(module).module)


class TestInit:
    @pytest.mark.parametrize(
        ("plan", "data", "tensor"),
        [(tensor_parallel, 1, 2), (both, 2, 2)],
        ids=["tensor", "both"],
    )
    def test_meta_parameters_become_those_of_one_process(self, plan: Any, data: int, tensor: int) -> None:
        torch.manual_seed(0)
        expected = Net().state_dict()
        for were_meta, state in on_ranks(data * tensor, _from_meta, plan, data, tensor):
            assert were_meta
            torch.testing.assert_close(state, expected, rtol=0, atol=0)

    def test_parameters_are_real_unless_asked(self, one_rank: Any) -> None:
        strategy = one_rank()
        for empty_init in (None, False):
            with strategy.module_init_context(empty_init=empty_init):
                assert nn.Linear(1, 1).weight.device == strategy.root_device

    def test_a_module_is_not_moved_before_it_is_split(self, one_rank: Any) -> None:
        module = nn.Linear(1, 1, device="meta")
        one_rank().module_to_device(module)
        assert module.weight.is_meta


def _own_way(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, dist.ReduceOp.AVG))
    return module


def _refusals() -> dict[str, str]:
    fabric = _fabric(as_it_is, 2, 1)
    strategy: Any = fabric.strategy
    messages = {}
    for name, plan in {"nothing": as_it_is, "tensor": tensor_parallel}.items():
        strategy._parallelize_fn = plan
        with pytest.raises(RuntimeError) as refused:
            fabric.setup_module(Net())
        messages[name] = str(refused.value)
    strategy._parallelize_fn = as_it_is
    fabric.setup_module(Net().requires_grad_(False))
    strategy._parallelize_fn = _own_way
    module = fabric.setup_module(nn.Linear(1, 1))
    fabric.backward(module(torch.full((1, 1), float(fabric.global_rank))).sum())
    messages["by hand"] = str(module.weight.grad.item())
    return messages


def split_and_ddp(module: Net, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(tensor_parallel(module, mesh), device_mesh=mesh["data_parallel"])


def split_and_replicated(module: Net, mesh: DeviceMesh) -> nn.Module:
    return replicate(tensor_parallel(module, mesh), device_mesh=mesh["data_parallel"])


def _refusals_of_ddp() -> list[str]:
    messages = []
    fabric = _fabric(as_it_is, 2, 2)
    for plan in (split_and_ddp, split_and_replicated):
        fabric.strategy._parallelize_fn = plan  # type: ignore[attr-defined]
        with pytest.raises(TypeError) as refused:
            fabric.setup_module(Net())
        messages.append(str(refused.value))
    return messages


class TestWhatTheFunctionReturns:
    def test_it_is_a_module(self, one_rank: Any) -> None:
        with pytest.raises(
            TypeError, match="must return the module, but it returned None. End it with `return module`"
        ):
            one_rank(lambda module, mesh: None).setup_module(nn.Linear(1, 1))

    def test_it_has_the_users_module_inside(self, one_rank: Any) -> None:
        with pytest.raises(
            TypeError, match="returned another Linear, so Linear, which was set up, would not be trained"
        ):
            one_rank(lambda module, mesh: nn.Linear(1, 1)).setup_module(nn.Linear(1, 1))

        strategy = one_rank(lambda module, mesh: nn.Sequential(module))
        linear = nn.Linear(1, 1)
        module = strategy.setup_module(linear)
        assert isinstance(module, nn.Sequential)
        assert strategy._module_with_state(module) is linear
        assert strategy.get_module_state_dict(module).keys() == {"weight", "bias"}

    @pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
    def test_it_does_not_use_the_older_fsdp(self, one_rank: Any) -> None:
        def plan(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
            return FullyShardedDataParallel(module, device_id=torch.device("cpu"))

        with pytest.raises(
            TypeError, match="wraps with `FullyShardedDataParallel`.* Use .*`torch.distributed.fsdp.fully"
        ):
            one_rank(plan).setup_module(nn.Linear(1, 1))

    def test_gradients_are_averaged_over_data_parallel_ranks(self) -> None:
        for messages in on_ranks(2, _refusals):
            assert "data_parallel_size is 2, but nothing averages" in messages["nothing"]
            assert "'positions', 'norm.weight', 'norm.bias', 'up.weight'" in messages["nothing"]
            assert "fully_shard(module, mesh=device_mesh" in messages["nothing"]
            assert "'up.weight', 'up.bias', 'down.weight', 'down.bias'" in messages["tensor"]
            assert messages["by hand"] == "0.5"

    def test_ddp_would_lose_what_is_split(self) -> None:
        for messages in on_ranks(4, _refusals_of_ddp):
            for message in messages:
                assert "splits parameters ('up.weight', 'up.bias', 'down.weight'" in message
                assert "Use `fully_shard(" in message


class TestOptimizers:
    def test_the_module_comes_first(self, one_rank: Any) -> None:
        module = nn.Linear(1, 1)
        with pytest.raises(RuntimeError, match="Set the module up first, then create the optimizer.*then set that up"):
            one_rank().setup_module_and_optimizers(module, [SGD(module.parameters())])

    def test_parameters_are_not_on_the_meta_device(self, one_rank: Any) -> None:
        module = nn.Linear(1, 1, device="meta")
        with pytest.raises(ValueError, match="SGD has parameters on the meta device.* Create it after `setup_module`"):
            one_rank().setup_optimizer(SGD(module.parameters()))

    def test_parameters_are_those_of_a_module_that_was_set_up(self, one_rank: Any) -> None:
        strategy = one_rank(sharded)
        module = Net()
        before = list(module.parameters())
        forward_module = strategy.setup_module(module)
        with pytest.raises(
            ValueError, match=r"SGD has 7 parameter\(s\) that no set-up module has, of shape \(6, 5\), "
        ):
            strategy.setup_optimizer(SGD(before))
        optimizer = SGD(forward_module.parameters())
        assert strategy.setup_optimizer(optimizer) is optimizer

    def test_whole_parameters_that_a_forward_has_left_are_refused(self, one_rank: Any) -> None:
        strategy = one_rank(sharded)
        module = strategy.setup_module(Net())
        with torch.no_grad():
            module(torch.ones(1, 6, 5))
        with pytest.raises(ValueError, match="before the first forward"):
            strategy.setup_optimizer(SGD(module.parameters()))
        strategy.setup_optimizer(SGD(module.parameters()))  # which has put the split ones back

    @pytest.mark.parametrize("way", ["foreach", "fused"])
    def test_split_and_whole_ones_cannot_be_stepped_together(self, one_rank: Any, way: str) -> None:
        strategy = one_rank(tensor_parallel)
        module = strategy.setup_module(Net())
        with pytest.raises(ValueError, match=rf"param_groups\[0\] of Adam has {way}=True, .* Give each kind a group"):
            strategy.setup_optimizer(Adam(module.parameters(), **{way: True}))
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter in module.parameters():
            groups[isinstance(parameter, DTensor)].append(parameter)
        optimizer = Adam([{"params": params} for params in groups.values()], **{way: True})
        module(torch.ones(1, 6, 5)).sum().backward()
        strategy.optimizer_step(strategy.setup_optimizer(optimizer))

    def test_torchs_default_of_stepping_them_together_is_left_out_for_the_step_alone(self, one_rank: Any) -> None:
        strategy = one_rank(tensor_parallel)
        module = strategy.setup_module(Net())
        optimizer = strategy.setup_optimizer(Adam(module.parameters()))
        during = []
        optimizer.register_step_pre_hook(lambda optimizer, *_: during.append(optimizer.param_groups[0]["foreach"]))
        module(torch.ones(1, 6, 5)).sum().backward()
        strategy.optimizer_step(optimizer)
        assert during == [False]
        assert optimizer.state_dict()["param_groups"][0]["foreach"] is None


def _accumulated(plan: Any, data: int, tensor: int) -> dict[str, Any]:
    fabric = _fabric(plan, data, tensor)
    torch.manual_seed(0)
    module = fabric.setup_module(Net())
    first, second, *_ = _batches()
    with fabric.no_backward_sync(module):
        with fabric.no_backward_sync(module):
            pass
        fabric.backward(module(_share(fabric, first)).pow(2).mean())
        unsynchronised = module.up.weight.grad
    fabric.backward(module(_share(fabric, second)).pow(2).mean())
    return {"unsynchronised": unsynchronised is None, "gradients": _gradients(module.module)}


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()  # type: ignore[union-attr]
        for name, p in module.named_parameters()
    }


def _with_a_look_before_the_step(looks: bool) -> dict[str, Tensor]:
    fabric = _fabric(sharded, 2, 1)
    torch.manual_seed(0)
    module = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(SGD(module.parameters(), lr=0.1))
    for batch in _batches():
        optimizer.zero_grad()
        fabric.backward(module(_share(fabric, batch)).pow(2).mean())
        if looks:
            with torch.no_grad():
                module(batch)
        optimizer.step()
    return _full(module.module)


def test_a_forward_before_the_step_leaves_nothing_that_a_later_one_uses() -> None:
    for looked, did_not in zip(
        on_ranks(2, _with_a_look_before_the_step, True), on_ranks(2, _with_a_look_before_the_step, False), strict=True
    ):
        torch.testing.assert_close(looked, did_not, rtol=0, atol=0)


class TestBackwardSync:
    @pytest.mark.parametrize(
        ("plan", "data", "tensor"),
        [(sharded, 2, 1), (both, 2, 2), (ddp, 2, 1), (tensor_parallel, 1, 2)],
        ids=["sharded", "both", "ddp", "tensor"],
    )
    def test_gradients_accumulate_to_the_same(self, plan: Any, data: int, tensor: int) -> None:
        torch.manual_seed(0)
        expected = Net()
        for batch, _ in zip(_batches(), range(2), strict=False):
            expected(batch).pow(2).mean().backward()
        for outcome in on_ranks(data * tensor, _accumulated, plan, data, tensor):
            assert outcome["unsynchronised"] is (plan in (sharded, both))
            torch.testing.assert_close(outcome["gradients"], _gradients(expected))

    def test_it_is_left_out_only_of_what_was_set_up(self, one_rank: Any) -> None:
        control = one_rank()._backward_sync_control
        with pytest.raises(TypeError, match="needs the module that `setup_module` returned, but got Linear"):
            control.no_backward_sync(nn.Linear(1, 1), enabled=True)
        with control.no_backward_sync(nn.Linear(1, 1), enabled=False):
            pass

    def test_a_compiled_module_is_known(self, one_rank: Any) -> None:
        strategy = one_rank(lambda module, mesh: torch.compile(module, backend="eager"))
        module: Any = strategy.setup_module(nn.Linear(1, 1))
        for handle in (module, module._orig_mod):
            with strategy._backward_sync_control.no_backward_sync(handle, enabled=True):
                pass


def _methods(plan: Any, data: int, tensor: int) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    fabric = _fabric(plan, data, tensor)
    torch.manual_seed(0)
    module = fabric.setup_module(Net())
    batch = _share(fabric, next(_batches()))
    module.mark_forward_method("by_hand")
    for name in ("training_step", "by_hand", "training_step"):
        module.zero_grad()
        fabric.backward(getattr(module, name)(batch))
        outcome[name] = _gradients(module.module)
    outcome["keys"] = list(module.state_dict())
    outcome["same"] = module.module.up.weight is module.up.weight
    return outcome


def _unmarked() -> str:
    module = _fabric(sharded, 2, 1).setup_module(Net())
    with pytest.raises(RuntimeError) as refused:
        module.hidden(torch.ones(1, 6, 5))
    return str(refused.value)


class TestMethods:
    @pytest.mark.parametrize(
        ("plan", "data", "tensor"), [(tensor_parallel, 1, 2), (both, 2, 2)], ids=["tensor", "both"]
    )
    def test_marked_ones_go_through_the_hooks_of_the_module(self, plan: Any, data: int, tensor: int) -> None:
        torch.manual_seed(0)
        expected = Net()
        expected.training_step(next(_batches())).backward()
        for outcome in on_ranks(data * tensor, _methods, plan, data, tensor):
            assert outcome["keys"] == list(expected.state_dict())
            assert outcome["same"]
            for name in ("training_step", "by_hand"):
                torch.testing.assert_close(outcome[name], _gradients(expected))

    def test_others_are_refused_where_parameters_are_in_parts(self) -> None:
        for message in on_ranks(2, _unmarked):
            assert "Mark it once after set-up: `model.mark_forward_method('hidden')`" in message


def _scaled(plan: Any, data: int, tensor: int, first: str) -> dict[str, Any]:
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    fabric = _fabric(plan, data, tensor, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    torch.manual_seed(0)
    module = fabric.setup_module(Net())
    parameters = dict(module.named_parameters())
    names = [first, *(name for name in parameters if name != first)]
    optimizer = fabric.setup_optimizers(SGD([parameters[name] for name in names], lr=0.1))
    outcome: dict[str, Any] = {"scales": []}
    for poisoned in (False, True, False):
        before = _full(module.module)
        optimizer.zero_grad()
        fabric.backward(module(_share(fabric, next(_batches()))).pow(2).mean())
        if poisoned and fabric.global_rank == fabric.world_size - 1:
            module.up.weight.grad._local_tensor.view(-1)[0] = float("inf")
        optimizer.step()
        outcome["scales"].append(fabric.strategy.precision.scaler.get_scale())  # type: ignore[attr-defined]
        outcome[f"poisoned={poisoned}"] = all(
            torch.equal(before[name], now) for name, now in _full(module.module).items()
        )
    outcome["state"] = _full(module.module)
    return outcome


def _in_precision(precision: Any) -> tuple[str, float]:
    fabric = _fabric(tensor_parallel, 1, 2, precision=precision)
    torch.manual_seed(0)
    with fabric.init_module():
        module = Net()
    module = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(SGD(module.parameters(), lr=0.1))
    losses = []
    for _ in range(3):
        losses.append(module(next(_batches())).pow(2).mean())
        _train_step(fabric, module, optimizer, next(_batches()))
    assert losses[2] < losses[0]
    return str(module.module.up.weight.dtype), losses[0].item()


class TestPrecision:
    @pytest.mark.parametrize("first", ["norm.weight", "down.bias", "up.weight"])
    def test_all_ranks_skip_a_step_that_overflows_on_one(self, first: str) -> None:
        outcomes = on_ranks(2, _scaled, tensor_parallel, 1, 2, first)
        for outcome in outcomes:
            assert outcome["scales"] == [2.0**11, 2.0**10, 2.0**11]
            assert (outcome["poisoned=False"], outcome["poisoned=True"]) == (False, True)
        torch.testing.assert_close(outcomes[0]["state"], outcomes[1]["state"], rtol=0, atol=0)

    def test_so_they_do_on_a_mesh_of_both_kinds(self) -> None:
        outcomes = on_ranks(4, _scaled, both, 2, 2, "norm.weight")
        assert [outcome["scales"] for outcome in outcomes] == [[2.0**11, 2.0**10, 2.0**11]] * 4
        assert [outcome["poisoned=True"] for outcome in outcomes] == [True] * 4

    def test_a_scaler_of_the_users_own_class_is_kept(self) -> None:
        class Mine(GradScaler):
            pass

        scaler = Mine("cpu")
        fabric = _fabric(as_it_is, 1, 1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
        assert fabric.strategy.precision.scaler is scaler  # type: ignore[attr-defined]
        fabric.strategy.teardown()

    def test_fp16_gradients_are_not_unscaled(self) -> None:
        fabric = _fabric(as_it_is, 1, 1, plugins=MixedPrecision("16-mixed", "cpu"))
        module = fabric.setup_module(nn.Linear(1, 1).half())
        optimizer = fabric.setup_optimizers(SGD(module.parameters()))
        fabric.backward(module(torch.ones(1, 1)).sum())
        with pytest.raises(ValueError, match="unscale FP16"):
            optimizer.step()
        fabric.strategy.teardown()

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [("bf16-true", torch.bfloat16), ("16-true", torch.float16), ("bf16-mixed", torch.float32)],
    )
    def test_layers_are_split_in_any(self, precision: str, dtype: torch.dtype) -> None:
        batch = next(_batches())
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        expected = Net()(batch.to(dtype)).pow(2).mean().item()
        for found, loss in on_ranks(2, _in_precision, precision):
            assert found == str(dtype)
            assert loss == pytest.approx(expected, rel=0.02)


def _saved_and_loaded(folder: Path, distributed: bool) -> bool:
    fabric = _fabric(both, 2, 2, distributed=distributed)
    batches = list(_batches())

    def fresh(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        module = fabric.setup_module(Net())
        return module, fabric.setup_optimizers(AdamW(module.parameters(), lr=0.05))

    module, optimizer = fresh(0)
    _train_step(fabric, module, optimizer, batches[0])
    fabric.save(folder / "checkpoint", {"model": module, "optimizer": optimizer, "step": 1})
    _train_step(fabric, module, optimizer, batches[1])

    other, other_optimizer = fresh(1)
    state = {"model": other, "optimizer": other_optimizer, "step": 0}
    assert fabric.load(folder / "checkpoint", state) == {}
    assert state["step"] == 1
    _train_step(fabric, other, other_optimizer, batches[1])

    third, third_optimizer = fresh(2)
    weights = fabric.strategy.get_module_state_dict(module._forward_module)
    fabric.strategy.load_module_state_dict(third.module, weights if distributed else fabric.broadcast(weights))
    saved = optimizer.state_dict()
    third_optimizer.load_state_dict(saved if distributed else fabric.broadcast(saved))
    _train_step(fabric, module, optimizer, batches[2])
    _train_step(fabric, other, other_optimizer, batches[2])
    _train_step(fabric, third, third_optimizer, batches[2])
    expected = _full(module.module)
    return all(
        torch.equal(expected[name], value) for loaded in (other, third) for name, value in _full(loaded.module).items()
    )


class TestFiles:
    def test_folders_are_not_written_by_a_plugin(self) -> None:
        io = TorchCheckpointIO()
        with pytest.raises(NotImplementedError, match="so TorchCheckpointIO would never be asked"):
            _strategy().checkpoint_io = io
        strategy = _strategy(save_distributed_checkpoint=False)
        strategy.checkpoint_io = io
        assert strategy.checkpoint_io is io

    def test_each_rank_writes_its_part(self, tmp_path: Path) -> None:
        assert on_ranks(4, _saved_and_loaded, tmp_path, True) == [True] * 4
        assert len(list((tmp_path / "checkpoint").glob("*.distcp"))) == 4

    def test_or_rank_zero_writes_one_file_that_is_like_any_other(self, tmp_path: Path) -> None:
        assert on_ranks(4, _saved_and_loaded, tmp_path, False) == [True] * 4
        saved = torch.load(tmp_path / "checkpoint")
        module = Net()
        module.load_state_dict(saved["model"])
        AdamW(module.parameters()).load_state_dict(saved["optimizer"])
