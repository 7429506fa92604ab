"""Accuracy of int8 against float32 on CIFAR-10: `python benchmarks/quantization.py DATA`.

Trains a small ResNet with RigL, quantizes it with each method of calibration, and prints top-1 of
float32 and of int8, the images on which both agree, and the time that calibration took. DATA holds
train/<class>/*.jpg and val/<class>/*.jpg. int8 runs as exact integers in torch (which is slow).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sparse
from benchmarks.cifar import CLASSES, RECIPES, Split, load, normalize
from sparse import runtime

BATCH_SIZE, LEARNING_RATE = 128, 0.1


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm = convolution(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.second, self.last = convolution(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        projects = stride > 1 or inputs != outputs
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(*shortcut if projects else ())

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(y + self.shortcut(x))


def convolution(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def build() -> nn.Module:
    """Build a ResNet of nine layers for 32 x 32 pixels: 77 thousand weights."""
    stem = [convolution(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 2), Block(16, 32, 1), Block(32, 64, 2)]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)
    )


def train(
    split: Split, *, sparsity: float, epochs: int, seed: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network trained with RigL, in evaluation, and its masks."""
    torch.manual_seed(seed)
    recipe, model = RECIPES["small"], build()
    steps = epochs * (len(split[1]) // BATCH_SIZE)
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    sparsifier = sparse.rigl(
        model, optimizer, sparsity=sparsity, distribution="erk", t_end=steps * 3 // 4, seed=seed
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.lr_factor(step, steps)
    )
    for epoch in range(epochs):
        for images, labels in recipe.batches(split, BATCH_SIZE):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval(), dict(sparsifier.masks)


def quantize(
    model: nn.Module, masks: dict[str, Tensor], images: Tensor, *, method: str
) -> runtime.Network:
    """Return the network in int8."""
    nodes, activations = runtime.calibrate(
        runtime.trace(model), model.state_dict(), normalize(images).split(64), method=method
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        runtime.save(
            path,
            model.state_dict(),
            masks,
            nodes=nodes,
            activations=activations,
            arch="resnet9",
            model={},
            image_size=32,
            mean=(120 / 255,) * 3,
            std=(62 / 255,) * 3,
            dtype="int8",
            fold=True,
        )
        return runtime.load(path, backend="torch")


@torch.no_grad()
def predictions(model: nn.Module | runtime.Network, images: Tensor) -> Tensor:
    """Return the class of every image."""
    return torch.cat([model(normalize(chunk)).argmax(1) for chunk in images.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=256, help="for calibration")
    arguments = parser.parse_args()
    data = load(arguments.data, torch.device("cpu"))
    images, labels = data["val"]
    print("| seed | float32 (%) | calibration | int8 (%) | agree (%) | seconds |")
    print("|---" * 6 + "|")
    for seed in arguments.seeds:
        model, masks = train(
            data["train"], sparsity=arguments.sparsity, epochs=arguments.epochs, seed=seed
        )
        wanted = predictions(model, images)
        chosen = torch.randperm(len(data["train"][1]))[: arguments.num_images]
        for method in runtime.METHODS:
            start = time.perf_counter()
            network = quantize(model, masks, data["train"][0][chosen], method=method)
            seconds = time.perf_counter() - start
            found = predictions(network, images)
            scores = [100 * float((a == b).float().mean()) for a, b in (
                (wanted, labels), (found, labels), (found, wanted)
            )]  # fmt: skip
            print(
                f"| {seed} | {scores[0]:.2f} | {method} | {scores[1]:.2f} | {scores[2]:.2f} | "
                f"{seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
