"""Resampling the noise levels: t is drawn from a density q learned from the losses, and the loss is
divided by q.

    t = Q(u),  q(t) = K π_k on the k-th of K equal bins of [0, 1],  E_q[L(t)/q(t)] = E[L(t)]
    whatever q

so the objective is the same and its estimate varies less: E_q[(L/q)²] is least for π_k ∝ √E[L² |
bin k]. λ(Q(u)) is again a monotone schedule with the ends of the given one. What is learned is a
few numbers on the host, a function of the losses of whole global batches, so it is the same on
every rank and travels with the checkpoint.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

ResamplerState = dict[str, Tensor]


class Resampler(ABC):
    """Learns π from losses. Immutable: what it has learned is passed in and out, float64 on the
    host.

    Args of every resampler: `bins` K, `floor` the share of draws that stay uniform, and
    `update_interval`, the steps between updates (each waits once for the device).
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
        """What is known before the first loss."""

    @abstractmethod
    def _preferred(self, state: ResamplerState) -> Tensor:
        """π before the floor, (K,)."""

    @abstractmethod
    def update(self, state: ResamplerState, times: Tensor, losses: Tensor) -> ResamplerState:
        """What is known after losses L(t), not divided by q, at times t drawn from q; both (N,), in
        the order of the run.
        """

    def masses(self, state: ResamplerState) -> Tensor:
        """π (K,), at least floor / K each."""
        return self.floor / self.bins + (1 - self.floor) * self._preferred(state)

    def times(self, state: ResamplerState, u: Tensor) -> Tensor:
        """Q(u), the times of u ~ U(0, 1)."""
        masses = self.masses(state)
        ends = masses.cumsum(0)
        k = torch.searchsorted(ends, u.contiguous()).clamp(max=self.bins - 1)
        within = (u - (ends[k] - masses[k])) / masses[k]
        return ((k + within) / self.bins).clamp(2.0**-53, 1 - 2.0**-53)

    def density(self, state: ResamplerState, t: Tensor, steps: int | None) -> Tensor:
        """q(t); of a table's level t = i/T, T times the probability of its cell ((i-1)/T, i/T]."""
        if steps is None:
            return self.bins * self.masses(state)[self._bin(t)]
        return steps * (self._cdf(state, t) - self._cdf(state, t - 1 / steps))

    def _cdf(self, state: ResamplerState, t: Tensor) -> Tensor:
        masses, k = self.masses(state), self._bin(t)
        return masses.cumsum(0)[k] - masses[k] * (k + 1 - t * self.bins)

    def _bin(self, t: Tensor) -> Tensor:
        return ((t * self.bins).ceil() - 1).clamp(0, self.bins - 1).long()


@dataclass(frozen=True)
class SecondMoment(Resampler):
    """π_k ∝ √(mean of the last H squared losses of bin k), uniform until every bin has H of them.

    Nichol & Dhariwal 2021 (2102.09672, eq. 18): K = 1000 timesteps, H = 10, floor 0.001.

    Args:
        bins: K.
        history: H.
        floor: share of draws that stay uniform.
        update_interval: steps between updates.
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
        moments = state["losses"].square().mean(1).sqrt()  # NaN until the bin is full
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
    """p = softmax(θ), π its mixture with the floor, θ by stochastic gradient descent on ln
    E_q[(L/q)²], the loss's variance.

    ∂/∂θ_j E_q[(L/q)²] ∝ -E_q[(L/q)² p_k/π_k (1[k = j] - p_j)], k the bin of t: at rest π_k ∝ √E[L²
    | k] above the floor. The step of bin j is times min(K, 1/p_j), so that a few tens of updates
    suffice for any K. Kingma et al. 2021 (2107.00630, section 5.1 and appendix I.2), whose network
    is here a monotone piecewise linear schedule of K pieces.

    Args:
        bins: K.
        rate: of the descent, for an update; at least 1 would overshoot.
        floor: share of draws that stay uniform.
        update_interval: steps between updates.
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
