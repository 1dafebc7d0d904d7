"""The samplers, grids and schedules of diffcore as a diffusers scheduler, for any pipeline."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffcore.core.prediction import (
    Prediction,
    add_to_x0,
    at_least_float32,
    edm_norm,
    expand_per_sample,
    predict,
    scale_input,
    target,
)
from diffcore.core.process import TimeConditioning
from diffcore.integrations.diffusers.scheduler.call import PipelineCall
from diffcore.integrations.diffusers.scheduler.call_plan import call_plan
from diffcore.integrations.diffusers.scheduler.generator_noise import GeneratorNoise, Generators
from diffcore.integrations.diffusers.scheduler.scheduler_config import (
    read_scheduler_config,
    scheduler_arguments,
)
from diffcore.integrations.diffusers.scheduler.settings import (
    SchedulerSettings,
    apply_dynamic_shift,
)
from diffcore.io.specs import from_spec, to_spec
from diffcore.samplers import DDIM, Sampler
from diffcore.schedules import Discrete, Grid, Level, Schedule, Trailing

__all__ = ["DiffcoreScheduler", "SchedulerStepOutput"]


@dataclass
class SchedulerStepOutput(SchedulerOutput):
    """The result of `step`.

    Args:
        prev_sample: x of the next evaluation, or the sample.
        pred_original_sample: predicted x_0.
    """

    pred_original_sample: Tensor


class _ThreadCalls(threading.local):
    """The call of each thread; a copy of the scheduler has none."""

    call: PipelineCall | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class DiffcoreScheduler(SchedulerMixin, ConfigMixin):
    """A sampler, a grid and a process with the interface of a diffusers scheduler.

        pipe.scheduler = DiffcoreScheduler.from_config(
            pipe.scheduler.config, sampler=DPMSolverPP("2M"), grid=Trailing()
        )

    `from_config` reads the config of any diffusers scheduler; keyword arguments replace its values,
    which are then not read.
    x is in the scaling of the schedule (vp for tables), for which `init_noise_sigma` is close to 1.
    The progress of a call is kept for each thread, so that several threads can call one pipeline.
    Stochastic samplers draw from the generator that the pipeline passes to `step` (default: torch's
    global one), in the order in which diffusers draws.

    Args:
        sampler: numerical integrator, or its plain data; not an adaptive one.
        grid: rule that places the knots.
        schedule: noise schedule of training; for a flow with dynamic shifting, before the shift.
        prediction_type: output of the network.
        time: time conditioning of the network.
        sigma_data: standard deviation of x_0, for edm and for the scale of the first x.
        last: λ of the last knot; None for clean data. Stable Diffusion ends at index 0 of its
            table.
        clip: bound to which |x_0| is clamped, and ε follows; None does not clamp.
        levels: λ of further knots, such as the bounds of a guidance interval.
        variance_type: learned_range if pipelines pass an output of 2C channels whose second half is
            a learned variance, with which the sampler DDPM() samples; else fixed.
        num_train_timesteps: T, which pipelines (denoising_end of SDXL) and training scripts read.
        use_dynamic_shifting: True if pipelines compute μ from the image size, by which the schedule
            is shifted.
        time_shift_type: exponential (s = e^μ) or linear (s = μ).
        base_image_seq_len: number of tokens at which μ is `base_shift`.
        max_image_seq_len: number of tokens at which μ is `max_shift`.
        base_shift: μ at the smaller number of tokens.
        max_shift: μ at the larger number of tokens.
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
        variance_type: str = "fixed",
        num_train_timesteps: int = 1000,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> None:
        given = dict(locals())
        components = {name: given.pop(name) for name in SchedulerSettings.__dataclass_fields__}
        self.settings = from_spec(SchedulerSettings, components)
        others = {name: value for name, value in given.items() if name not in ("self", "__class__")}
        self.register_to_config(**to_spec(self.settings), **others)  # type: ignore[no-untyped-call]
        self._threads = _ThreadCalls()

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler from the config of a DiffcoreScheduler or of any diffusers scheduler.

        Args:
            config: config of a scheduler, or the scheduler itself, whose class decides where two
                classes have equal options.
            return_unused_kwargs: True also returns the unused keyword arguments, as in diffusers.
            **kwargs: arguments that replace those of the config.

        Returns:
            The scheduler.
        """
        if isinstance(config, SchedulerMixin):
            config = read_scheduler_config(config)
        if isinstance(config, Mapping) and "sampler" not in config:
            config = scheduler_arguments(config, kwargs)
        build = super().from_config
        return build(config, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @cached_property
    def order(self) -> int:
        """Number of evaluations of a step between two noisy knots; pipelines read it."""
        noisy_knots = tuple(self.settings.schedule.at(logsnr) for logsnr in (-1.0, 1.0))
        return self.settings.sampler.evaluations(noisy_knots)

    @property
    def call(self) -> PipelineCall:
        """The call of this thread.

        Raises:
            ValueError: There is none; call `set_timesteps`.
        """
        if self._threads.call is None:
            raise ValueError(
                "set_timesteps has not been called in this thread: call it before the first step"
            )
        return self._threads.call

    @property
    def timesteps(self) -> Tensor:
        """Time input of the network for each evaluation, (evaluations,)."""
        return self.call.timesteps

    @property
    def sigmas(self) -> Tensor:
        """σ/α at each evaluation and after the last, (evaluations + 1,); of a flow σ/(α+σ)."""
        return self.call.sigmas

    @property
    def num_inference_steps(self) -> int:
        """Number of sampler steps in the call of this thread."""
        return 1 + self.call.plan.states[-1].step

    @property
    def init_noise_sigma(self) -> float:
        """√(α² s² + σ²) at the first knot, the factor of unit noise."""
        call = self._threads.call
        level = self.settings.schedule.level(1.0) if call is None else call.plan.states[0].level
        return float(edm_norm(level, self.settings.sigma_data))

    @property
    def begin_index(self) -> int | None:
        """Index of the first evaluation in `timesteps`, or None before it is known."""
        return self.call.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the call at the evaluation `timesteps[begin_index]`."""
        self.call.begin = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Start a call in this thread: define its knots, and so the levels of its evaluations.

        Args:
            num_inference_steps: number of steps of the grid.
            device: device of `timesteps`.
            timesteps: time input at each knot, which replaces the grid; a clean knot follows.
            sigmas: σ/α at each knot, which replaces the grid (for a flow: the time t before its
                shift); a clean knot follows. The default of flow pipelines, n uniform times from 1
                to 1/n, is read as n steps of the grid.
            mu: μ of the shift; required with use_dynamic_shifting.

        Raises:
            ValueError: The arguments define no knots or contradict each other, or the sampler or
                the network cannot be evaluated at them.
        """
        settings = apply_dynamic_shift(self.settings, self.config, mu)
        times, ratios = (
            None if given is None else tuple(map(float, given)) for given in (timesteps, sigmas)
        )
        self._threads.call = PipelineCall.of(
            call_plan(settings, num_inference_steps, times, ratios), device
        )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Input of the network (B, *shape): x, or x / √(α² s² + σ²) for edm."""
        settings = self.settings
        if settings.prediction_type != "edm":  # a pipeline may call this before set_timesteps
            return sample
        level = self.call.state_at(timestep).level
        return scale_input(settings.prediction_type, sample, level, settings.sigma_data)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        eta: float | None = None,
        **options: Any,
    ) -> SchedulerStepOutput | tuple[Tensor, Tensor]:
        """Advance the sampler by one network evaluation, in float32 or a wider dtype.

        Args:
            model_output: (B, *shape) output of the network. Further channels are left out, or with
                variance_type learned_range they are a variance for each channel.
            timestep: time input of the network.
            sample: (B, *shape) x of the evaluation.
            generator: generator of the noise of stochastic samplers.
            return_dict: True returns a `SchedulerStepOutput`, False a tuple.
            eta: η of diffusers' DDIM; only 0 and None are accepted, since the sampler defines η.
            **options: options of other schedulers; only 0, None and False are accepted.

        Returns:
            x of the next evaluation, and the predicted x_0; both (B, *shape) in the dtype of
            `sample`.

        Raises:
            ValueError: An option is set that the sampler defines, the call is over, or `timestep`
                is not one of `timesteps`.
        """
        _check_options({"eta": eta} | options)
        call = self.call
        x = at_least_float32(sample)
        noise = GeneratorNoise.of(
            len(x), x.shape[1:], x.device, generator, model_output.dtype, x.dtype
        )
        state = call.start(timestep, x, noise)
        prediction = self._prediction(model_output.to(x.dtype), x, state.level)
        after = call.advance(state, prediction, noise)
        result = after.x.to(sample.dtype), prediction.x0.to(sample.dtype)
        return SchedulerStepOutput(*result) if return_dict else result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x_0 + σ ε (B, *shape) at the levels of `timesteps` (B,).

        Args:
            original_samples: (B, *shape) x_0.
            noise: (B, *shape) ε.
            timesteps: (B,) time inputs of the network.

        Returns:
            (B, *shape) noisy samples in the dtype of x_0.
        """
        pair = Prediction(at_least_float32(original_samples), at_least_float32(noise))
        return pair.at(self._levels(timesteps, pair.x0)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the name and the argument order of flow schedulers.

        Args:
            sample: (B, *shape) x_0.
            timestep: (B,) time inputs of the network.
            noise: (B, *shape) ε.

        Returns:
            (B, *shape) noisy samples in the dtype of x_0.
        """
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target v = α ε - σ x_0 of the vp process at the levels of `timesteps`.

        Args:
            sample: (B, *shape) x_0.
            noise: (B, *shape) ε.
            timesteps: (B,) time inputs of the network.

        Returns:
            (B, *shape) v in the dtype of x_0.
        """
        x0, eps = at_least_float32(sample), at_least_float32(noise)
        return target("v_prediction", x0, eps, self._levels(timesteps, x0), 1.0).to(sample.dtype)

    def _prediction(self, output: Tensor, x: Tensor, level: Level) -> Prediction:
        settings, channels = self.settings, x.shape[1]
        mean, rest = output[:, :channels], output[:, channels:]
        prediction = predict(settings.prediction_type, mean, x, level, settings.sigma_data)
        if settings.variance_type == "learned_range" and rest.shape == x.shape:
            prediction = replace(prediction, variance=(rest + 1) / 2)
        if settings.clip is None:
            return prediction
        change = prediction.x0.clamp(-settings.clip, settings.clip) - prediction.x0
        return add_to_x0(prediction, change, level)

    def _levels(self, timesteps: Tensor, x: Tensor) -> Level:
        """The level of each sample, whose values broadcast against x."""
        call, time = self._threads.call, self.settings.time
        schedule = self.settings.schedule if call is None else call.plan.process.schedule
        return time.level(schedule, expand_per_sample(timesteps, x)).to(x)


def _check_options(options: dict[str, Any]) -> None:
    given = {name: value for name, value in options.items() if value}
    if given:
        raise ValueError(
            f"step got {given}, which the sampler defines: set it there, such as "
            f"sampler=DDIM(eta={float(given.get('eta', 1.0)):g})"
        )
