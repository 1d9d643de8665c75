"""A stand-in for torch_xla: what the library uses of it, on the CPU, with several processes as devices.

Of torch_xla itself the CPU gives one device only. Tests marked ``xla`` run against both, so that what the stand-in says
of one device is what torch_xla says; tests of several devices run against the stand-in, over gloo.
"""

import concurrent.futures
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning.fabric.accelerators import XLAAccelerator
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.imports import package_available

IS_INSTALLED = importlib.util.find_spec("torch_xla") is not None
if IS_INSTALLED:
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch_xla

    torch_xla.device()  # a backward before the first device is there would leave autograd without a thread for it


@pytest.fixture(params=["stand-in", pytest.param("torch_xla", marks=pytest.mark.xla)])
def xla(request, monkeypatch):
    """One device, of the stand-in and of torch_xla itself; the machine seems to have it as its one TPU core."""
    if request.param == "stand-in":
        package_available.cache_clear()
        for name, module in _modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(XLAAccelerator, "get_parallel_devices", staticmethod(lambda devices: [device()]))
        yield request.param
        package_available.cache_clear()
        return
    if not IS_INSTALLED:
        pytest.skip("needs torch_xla")
    from torch_xla._internal import tpu

    monkeypatch.setattr(tpu, "num_available_devices", lambda: 1)
    yield request.param


def install() -> None:
    """Put the stand-in in place in this process, one of several, and join the others."""
    package_available.cache_clear()
    sys.modules.update(_modules())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        dist.barrier()  # nobody leaves while others still connect


def _modules() -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    for name, content in _CONTENT.items():
        module = modules[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update({each.__name__ if callable(each) else each: each for each in content})
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
    vars(modules["torch_xla.core.xla_model"]).update({f"REDUCE_{name.upper()}": name for name in _OPERATIONS})
    return modules


# ---- torch_xla, torch_xla.runtime ------------------------------------------------------------------------------------


def device():
    return torch.device("cpu")


def sync():
    sync.count += 1


sync.count = 0


def manual_seed(seed, device=None):
    manual_seed.last = seed


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def global_ordinal():
    return dist.get_rank() if dist.is_initialized() else 0


def local_ordinal():
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def host_index():
    return int(os.environ.get("NODE_RANK", "0"))


def addressable_device_count():
    return 1


def device_type():
    return "CPU"


def num_available_devices():
    return int(os.environ.get("XLA_STAND_IN_DEVICES", os.environ.get("LOCAL_WORLD_SIZE", "1")))


# ---- torch_xla.core.xla_model ----------------------------------------------------------------------------------------

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mul": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "and": dist.ReduceOp.BAND,
    "or": dist.ReduceOp.BOR,
}


def all_reduce(reduce_type, inputs, scale=1.0, groups=None, pin_layout=True):
    if isinstance(inputs, torch.Tensor):
        result = inputs.detach().clone(memory_format=torch.contiguous_format)
        _all_reduce_inplace(reduce_type, result, scale)
        return result
    for tensor in inputs:
        _all_reduce_inplace(reduce_type, tensor, scale)
    return inputs


def _all_reduce_inplace(reduce_type, tensor, scale):
    if tensor.dtype is torch.bool and reduce_type == "sum":
        raise RuntimeError("XLA does not add truth values")
    if world_size() > 1:
        dist.all_reduce(tensor, _OPERATIONS[reduce_type])
        if scale != 1.0:
            tensor.mul_(scale)


def all_gather(value, dim=0):
    if value.dtype is torch.bool:
        raise RuntimeError("XLA does not add truth values")
    if world_size() == 1:
        return value.clone()
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, dim)


def collective_broadcast(tensors, root_ordinal=0):
    for tensor in tensors:
        tensor.mul_(int(global_ordinal() == root_ordinal))
    all_reduce("sum", tensors)


def rendezvous(tag, payload=b"", replicas=()):
    payloads = [b""] * world_size()
    if world_size() > 1:
        dist.all_gather_object(payloads, payload)
    return payloads


def reduce_gradients(optimizer):
    reduce_gradients.count += 1
    if world_size() > 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        all_reduce("sum", gradients, scale=1.0 / world_size())


reduce_gradients.count = 0


# ---- torch_xla.distributed -------------------------------------------------------------------------------------------


class MpDeviceLoader:
    """Ends a graph before each batch; an error of the loader, which is read in a thread, ends the epoch."""

    def __init__(self, loader, device):
        self._loader, self._device = loader, device

    def __iter__(self):
        batches = iter(self._loader)
        while True:
            sync()
            try:
                batch = next(batches)
            except Exception:  # StopIteration, too
                return
            yield apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.to(self._device))

    def __len__(self):
        return len(self._loader)


def spawn(fn, args=(), nprocs=None, join=True, daemon=False, start_method="spawn"):
    if nprocs == 1:
        fn(0, *args)
        return
    if nprocs is not None:
        raise ValueError(f"Unsupported nprocs ({nprocs}).")
    world = num_available_devices()
    context = multiprocessing.get_context(start_method)
    with concurrent.futures.ProcessPoolExecutor(max_workers=world, mp_context=context) as executor:
        list(executor.map(functools.partial(_run, fn, args, world, find_free_network_port()), range(world)))


def _run(fn, args, world, port, rank):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    install()
    fn(rank, *args)


# ---- torch_xla.distributed.fsdp --------------------------------------------------------------------------------------


