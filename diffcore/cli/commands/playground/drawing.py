"""From settings to samples, their trajectories, and pictures of both: everything but the page."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffcore.cli.commands.playground.model import PlaygroundModel, load_model
from diffcore.cli.commands.playground.request import PictureRequest
from diffcore.cli.image_model import PipelineOptions, load_guidance
from diffcore.core.prediction import Prediction
from diffcore.samplers import State
from diffcore.sampling.generation import NonFiniteWarning, Samples, sample
from diffcore.schedules import Level

__all__ = ["BATCH", "Drawing", "Evaluation", "draw"]

BATCH = 64
"""Largest number of samples of a network that are integrated together."""


class Evaluation(NamedTuple):
    """One evaluation of the network along the trajectories.

    Args:
        step: number of knots that were passed before.
        level: noise level of x.
        x: (N, *shape) samples at this level.
        x0: (N, *shape) guided prediction of x_0 from them.
    """

    step: int
    level: Level
    x: Tensor
    x0: Tensor


@dataclass
class _Recorder:
    """A callback that keeps the trajectories of the first batch."""

    evaluations: list[Evaluation] = field(default_factory=list)
    is_complete: bool = False

    def __call__(self, step: int, state: State, prediction: Prediction) -> None:
        """Keep an evaluation, unless it is of a later batch, which starts anew."""
        if self.evaluations and step == 0 and state.level == self.evaluations[0].level:
            self.is_complete = True
        if not self.is_complete:
            x, x0 = state.x.cpu().clone(), prediction.x0.cpu().clone()
            self.evaluations.append(Evaluation(step, state.level, x, x0))


@dataclass(frozen=True)
class Drawing:
    """Samples, and how they came about.

    Args:
        model: denoiser, and the decoder of its samples.
        request: settings of the samples.
        samples: result of `sample`, not decoded.
        evaluations: evaluations of the first batch in their order.
        batch_size: number of samples that were integrated together.
        seconds: time of sampling.
    """

    model: PlaygroundModel
    request: PictureRequest
    samples: Samples
    evaluations: tuple[Evaluation, ...]
    batch_size: int
    seconds: float

    @property
    def step_starts(self) -> list[Evaluation]:
        """The first evaluation of each step; all of them if the sampler chooses its own steps."""
        if self.samples.planned is None:
            return list(self.evaluations)
        starts: dict[int, Evaluation] = {}
        for evaluation in self.evaluations:
            starts.setdefault(evaluation.step, evaluation)
        return list(starts.values())

    @property
    def facts(self) -> Mapping[str, str]:
        """What the page states beside the pictures, by name."""
        first, last = (level.logsnr for level in (self.samples.knots[0], self.samples.knots[-2]))
        planned = self.samples.planned
        return {
            "network evaluations for each sample": f"{self.samples.evaluations:g}"
            + ("" if planned is None else f" ({planned} planned)"),
            "steps": f"{len(self.samples.knots) - 1}, from λ = {first:.4g}; the last step starts "
            f"at λ = {last:.4g}",
            "samples": f"{len(self.samples.x)} in {self.seconds:.2f} s",
        }


def draw(model: str, request: PictureRequest, device: torch.device) -> Drawing:
    """Sample a model as the command line that `command_line` prints would.

    Args:
        model: name of a distribution, or folder of a run or of a pipeline.
        request: settings of the samples.
        device: device of the network.

    Returns:
        The samples with the trajectories of the first batch.

    Raises:
        ValueError: the settings do not fit the model or each other.
    """
    loaded = load_model(model, request.schedule, request.prompt, device)
    _check(loaded, request)
    guidance = load_guidance(request.guidance, PipelineOptions(prompt=request.prompt), device)
    recorder, start = _Recorder(), time.perf_counter()
    batch_size = request.count if loaded.oracle is not None else min(request.count, BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)  # the page shows what is missing
        samples = sample(
            loaded.denoiser,
            request.sampler,
            request.grid,
            request.steps,
            seeds=request.seeds,
            condition=request.condition,
            guidance=guidance,
            batch_size=batch_size,
            callback=recorder,
        )
    seconds = time.perf_counter() - start
    return Drawing(loaded, request, samples, tuple(recorder.evaluations), batch_size, seconds)


def _check(model: PlaygroundModel, request: PictureRequest) -> None:
    """Refuse labels of a text-conditioned network, and the null label, which is not a class."""
    if request.labels and model.is_text_conditioned:
        raise ValueError("the network is conditioned on text, not on labels: use a prompt")
    if request.prompt and not model.is_text_conditioned:
        raise ValueError(f"{model.name} is not conditioned on text: leave the prompt out")
    classes = model.denoiser.process.classes
    wrong = [label for label in request.labels if label >= classes]
    if wrong:
        raise ValueError(
            f"labels {wrong} are out of range, expected 0 .. {classes - 1}; leave labels out for "
            "unconditional samples"
            if classes
            else "labels were given, but the network has no classes: leave them out"
        )
