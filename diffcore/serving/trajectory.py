"""One sample in progress: the state of its sampler, and the evaluations that it waits for."""

from typing import Any

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition, labels_of
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.noise import Noise
from diffcore.core.prediction import Prediction
from diffcore.guidance import CFG, Guidance, GuidanceInput, Step
from diffcore.guidance.reference import Query
from diffcore.samplers import State
from diffcore.sampling.loop import current_step
from diffcore.sampling.mode_changes import find_mode_changes, forget_at_mode_change
from diffcore.schedules import Level
from diffcore.serving.request import RequestPlan

__all__ = ["Trajectory"]


class Trajectory:
    """The trajectory of one sample, which is advanced from evaluation to evaluation.

    It computes what `integrate` computes for a batch of one sample, but leaves the evaluation of
    its queries to the caller:

        while not trajectory.is_done:
            for index, query in enumerate(trajectory.queries):
                trajectory.receive(index, query.denoiser(trajectory.x, trajectory.level, ...))

    Args:
        denoiser: network with its process.
        plan: request that the sample belongs to.
        index: index of the sample in the request.
        dtype: dtype of the sample during integration.
    """

    def __init__(
        self, denoiser: DenoiserProtocol, plan: RequestPlan, index: int, dtype: torch.dtype
    ) -> None:
        request, process = plan.request, denoiser.process
        self.denoiser, self.plan, self.evaluations = denoiser, plan, 0
        seeds = torch.tensor([int(request.seeds[index])])
        self._noise = Noise(seeds, process.shape, denoiser.device, dtype, request.path)
        condition = None
        if plan.condition is not None:
            condition = plan.condition[torch.tensor([index])].to(denoiser.device)
        self._condition: BatchCondition | None = condition
        self._mode_changes = find_mode_changes(plan.knots, request.guidance.levels(process))
        x = self._noise.first_sample(plan.knots[0], process.sigma_data)
        self.state: State[Any] = request.sampler.start(x, plan.knots, self._noise)
        self._step: Step | None = None
        self._memory: Any = None
        self.queries: list[Query] = []
        self._predictions: dict[int, Prediction] = {}
        self._plan_evaluation()

    @property
    def is_done(self) -> bool:
        """Whether no evaluation remains, so that `x` is the result."""
        return self.state.done

    @property
    def x(self) -> Tensor:
        """(1, *shape) input of the queries, or the sample once it is done."""
        return self.state.x

    @property
    def level(self) -> Level:
        """The noise level of the queries, and for a network of two times the end of the step."""
        assert self._step is not None  # it is set at construction
        return self._step.level

    @property
    def _rule(self) -> Guidance:
        request = self.plan.request
        return request.guidance if request.sampler.uses_guidance(self.state) else CFG(1.0)

    def _plan_evaluation(self) -> None:
        """Set the step and the queries of the next evaluation; none when it is done."""
        self.queries = []
        if self.is_done:
            return
        process, sampler = self.denoiser.process, self.plan.request.sampler
        self._step = current_step(process, sampler, self.plan.knots, self.state, self._step)
        references = self._rule.required_references(self._step, self._memory)
        own = self._condition if process.dropouts else None  # labels may be for the rule alone
        self.queries = [
            Query(self.denoiser, own),
            *(reference.query(self.denoiser, own, self.state.x) for reference in references),
        ]

    def receive(self, index: int, prediction: Prediction) -> bool:
        """Receive the prediction of one query, and take a step once all of them are there.

        Args:
            index: index of the query among `queries`.
            prediction: its prediction (1, *shape).

        Returns:
            Whether a step was taken, so that `queries` are those of the next one.
        """
        self._predictions[index] = prediction
        if len(self._predictions) < len(self.queries):
            return False
        predictions = [self._predictions.pop(i) for i in range(len(self.queries))]
        self._advance(predictions)
        self._plan_evaluation()
        return True

    def _advance(self, predictions: list[Prediction]) -> None:
        """Combine the predictions, and take the step that they allow."""
        assert self._step is not None  # there are no queries without a step
        conditional, *references = predictions
        self.evaluations += len(predictions)
        labels = labels_of(self._condition)
        inputs = GuidanceInput(self.state.x, self._step, conditional, tuple(references), labels)
        guided, self._memory = self._rule.guide(inputs, self._memory)
        sampler = self.plan.request.sampler
        state = sampler.advance(self.state, guided, self._noise)
        self.state = forget_at_mode_change(sampler, state, self._mode_changes)
