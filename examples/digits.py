"""Classify handwritten digits: an ordinary PyTorch script with the five Fabric lines.

Run it as one process, as two, and go on from where it stopped:

    python examples/digits.py
    fabric run --devices 2 examples/digits.py --epochs 15
    fabric run --devices 2 --precision bf16-mixed examples/digits.py --epochs 20 --resume
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger

TRAIN_IMAGES = 1400  # of 1,797; the rest is held out


class DigitClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


def digits() -> tuple[Subset, Subset]:
    """Return the training and the held-out images, the same ones in every run."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = TensorDataset(images, torch.tensor(data.target))
    return Subset(dataset, order[:TRAIN_IMAGES]), Subset(dataset, order[TRAIN_IMAGES:])


def train(fabric: Fabric, args: argparse.Namespace) -> float:
    """Train and return the accuracy on the held-out images."""
    fabric.print(f"world size {fabric.world_size}")
    fabric.seed_everything(args.seed, verbose=False)

    model = DigitClassifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)

    train_set, test_set = digits()
    train_loader = fabric.setup_dataloaders(DataLoader(train_set, batch_size=args.batch_size, shuffle=True))
    # A distributed sampler repeats images to give every rank as many; here each one has to count once.
    share = Subset(test_set, range(fabric.global_rank, len(test_set), fabric.world_size))
    test_loader = fabric.setup_dataloaders(DataLoader(share, batch_size=256), use_distributed_sampler=False)

    checkpoint = args.out / "checkpoint.pt"
    state = {"model": model, "optimizer": optimizer, "epochs_done": 0}
    if args.resume:
        fabric.load(checkpoint, state)
        fabric.print(f"resumed after epoch {state['epochs_done']}")

    for epoch in with_progress(fabric, range(state["epochs_done"], args.epochs)):
        model.train()
        for images, targets in train_loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), targets)
            fabric.backward(loss)
            optimizer.step()
        state["epochs_done"] = epoch + 1
        fabric.save(checkpoint, state)
        metrics = {"loss": fabric.all_reduce(loss.detach()), "accuracy": evaluate(fabric, model, test_loader)}
        fabric.log_dict(metrics, step=epoch)
        fabric.print(f"epoch {epoch + 1}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.4f}")

    accuracy = evaluate(fabric, model, test_loader)
    fabric.print(f"test accuracy {accuracy:.4f}")
    return accuracy


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, loader: Iterable) -> float:
    """Return the share of images, over all ranks, that the model classifies correctly."""
    model.eval()
    counts = torch.zeros(2, device=fabric.device)  # correct, seen
    for images, targets in loader:
        correct = model(images).argmax(dim=1) == targets
        counts += torch.stack([correct.sum(), torch.tensor(len(targets), device=fabric.device)])
    correct, seen = fabric.all_reduce(counts, reduce_op="sum").tolist()
    return correct / seen


def with_progress(fabric: Fabric, epochs: range) -> Iterable[int]:
    """Show a bar on the main process if rich is installed; without it the line per epoch has to do."""
    if not fabric.is_global_zero:
        return epochs
    try:
        from rich.progress import track
    except ModuleNotFoundError:
        return epochs
    return track(epochs, description="training")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32, help="images per process and step")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder for checkpoint and metrics")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    fabric = Fabric(loggers=CSVLogger(args.out, name="metrics"))
    fabric.launch(train, args)


if __name__ == "__main__":
    main()
