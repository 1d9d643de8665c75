"""What every checkpoint IO promises, checked over the library's and a foreign one."""

import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.data import AttributeDict


class PickleIO(CheckpointIO):
    """The smallest checkpoint IO that somebody else could write."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        data = pickle.dumps(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return pickle.loads(path.read_bytes())

    def remove_checkpoint(self, path):
        path.unlink(missing_ok=True)


every = pytest.mark.parametrize("io", [TorchCheckpointIO(), PickleIO()], ids=lambda io: type(io).__name__)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.tuples(st.sampled_from(DTYPES), st.integers(0, 3)).map(lambda kind: torch.ones(kind[1], dtype=kind[0])),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(AttributeDict),
    ),
    max_leaves=8,
)


def _same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@every
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(st.text(max_size=4), trees, max_size=3))
def test_what_is_loaded_is_what_was_saved(io, tmp_path, state):
    io.save_checkpoint(state, tmp_path / "checkpoint")
    assert _same(io.load_checkpoint(tmp_path / "checkpoint"), state)


@every
def test_saving_makes_folders_and_replaces_what_was_there(io, tmp_path):
    path = tmp_path / "some" / "folder" / "checkpoint"
    for step in (1, 2):
        io.save_checkpoint({"step": step}, path)
        assert io.load_checkpoint(path) == {"step": step}


@every
def test_what_cannot_be_saved_leaves_the_old_checkpoint(io, tmp_path):
    path = tmp_path / "checkpoint"
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        io.save_checkpoint({"step": lambda: 2}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


@every
def test_removing_twice_is_fine(io, tmp_path):
    path = tmp_path / "checkpoint"
    io.save_checkpoint({}, path)
    for _ in range(2):
        io.remove_checkpoint(path)
        assert not path.exists()


@every
def test_teardown_may_be_called_twice(io):
    io.teardown()
    io.teardown()


@every
def test_can_be_sent_to_another_process(io):
    assert type(pickle.loads(pickle.dumps(io))) is type(io)
