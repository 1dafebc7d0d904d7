"""A network with its process, sampler, grid and guidance as a pipeline of diffusers: saved, loaded, moved and called as theirs.

    model_index.json    shape, range and classes of the data; guidance; number of steps
    scheduler/          sampler, grid, schedule, prediction type, time conditioning (a DiffcoreScheduler)
    unet/ or transformer/, vae/    configs and safetensors

The loop is ours: every sampler and every rule of guidance works, and seeds give the samples of `diffcore.sample`.
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
from diffcore.integrations.diffusers.pipeline.model_index import COMPONENTS, Facts, check_folder
from diffcore.integrations.diffusers.pipeline.progress import Followed
from diffcore.integrations.diffusers.scheduler.generator_noise import Drawn, Generators
from diffcore.integrations.diffusers.scheduler.scheduler import DiffcoreScheduler
from diffcore.integrations.diffusers.scheduler.settings import Settings
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

OutputType = Literal["pil", "np", "pt", "latent"]
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any]]


class DiffcorePipeline(DiffusionPipeline):
    """A network of diffusers with all that sampling it takes.

        pipe = DiffcorePipeline.from_pretrained("runs/digits/pipeline")
        images = pipe(class_labels=[3, 5], seeds=[0, 1]).images

    Unconditional and class-conditional networks, of images or of a VAE's latents.

    Args:
        scheduler: sampler, grid and process, unless a call names others.
        unet: the network, or
        transformer: the network.
        vae: where it works on latents.
        shape: of one x_0, as the network sees it.
        low: lower end of the data's range.
        high: upper end of the data's range.
        classes: number of class labels, 0 for none; the label `classes` itself is the null label.
        dropout: share of training samples without their label.
        guidance: the rule, or its spec, unless a call names another.
        num_inference_steps: unless a call names another number.

    Raises:
        ValueError: parts that are missing or contradict each other.
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
        self._facts = from_spec(Facts, {f.name: to_spec(given[f.name]) for f in fields(Facts)})
        self.register_to_config(**to_spec(self._facts))  # type: ignore[no-untyped-call]
        self._interrupt = False
        self.process  # refuses what contradicts itself

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
        """The pipeline of a denoiser, and how it is sampled unless a call says otherwise.

        Raises:
            ValueError: its network is no ModelMixin of diffusers, which alone can be saved in a pipeline.
        """
        network, process = denoiser.network, denoiser.process
        if isinstance(network, MeanOutput):
            network = network.network
        if not isinstance(network, ModelMixin):
            raise ValueError(
                f"the network is a {type(network).__name__}, and a pipeline holds ModelMixins of diffusers: make it one "
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
        said = {f.name: getattr(process, f.name) for f in fields(Facts) if hasattr(process, f.name)}
        return cls(
            scheduler, **parts, **said, guidance=guidance, num_inference_steps=num_inference_steps
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Load a saved pipeline; options are those of diffusers (dtype, device_map, variant, a component by name).

        No code that comes with it is run, and no pickle is opened.

        Raises:
            ValueError: a part is missing, or of a class that is not known, or has no safetensors.
        """
        for name in ("custom_pipeline", "trust_remote_code"):
            if options.get(name):
                raise ValueError(
                    f"{name} is {options[name]!r}, but code that comes with weights is not run: leave it out"
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
                f"{folder} cannot be read ({' '.join(str(error).split())}): each part needs its config and safetensors; "
                f"pickled weights are not opened, convert them first"
            ) from None

    @property
    def network(self) -> nn.Module:
        """The UNet or transformer."""
        return self.transformer if self.unet is None else self.unet

    @property
    def settings(self) -> Settings:
        """What the scheduler says.

        Raises:
            ValueError: it is not ours, or says what this loop does not do.
        """
        if not isinstance(self.scheduler, DiffcoreScheduler):
            raise ValueError(
                f"the scheduler is a {type(self.scheduler).__name__}, expected a DiffcoreScheduler: "
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
        """What the network was trained on."""
        return replace(self.settings.process, **self._facts.of_process)

    @property
    def guidance(self) -> Guidance:
        """The rule unless a call names another."""
        return self._facts.guidance

    @property
    def denoiser(self) -> Denoiser:
        """The network with its process, for `diffcore.sample` and all that takes one."""
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
        """Images, as many as there are labels, seeds or generators, or `batch_size`; one by default.

        With seeds each image is a function of its own seed and label, and with output_type "latent" they are the samples of
        `sample(pipe.denoiser, ..., seeds=seeds, batch_size=len(seeds))`, bit for bit. With torch generators (one, one an image,
        or none: torch's global one) they are drawn as pipelines of diffusers draw.

        Args:
            batch_size: how many, where nothing else says it.
            class_labels: one an image, or one for all; none is unconditional.
            seeds: integers of 64 bits.
            generator: in place of seeds.
            num_inference_steps: steps between the knots.
            guidance: the rule.
            sampler: the integrator.
            grid: which levels it visits.
            output_type: pil, np (N, H, W, C) or pt (N, C, H, W) within [0, 1], or latent, x_0 as the network sees it.
            return_dict: an object with `images`, or a tuple of them.
            callback_on_step_end: called with the pipeline, the step's number, what the network was told in it, and {"latents":
                x}; returns that dictionary, whose latents the run goes on with. `pipe._interrupt = True` ends the run there.

        Raises:
            ValueError: before the first step, where the network cannot be sampled so.
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
            followed = Followed(sampler, self._told(process, bar.update, callback_on_step_end))
            x, _ = integrate(denoiser, followed, x, knots, noise, rule, labels)
        answer: Any = (x if output_type == "latent" else self._pictures(x, output_type),)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return ImagePipelineOutput(*answer) if return_dict else answer

    def _knots(self, steps: int | None, grid: Grid | None) -> tuple[Level, ...]:
        settings, steps = self.settings, self._facts.num_inference_steps if steps is None else steps
        return replace(settings, grid=grid or settings.grid).knots(steps)

    def _weaker(self, folder: str) -> Denoiser:
        """Another network, which a rule of guidance names by its run."""
        return Run(Path(folder)).denoiser(self._execution_device)

    def _noise(
        self, process: Process, count: int, seeds: Sequence[int] | None, generator: Generators
    ) -> Noise:
        device = self._execution_device
        if seeds is not None:
            return Noise(torch.tensor(seeds), process.shape, device)
        dtype = next((p.dtype for p in self.network.parameters()), torch.float32)
        rows = torch.zeros(count, dtype=torch.int64)
        return Drawn(rows, process.shape, device, generator=generator, drawn=dtype)

    def _told(
        self, process: Process, count: Callable[[], Any], callback: Callback | None
    ) -> Callable[[State, State], State]:
        def tell(before: State, after: State) -> State:
            count()
            if callback is not None:
                told = float(process.time(before.level))
                answer = callback(self, before.step, told, {"latents": after.x})
                after = replace(after, x=answer.get("latents", after.x))
            return replace(after, remaining=()) if self._interrupt else after

        return tell

    @property
    def _pictured(self) -> Process:
        """The process of what is shown: of the samples, or of what the VAE makes of them."""
        process = self.process
        if self.vae is None:
            return process
        channels = self.vae.config.get("out_channels", 3)
        return replace(process, shape=(channels, *process.shape[1:]), low=-1.0, high=1.0)

    def _check_output(self, output_type: str) -> None:
        """Refuse before sampling what could not be shown after it."""
        if output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type is {output_type!r}, expected one of {', '.join(get_args(OutputType))}"
            )
        if output_type != "latent" and not images.is_image(pictured := self._pictured):
            raise ValueError(
                f"samples of shape {pictured.shape} are not images of 1 or 3 channels: pass output_type='latent' for x_0"
            )

    def _pictures(self, x: Tensor, output_type: OutputType) -> Any:
        pictured = self._pictured
        if self.vae is not None:
            x = Latents(self.vae).decode(x.to(self.vae.dtype))
        if output_type == "pil":
            return [images.to_image(array) for array in images.to_pixels(x, pictured)]
        unit = images.to_unit_range(x, pictured)
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def _count(**given: Any) -> int:
    """How many images all of these ask for."""
    asked = {
        name: value if name == "batch_size" else _length(value) for name, value in given.items()
    }
    counts = {name: count for name, count in asked.items() if count is not None}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} by {name}" for name, count in counts.items())
        raise ValueError(f"the call asks for {text}: pass as many of each")
    if given["seeds"] is not None and given["generator"] is not None:
        raise ValueError("seeds and generator were given: pass one of them")
    return next(iter(counts.values()), 1)


def _length(value: Any) -> int | None:
    """Of a list or tensor; one of anything else is for all."""
    listed = value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, Sequence)
    return len(value) if listed else None


def _labels(class_labels: Any, count: int) -> Tensor | None:
    if class_labels is None:
        return None
    labels = torch.as_tensor(class_labels, device="cpu")
    return labels if labels.ndim else labels.expand(count)


def _on(labels: Tensor | None, device: torch.device) -> Tensor | None:
    return None if labels is None else labels.to(device)
