"""What every precision promises, checked over all that the library builds and a foreign one."""

import importlib.util
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning.fabric.plugins.precision import Precision
from lightning.fabric.plugins.precision._table import PRECISIONS, build_precision

BUILT = [name for name in PRECISIONS if not name.startswith("transformer-engine")]
WEIGHTS = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
INPUTS = {**WEIGHTS, "16-mixed": torch.float32, "bf16-mixed": torch.float32, "float8": torch.float32}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]

leaves = st.one_of(
    st.sampled_from(DTYPES).map(lambda dtype: torch.ones(2, dtype=dtype)), st.none(), st.integers(), st.text(max_size=2)
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)


class CountingPrecision(Precision):
    """A precision that somebody else could write: 32-bit that counts its steps."""

    def __init__(self):
        self.steps = 0

    def optimizer_step(self, optimizer, **kwargs):
        self.steps += 1
        return super().optimizer_step(optimizer, **kwargs)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]


def _make(name):
    return CountingPrecision() if name == "foreign" else build_precision(name, "cpu")


if importlib.util.find_spec("torchao") is None:
    BUILT.remove("float8")

every = pytest.mark.parametrize("name", [*BUILT, "foreign"])


def _train(precision, module, optimizer, steps):
    """Train as the wrappers do, with the loss of each step."""
    x, y = torch.linspace(-1, 1, 16).reshape(8, 2), torch.linspace(0, 1, 8).reshape(8, 1)
    losses = []
    for _ in range(steps):
        with precision.forward_context():
            output = module(precision.convert_input(x))
        # small, so that its gradients fit into float16 at the scaler's first scale
        loss = 0.1 * nn.functional.mse_loss(precision.convert_output(output), y)
        optimizer.zero_grad()
        precision.pre_backward(loss, module)
        precision.backward(loss, module)
        precision.post_backward(loss, module)
        precision.unscale_gradients(optimizer)
        norm = nn.utils.clip_grad_norm_(list(precision.main_params(optimizer)), 10.0)
        assert 0 < norm < 10
        precision.optimizer_step(optimizer)
        losses.append(loss.item())
    return losses


def _module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def _convert(precision, module):
    """Convert ``module`` as a part of a model, in which there is something to do for every precision."""
    precision.convert_module(nn.ModuleDict({"module": module, "others": _module()}))
    return module


@every
def test_training_lowers_the_loss_much_like_32_bit(name):
    precision, module = _make(name), _module()
    module = precision.convert_module(module)
    losses = _train(precision, module, torch.optim.SGD(module.parameters(), lr=1.0), steps=10)
    reference = _module()
    expected = _train(Precision(), reference, torch.optim.SGD(reference.parameters(), lr=1.0), steps=10)
    assert losses[-1] < 0.7 * losses[0]
    assert losses == pytest.approx(expected, rel=0.1 if name == "float8" else 0.05)


@every
def test_weights_and_buffers_have_the_dtype_of_the_precision(name):
    precision = _make(name)
    module = _convert(precision, nn.BatchNorm1d(2))
    with precision.module_init_context():
        created = nn.BatchNorm1d(2)
    with precision.tensor_init_context():
        tensor = torch.ones(1)
    expected = WEIGHTS.get(name, torch.float32)
    for made in (module, created):
        assert {value.dtype for key, value in made.state_dict().items() if "num" not in key} == {expected}
        assert made.num_batches_tracked.dtype is torch.int64
    assert tensor.dtype is expected
    assert torch.get_default_dtype() is torch.float32


@every
def test_integer_input_reaches_an_embedding_as_it_is(name):
    precision = _make(name)
    module = _convert(precision, nn.Embedding(4, 2))
    with precision.forward_context():
        output = module(precision.convert_input(torch.tensor([1, 3])))
    assert precision.convert_output(output).dtype is torch.float32


def _dtypes(tree):
    if isinstance(tree, torch.Tensor):
        return [tree.dtype]
    if isinstance(tree, dict):
        return [(key, _dtypes(value)) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return [type(tree), *map(_dtypes, tree)]
    return tree


def _expected(tree, dtype):
    """Return what ``_dtypes`` must give after floating-point tensors have become ``dtype``."""
    if isinstance(tree, torch.Tensor):
        return [dtype if dtype and tree.is_floating_point() else tree.dtype]
    if isinstance(tree, dict):
        return [(key, _expected(value, dtype)) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return [type(tree), *(_expected(value, dtype) for value in tree)]
    return tree


@every
@settings(deadline=None)
@given(tree=trees)
def test_any_nested_input_keeps_its_shape_and_what_is_not_floating(name, tree):
    precision = _make(name)
    assert _dtypes(precision.convert_input(tree)) == _expected(tree, INPUTS.get(name))
    assert _dtypes(precision.convert_output(tree)) == _expected(tree, torch.float32 if name in INPUTS else None)


@every
def test_tells_what_each_module_computes_in(name):
    precision, module = _make(name), _module()
    module = precision.convert_module(module)
    products = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
                products.append(getattr(args[-1], "_data", args[-1]).dtype)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Seen():
        for part in (module[0], module[2]):
            with precision.forward_context():
                part(precision.convert_input(torch.ones(1, part.in_features)))
    told = [precision.computes_in(str(i), module[i]).removesuffix(" (autocast)") for i in (0, 2)]
    assert told == [str(dtype).removeprefix("torch.") for dtype in products[:2]]
    assert all(remark.endswith(".") for remark in precision.remarks())


@every
def test_a_compiled_step_sees_through_it(name):
    precision, module = _make(name), _module()
    module = precision.convert_module(module)

    def forward(x):
        with precision.forward_context():
            output = module(precision.convert_input(x))
        return precision.convert_output(output)

    expected = forward(torch.ones(1, 2))
    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(1, 2)), expected)


@every
def test_backward_takes_the_arguments_of_tensor_backward(name):
    precision = _make(name)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    loss = parameter * 2
    precision.backward(loss, None, torch.tensor([1.0, 0.5]), retain_graph=True)
    precision.backward(loss, None, gradient=torch.tensor([1.0, 0.5]))
    precision.unscale_gradients(optimizer)
    assert parameter.grad.tolist() == [4.0, 2.0]


@every
def test_a_step_returns_what_the_closure_returned(name):
    precision = _make(name)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def closure():
        loss = parameter.sum()
        precision.backward(loss, None)
        return loss

    assert precision.optimizer_step(optimizer, closure=closure).item() == 1.0
    assert parameter.item() == 0.0


@every
def test_state_survives_a_round_trip_into_a_new_plugin(name):
    precision, module = _make(name), _module()
    module = precision.convert_module(module)
    _train(precision, module, torch.optim.SGD(module.parameters(), lr=1.0), steps=2)
    resumed = _make(name)
    resumed.load_state_dict(precision.state_dict())
    assert resumed.state_dict().keys() == precision.state_dict().keys()


@every
def test_can_be_sent_to_another_process_before_training(name):
    again = pickle.loads(pickle.dumps(_make(name)))
    assert again.precision == _make(name).precision


@every
def test_teardown_may_be_called_twice(name):
    precision = _make(name)
    precision.teardown()
    precision.teardown()


def test_32_bit_gives_back_the_very_same_objects():
    precision, data, module = Precision(), {"x": [torch.ones(1, dtype=torch.float64)]}, nn.Linear(1, 1)
    assert precision.convert_input(data) is data
    assert precision.convert_output(data) is data
    assert precision.convert_module(module) is module
