"""The whole loop of a deterministic sampler as one CUDA graph, which is captured once and replayed.

Knots, coefficients and the order of the kernels are known on the host before the first step, so the
loop launches the same kernels for every batch. A replay launches them without Python.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffcore.core.conditions import BatchCondition, Conditions
from diffcore.core.denoiser import DenoiserProtocol
from diffcore.core.network import find_learned_levels
from diffcore.core.noise import Noise
from diffcore.guidance import Guidance
from diffcore.samplers import Knots, Sampler
from diffcore.sampling.loop import Callback, integrate

__all__ = ["Loop", "LoopGraph", "Replay", "capture_on_cuda", "check_graph", "graph_of_loop"]

Loop = Callable[[Tensor, BatchCondition | None], tuple[Tensor, int]]
"""Integrates x (B, *shape) under a condition; returns the samples and the number of evaluations."""

Replay = Callable[[], None]
"""Repeats what was captured, on the tensors that it was captured with."""

WARM_UP = 2
"""Runs before the capture, in which libraries choose algorithms and allocate their workspaces."""


def check_graph(
    denoiser: DenoiserProtocol, sampler: Sampler, knots: Knots, has_callback: bool
) -> None:
    """Check that a loop can be one CUDA graph.

    Args:
        denoiser: network with its process.
        sampler: numerical integrator.
        knots: levels between which the sampler steps.
        has_callback: whether a callback observes the steps.

    Raises:
        ValueError: it cannot; the message has the remedy.
    """
    if denoiser.device.type != "cuda":
        raise ValueError(
            f"graph is true, and the network is on {denoiser.device}: a CUDA graph needs a network "
            "on a CUDA device; leave graph out"
        )
    if sampler.is_adaptive or sampler.draws_noise(knots):
        raise ValueError(
            f"graph is true, and {sampler} decides from the samples or draws noise in its steps: "
            "use a deterministic sampler such as AdamsMoulton(3), or leave graph out"
        )
    if find_learned_levels(denoiser.network) is not None:
        raise ValueError("graph is true, and the levels depend on the samples: leave graph out")
    if has_callback:
        raise ValueError("graph is true, and a replayed loop calls no callback: leave one out")


class LoopGraph:
    """A loop that is captured at its first call, and replayed at each call.

    Args:
        loop: the loop, whose kernels depend on the shape of x and of the condition alone.
        capture: captures a call without arguments: returns its result, and the replay.

    Raises:
        ValueError: the loop cannot be captured, such as with AdaptiveGuidance, which reads values
            of the device.
    """

    def __init__(
        self,
        loop: Loop,
        capture: Callable[[Callable[[], tuple[Tensor, int]]], tuple[tuple[Tensor, int], Replay]],
    ) -> None:
        self._loop, self._capture = loop, capture
        self._x: Tensor | None = None
        self._condition: BatchCondition | None = None

    def __call__(self, x: Tensor, condition: BatchCondition | None) -> tuple[Tensor, int]:
        """Integrate a batch of the shape of the first one.

        Args:
            x: (B, *shape) samples at the first knot.
            condition: condition of the samples.

        Returns:
            The samples, in memory of their own, and the number of evaluations.
        """
        if self._x is None:
            rows = torch.arange(len(x), device=x.device)
            first, given = x.clone(), None if condition is None else condition[rows]  # copies
            self._x, self._condition = first, given
            self._result, self._replay = self._capture(lambda: self._loop(first, given))
        for own, new in zip(
            [self._x, *_tensors(self._condition)], [x, *_tensors(condition)], strict=True
        ):
            own.copy_(new)
        self._replay()
        samples, evaluations = self._result
        return samples.clone(), evaluations


def _tensors(condition: BatchCondition | None) -> list[Tensor]:
    """The tensors of a condition, in a fixed order."""
    if not isinstance(condition, Conditions):
        return [] if condition is None else [condition]
    label = [] if condition.label is None else [condition.label]
    return [
        *(condition.values[name] for name in sorted(condition.values)),
        *(condition.absent[name] for name in sorted(condition.absent)),
        *label,
    ]


def graph_of_loop(
    denoiser: DenoiserProtocol,
    sampler: Sampler,
    knots: Knots,
    guidance: Guidance,
    micro_batch: int = 0,
    callback: Callback | None = None,
) -> LoopGraph:
    """The loop of a deterministic sampler, which is captured at its first call.

    Args:
        denoiser: network with its process, on a CUDA device.
        sampler: deterministic sampler.
        knots: levels between which the sampler steps.
        guidance: guidance rule.
        micro_batch: number of samples in each call of the network; 0 for one call.
        callback: refused, since a replayed loop calls none.

    Returns:
        The graph, for batches of the shape of the first one.

    Raises:
        ValueError: as `check_graph`.
    """
    check_graph(denoiser, sampler, knots, callback is not None)

    def loop(x: Tensor, condition: BatchCondition | None) -> tuple[Tensor, int]:
        seeds = torch.zeros(len(x), dtype=torch.int64)  # a deterministic sampler draws no noise
        noise = Noise(seeds, denoiser.process.shape, x.device, x.dtype)
        return integrate(
            denoiser, sampler, x, knots, noise, guidance, condition, micro_batch, checked=True
        )

    return LoopGraph(loop, capture_on_cuda)


def capture_on_cuda(
    call: Callable[[], tuple[Tensor, int]],
) -> tuple[tuple[Tensor, int], Replay]:
    """Capture a call as a CUDA graph, after warm-up on a stream of its own.

    Args:
        call: launches kernels on tensors that stay where they are.

    Returns:
        The result of the captured call, whose tensors a replay writes, and the replay.

    Raises:
        ValueError: the call waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = call()
    except RuntimeError as error:
        raise ValueError(
            f"graph is true, and the loop cannot be captured ({str(error).partition(chr(10))[0]}): "
            "leave graph out, or use a rule that reads no values, such as CFG"
        ) from error
    return result, graph.replay