class XlaFullyShardedDataParallel(nn.Module):
    """Parts of flattened parameters, gathered in each forward; names and metadata as torch_xla has them."""

    def __init__(
        self,
        module,
        auto_wrap_policy=None,
        compute_dtype=None,
        buffer_dtype=None,
        param_init_fn=None,
        flatten_parameters=False,
    ):
        super().__init__()
        self.compute_dtype = compute_dtype or torch.float32
        options = {"compute_dtype": compute_dtype, "buffer_dtype": buffer_dtype, "param_init_fn": param_init_fn}
        if auto_wrap_policy is not None:
            _wrap_children(module, auto_wrap_policy, options)
        if any(parameter.is_meta for parameter in module.parameters()):
            param_init_fn(module)
        self._fsdp_wrapped_module = module
        self._in_sync, self._uses, self._kept, self._unreduced = True, [], {}, {}
        for name, part in list(self.named_modules()):
            for leaf, parameter in list(part._parameters.items()):
                if parameter is not None and not hasattr(parameter, "_is_sharded"):
                    self._shard(name, part, leaf, parameter)
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    part._buffers[name] = buffer.to(buffer_dtype or self.compute_dtype)

    def _shard(self, name, owner, leaf, parameter):
        if parameter.dtype is not torch.float32:
            raise TypeError("only fp32 parameters are supported")
        del owner._parameters[leaf]
        if parameter not in self._kept:
            rows = -(-parameter.numel() // (world_size() * 128)) * 128
            flat = torch.cat([parameter.detach().flatten(), torch.zeros(rows * world_size() - parameter.numel())])
            shard = nn.Parameter(flat[global_ordinal() * rows :][:rows].clone(), parameter.requires_grad)
            shard._is_sharded, shard._orig_size, shard._orig_name = True, parameter.shape, f"{name}.{leaf}"
            shard._name = f"_fsdp_shard.{shard._orig_name}".replace(".", "_FSDP_SHARD_SEPARATOR_")
            self.register_parameter(shard._name, shard)
            self._kept[parameter] = shard
        self._uses.append((owner, leaf, self._kept[parameter]))

    def forward(self, *args, **kwargs):
        cast = lambda tensor: tensor.to(self.compute_dtype) if tensor.is_floating_point() else tensor
        for owner, leaf, shard in self._uses:
            whole = _Gather.apply(shard, self)[: shard._orig_size.numel()].view(shard._orig_size)
            object.__setattr__(owner, leaf, whole.to(self.compute_dtype))
        args, kwargs = apply_to_collection((args, kwargs), torch.Tensor, cast)
        return self._fsdp_wrapped_module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        instances = [part for part in self.modules() if isinstance(part, XlaFullyShardedDataParallel)]
        for each in instances:
            each._in_sync = False
        yield
        for each in instances:
            each._in_sync = True

    def get_shard_metadata(self):
        info = {
            name: {
                part._name: {"_orig_size": part._orig_size, "_orig_name": part._orig_name}
                for part in each._kept.values()
            }
            for name, each in self.named_modules(remove_duplicate=False)
            if isinstance(each, XlaFullyShardedDataParallel)
        }
        places = {"world_size": world_size(), "rank": global_ordinal()}
        return {"shard_info": info, "flatten_info": {}, "buffer_info": {}, **places}


def _wrap_children(module, policy, options):
    for name, child in module.named_children():
        if policy(module=child, recurse=True, unwrapped_params=0):
            _wrap_children(child, policy, options)
        if policy(module=child, recurse=False, unwrapped_params=0):
            setattr(module, name, XlaFullyShardedDataParallel(child, **options))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard, owner):
        ctx.shard, ctx.owner = shard, owner
        return all_gather(shard.detach())

    @staticmethod
    def backward(ctx, grad):
        grad = grad + ctx.owner._unreduced.pop(ctx.shard, 0)
        if not ctx.owner._in_sync:
            ctx.owner._unreduced[ctx.shard] = grad
            return None, None
        rows = ctx.shard.shape[0]
        return all_reduce("sum", grad, scale=1 / world_size())[global_ordinal() * rows :][:rows], None


def consolidate_sharded_state_dicts(state_dict_list, shard_metadata):
    whole = OrderedDict()
    for key, value in state_dict_list[0].items():
        prefix, found, suffix = key.rpartition("_fsdp_shard")
        name = key
        if found:
            info = shard_metadata["shard_info"][prefix.rstrip(".")][found + suffix]
            size = torch.Size(info["_orig_size"])
            value = torch.cat([state[key] for state in state_dict_list])[: size.numel()].view(size)
            name = prefix + info["_orig_name"]
        whole[name.replace("_fsdp_wrapped_module.", "")] = value
    return whole


def checkpoint_module(module):
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return module


_CONTENT = {
    "torch_xla": [device, sync, manual_seed],
    "torch_xla.runtime": [
        world_size,
        global_ordinal,
        local_ordinal,
        host_index,
        addressable_device_count,
        device_type,
    ],
    "torch_xla._internal": [],
    "torch_xla._internal.tpu": [num_available_devices],
    "torch_xla.core": [],
    "torch_xla.core.xla_model": [all_reduce, all_gather, collective_broadcast, rendezvous, reduce_gradients],
    "torch_xla.distributed": [],
    "torch_xla.distributed.parallel_loader": [MpDeviceLoader],
    "torch_xla.distributed.xla_multiprocessing": [spawn],
    "torch_xla.distributed.fsdp": [XlaFullyShardedDataParallel, checkpoint_module, consolidate_sharded_state_dicts],
}


def batches(rank: int = 0, world: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of four samples; of several ranks, each has its share of every batch."""
    inputs, targets = torch.arange(80.0).reshape(16, 5).sin(), torch.arange(16) % 3
    for start in range(0, 16, 4):
        share = slice(start + rank * 4 // world, start + (rank + 1) * 4 // world)
        yield inputs[share], targets[share]
