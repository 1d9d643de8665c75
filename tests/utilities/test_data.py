import os
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning.fabric.utilities import data
from lightning.fabric.utilities.data import (
    AttributeDict,
    _auto_add_worker_init_fn,
    _replace_dunder_methods,
    _set_sampler_epoch,
    distribute_dataloader,
    has_iterable_dataset,
    needs_distributed_sampler,
    sized_len,
    suggested_max_num_workers,
)
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import pl_worker_init_function


class Numbers(Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return self.size


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def _batches(loader: DataLoader) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in loader]


def _shares(loader: DataLoader, ranks: int = 2, **kwargs: Any) -> list[DataLoader]:
    return [distribute_dataloader(loader, ranks, rank, **kwargs) for rank in range(ranks)]


class TestAttributeDict:
    def test_keys_are_attributes(self) -> None:
        state = AttributeDict(a=1)
        state.b = 2
        assert (state.a, state["b"], dict(state)) == (1, 2, {"a": 1, "b": 2})
        del state.a
        with pytest.raises(AttributeError, match="no attribute 'a'"):
            _ = state.a
        with pytest.raises(AttributeError, match="no attribute 'a'"):
            del state.a
        assert "b" in dir(state)

    def test_repr(self) -> None:
        assert repr(AttributeDict(long=2, a=1)) == '"a":    1\n"long": 2'
        assert repr(AttributeDict()) == ""


class TestQuestions:
    def test_iterable(self) -> None:
        assert has_iterable_dataset(DataLoader(Stream()))
        assert not has_iterable_dataset(DataLoader(Numbers(1)))
        assert not has_iterable_dataset(object())

    def test_sized_len(self) -> None:
        class Unsure:
            def __len__(self) -> int:
                raise NotImplementedError

        assert [sized_len(obj) for obj in ([1, 2], DataLoader(Numbers(4), batch_size=2))] == [2, 2]
        assert [sized_len(obj) for obj in (iter([]), Unsure(), DataLoader(Stream()))] == [None] * 3

    @pytest.mark.parametrize(("cpus", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (8, 2, 3), (4, 8, 1)])
    def test_suggested_workers(self, cpus: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "_num_cpus_available", lambda: cpus)
        assert suggested_max_num_workers(processes) == workers

    def test_suggested_workers_needs_a_process(self) -> None:
        with pytest.raises(ValueError, match="1 or more, but got 0"):
            suggested_max_num_workers(0)

    def test_needs_distributed_sampler(self) -> None:
        numbers = Numbers(4)
        distributed = DistributedSampler(numbers, 2, 0)
        assert needs_distributed_sampler(DataLoader(numbers))
        assert needs_distributed_sampler(DataLoader(numbers, batch_sampler=[[0], [1]]))
        assert not needs_distributed_sampler(DataLoader(Stream()))
        assert not needs_distributed_sampler(DataLoader(numbers, sampler=distributed))
        assert not needs_distributed_sampler(DataLoader(numbers, batch_sampler=BatchSampler(distributed, 1, False)))
        as_sampler = BatchSampler(distributed, 2, False)
        assert not needs_distributed_sampler(DataLoader(numbers, sampler=as_sampler, batch_size=None))


class TestOrder:
    """Exactly what a plain ``DistributedSampler`` gives."""

    @settings(deadline=None, max_examples=40)
    @given(
        size=st.integers(1, 30),
        ranks=st.integers(1, 4),
        batch_size=st.integers(1, 5),
        shuffle=st.booleans(),
        drop_last=st.booleans(),
        seed=st.integers(0, 5),
        epoch=st.integers(0, 3),
    )
    def test_equal_to_torch(
        self, size: int, ranks: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int, epoch: int
    ) -> None:
        dataset = Numbers(size)
        loader = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
        for rank, share in enumerate(_shares(loader, ranks, seed=seed)):
            sampler = DistributedSampler(dataset, ranks, rank, shuffle=shuffle, seed=seed)
            sampler.set_epoch(epoch)
            expected = DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last)
            _set_sampler_epoch(share, epoch)
            assert _batches(share) == _batches(expected)

    def test_the_seed_is_the_global_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loader = DataLoader(Numbers(20), shuffle=True)
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        assert distribute_dataloader(loader, 2, 0).sampler.seed == 0
        monkeypatch.setenv("PL_GLOBAL_SEED", "123")
        assert distribute_dataloader(loader, 2, 0).sampler.seed == 123

    def test_what_needs_no_sampler_is_returned_as_it_is(self) -> None:
        for loader in (DataLoader(Stream()), DataLoader(Numbers(4), sampler=DistributedSampler(Numbers(4), 2, 0))):
            assert distribute_dataloader(loader, 2, 0) is loader


