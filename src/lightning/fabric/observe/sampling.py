"""What a loader reads, and which part of it this rank gets."""

from typing import Any

from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from lightning.fabric.observe.inventory import Samplers, SetUpLoader
from lightning.fabric.observe.records import LoaderReport, SamplerReport
from lightning.fabric.utilities.data import has_iterable_dataset, sized_len


def _sampler(dataloader: Any, samplers: Samplers) -> SamplerReport:
    """Describe what ``dataloader`` has, or had."""
    if has_iterable_dataset(dataloader):
        return SamplerReport("none, the dataset iterates itself")
    sampler, batch_sampler = samplers
    inner = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is BatchSampler or batch_sampler is None:
        return _report(sampler if inner is None else inner, "samples", None)
    own = type(batch_sampler).__name__
    if inner is None or hasattr(batch_sampler, "num_replicas"):  # whole batches are shared out
        return _report(batch_sampler, "batches", None)
    return _report(inner, "samples", own)


def _report(sampler: Any, of: str, batch_sampler: str | None) -> SamplerReport:
    inner = getattr(sampler, "sampler", None)
    shuffle = {RandomSampler: True, SequentialSampler: False}.get(type(sampler), getattr(sampler, "shuffle", None))
    return SamplerReport(
        kind=type(sampler).__name__,
        length=sized_len(sampler),
        of=of,
        shuffle=shuffle if isinstance(shuffle, bool) else None,
        num_replicas=getattr(sampler, "num_replicas", None),
        rank=getattr(sampler, "rank", None),
        wraps=None if inner is None else type(inner).__name__,
        batch_sampler=batch_sampler,
    )


def report(wrapped: Any, loader: SetUpLoader, replicas: int) -> LoaderReport:
    """Describe a set-up loader; ``replicas``: how many parts the data should have."""
    dataloader = loader.dataloader
    before, after = _sampler(dataloader, loader.before), _sampler(dataloader, Samplers.of(dataloader))
    dataset, batch_size = dataloader.dataset, dataloader.batch_size
    samples = after.length if after.of == "samples" else None
    shared = after.num_replicas or 1
    surplus = 0 if None in (after.length, before.length) or shared == 1 else shared * after.length - before.length  # type: ignore[operator]
    return LoaderReport(
        kind=type(dataloader).__name__,
        dataset=type(dataset).__name__,
        dataset_length=sized_len(dataset),
        batch_size=batch_size,
        drop_last=bool(dataloader.drop_last),
        before=before,
        after=after,
        samples_here=samples,
        batches_here=sized_len(dataloader),
        repeated=max(0, surplus),
        left_out=max(0, -surplus),
        sees_all=replicas > 1 and after.num_replicas is None,
        workers=dataloader.num_workers,
        persistent_workers=bool(dataloader.persistent_workers),
        pin_memory=bool(dataloader.pin_memory),
        device=None if wrapped.device is None else str(wrapped.device),
    )
