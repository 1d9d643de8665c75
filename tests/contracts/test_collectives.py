"""What every collective promises: in a group of one process, all of them give the same results."""

import inspect
from datetime import timedelta

import pytest
import torch

from lightning.fabric.plugins.collectives import Collective, SingleDeviceCollective, TorchCollective

OBJECT = {"any": ["object"]}


@pytest.fixture(params=[SingleDeviceCollective, TorchCollective])
def collective(request):
    made = request.param()
    made.setup(backend="gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield made.create_group()
    made.teardown()


def x():
    return torch.tensor([1.0, 2.0])


TENSOR_OPERATIONS = {
    "broadcast": lambda c: c.broadcast(x(), src=0),
    "all_reduce": lambda c: c.all_reduce(x()),
    "all_reduce max": lambda c: c.all_reduce(x(), op="max"),
    "reduce": lambda c: c.reduce(x(), dst=0, op="avg"),
    "all_gather": lambda c: c.all_gather([torch.zeros(2)], x())[0],
    "gather": lambda c: c.gather(x(), [torch.zeros(2)], dst=0)[0],
    "scatter": lambda c: c.scatter(torch.zeros(2), [x()], src=0),
    "reduce_scatter": lambda c: c.reduce_scatter(torch.zeros(2), [x()]),
    "all_to_all": lambda c: c.all_to_all([torch.zeros(2)], [x()])[0],
}
OBJECT_OPERATIONS = {
    "all_gather_object": lambda c: c.all_gather_object([None], OBJECT),
    "broadcast_object_list": lambda c: c.broadcast_object_list([OBJECT], src=0),
    "gather_object": lambda c: c.gather_object(OBJECT, [None], dst=0),
    "scatter_object_list": lambda c: c.scatter_object_list([None], [OBJECT], src=0),
}


@pytest.mark.parametrize("operation", TENSOR_OPERATIONS.values(), ids=list(TENSOR_OPERATIONS))
def test_one_process_gets_its_own_tensor(collective, operation):
    assert operation(collective).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("operation", OBJECT_OPERATIONS.values(), ids=list(OBJECT_OPERATIONS))
def test_one_process_gets_its_own_object(collective, operation):
    assert operation(collective) == [OBJECT]


def test_results_arrive_in_the_buffers_that_were_passed(collective):
    buffer, places = torch.zeros(2), [None]
    assert collective.all_gather([buffer], x())[0] is buffer
    assert buffer.tolist() == [1.0, 2.0]
    assert collective.all_gather_object(places, OBJECT) is places


def test_there_is_nobody_to_wait_for(collective):
    collective.barrier()
    collective.monitored_barrier(timeout=timedelta(seconds=5))


def test_rank_and_size(collective):
    assert (collective.rank, collective.world_size) == (0, 1)


def test_one_object_owns_one_group(collective):
    with pytest.raises(RuntimeError, match="owns a group already"):
        collective.create_group()


def test_is_set_up(collective):
    assert collective.is_available()
    assert collective.is_initialized()
    assert collective.setup() is collective


def test_teardown_gives_the_group_back_and_may_be_repeated(collective):
    assert collective.teardown() is collective
    assert collective.teardown() is collective
    with pytest.raises(RuntimeError, match=r"does not own a group yet. Call `create_group\(\)`"):
        collective.group  # noqa: B018


@pytest.mark.parametrize("cls", [SingleDeviceCollective, TorchCollective])
def test_arguments_have_the_names_of_the_contract(cls):
    for name, method in inspect.getmembers(Collective, inspect.isfunction):
        if getattr(method, "__isabstractmethod__", False) and name != "setup":
            mine = inspect.signature(getattr(cls, name)).parameters
            assert list(mine) == list(inspect.signature(method).parameters), name