class EveryOther(Sampler):
    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch, self.size, 2))

    def __len__(self) -> int:
        return len(range(self.epoch, self.size, 2))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class TestCustomSamplers:
    def test_the_order_is_kept(self) -> None:
        loader = DataLoader(Numbers(12), sampler=EveryOther(12), batch_size=2)
        shares = _shares(loader)
        assert [_batches(share) for share in shares] == [[[0, 4], [8]], [[2, 6], [10]]]
        assert isinstance(shares[0].sampler, DistributedSamplerWrapper)
        assert isinstance(shares[0].sampler.sampler, EveryOther)

    def test_the_epoch_reaches_it(self) -> None:
        share = _shares(DataLoader(Numbers(12), sampler=EveryOther(12)))[0]
        _set_sampler_epoch(share, 1)
        assert _batches(share) == [[1], [5], [9]]

    @pytest.mark.parametrize(
        "sampler",
        [
            SubsetRandomSampler([1, 3, 5, 7]),
            WeightedRandomSampler([0.1] * 8, 8),
            RandomSampler(Numbers(8), num_samples=4),
            RandomSampler(Numbers(8), replacement=True),
        ],
    )
    def test_all_ranks_share_one_draw_whatever_their_own_generators_say(self, sampler: Sampler) -> None:
        loader = DataLoader(Numbers(8), sampler=sampler, batch_size=None)
        drawn = []
        for seed, share in enumerate(_shares(loader)):
            torch.manual_seed(seed)
            drawn.append(_batches(share))
        torch.manual_seed(99)
        again = [_batches(share) for share in _shares(loader)]
        assert drawn == again
        together = [index for pair in zip(*drawn, strict=True) for index in pair]
        assert len(together) == len(sampler)  # type: ignore[arg-type]
        if not getattr(sampler, "replacement", False):
            assert len(set(together)) == len(together)

    def test_each_epoch_has_another_order(self) -> None:
        share = _shares(DataLoader(Numbers(64), sampler=SubsetRandomSampler(range(64)), batch_size=None))[0]
        orders = set()
        for epoch in range(3):
            _set_sampler_epoch(share, epoch)
            orders.add(tuple(_batches(share)))
        assert len(orders) == 3

    def test_drawing_leaves_the_global_generators_alone(self) -> None:
        share = _shares(DataLoader(Numbers(8), sampler=SubsetRandomSampler(range(8))))[0]
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        list(share.sampler)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]

    def test_a_sampler_without_length_is_refused(self) -> None:
        class Endless(Sampler):
            def __iter__(self) -> Iterator[int]:
                return iter(int, 1)

        with pytest.raises(TypeError, match="`Endless` has no `__len__`.*use_distributed_sampler=False"):
            _shares(DataLoader(Numbers(8), sampler=Endless()))

    def test_a_sequential_sampler_of_a_part_is_not_taken_for_the_whole(self) -> None:
        loader = DataLoader(Numbers(10), sampler=SequentialSampler(range(4)), batch_size=None)
        assert [_batches(share) for share in _shares(loader)] == [[0, 2], [1, 3]]


