"""A network with its process, sampler, grid and guidance as a diffusers pipeline.

    model_index.json    shape, range and classes of the data; guidance; number of steps
    scheduler/          sampler, grid, schedule, prediction type, time conditioning (a
    DiffcoreScheduler) unet/ or transformer/, vae/    configs and safetensors

The sampling loop is that of diffcore: every sampler and every guidance rule works, and seeds give
the samples of `diffcore.sample`.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from diffcore.core.denoiser import Denoiser
from diffcore.core.noise import Noise
from diffcore.core.process import Process
from diffcore.guidance import CFG, Guidance, find_weaker_networks, load_weaker_networks
from diffcore.integrations.diffusers.loading.network import MeanOutput, mean_network
from diffcore.integrations.diffusers.loading.vae import Latents
from diffcore.integrations.diffusers.pipeline.model_index import (
    COMPONENTS,
    PipelineSettings,
    check_folder,
)
from diffcore.integrations.diffusers.pipeline.observed_sampler import ObservedSampler
from diffcore.integrations.diffusers.scheduler.generator_noise import GeneratorNoise, Generators
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.settings import SchedulerSettings
from diffcore.io.specs import from_spec, to_spec
from diffcore.run import Run
from diffcore.samplers import Sampler, State
from diffcore.sampling import images
from diffcore.sampling.generation import (
    DEFAULT_GRID,
    DEFAULT_SAMPLER,
    check_sampling,
    evaluation_mode,
    insert_levels,
)
from diffcore.sampling.loop import integrate
from diffcore.schedules import Grid, Level

__all__ = ["DiffcorePipeline"]

OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any]]


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
    ) -> None:
        given = dict(locals())
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("the pipeline has one network: pass either unet or transformer")
        parts = {"scheduler": scheduler, "unet": unet, "transformer": transformer, "vae": vae}
        self.register_modules(**parts)  # type: ignore[no-untyped-call]
        self._settings = from_spec(
            PipelineSettings, {f.name: to_spec(given[f.name]) for f in fields(PipelineSettings)}
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
            denoiser: network with its process.
            sampler: default sampler of a call.
            grid: default grid of a call.
            num_inference_steps: default number of steps of a call.
            guidance: default guidance rule of a call.
            vae: decoder of latents, if the network generates latents.

        Returns:
            The pipeline.

        Raises:
            ValueError: The network is no ModelMixin of diffusers, and cannot be saved in a
                pipeline.
        """
        network, process = denoiser.network, denoiser.process
        if isinstance(network, MeanOutput):
            network = network.network
        if not isinstance(network, ModelMixin):
            raise ValueError(
                f"the network is a {type(network).__name__}, and a pipeline holds ModelMixins of "
                "diffusers: make it one "
                f"(ModelMixin, ConfigMixin), or sample the run itself"
            )
        name = (
            "unet"
            if any("UNet" in kind.__name__ for kind in type(network).__mro__)
            else "transformer"
        )
        scheduler = DiffcoreScheduler(
            sampler, grid, process.schedule, process.prediction, process.time, process.sigma_data
        )
        parts: dict[str, Any] = {name: network, "vae": vae}
        values = {
            f.name: getattr(process, f.name)
            for f in fields(PipelineSettings)
            if hasattr(process, f.name)
        }
        return cls(
            scheduler, **parts, **values, guidance=guidance, num_inference_steps=num_inference_steps
        )

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
                "config and safetensors; "
                f"pickled weights are not opened, convert them first"
            ) from None

    @property
    def network(self) -> nn.Module:
        """The network: the UNet or the transformer."""
        return self.transformer if self.unet is None else self.unet

    @property
    def settings(self) -> SchedulerSettings:
        """The settings of the scheduler.

        Raises:
            ValueError: It is no DiffcoreScheduler, or it clips x_0.
        """
        if not isinstance(self.scheduler, DiffcoreScheduler):
            raise ValueError(
                f"the scheduler is a {type(self.scheduler).__name__}, expected a "
                "DiffcoreScheduler: "
                f"DiffcoreScheduler.from_config(scheduler.config) makes one of it"
            )
        settings = self.scheduler.settings
        if settings.clip is not None:
            raise ValueError(
                f"the scheduler clips x_0 to ±{settings.clip:g}, which this pipeline does not: "
                f"DiffcoreScheduler.from_config(scheduler.config, clip=None)"
            )
        return settings

    @property
    def process(self) -> Process:
        """The process that the network was trained on."""
        return replace(self.settings.process, **self._settings.of_process)

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
        """Draw images.

        With seeds each image is a function of its seed and label, and with output_type "latent"
        they are the samples of `sample(pipe.denoiser, ..., seeds=seeds, batch_size=len(seeds))`,
        bit for bit. With torch generators they are drawn in the way of diffusers pipelines.

        Args:
            batch_size: number of images N, if no other argument defines it; default 1.
            class_labels: N labels, or one for all; None for unconditional images.
            seeds: N integers of 64 bits.
            generator: generators that replace the seeds: N, one for all, or None for torch's global
                one.
            num_inference_steps: number of steps; default: that of the pipeline.
            guidance: guidance rule; default: that of the pipeline.
            sampler: numerical integrator; default: that of the scheduler.
            grid: rule that places the knots; default: that of the scheduler.
            output_type: pil, np (N, H, W, C) or pt (N, C, H, W) in [0, 1], or latent (x_0 of the
                network).
            return_dict: True returns an object with `images`, False a tuple.
            callback_on_step_end: called with the pipeline, the index of the step, its time input,
                and {"latents": x}; sampling continues with the latents of the dictionary that it
                returns. `pipe._interrupt = True` stops it there.

        Returns:
            The images.

        Raises:
            ValueError: The arguments do not fit together. It is raised before the first step.
        """
        self._interrupt = False
        denoiser, rule = (
            self.denoiser,
            load_weaker_networks(guidance or self.guidance, self._weaker),
        )
        process, sampler = denoiser.process, sampler or self.settings.sampler
        count = _count(
            batch_size=batch_size, class_labels=class_labels, seeds=seeds, generator=generator
        )
        knots = insert_levels(self._knots(num_inference_steps, grid), rule.levels(process))
        numbers, condition = range(count) if seeds is None else seeds, _labels(class_labels, count)
        labels = check_sampling(process, knots, numbers, condition, rule, count, sampler)
        self._check_output(output_type)
        noise = self._noise(process, count, seeds, generator)
        labels, x = _on(labels, noise.device), noise.first_sample(knots[0], process.sigma_data)
        with (
            evaluation_mode(denoiser, *find_weaker_networks(rule)),
            self.progress_bar(total=len(knots) - 1) as bar,
        ):
            observed = ObservedSampler(
                sampler, self._observer(process, bar.update, callback_on_step_end)
            )
            x, _ = integrate(denoiser, observed, x, knots, noise, rule, labels)
        result: Any = (x if output_type == "latent" else self._to_output(x, output_type),)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return ImagePipelineOutput(*result) if return_dict else result

    def _knots(self, steps: int | None, grid: Grid | None) -> tuple[Level, ...]:
        settings, steps = (
            self.settings,
            self._settings.num_inference_steps if steps is None else steps,
        )
        return replace(settings, grid=grid or settings.grid).knots(steps)

    def _weaker(self, folder: str) -> Denoiser:
        """The denoiser of a run that a guidance rule names by its folder."""
        return Run(Path(folder)).denoiser(self._execution_device)

    def _noise(
        self, process: Process, count: int, seeds: Sequence[int] | None, generator: Generators
    ) -> Noise:
        device = self._execution_device
        if seeds is not None:
            return Noise(torch.tensor(seeds), process.shape, device)
        dtype = next((p.dtype for p in self.network.parameters()), torch.float32)
        rows = torch.zeros(count, dtype=torch.int64)
        return GeneratorNoise(rows, process.shape, device, generator=generator, draw_dtype=dtype)

    def _observer(
        self, process: Process, count: Callable[[], Any], callback: Callback | None
    ) -> Callable[[State, State], State]:
        def observe(before: State, after: State) -> State:
            count()
            if callback is not None:
                time_input = float(process.time(before.level))
                result = callback(self, before.step, time_input, {"latents": after.x})
                after = replace(after, x=result.get("latents", after.x))
            return replace(after, remaining=()) if self._interrupt else after

        return observe

    @property
    def _image_process(self) -> Process:
        """The process of the images: of the samples, or of what the VAE decodes from them."""
        process = self.process
        if self.vae is None:
            return process
        channels = self.vae.config.get("out_channels", 3)
        return replace(process, shape=(channels, *process.shape[1:]), low=-1.0, high=1.0)

    def _check_output(self, output_type: str) -> None:
        """Raise ValueError, before sampling, if the samples cannot be returned as `output_type`."""
        if output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type is {output_type!r}, expected one of {', '.join(get_args(OutputType))}"
            )
        if output_type != "latent" and not images.is_image(image_process := self._image_process):
            raise ValueError(
                f"samples of shape {image_process.shape} are not images of 1 or 3 channels: pass "
                "output_type='latent' for x_0"
            )

    def _to_output(self, x: Tensor, output_type: OutputType) -> Any:
        image_process = self._image_process
        if self.vae is not None:
            x = Latents(self.vae).decode(x.to(self.vae.dtype))
        if output_type == "pil":
            return [images.to_image(array) for array in images.to_pixels(x, image_process)]
        unit = images.to_unit_range(x, image_process)
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def _count(**given: Any) -> int:
    """The number of images that the arguments define."""
    lengths = {
        name: value if name == "batch_size" else _length(value) for name, value in given.items()
    }
    counts = {name: count for name, count in lengths.items() if count is not None}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} by {name}" for name, count in counts.items())
        raise ValueError(f"the call defines {text}: pass as many of each")
    if given["seeds"] is not None and given["generator"] is not None:
        raise ValueError("seeds and generator were given: pass one of them")
    return next(iter(counts.values()), 1)


def _length(value: Any) -> int | None:
    """Length of a list or tensor; None for a single value, which is for all."""
    listed = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, Sequence)
    return len(value) if listed else None


def _labels(class_labels: Any, count: int) -> Tensor | None:
    if class_labels is None:
        return None
    labels = torch.as_tensor(class_labels, device="cpu")
    return labels if labels.ndim else labels.expand(count)


def _on(labels: Tensor | None, device: torch.device) -> Tensor | None:
    return None if labels is None else labels.to(device)
