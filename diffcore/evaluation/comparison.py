"""All metrics of a set of images at once, from its features and those of real images."""

from typing import Any

from torch import Tensor

from diffcore.core.random import permutation
from diffcore.evaluation.clip_score import clip_score
from diffcore.evaluation.energy_distance import energy_distance
from diffcore.evaluation.features.feature_table import FeatureTable
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.evaluation.image_statistics import STATISTICS, summarize_statistics
from diffcore.evaluation.inception_score import inception_score
from diffcore.evaluation.kernel_distance import kernel_distance
from diffcore.evaluation.label_accuracy import LabelClassifier
from diffcore.evaluation.neighbours import (
    NeighbourScores,
    nearest_neighbours,
    neighbour_scores,
)
from diffcore.io.extras import has_extra

__all__ = ["METRICS", "compare", "describe", "fit_label_classifier"]

METRICS = (
    "frechet_distance",
    "kernel_distance",
    "energy_distance",
    *NeighbourScores._fields,
    "label_accuracy",
    "inception_score",
    "clip_score",
    "training_distance",
    *STATISTICS,
    "brightness_spread",
)
"""Names of all metrics; features without classes or texts lack some of them."""

MAXIMUM_FITTED = 10_000
"""Largest number of images to which a support vector machine is fitted."""


def compare(samples: FeatureTable, reference: FeatureTable, seed: int = 0) -> dict[str, float]:
    """The metrics that compare images with a reference.

    Args:
        samples: features of the images to evaluate.
        reference: features of real images.
        seed: seed of the directions of the energy distance.

    Returns:
        The metrics by name.
    """
    a, b = samples.features, reference.features
    return {
        "frechet_distance": frechet_distance(a, b),
        "kernel_distance": kernel_distance(a, b),
        "energy_distance": energy_distance(a, b, seed=seed),
        **neighbour_scores(a, b)._asdict(),
    }


def describe(
    images: FeatureTable,
    training: FeatureTable | None = None,
    classifier: LabelClassifier | None = None,
    classes: int = 0,
    texts: Tensor | None = None,
) -> dict[str, float]:
    """The metrics of images that need no reference.

    Args:
        images: features of the images.
        training: features of the training data, in which the nearest neighbours are sought.
        classifier: classifier of features; it is not used if the logits predict the labels.
        classes: number of labels that the logits predict; 0: they predict none.
        texts: (N, d) embeddings of the prompts of the images in the space of the features.

    Returns:
        The metrics by name: label_accuracy if there are labels and a classifier, inception_score
        if there are logits, clip_score if there are embeddings of prompts, training_distance, the
        median distance to the nearest training image, and the statistics of the images.
    """
    found: dict[str, float] = {}
    is_labelled = bool((images.labels >= 0).all())
    if is_labelled and classes > int(images.labels.max()):
        found["label_accuracy"] = float((images.logits.argmax(1) == images.labels).double().mean())
    elif is_labelled and classifier is not None:
        found["label_accuracy"] = classifier.accuracy(images.features, images.labels)
    if images.logits.shape[1]:
        found["inception_score"] = inception_score(images.logits)
    if texts is not None:
        found["clip_score"] = clip_score(images.features, texts)
    if training is not None:
        distance: Tensor = nearest_neighbours(images.features, training.features)[0]
        found["training_distance"] = float(distance.median())
    return found | summarize_statistics(images.statistics)


def fit_label_classifier(real: FeatureTable, seed: int = 0) -> LabelClassifier | None:
    """A classifier of the features of labelled real images.

    Args:
        real: features of real images; at most `MAXIMUM_FITTED` of them are used.
        seed: seed of the choice among more images.

    Returns:
        The classifier; None if an image has no label, there is one class, or scikit-learn is not
        installed.
    """
    labels: Any = real.labels
    if not has_extra("sklearn") or int(labels.min()) < 0 or int(labels.min()) == int(labels.max()):
        return None
    rows = permutation(seed, 0, len(labels))[:MAXIMUM_FITTED]
    return LabelClassifier(real.features[rows], labels[rows])
