"""Training of the small classifier whose features evaluations compare."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffcore.core.random import Stream, derive_seed, permutation
from diffcore.evaluation.features.local_classifier import ClassifierNetwork

__all__ = ["TrainedClassifier", "train_classifier"]

HELD_OUT = 10
"""One of so many images is held out."""
WEIGHT_DECAY = 0.05


class TrainedClassifier(NamedTuple):
    """A trained network and how well it does on images that it was not trained on.

    Args:
        network: trained network in evaluation mode.
        accuracy: share of held-out images whose label it predicts.
        held_out: number of held-out images.
    """

    network: ClassifierNetwork
    accuracy: float
    held_out: int


def train_classifier(
    images: Tensor,
    labels: Tensor,
    size: int,
    width: int = 32,
    steps: int = 1000,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TrainedClassifier:
    """Train a classifier by AdamW under a one-cycle learning rate.

    Initial weights, the held-out tenth and the order are functions of the seed.

    Args:
        images: (N, C, H, W) bytes.
        labels: (N,) class labels from 0; each class has an image.
        size: height and width in pixels to which images are resized.
        width: channels of the first convolution; there are twice as many features.
        steps: number of steps.
        batch_size: number of images in a step.
        lr: largest learning rate.
        seed: 64-bit seed.
        device: device of the training.

    Returns:
        The network and its accuracy.

    Raises:
        ValueError: an image has no label, there is one class, or there are fewer than 20 images.
    """
    if int(labels.min()) < 0 or int(labels.max()) == 0 or len(labels) < 2 * HELD_OUT:
        raise ValueError(
            f"the data has {len(labels)} images with labels from {int(labels.min())} to "
            f"{int(labels.max())}, expected {2 * HELD_OUT} or more, all labelled, of two classes "
            "or more: sort the images of a folder into one sub-folder for each class"
        )
    order = permutation(seed, 2**40, len(labels))
    held_out, rows = order[: len(labels) // HELD_OUT], order[len(labels) // HELD_OUT :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.MODEL, 0))
        network = ClassifierNetwork(size, images.shape[1], int(labels.max()) + 1, width)
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for batch in _batches(rows, seed, steps, batch_size):
        x = network.prepare(images[batch]).to(device)
        loss = cross_entropy(network(x), labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return TrainedClassifier(
        network, _accuracy(network, images[held_out], labels[held_out]), len(held_out)
    )


def _batches(rows: Tensor, seed: int, steps: int, size: int) -> Iterator[Tensor]:
    """The rows of each batch. Every epoch has a permutation of its own and a smaller last batch."""
    per_epoch = -(-len(rows) // size)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if not place:
            order = rows[permutation(seed, epoch, len(rows))]
        yield order[place * size : (place + 1) * size]


@torch.no_grad()
def _accuracy(network: ClassifierNetwork, images: Tensor, labels: Tensor) -> float:
    device = next(network.parameters()).device
    parts = images.split(256)
    found = torch.cat([network(network.prepare(part).to(device)).argmax(1).cpu() for part in parts])
    return float((found == labels).double().mean())