class PairSampler(BatchSampler):
    """Batches in reverse, with an argument of its own."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, sign: int = 1) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.sign = sign

    def __iter__(self) -> Iterator[list[int]]:
        return reversed(list(super().__iter__()))


class RenamedSampler(BatchSampler):
    def __init__(self, indices: Any, size: int) -> None:
        super().__init__(indices, size, False)


class TestBatchSamplers:
    def test_rebuilt_around_the_share(self) -> None:
        numbers = Numbers(8)
        loader = DataLoader(numbers, batch_sampler=PairSampler(SequentialSampler(numbers), 2, False, sign=-1))
        shares = _shares(loader)
        assert [_batches(share) for share in shares] == [[[4, 6], [0, 2]], [[5, 7], [1, 3]]]
        assert type(shares[0].batch_sampler) is PairSampler
        assert shares[0].batch_sampler.sign == -1

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_plain_one_given_by_the_user(self, shuffle: bool) -> None:
        numbers = Numbers(8)
        inner = RandomSampler(numbers) if shuffle else SequentialSampler(numbers)
        share = _shares(DataLoader(numbers, batch_sampler=BatchSampler(inner, 3, False)), seed=1)[0]
        expected = DistributedSampler(numbers, 2, 0, shuffle=shuffle, seed=1)
        assert _batches(share) == _batches(DataLoader(numbers, sampler=expected, batch_size=3))
        _set_sampler_epoch(share, 5)
        assert share.batch_sampler.sampler.epoch == 5

    def test_batches_out_of_nothing_are_shared_out(self) -> None:
        loader = DataLoader(Numbers(8), batch_sampler=[[0, 1], [2], [3, 4, 5], [6, 7]])
        assert [_batches(share) for share in _shares(loader)] == [[[0, 1], [3, 4, 5]], [[2], [6, 7]]]
        assert len(_shares(loader)[0]) == 2

    def test_a_batch_sampler_as_sampler(self) -> None:
        numbers = Numbers(8)
        loader = DataLoader(
            numbers, sampler=BatchSampler(SequentialSampler(numbers), 2, False), batch_size=None, collate_fn=list
        )
        assert [_batches(share) for share in _shares(loader)] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]

    def test_the_argument_that_is_the_sampler_may_have_another_name(self) -> None:
        with _replace_dunder_methods(BatchSampler):
            batch_sampler = RenamedSampler(SequentialSampler(Numbers(4)), 2)
        shares = _shares(DataLoader(Numbers(4), batch_sampler=batch_sampler))
        assert [_batches(share) for share in shares] == [[[0, 2]], [[1, 3]]]

    def test_one_that_takes_no_sampler_is_refused(self) -> None:
        class FromData(BatchSampler):
            def __init__(self, dataset: Dataset) -> None:
                self.dataset = dataset
                super().__init__(SequentialSampler(dataset), 2, False)  # type: ignore[arg-type]

        loader = DataLoader(Numbers(4), batch_sampler=FromData(Numbers(4)))
        with pytest.raises(TypeError, match="`FromData` cannot be built again with another `sampler`"):
            _shares(loader)

    def test_one_that_ignores_its_sampler_is_refused(self) -> None:
        class Stubborn(BatchSampler):
            def __init__(self, sampler: Any = None) -> None:
                super().__init__(SequentialSampler(Numbers(4)), 2, False)  # type: ignore[arg-type]

        with pytest.raises(MisconfigurationException, match="`Stubborn` does not use the `sampler`"):
            _shares(DataLoader(Numbers(4), batch_sampler=Stubborn()))


def _collate(samples: list[Any]) -> list[Any]:
    return samples


class TestArgumentsAreKept:
    ARGUMENTS: dict[str, Any] = {
        "batch_size": 3,
        "num_workers": 2,
        "collate_fn": _collate,
        "pin_memory": True,
        "drop_last": True,
        "timeout": 5,
        "worker_init_fn": print,
        "multiprocessing_context": "fork",
        "generator": torch.Generator(),
        "prefetch_factor": 4,
        "persistent_workers": True,
        "in_order": False,
    }

    @pytest.mark.parametrize("noted", [True, False])
    def test_all(self, noted: bool) -> None:
        if noted:
            with _replace_dunder_methods(DataLoader, "dataset"):
                loader = DataLoader(Numbers(12), **self.ARGUMENTS)
        else:
            loader = DataLoader(Numbers(12), **self.ARGUMENTS)
        share = _shares(loader)[0]
        assert share.dataset is loader.dataset
        for name in self.ARGUMENTS:
            assert getattr(share, name) is getattr(loader, name), name

    def test_no_batches(self) -> None:
        share = _shares(DataLoader(Numbers(4), batch_size=None))[0]
        assert share.batch_size is None
        assert _batches(share) == [0, 2]

    def test_workers_run(self) -> None:
        loader = DataLoader(Numbers(8), batch_size=2, num_workers=1, multiprocessing_context="fork")
        assert _batches(_shares(loader)[1]) == [[1, 3], [5, 7]]

    def test_attributes_set_by_the_user(self) -> None:
        for context in (True, False):
            if context:
                with _replace_dunder_methods(DataLoader, "dataset"):
                    loader = DataLoader(Numbers(4))
            else:
                loader = DataLoader(Numbers(4))
            loader.tag = "kept"
            loader.collate_fn = _collate
            share = _shares(loader)[0]
            assert share.tag == "kept"
            assert share.collate_fn is _collate
            assert _batches(share) == [[0], [2]]


class Keywords(DataLoader):
    """Makes its data set itself, and passes the rest on."""

    def __init__(self, size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(Numbers(size), *args, **kwargs)


class Fixed(DataLoader):
    """Sets some arguments itself."""

    def __init__(self, dataset: Dataset, scale: int = 1, **kwargs: Any) -> None:
        self.scale = scale
        super().__init__(dataset, batch_size=2, collate_fn=self._scaled, **kwargs)

    def _scaled(self, samples: list[int]) -> list[int]:
        return [sample * self.scale for sample in samples]


class Deep(Fixed):
    def __init__(self, name: str, **kwargs: Any) -> None:
        self.name = name
        super().__init__(**kwargs)


class Explicit(DataLoader):
    def __init__(self, dataset: Dataset, sampler: Any = None, shuffle: bool = True, batch_size: int = 2) -> None:
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, shuffle=shuffle)


class TestSubclasses:
    """Made inside of the noting or outside of it."""

    @pytest.fixture(params=["noted", "plain"])
    def noting(self, request: pytest.FixtureRequest) -> Iterator[bool]:
        if request.param == "plain":
            yield False
        else:
            with _replace_dunder_methods(DataLoader, "dataset"), _replace_dunder_methods(BatchSampler):
                yield True

    def test_explicit_arguments(self, noting: bool) -> None:
        share = _shares(Explicit(Numbers(8), shuffle=True), seed=3)[0]
        assert type(share) is Explicit
        sampler = DistributedSampler(Numbers(8), 2, 0, seed=3)
        assert _batches(share) == _batches(DataLoader(Numbers(8), sampler=sampler, batch_size=2))

    def test_arguments_that_it_sets_itself(self, noting: bool) -> None:
        share = _shares(Fixed(Numbers(8), scale=10))[1]
        assert type(share) is Fixed
        assert _batches(share) == [[10, 30], [50, 70]]

    def test_arguments_along_the_inheritance(self, noting: bool) -> None:
        share = _shares(Deep("name", dataset=Numbers(8), scale=10, num_workers=0))[0]
        assert (type(share), share.name) == (Deep, "name")
        assert _batches(share) == [[0, 20], [40, 60]]

    def test_own_attributes_survive(self, noting: bool) -> None:
        loader = Deep("name", dataset=Numbers(8))
        loader.name = "changed"
        loader.seen = 5
        share = _shares(loader)[0]
        assert (share.name, share.seen) == ("changed", 5)

    def test_twice(self, noting: bool) -> None:
        once = _shares(Deep("name", dataset=Numbers(8), scale=10))[0]
        again = data._update_dataloader(once, SequentialSampler(Numbers(4)))
        assert _batches(again) == [[0, 10], [20, 30]]

    def test_a_class_made_meanwhile(self, noting: bool) -> None:
        class Late(DataLoader):
            def __init__(self, dataset: Dataset, tag: str, **kwargs: Any) -> None:
                self.tag = tag
                super().__init__(dataset, **kwargs)

        share = _shares(Late(Numbers(4), "tag", batch_size=2))[0]
        assert (share.tag, _batches(share)) == ("tag", [[0, 2]])

    def test_missing_attributes_are_named(self) -> None:
        with pytest.raises(MisconfigurationException, match=r"`Keywords`.*needs `size`.*`self.size = size`"):
            _shares(Keywords(8))

    def test_noted_arguments_need_no_attributes(self) -> None:
        with _replace_dunder_methods(DataLoader, "dataset"):
            loaders = [Keywords(8, batch_size=2, shuffle=True), Keywords(8, 2, True)]
        sampler = DistributedSampler(Numbers(8), 2, 0, seed=3)
        expected = _batches(DataLoader(Numbers(8), sampler=sampler, batch_size=2))
        for loader in loaders:
            assert _batches(_shares(loader, seed=3)[0]) == expected

    def test_one_that_takes_no_sampler_is_refused(self, noting: bool) -> None:
        class Closed(DataLoader):
            def __init__(self, dataset: Dataset) -> None:
                super().__init__(dataset)

        with pytest.raises(TypeError, match=r"`Closed`.*does not take that argument.*use_distributed_sampler=False"):
            _shares(Closed(Numbers(4)))

    def test_one_that_swallows_arguments_is_refused(self, noting: bool) -> None:
        class Greedy(DataLoader):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(Numbers(4), batch_size=2)

        with pytest.raises(MisconfigurationException, match=r"`Greedy`.*does not pass `sampler` on"):
            _shares(Greedy())

    def test_one_that_drops_a_setting_is_refused(self, noting: bool) -> None:
        class Forgetful(DataLoader):
            def __init__(self, dataset: Dataset, sampler: Any = None) -> None:
                super().__init__(dataset, sampler=sampler, batch_size=1 if sampler else 4)

        with pytest.raises(MisconfigurationException, match="does not pass `batch_size` on"):
            _shares(Forgetful(Numbers(4)))

    def test_one_that_shuffles_by_itself_is_refused(self, noting: bool) -> None:
        class Shuffled(DataLoader):
            def __init__(self, dataset: Dataset, **kwargs: Any) -> None:
                super().__init__(dataset, shuffle=True, **kwargs)

        with pytest.raises((MisconfigurationException, TypeError), match="`Shuffled` cannot be built again"):
            _shares(Shuffled(Numbers(4)))


class TestNoting:
    def test_everything_is_restored(self) -> None:
        inits = [cls.__dict__["__init__"] for cls in (DataLoader, Fixed, Deep)]
        with pytest.raises(KeyError), _replace_dunder_methods(DataLoader, "dataset"):
            assert DataLoader.__dict__["__init__"] is not inits[0]
            raise KeyError
        assert [cls.__dict__["__init__"] for cls in (DataLoader, Fixed, Deep)] == inits

    def test_loaders_work_inside(self) -> None:
        with _replace_dunder_methods(DataLoader, "dataset"):
            loader = Deep("name", dataset=Numbers(4))
            assert _batches(loader) == [[0, 1], [2, 3]]

    def test_the_explicit_argument(self) -> None:
        with _replace_dunder_methods(DataLoader, "dataset"):
            numbers = Numbers(4)
            assert getattr(DataLoader(numbers), "__dataset") is numbers

    def test_nested(self) -> None:
        with _replace_dunder_methods(DataLoader, "dataset"), _replace_dunder_methods(DataLoader, "dataset"):
            loader = Keywords(8, batch_size=2)
        assert _batches(_shares(loader)[0]) == [[0, 2], [4, 6]]


class TestEpoch:
    def test_each_sampler_is_told_once(self) -> None:
        told: list[int] = []

        class Listening(SequentialSampler):
            def set_epoch(self, epoch: int) -> None:
                told.append(epoch)

        _set_sampler_epoch(DataLoader(Numbers(4), sampler=Listening(Numbers(4))), 3)
        assert told == [3]

    def test_what_has_no_sampler_is_no_error(self) -> None:
        _set_sampler_epoch([1, 2], 1)
        _set_sampler_epoch(DataLoader(Stream()), 1)


class TestWorkerInit:
    def test_only_if_asked_and_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loader = DataLoader(Numbers(1))
        monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
        _auto_add_worker_init_fn(loader, rank=2)
        assert loader.worker_init_fn is None
        monkeypatch.setenv("PL_SEED_WORKERS", "1")
        _auto_add_worker_init_fn(loader, rank=2)
        assert isinstance(loader.worker_init_fn, partial)
        assert (loader.worker_init_fn.func, loader.worker_init_fn.keywords) == (pl_worker_init_function, {"rank": 2})
        own = DataLoader(Numbers(1), worker_init_fn=os.getpid)  # type: ignore[arg-type]
        _auto_add_worker_init_fn(own, rank=2)
        assert own.worker_init_fn is os.getpid
