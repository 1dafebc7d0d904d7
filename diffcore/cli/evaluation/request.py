"""The options of `diffcore evaluate` beside those of sampling, and the bounds on its results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffcore.cli.sample_request import MAXIMUM_COUNT
from diffcore.evaluation.comparison import METRICS

__all__ = ["EvaluationRequest", "check_bounds", "failed_bounds", "spread_labels"]

BOUND = re.compile(r"(\w+)\s*(<=|>=)\s*(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(x?)")
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What is measured.

    Args:
        reference: real images to compare with: a folder of images, a run (its data), a .npy or
            .safetensors file, or a data set such as Digits; "": the data of the run.
        training: training data, in which the nearest neighbours are sought, and which is measured
            in the same way as the samples if it is not the reference; "": the data of the run.
        features: pixels, inception, clip, dinov2, a folder of a model of transformers, or a file of
            `diffcore features train`.
        n: number of samples of each repetition; of a folder all images are used.
        repeats: number of repetitions with further seeds, which show the spread.
        seed: first seed; the samples have the seeds after it.
        size: height and width in pixels of the images of a folder; 0: those of the model, or of the
            first image.
        force: whether to measure fewer images than 5 for each feature, for which a Fréchet distance
            is mostly bias.
        out: folder of samples, features and results; "": evaluation in the run's folder, or
            FOLDER-evaluation beside another folder.
    """

    reference: str = ""
    training: str = ""
    features: str = "inception"
    n: int = 10_000
    repeats: int = 1
    seed: int = 0
    size: int = 0
    force: bool = False
    out: str = ""

    def __post_init__(self) -> None:
        if not 2 <= self.n <= MAXIMUM_COUNT:
            raise ValueError(f"n is {self.n}, expected 2 to {MAXIMUM_COUNT:,} samples")
        if not 1 <= self.repeats <= 100:
            raise ValueError(f"repeats is {self.repeats}, expected 1 to 100")
        if not 0 <= self.seed < 2**62 or self.size < 0:
            raise ValueError(
                f"seed is {self.seed} and size {self.size}, expected 0 or more, and a seed below "
                "2^62"
            )


def spread_labels(labels: Sequence[int], first: int, count: int) -> list[int]:
    """Labels of samples, in the proportions of given labels.

    Sample i has the label at the share frac(i/φ) of the sorted labels, φ the golden ratio. Every
    part of the sequence is proportional up to O(log n) samples, so that further samples do not
    change the labels of the first ones.

    Args:
        labels: labels of the reference.
        first: number of the first sample.
        count: number of samples.

    Returns:
        The label of each sample.
    """
    ordered = sorted(labels)
    places = (i * GOLDEN % 2**64 * len(ordered) >> 64 for i in range(first, first + count))
    return [ordered[place] for place in places]


def check_bounds(bounds: Sequence[str]) -> None:
    """Check that bounds can be read, before the samples are drawn.

    Args:
        bounds: texts, see `failed_bounds`.

    Raises:
        ValueError: a bound cannot be read, or there is no such metric.
    """
    for bound in bounds:
        match = BOUND.fullmatch(bound.strip())
        if match and match[1] not in METRICS:
            raise ValueError(f"require is {bound!r}, expected one of {', '.join(METRICS)}")
        if not match:
            raise ValueError(
                f"require is {bound!r}, expected a bound such as frechet_distance<=10 or "
                "frechet_distance<=3x"
            )


def failed_bounds(bounds: Sequence[str], results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The bounds that results do not meet.

    Args:
        bounds: texts such as "label_accuracy>=0.9" or "frechet_distance<=3x", where x stands for
            the value of the training data.
        results: metric -> values with the entry `samples`, and perhaps `training_data`.

    Returns:
        One line for each bound that is missed.

    Raises:
        ValueError: a bound cannot be read, or there is no such metric.
    """
    check_bounds(bounds)
    failed = []
    for bound in bounds:
        match = BOUND.fullmatch(bound.strip())
        assert match is not None
        if match[1] not in results:
            raise ValueError(
                f"require is {bound!r}, but only {', '.join(results)} were measured: the features "
                "or the images allow no more"
            )
        values, limit = results[match[1]], float(match[3])
        if match[4] and "training_data" not in values:
            raise ValueError(
                f"require is {bound!r}, but the training data is the reference, or was not measured"
            )
        limit *= values["training_data"] if match[4] else 1
        value = values["samples"]
        if not (value <= limit if match[2] == "<=" else value >= limit):
            failed.append(f"{match[1]} is {value:.4g}, required {match[2]} {limit:.4g}")
    return failed
