"""`diffcore serve`: a web service that draws samples of a run or a diffusers pipeline."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffcore.cli.arguments import join_option
from diffcore.cli.commands.sample import find_device
from diffcore.cli.image_model import (
    ImageModel,
    PipelineOptions,
    load_guidance,
    load_image_model,
    read_sampling_settings,
)
from diffcore.cli.run_defaults import parse_with_run_defaults
from diffcore.guidance import CFG, Guidance
from diffcore.io.extras import import_extra
from diffcore.io.parser import ComponentParser
from diffcore.run import AVERAGED
from diffcore.samplers import Sampler
from diffcore.sampling import DEFAULT_GRID, DEFAULT_SAMPLER
from diffcore.schedules import Grid
from diffcore.serving import SamplingLimits, SamplingService

__all__ = ["ServeRequest", "listen", "main"]


@dataclass(frozen=True)
class ServeRequest:
    """Which model to serve, where, and how.

    Args:
        host: address to listen on; the default is reached from this machine only. The service knows
            no users: listen on another address only behind a server that does.
        port: port to listen on; 0: a free one, which is printed.
        rows: number of rows in each call of the network, filled with the evaluations of several
            requests. The last bits of the samples depend on it.
        limits: bounds on requests.
        timeout: maximum seconds of a request, after which it is given up.
        sampler: numerical integrator of requests that name none.
        grid: rule that places the noise levels of requests that name none.
        steps: number of sampler steps of requests that name none.
        guidance: guidance rule of requests that name none.
        prompt: text prompt of a text-conditioned pipeline, which requests name by its index as
            label; may be repeated.
        negative: negative prompt that guidance moves away from.
        lora: adapter of a pipeline, as FILE or FILE=STRENGTH; may be repeated.
        height: height of a pipeline's images in pixels; 0: the network's default.
        width: width of a pipeline's images in pixels; 0: the network's default.
        weights: weights of a run: averaged, raw, a checkpoint such as step-00000400, or a
            safetensors file.
        threads: number of processor threads; 0: torch's default. The last bits of the samples
            depend on it.
        device: device of the network: auto, cpu, cuda, ...
    """

    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 32
    limits: SamplingLimits = field(default_factory=SamplingLimits)
    timeout: float = 300.0
    sampler: Sampler = field(default_factory=lambda: DEFAULT_SAMPLER)
    grid: Grid = field(default_factory=lambda: DEFAULT_GRID)
    steps: int = 25
    guidance: Guidance = field(default_factory=CFG)
    prompt: tuple[str, ...] = ()
    negative: str = ""
    lora: tuple[str, ...] = ()
    height: int = 0
    width: int = 0
    weights: str = AVERAGED
    threads: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}, expected a number from 0 to {2**16 - 1}")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}, expected seconds above 0")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}, expected a number, or 0 for the default")

    @property
    def pipeline_options(self) -> PipelineOptions:
        """The options that only pipelines have."""
        return PipelineOptions(self.prompt, self.negative, self.height, self.width, self.lora)


def main(argv: Sequence[str]) -> None:
    """Serve the run or the pipeline that the first word names, until it is interrupted.

    Args:
        argv: command-line words after `serve`.
    """
    parser = ComponentParser(
        prog="diffcore serve",
        usage="diffcore serve RUN [--option value ...]",
        description="Serve samples of the run in folder RUN, or of the diffusers pipeline saved "
        "there, over HTTP: POST /generate, GET /health, GET /metrics. Requests share the "
        "evaluations of the network. The run's sampler, grid, steps and guidance replace the "
        "defaults below.",
    )
    parser.add_argument("--config", action="config", help="YAML file of these options")
    parser.add_argument(
        "run", type=str, metavar="RUN", help="folder of a run or of a diffusers pipeline"
    )
    parser.add_class_arguments(ServeRequest)
    words = join_option(argv, "prompt", "a text", may_be_empty=True)
    words = join_option(words, "lora", "the file of an adapter")
    arguments = parse_with_run_defaults(parser, words, read_sampling_settings)
    arguments.pop("config", None)
    folder = Path(arguments.pop("run"))
    _serve(folder, ServeRequest(**arguments))


def _serve(folder: Path, request: ServeRequest) -> None:
    uvicorn = import_extra("uvicorn", "diffcore serve")
    import_extra("fastapi", "diffcore serve")
    if request.threads:
        torch.set_num_threads(request.threads)
    device, options = find_device(request.device), request.pipeline_options
    model = load_image_model(folder, options, device, request.weights)
    guidance = load_guidance(request.guidance, options, device)
    listener = listen(request.host, request.port)
    with listener, SamplingService(model.denoiser, request.rows, request.limits) as service:
        application = _create_application(folder, request, model, guidance, service)
        settings = uvicorn.Config(
            application, log_level="warning", access_log=False, lifespan="off", ws="none"
        )
        host, port = listener.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        print(f"diffcore: serving {folder} at http://{place}:{port}", flush=True)
        uvicorn.Server(settings).run(sockets=[listener])


def _create_application(
    folder: Path,
    request: ServeRequest,
    model: ImageModel,
    guidance: Guidance,
    service: SamplingService,
) -> object:
    from diffcore.cli.serving.application import ServedModel, create_application
    from diffcore.cli.serving.messages import RequestDefaults

    defaults = RequestDefaults(request.sampler, request.grid, request.steps, guidance)
    return create_application(ServedModel(folder.name, model, service, defaults, request.timeout))


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens on an address, so that connections wait for the start.

    Args:
        host: address.
        port: port; 0: a free one.

    Returns:
        The socket.

    Raises:
        ValueError: another program listens there, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on port {port} of {host} ({error.strerror}): choose another --port or "
            "--host"
        ) from None
    return listener
