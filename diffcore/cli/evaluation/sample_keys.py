"""Label, seed and named conditions of the samples that `compare` and `tune` draw."""

from collections.abc import Sequence

from diffcore.cli.image_model import ImageModel
from diffcore.cli.sample_request import SampleRequest
from diffcore.sampling.files import SampleKey

__all__ = ["labels_in_turn", "sample_keys"]


def labels_in_turn(sampling: SampleRequest, model: ImageModel) -> list[int] | None:
    """The labels or prompts that samples have in turn: those of the options, or all classes.

    Args:
        sampling: options of `diffcore sample`.
        model: network that is sampled.

    Returns:
        The labels; None for unconditional samples.

    Raises:
        ValueError: The network is conditioned on text, and the options have labels or no prompt.
    """
    classes = model.denoiser.process.classes
    if model.is_text_conditioned and sampling.labels:
        raise ValueError("the network is conditioned on text, not on labels: use --prompt TEXT")
    if sampling.unique_labels:
        return list(sampling.unique_labels)
    if model.is_text_conditioned:
        raise ValueError("the network is conditioned on text: give prompts, --prompt TEXT")
    return list(range(classes)) if classes else None


def sample_keys(
    model: ImageModel, labels: Sequence[int] | None, values: int, first: int, count: int
) -> list[SampleKey]:
    """Label, seed and value of the named conditions of each sample, in turn.

    Args:
        model: network that is sampled.
        labels: result of `labels_in_turn`.
        values: number of values of the named conditions.
        first: seed of the first sample.
        count: number of samples.

    Returns:
        The keys, with consecutive seeds.
    """
    given = labels or [model.denoiser.process.classes]
    return [SampleKey(given[i % len(given)], first + i, i % values) for i in range(count)]
