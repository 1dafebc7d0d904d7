"""A network with its process, sampler, grid and guidance as a diffusers pipeline.

    model_index.json        shape, range and classes of the data; guidance; number of steps
    scheduler/              a DiffcoreScheduler: sampler, grid, schedule, prediction type, time
    unet/ or transformer/   config and safetensors of the network
    vae/                    config and safetensors of the decoder, for latents

The sampling loop is that of diffcore: every sampler and every guidance rule works, and the samples
of given seeds are those of `diffcore.sample`.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from diffcore.core.conditions import labels_of
from diffcore.core.denoiser import Denoiser
from diffcore.core.network import evaluation_dtype, unwrap
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, find_networks, load_weaker_networks
from diffcore.integrations.diffusers.loading.network import MeanOutput, mean_network
from diffcore.integrations.diffusers.pipeline.call_arguments import count_images, expand_labels
from diffcore.integrations.diffusers.pipeline.model_index import (
    COMPONENTS,
    PROCESS_SETTINGS,
    PipelineSettings,
    check_folder,
)
from diffcore.integrations.diffusers.pipeline.observed_sampler import ObservedSampler
from diffcore.integrations.diffusers.pipeline.output import (
    OutputType,
    check_output_type,
    convert_samples,
)
from diffcore.integrations.diffusers.scheduler.generator_noise import GeneratorNoise, Generators
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.io.specs import from_spec, to_spec
from diffcore.run import Run
from diffcore.samplers import Sampler, State
from diffcore.sampling.generation import (
    DEFAULT_GRID,
    DEFAULT_SAMPLER,
    check_sampling,
    evaluation_mode,
    warn_of_non_finite,
)
from diffcore.sampling.loop import integrate
from diffcore.sampling.mode_changes import insert_levels
from diffcore.schedules import Grid, Level

__all__ = ["DiffcorePipeline"]

Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any]]


class _Call(NamedTuple):
    """The checked arguments of one call, for N samples.

    Args:
        sampler: numerical integrator.
        knots: levels between which the sampler steps.
        guidance: guidance rule, whose weaker networks are loaded.
        noise: noise of the samples.
        labels: (N,) labels on the host; None for unconditional samples.
    """

    sampler: Sampler
    knots: tuple[Level, ...]
    guidance: Guidance
    noise: Noise
    labels: Tensor | None


class DiffcorePipeline(DiffusionPipeline):
    """A diffusers network with everything that is needed to sample it.

        pipe = DiffcorePipeline.from_pretrained("runs/digits/pipeline")
        images = pipe(class_labels=[3, 5], seeds=[0, 1]).images

    For unconditional and class-conditional networks of images or of VAE latents.

    Args:
        scheduler: process, and default sampler and grid of a call.
        unet: the network if it is a UNet.
        transformer: the network if it is a transformer.
        vae: decoder of latents; None if the network generates images.
        shape: shape of one x_0, the input of the network.
        low: lower bound of the data.
        high: upper bound of the data.
        classes: number of class labels; 0 for none. The label `classes` is the null label.
        dropout: share of training samples without their label.
        guidance: default guidance rule of a call, or its plain data.
        num_inference_steps: default number of steps of a call.
        estimate: what the pair of the network is (`Process.estimate`).

    Raises:
        ValueError: Parts are missing, or contradict each other.
    """

    model_cpu_offload_seq: Any = "unet->transformer->vae"
    _optional_components: Any = list(COMPONENTS)  # noqa: RUF012  # as diffusers has it
    _callback_tensor_inputs: Any = ("latents",)
    config: Any  # a mapping with attributes
    scheduler: Any
    unet: Any
    transformer: Any
    vae: Any

    def __init__(
        self,
        scheduler: DiffcoreScheduler,
        unet: ModelMixin | None = None,
        transformer: ModelMixin | None = None,
        vae: ModelMixin | None = None,
        shape: list[int] | Sequence[int] = (1, 8, 8),
        low: float | str = -1.0,
        high: float | str = 1.0,
        classes: int = 0,
        dropout: float = 0.0,
        guidance: dict[str, Any] | Guidance = CFG(1.0),
        num_inference_steps: int = 25,
        estimate: str = "posterior_mean",
    ) -> None:
        given = dict(locals())
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("the pipeline has one network: pass either unet or transformer")
        parts = {"scheduler": scheduler, "unet": unet, "transformer": transformer, "vae": vae}
        self.register_modules(**parts)  # type: ignore[no-untyped-call]
        self._settings = from_spec(
            PipelineSettings, {f.name: given[f.name] for f in fields(PipelineSettings)}
        )
        self.register_to_config(**to_spec(self._settings))  # type: ignore[no-untyped-call]
        self._interrupt = False
        self.process  # raises if the settings contradict each other

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        sampler: Sampler = DEFAULT_SAMPLER,
        grid: Grid = DEFAULT_GRID,
        num_inference_steps: int = 25,
        guidance: Guidance = CFG(1.0),
        vae: ModelMixin | None = None,
    ) -> Self:
        """The pipeline of a denoiser.

        Args:
            denoiser: network with its process. A wrapper such as that of `torch.compile` is left
                out, since a pipeline could not be saved with it.
            sampler: default sampler of a call.
            grid: default grid of a call.
            num_inference_steps: default number of steps of a call.
            guidance: default guidance rule of a call.
            vae: decoder of latents, if the network generates latents.

        Returns:
            The pipeline.

        Raises:
            ValueError: The network is no ModelMixin of diffusers, and so cannot be saved in a
                pipeline; or its process has named conditions.
        """
        network, process = unwrap(denoiser.network), denoiser.process
        if process.conditions:
            raise ValueError(
                f"the network has the conditions {', '.join(process.conditions)}, which the calls "
                "of a pipeline do not have: sample the run itself"
            )
        if isinstance(network, MeanOutput):
            network = unwrap(network.network)
        if not isinstance(network, ModelMixin):
            raise ValueError(
                f"the network is a {type(network).__name__}, and a pipeline holds ModelMixins of "
                "diffusers: derive its class from ModelMixin and ConfigMixin, or sample the run "
                "itself"
            )
        is_unet = any("UNet" in cls.__name__ for cls in type(network).__mro__)
        kind = "fixed" if process.variance == "fixed" else "learned_range"
        description = process.schedule, process.prediction, process.time, process.sigma_data
        scheduler = DiffcoreScheduler(sampler, grid, *description, variance_type=kind)
        parts: dict[str, Any] = {"unet" if is_unet else "transformer": network, "vae": vae}
        parts |= {name: getattr(process, name) for name in PROCESS_SETTINGS}
        return cls(scheduler, **parts, guidance=guidance, num_inference_steps=num_inference_steps)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Load a saved pipeline. No code of the folder is executed, and no pickle is opened.

        Args:
            pretrained_model_name_or_path: folder, or name on a hub.
            **options: options of diffusers (dtype, device_map, variant, a component by name).

        Returns:
            The pipeline.

        Raises:
            ValueError: A part is missing, of an unknown class, or without safetensors.
        """
        for name in ("custom_pipeline", "trust_remote_code"):
            if options.get(name):
                raise ValueError(
                    f"{name} is {options[name]!r}, but code that lies beside weights is not "
                    "executed: leave it out"
                )
        if not options.setdefault("use_safetensors", True):
            raise ValueError(
                "use_safetensors is False, but pickled weights are not opened: convert them first"
            )
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(cls.download(pretrained_model_name_or_path, **options))
        check_folder(folder, options)
        try:
            return super().from_pretrained(folder, **options)
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be read ({' '.join(str(error).split())}): each part needs its "
                "config and safetensors; pickled weights are not opened, convert them first"
            ) from None

    @property
    def network(self) -> nn.Module:
        """The network: the UNet or the transformer."""
        return self.transformer if self.unet is None else self.unet

    @property
    def settings(self) -> SchedulerSettings:
        """The settings of the scheduler.

        Raises:
            ValueError: The scheduler is no DiffcoreScheduler, or it clips x_0.
        """
        if not isinstance(self.scheduler, DiffcoreScheduler):
            raise ValueError(
                f"the scheduler is a {type(self.scheduler).__name__}, expected a "
                "DiffcoreScheduler: DiffcoreScheduler.from_config(scheduler.config) converts it"
            )
        settings = self.scheduler.settings
        if settings.clip is not None:
            raise ValueError(
                f"the scheduler clips x_0 to ±{settings.clip:g}, which this pipeline does not "
                "support: use DiffcoreScheduler.from_config(scheduler.config, clip=None)"
            )
        return settings

    @property
    def process(self) -> Process:
        """The process that the network was trained on."""
        return replace(self.settings.process, **self._settings.process_settings())

    @property
    def guidance(self) -> Guidance:
        """The default guidance rule of a call."""
        return self._settings.guidance

    @property
    def denoiser(self) -> Denoiser:
        """The network with its process, for `diffcore.sample`."""
        process = self.process
        return Denoiser(mean_network(self.network, process), process)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        seeds: Sequence[int] | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        guidance: Guidance | None = None,
        sampler: Sampler | None = None,
        grid: Grid | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw N images.

        With seeds each image is a function of its seed and label, and with output_type "latent"
        they are the samples of `sample(pipe.denoiser, ..., seeds=seeds, batch_size=len(seeds))`,
        bit for bit. With torch generators the noise is drawn in the order of diffusers pipelines.

        Args:
            batch_size: number of images N, if no other argument defines it; default 1.
            class_labels: N labels, or one for all; None for unconditional images.
            seeds: N integers of 64 bits.
            generator: generators that replace the seeds: N, one for all, or None for torch's global
                one.
            num_inference_steps: number of steps; None for that of the pipeline.
            guidance: guidance rule; None for that of the pipeline.
            sampler: numerical integrator; None for that of the scheduler.
            grid: rule that places the knots; None for that of the scheduler.
            output_type: pil, np (N, H, W, C) or pt (N, C, H, W) in [0, 1], or latent (x_0 of the
                network).
            return_dict: True returns an object with `images`, False a tuple.
            callback_on_step_end: called with the pipeline, the index of the step, its time input,
                and {"latents": x}; sampling continues with the latents of the dictionary that it
                returns. `pipe._interrupt = True` stops it there.

        Returns:
            The N images in the type of the output.

        Raises:
            ValueError: The arguments contradict each other. It is raised before the first step.
        """
        self._interrupt = False
        call = self._prepare_call(
            batch_size, class_labels, seeds, generator, num_inference_steps, guidance, sampler, grid
        )
        process, vae = self.process, self.vae
        check_output_type(output_type, process, vae)
        x = self._sample(call, callback_on_step_end)
        images = convert_samples(x, output_type, process, vae)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _prepare_call(
        self,
        batch_size: int | None,
        class_labels: Any,
        seeds: Sequence[int] | None,
        generator: Generators,
        steps: int | None,
        guidance: Guidance | None,
        sampler: Sampler | None,
        grid: Grid | None,
    ) -> _Call:
        """Complete the arguments of a call by the defaults of the pipeline, and check them."""
        process, sampler = self.process, sampler or self.settings.sampler
        rule = load_weaker_networks(guidance or self.guidance, self._load_weaker_network)
        count = count_images(
            batch_size=batch_size, class_labels=class_labels, seeds=seeds, generator=generator
        )
        knots = insert_levels(self._knots(steps, grid), rule.levels(process))
        keys, labels = range(count) if seeds is None else seeds, expand_labels(class_labels, count)
        given = check_sampling(process, knots, keys, labels, rule, count, sampler)
        noise = self._noise(process, count, seeds, generator)
        return _Call(sampler, knots, rule, noise, labels_of(given))

    def _sample(self, call: _Call, callback: Callback | None) -> Tensor:
        """The samples (N, *shape) of a call, with a progress bar that counts sampler steps."""
        denoiser, noise = self.denoiser, call.noise
        x = noise.first_sample(call.knots[0], denoiser.process.sigma_data)
        labels = None if call.labels is None else call.labels.to(noise.device)
        with (
            evaluation_mode(denoiser, *find_networks(call.guidance)),
            self.progress_bar(total=len(call.knots) - 1) as bar,
        ):
            sampler = ObservedSampler(
                call.sampler, self._observer(denoiser.process, bar.update, callback)
            )
            x, _ = integrate(
                denoiser, sampler, x, call.knots, noise, call.guidance, labels, checked=True
            )
        warn_of_non_finite(x)
        return x

    def _knots(self, steps: int | None, grid: Grid | None) -> tuple[Level, ...]:
        settings = self.settings
        steps = self._settings.num_inference_steps if steps is None else steps
        return replace(settings, grid=grid or settings.grid).knots(steps)

    def _load_weaker_network(self, folder: str) -> Denoiser:
        """The denoiser of a run that a guidance rule names by its folder."""
        return Run(Path(folder)).denoiser(self._execution_device)

    def _noise(
        self, process: Process, count: int, seeds: Sequence[int] | None, generator: Generators
    ) -> Noise:
        device = self._execution_device
        if seeds is not None:
            return Noise(torch.tensor(seeds), process.shape, device)
        dtype = evaluation_dtype(self.network, torch.float32)
        return GeneratorNoise.of(count, process.shape, device, generator, dtype)

    def _observer(
        self, process: Process, count: Callable[[], Any], callback: Callback | None
    ) -> Callable[[State, State], State]:
        """A function that reports each step to the progress bar and the callback."""

        def observe(before: State, after: State) -> State:
            count()
            if callback is not None:
                time_input = float(process.time(before.level))
                result = callback(self, before.step, time_input, {"latents": after.x})
                after = replace(after, x=result.get("latents", after.x))
            return replace(after, remaining=()) if self._interrupt else after

        return observe
