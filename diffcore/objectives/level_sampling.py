"""Adaptive sampling of noise levels: t is drawn from a density q that is fitted to the losses.

    t = Q(u),  q(t) = K π_k on the k-th of K equal bins of [0, 1]
    E_q[L(t)/q(t)] = E[L(t)] for every q

The loss is divided by q, so the objective does not change and its estimate has a lower variance:
E_q[(L/q)²] is minimal for π_k ∝ √E[L² | bin k]. λ(Q(u)) is again a monotone schedule with the same
ends. The state is a few numbers on the host, a function of the losses of whole global batches, so
it is equal on every rank and part of the checkpoint.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LearnedSchedule", "Resampler", "ResamplerState", "SecondMoment"]

ResamplerState = dict[str, Tensor]
"""The fitted numbers of a resampler by name, float64 tensors on the host."""


class Resampler(ABC):
    """Fits the bin probabilities π to the losses.

    It is immutable: `update` takes a state and returns a new one.

    Attributes:
        bins: number K of equal bins of t in [0, 1], at least 2.
        floor: fraction of the draws that stay uniform, in (0, 1).
        update_interval: number of steps between updates; each update waits once for the device.
    """

    bins: int
    floor: float
    update_interval: int

    def __post_init__(self) -> None:
        if self.bins < 2 or self.update_interval < 1:
            raise ValueError(
                f"bins and update_interval are {self.bins} and {self.update_interval}, expected at "
                "least 2 and 1"
            )
        if not 0 < self.floor < 1:
            raise ValueError(
                f"floor is {self.floor}, expected a share of uniform draws within (0, 1)"
            )

    @abstractmethod
    def initial_state(self) -> ResamplerState:
        """The state before the first loss.

        Returns:
            A state whose density is uniform.
        """

    @abstractmethod
    def _preferred(self, state: ResamplerState) -> Tensor:
        """π (K,) before the floor is applied."""

    @abstractmethod
    def update(self, state: ResamplerState, times: Tensor, losses: Tensor) -> ResamplerState:
        """The state after further losses.

        Args:
            state: state of the resampler, from `initial_state` or `update`.
            times: times t (N,) drawn from q, float64 on the host, in the order of the global
                batches.
            losses: losses L(t) (N,), not divided by q; entries that are not finite are ignored.

        Returns:
            A new state; the given one is unchanged.
        """

    def masses(self, state: ResamplerState) -> Tensor:
        """The bin probabilities π (K,), each at least floor / K."""
        return self.floor / self.bins + (1 - self.floor) * self._preferred(state)

    def times(self, state: ResamplerState, u: Tensor) -> Tensor:
        """The quantiles Q(u) for u ~ U(0, 1), of the shape of u: times with density q."""
        masses = self.masses(state)
        ends = masses.cumsum(0)
        k = torch.searchsorted(ends, u.contiguous()).clamp(max=self.bins - 1)
        within = (u - (ends[k] - masses[k])) / masses[k]
        return ((k + within) / self.bins).clamp(2.0**-53, 1 - 2.0**-53)

    def density(self, state: ResamplerState, t: Tensor, steps: int | None) -> Tensor:
        """q(t), of the shape of t.

        For a table of T levels, the density of t = i/T is T times the probability of
        ((i-1)/T, i/T].

        Args:
            state: state of the resampler, from `initial_state` or `update`.
            t: times in (0, 1], float64 on the host.
            steps: number T of levels of a table; None for a continuous schedule.
        """
        if steps is None:
            return self.bins * self.masses(state)[self._bin(t)]
        return steps * (self._cdf(state, t) - self._cdf(state, t - 1 / steps))

    def _cdf(self, state: ResamplerState, t: Tensor) -> Tensor:
        """The distribution function of q at t, of the shape of t."""
        masses, k = self.masses(state), self._bin(t)
        return masses.cumsum(0)[k] - masses[k] * (k + 1 - t * self.bins)

    def _bin(self, t: Tensor) -> Tensor:
        """The index of the bin (k/K, (k+1)/K] of t, of the shape of t."""
        return ((t * self.bins).ceil() - 1).clamp(0, self.bins - 1).long()


@dataclass(frozen=True)
class SecondMoment(Resampler):
    """π_k ∝ √(mean of the last H squared losses of bin k), uniform until every bin has H losses.

    Source: Nichol & Dhariwal 2021 (2102.09672, eq. 18), with K = 1000 timesteps, H = 10, floor
    0.001.

    Args:
        bins: number K of equal bins of t in [0, 1], at least 2.
        history: number H of losses that are kept for each bin, at least 1.
        floor: fraction of the draws that stay uniform, in (0, 1).
        update_interval: number of steps between updates, at least 1.

    Raises:
        ValueError: a field is out of range.
    """

    bins: int = 100
    history: int = 10
    floor: float = 0.001
    update_interval: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"history is {self.history}, expected at least 1 loss")

    def initial_state(self) -> ResamplerState:
        return {"losses": torch.full((self.bins, self.history), torch.nan, dtype=torch.float64)}

    def _preferred(self, state: ResamplerState) -> Tensor:
        moments = state["losses"].square().mean(1).sqrt()  # NaN until the bin has H losses
        if moments.isnan().any() or not moments.any():
            return torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        return moments / moments.sum()

    def update(self, state: ResamplerState, times: Tensor, losses: Tensor) -> ResamplerState:
        known = losses.isfinite()
        k = self._bin(times[known])
        new = losses[known][k.argsort(stable=True)].split(k.bincount(minlength=self.bins).tolist())
        rows = [torch.cat(pair)[-self.history :] for pair in zip(state["losses"], new, strict=True)]
        return {"losses": torch.stack(rows)}


@dataclass(frozen=True)
class LearnedSchedule(Resampler):
    """π is a mixture of softmax(θ) and the floor; θ minimises the logarithm of E_q[(L/q)²].

    With p = softmax(θ) and k the bin of t, stochastic gradient descent follows

        ∂/∂θ_j E_q[(L/q)²] ∝ -E_q[(L/q)² p_k/π_k (1[k = j] - p_j)]

    which vanishes at π_k ∝ √E[L² | k] above the floor. The step of bin j is multiplied by
    min(K, 1/p_j), so that a few tens of updates suffice for any K. In the source, a network defines
    the schedule; here it is a monotone piecewise linear function of K pieces.

    Source: Kingma et al. 2021 (2107.00630, section 5.1 and appendix I.2).

    Args:
        bins: number K of equal bins of t in [0, 1], at least 2.
        rate: step size of the gradient descent, in (0, 1); larger steps would overshoot.
        floor: fraction of the draws that stay uniform, in (0, 1).
        update_interval: number of steps between updates, at least 1.

    Raises:
        ValueError: a field is out of range.
    """

    bins: int = 50
    rate: float = 0.1
    floor: float = 0.01
    update_interval: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}, expected within (0, 1)")

    def initial_state(self) -> ResamplerState:
        return {"logits": torch.zeros(self.bins, dtype=torch.float64)}

    def _preferred(self, state: ResamplerState) -> Tensor:
        return state["logits"].softmax(0)

    def update(self, state: ResamplerState, times: Tensor, losses: Tensor) -> ResamplerState:
        k, p, masses = self._bin(times), self._preferred(state), self.masses(state)
        squares = (losses / masses[k]).square().nan_to_num(0.0, 0.0, 0.0)
        share = (
            torch.zeros_like(p).index_add(0, k, squares / squares.sum().clamp(min=1e-300))
            * p
            / masses
        )
        descent = (share - p * share.sum()) / p.clamp(min=1 / self.bins)
        return {"logits": state["logits"] + self.rate * descent}
