"""A training program written for MONAI alone: no line of it knows of noisyseg-fast.

    python examples/train_with_monai.py
    python -m noisyseg_fast.compat.monai examples/train_with_monai.py      # the same program, our kernels

Blobs in noise, a small U-Net, Dice + cross-entropy, and HD95 on validation volumes. Prints the losses, the scores, and
the seconds that the validation's metrics took.
"""

import sys
import time

import torch
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from monai.networks.nets import BasicUNet
from monai.transforms import AsDiscrete
from monai.utils import set_determinism

SIDE = int(sys.argv[1]) if len(sys.argv) > 1 else 64
STEPS, VOLUMES, CLASSES = 4, 4, 3


def volumes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 1, *S) and labels: two balls in noise."""
    axes = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float32)] * 3, indexing="ij")
    labels = torch.zeros(count, 1, SIDE, SIDE, SIDE)
    for item in labels:
        for label in range(1, CLASSES):
            centre = SIDE * (0.3 + 0.4 * torch.rand(3))
            radius = SIDE * (0.12 + 0.1 * torch.rand(()))
            inside = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2
            item[0][inside] = label
    return labels + 0.4 * torch.randn(labels.shape), labels


def main() -> None:
    set_determinism(0)
    images, labels = volumes(2)
    network = BasicUNet(spatial_dims=3, out_channels=CLASSES, features=(8, 8, 16, 16, 32, 8))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_function(network(images), labels)
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.6f}")

    network.eval()
    discrete = AsDiscrete(argmax=True, to_onehot=CLASSES), AsDiscrete(to_onehot=CLASSES)
    metrics = DiceMetric(), HausdorffDistanceMetric(percentile=95)
    seconds = 0.0
    for image, label in zip(*volumes(VOLUMES), strict=True):
        with torch.no_grad():
            logits = SimpleInferer()(image[None], network)
        pred, target = discrete[0](logits[0])[None], discrete[1](label)[None]
        start = time.perf_counter()
        for metric in metrics:
            metric(pred, target)
        seconds += time.perf_counter() - start
    dice, hd95 = (metric.aggregate().item() for metric in metrics)
    print(f"Dice {dice:.6f} HD95 {hd95:.6f}")
    print(f"metrics {seconds:.4f} s")


if __name__ == "__main__":
    main()
