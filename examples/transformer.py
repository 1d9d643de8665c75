"""Train a small byte-level language model on Python's own source code, under any strategy: the loop stays the same.

    python examples/transformer.py
    fabric run --devices 2 examples/transformer.py --strategy ddp
    fabric run --devices 2 examples/transformer.py --strategy fsdp --sharding SHARD_GRAD_OP
    fabric run --devices 4 examples/transformer.py --strategy tensor_parallel --tensor-parallel 2
    fabric run --devices 2 examples/transformer.py --strategy deepspeed_stage_3

Every one of them sees the same batches in the same order and prints the same losses.
"""

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset, Subset

from lightning.fabric import Fabric
from lightning.fabric.strategies import Strategy

BYTES = 256


# ---- the model: plain PyTorch ----------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        # No bias: that of the keys has no influence, so its gradient would be rounding errors, which Adam scales up.
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        # As many heads as there are here: with tensor parallelism a rank's layers put out only its own.
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp["down"](nn.functional.gelu(self.mlp["up"](self.mlp_norm(x))))


class Transformer(nn.Module):
    """Bytes ``(batch, context)`` in, logits of each next byte ``(batch, context, 256)`` out."""

    def __init__(self, width: int = 32, blocks: int = 2, heads: int = 4, context: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---- the data --------------------------------------------------------------------------------------------------------


class Windows(Dataset):
    """Pieces of a text, ``context`` bytes each, with the bytes that follow them."""

    def __init__(self, text: bytes, context: int) -> None:
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        piece = self.bytes[index * self.context : (index + 1) * self.context + 1].long()
        return piece[:-1], piece[1:]


def corpus(size: int) -> bytes:
    """The first ``size`` bytes of the standard library's sources."""
    text = b""
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if len(text) >= size:
            break
        text += path.read_bytes()
    return text[:size]


# ---- the strategies --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A strategy, and the two things about it that a script has to know."""

    strategy: str | Strategy
    joint: bool = True  # model and optimizer are set up by one call; else the model first, then its optimizer is made
    clips_itself: bool = False  # clipping of gradients is an option of the strategy, not a step of the loop


def choose(args: argparse.Namespace) -> Way:
    """Return the strategy that the command line names; classes are imported where they are asked for."""
    if args.strategy == "tensor_parallel":
        from lightning.fabric.strategies import ModelParallelStrategy

        sizes = {"data_parallel_size": args.data_parallel, "tensor_parallel_size": args.tensor_parallel}
        return Way(ModelParallelStrategy(parallelize, save_distributed_checkpoint=False, **sizes), joint=False)
    if args.strategy == "fsdp":
        from lightning.fabric.strategies import FSDPStrategy

        options = {"sharding_strategy": args.sharding, "device_mesh": args.mesh and tuple(args.mesh)}
        return Way(FSDPStrategy(auto_wrap_policy={Block}, state_dict_type="full", **options))
    if args.strategy.startswith("deepspeed_stage_"):
        from lightning.fabric.strategies import DeepSpeedStrategy

        config = {
            "zero_optimization": {"stage": int(args.strategy.removeprefix("deepspeed_stage_"))},
            "gradient_clipping": args.max_norm,
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log
        }
        return Way(DeepSpeedStrategy(config=config), clips_itself=True)
    return Way(args.strategy)


def parallelize(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Split each block over the mesh's tensor-parallel ranks, and what a rank then has over the data-parallel ones."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    tensor_mesh, data_mesh = mesh["tensor_parallel"], mesh["data_parallel"]
    if tensor_mesh.size() > 1:
        whole_heads = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan = {**whole_heads, "attention.out": RowwiseParallel(), "mlp.up": ColwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, tensor_mesh, {**plan, "mlp.down": RowwiseParallel()})
    if data_mesh.size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=data_mesh)
        fully_shard(model, mesh=data_mesh)
    return model


# ---- training --------------------------------------------------------------------------------------------------------


def train(fabric: Fabric, args: argparse.Namespace, way: Way) -> list[float]:
    """Train and return the loss of every step, each the mean over the global batch."""
    fabric.seed_everything(args.seed, verbose=False)
    with fabric.init_module(empty_init=args.meta or None):
        model = Transformer(args.width, args.blocks, args.heads, args.context)
    if way.joint and not args.meta if args.setup is None else args.setup == "joint":
        model, optimizer = fabric.setup(model, adamw(model, args.lr))
    else:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(adamw(model, args.lr))
    loader = fabric.setup_dataloaders(micro_batches(fabric, args))

    losses = []
    batches = endless(loader)
    for step in range(args.steps):
        step_loss = torch.zeros((), device=fabric.device)
        with fabric.accumulate(model, islice(batches, args.accumulate)) as parts:
            for tokens, targets in parts:
                loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
                fabric.backward(loss)
                step_loss += loss.detach() / args.accumulate
        if not way.clips_itself:
            fabric.clip_gradients(model, optimizer, max_norm=args.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(step_loss).item())
        fabric.print(f"step {step + 1}: loss {losses[-1]:.6f}")

    if args.out is not None:
        fabric.save(args.out, {"model": model})
    return losses


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    # Adam divides a gradient by its own size plus `eps`. A gradient next to nothing is rounding errors (1e-9), which
    # depend on the order of a sum and so on the number of ranks. With this `eps` they stay as small as they are.
    return torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-6)


def endless(loader: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def micro_batches(fabric: Fabric, args: argparse.Namespace) -> DataLoader:
    """One rank's part of each micro-batch.

    The order is drawn here, once and for all: taking turns, the ranks then share out a batch that does not depend on
    how many they are.
    """
    replicas = fabric.strategy.num_replicas
    size, rest = divmod(args.batch_size, args.accumulate * replicas)
    if rest:
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of {args.accumulate} x {replicas} replicas")
    windows = Windows(corpus(args.corpus), args.context)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    used = len(windows) - len(windows) % args.batch_size  # whole batches, so that no rank has to fill up
    return DataLoader(Subset(windows, order[:used]), batch_size=size)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="auto", help="a name that Fabric knows, or tensor_parallel")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--sharding", default="FULL_SHARD", help="what fsdp shards")
    parser.add_argument("--mesh", type=int, nargs=2, help="groups and ranks in each, for hybrid sharding")
    parser.add_argument("--data-parallel", type=int, default=1, help="data-parallel ranks under tensor_parallel")
    parser.add_argument("--tensor-parallel", type=int, default=2, help="ranks that share a layer")
    parser.add_argument("--setup", choices=["joint", "separate"], help="how to set up; the strategy decides by default")
    parser.add_argument("--meta", action="store_true", help="make the model without memory; ranks then fill their part")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="pieces of text per step, over all processes")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=32, help="bytes that the model sees")
    parser.add_argument("--corpus", type=int, default=1 << 16, help="bytes to learn from")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, help="file for the trained weights")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    way = choose(args)
    fabric = Fabric(accelerator=args.accelerator, strategy=way.strategy, devices=args.devices)
    losses = fabric.launch(train, args, way)
    if fabric.is_global_zero:
        print(f"world size {fabric.world_size}, loss {losses[-1]:.4f}, after log2: {losses[-1] / math.log(2):.2f} bits")


if __name__ == "__main__":
    main()
