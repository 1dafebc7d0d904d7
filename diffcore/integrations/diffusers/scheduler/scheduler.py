"""Our samplers, grids and schedules as a diffusers scheduler: any pipeline that takes one takes this."""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffcore.core.prediction import Prediction, edm_norm, predict, scale_input, target
from diffcore.core.process import TimeConditioning
from diffcore.guidance.base import add_to_x0
from diffcore.integrations.diffusers.scheduler.generator_noise import Drawn, Generators
from diffcore.integrations.diffusers.scheduler.plan import Call, Plan
from diffcore.integrations.diffusers.scheduler.scheduler_config import settings_of
from diffcore.integrations.diffusers.scheduler.settings import Settings
from diffcore.io.specs import to_spec
from diffcore.samplers import DDIM, Sampler
from diffcore.schedules import Discrete, Explicit, Grid, Level, Schedule, Trailing

ROUNDED = 1e-3
"""In λ: a first level this much noisier than the noisiest one is it (published σ/α are rounded)."""


@dataclass
class Output(SchedulerOutput):
    """What `step` answers.

    Args:
        prev_sample: x of the next question, or the result.
        pred_original_sample: x_0 of the prediction that was used.
    """

    pred_original_sample: Tensor


class _PerThread(threading.local):
    """The call that each thread's pipeline is in; a copy begins without any."""

    call: Call | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class DiffcoreScheduler(SchedulerMixin, ConfigMixin):
    """A sampler, a grid and a process of ours behind the interface of diffusers' schedulers.

        pipe.scheduler = DiffcoreScheduler.from_config(pipe.scheduler.config, sampler=DPMSolverPP("2M"), grid=Trailing())

    `from_config` reads any scheduler of diffusers; what is given beside it replaces what it said. x is that of the schedule's
    scaling (vp for tables), so `init_noise_sigma` is 1 or nearly. Where a call is, is kept for each thread, so that one
    pipeline can be called from several; a copy or a saved one has no call. Stochastic samplers draw from the generator
    that the pipeline gives to `step` (torch's global one where it gives none), as often and in the order in which diffusers do.

    Args:
        sampler: the integrator, or its spec.
        grid: which levels it visits.
        schedule: the noise levels of training; of a flow with dynamic shifting, before the shift.
        prediction_type: what the network outputs.
        time: how the network is told the level.
        sigma_data: standard deviation of x_0, for edm and for the first sample's scale.
        last: λ of the last knot where a run does not end at the clean level; Stable Diffusion's is that of index 0.
        clip: x_0 is clamped to ±clip, and ε follows.
        levels: λ that are knots beside the grid's, such as the bounds of a guidance interval.
        num_train_timesteps: read by pipelines (SDXL's denoising_end) and training scripts.
        use_dynamic_shifting: whether pipelines shall compute a μ from the image's size, and the schedule is shifted by it.
        time_shift_type: exponential, s = e^μ, or linear, s = μ.
        base_image_seq_len: of pipelines' μ.
        max_image_seq_len: of pipelines' μ.
        base_shift: of pipelines' μ.
        max_shift: of pipelines' μ.
    """

    _compatibles: ClassVar[list[str]] = []
    config: Any  # a mapping with attributes

    def __init__(
        self,
        sampler: Sampler | Mapping[str, Any] = DDIM(),
        grid: Grid | Mapping[str, Any] = Trailing(),
        schedule: Schedule | Mapping[str, Any] = Discrete(),
        prediction_type: str = "epsilon",
        time: TimeConditioning | Mapping[str, Any] = TimeConditioning(),
        sigma_data: float = 1.0,
        last: float | None = None,
        clip: float | None = None,
        levels: Sequence[float] = (),
        num_train_timesteps: int = 1000,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> None:
        given = dict(locals())
        own = {name: given.pop(name) for name in Settings.__dataclass_fields__}
        self.settings = Settings.read(own)
        others = {name: value for name, value in given.items() if name not in ("self", "__class__")}
        self.register_to_config(**to_spec(self.settings), **others)  # type: ignore[no-untyped-call]
        self._threads = _PerThread()

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From a config of its own, or of any scheduler of diffusers; `kwargs` replace what it says."""
        if isinstance(config, Mapping) and "sampler" not in config:
            config = settings_of(config)
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @cached_property
    def order(self) -> int:
        """Evaluations of a step between two noisy knots (the first and last may take fewer); pipelines read it each step."""
        inside = tuple(self.settings.schedule.at(logsnr) for logsnr in (-1.0, 1.0))
        return self.settings.sampler.evaluations(inside)

    @property
    def call(self) -> Call:
        """Where this thread's call is.

        Raises:
            ValueError: there is none.
        """
        if self._threads.call is None:
            raise ValueError(
                "set_timesteps has not been called in this thread: call it before the first step"
            )
        return self._threads.call

    @property
    def timesteps(self) -> Tensor:
        """What the network is to be told, one an evaluation."""
        return self.call.timesteps

    @property
    def num_inference_steps(self) -> int:
        """Steps between the knots of this thread's call."""
        return 1 + self.call.plan.states[-1].step

    @property
    def init_noise_sigma(self) -> float:
        """√(α² s² + σ²) at the first knot: what unit noise is to be multiplied with."""
        call = self._threads.call
        level = self.settings.schedule.level(1.0) if call is None else call.plan.states[0].level
        return float(edm_norm(level, self.settings.sigma_data))

    @property
    def begin_index(self) -> int | None:
        """The evaluation to begin with, if a pipeline has said so."""
        return self.call.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this evaluation."""
        self.call.begin = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan a call of this thread.

        Args:
            num_inference_steps: steps of the grid.
            device: where `timesteps` shall be.
            timesteps: in place of the grid, what the network is to be told at each knot; a clean knot follows.
            sigmas: in place of the grid, σ/α at each knot, of a flow the times t before its shift; a clean knot follows. A flow
                pipeline's own default, n times evenly from 1 to 1/n, is read as n steps of the grid.
            mu: the shift's μ, used with use_dynamic_shifting.
        """
        settings = self._settings(mu)
        times, ratios = (
            None if given is None else tuple(map(float, given)) for given in (timesteps, sigmas)
        )
        self._threads.call = Call.of(_plan(settings, num_inference_steps, times, ratios), device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is asked: x, or of an edm network x / √(α² s² + σ²)."""
        settings = self.settings
        if settings.prediction_type != "edm":  # a pipeline may call this before set_timesteps
            return sample
        level = self.call.now(timestep).level
        return scale_input(settings.prediction_type, sample, level, settings.sigma_data)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Output | tuple[Tensor, Tensor]:
        """X of the next question, given the network's output at x = `sample`; computed in float32 or better.

        Options that a pipeline passes for other schedulers are refused unless they ask for nothing (eta 0).
        """
        _check_options(options)
        call = self.call
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        noise = Drawn.like(model_output, x, generator)
        state = call.start(timestep, x, noise)
        prediction = self._prediction(model_output[:, : x.shape[1]].to(x.dtype), x, state.level)
        after = call.advance(state, prediction, noise)
        answer = after.x.to(sample.dtype), prediction.x0.to(sample.dtype)
        return Output(*answer) if return_dict else answer

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x_0 + σ ε at the levels that the network is told by `timesteps`; α and σ are exact in any dtype."""
        return self._combined(original_samples, noise, timesteps)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and order of flow schedulers."""
        return self._combined(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v of training, α ε - σ x_0 of the vp process."""
        x0, eps = (
            value.to(torch.promote_types(value.dtype, torch.float32)) for value in (sample, noise)
        )
        return target("v_prediction", x0, eps, self._levels(timesteps, x0), 1.0).to(sample.dtype)

    def _settings(self, mu: float | None) -> Settings:
        if not self.config.use_dynamic_shifting:
            return self.settings
        if mu is None:
            raise ValueError(
                "use_dynamic_shifting is set: pass mu, the μ that the pipeline computes from the image's size"
            )
        return self.settings.shifted(mu, self.config.time_shift_type)

    def _prediction(self, output: Tensor, x: Tensor, level: Level) -> Prediction:
        settings = self.settings
        prediction = predict(settings.prediction_type, output, x, level, settings.sigma_data)
        if settings.clip is None:
            return prediction
        return add_to_x0(
            prediction, prediction.x0.clamp(-settings.clip, settings.clip) - prediction.x0, level
        )

    def _levels(self, timesteps: Tensor, x: Tensor) -> Level:
        """The level of each row."""
        call, time = self._threads.call, self.settings.time
        schedule = self.settings.schedule if call is None else call.plan.process.schedule
        return time.level(schedule, timesteps.reshape(-1, *[1] * (x.ndim - 1))).to(x)

    def _combined(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        pair = Prediction(
            *(value.to(torch.promote_types(value.dtype, torch.float32)) for value in (x0, eps))
        )
        return pair.at(self._levels(timesteps, pair.x0)).to(x0.dtype)


def _check_options(options: dict[str, Any]) -> None:
    asked = {name: value for name, value in options.items() if value}
    if asked:
        raise ValueError(
            f"step got {asked}, which is the sampler's to say: pass it to the sampler, such as DDIM(eta=1.0)"
        )


Numbers = tuple[float, ...]


@lru_cache(32)
def _plan(
    settings: Settings, steps: int | None, timesteps: Numbers | None, sigmas: Numbers | None
) -> Plan:
    """What a call will ask: worked out once for calls that are alike."""
    return Plan.of(
        settings.process,
        settings.sampler,
        _knots(settings, steps, timesteps, sigmas),
        settings.levels,
    )


def _knots(
    settings: Settings, steps: int | None, timesteps: Numbers | None, sigmas: Numbers | None
) -> tuple[Level, ...]:
    schedule = settings.schedule
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas were given: pass one of them")
    if timesteps is not None:
        return _explicit(settings, [settings.time.level(schedule, t) for t in timesteps])
    if sigmas is None:
        if steps is None:
            raise ValueError("num_inference_steps is missing: pass it, timesteps or sigmas")
        return settings.knots(steps)
    if settings.time.variable != "blend":
        return _explicit(
            settings, [schedule.at(-2 * math.log(sigma)) for sigma in sigmas if sigma > 0]
        )
    if np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas))):
        return settings.knots(len(sigmas))
    return _explicit(settings, [schedule.level(sigma) for sigma in sigmas if sigma > 0])


def _explicit(settings: Settings, levels: list[Level]) -> tuple[Level, ...]:
    lowest = settings.schedule.logsnr(1.0)
    logsnrs = [float(level.logsnr) for level in levels]
    if logsnrs and lowest - ROUNDED < logsnrs[0] < lowest:
        logsnrs[0] = lowest
    grid = Explicit((*logsnrs, math.inf))
    return settings.ended(grid.knots(settings.schedule, len(logsnrs)))
