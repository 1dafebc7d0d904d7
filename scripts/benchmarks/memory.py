"""Peak memory of fine-tuning by option, on a CPU.

Each option runs in a process of its own, with one thread: the network of a pipeline is loaded, and
two steps of its optimizer (AdamW unless another is named) are taken on random latents
(2, 4, 32, 32) and random text states. Reported is the greatest resident set minus that before the
network was loaded. Before, the process takes the same steps with a network of 0.04 million
parameters, so that the libraries of the option are imported. An option whose package is not
installed is "not measured".
"""

import multiprocessing
import resource
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

SMALLEST = (16, 16)
"""Channels of the network that each process trains first."""
WIDTHS = {"tiny": (16, 32), "large": (128, 256, 512)}
"""Channels of the levels of a UNet2DConditionModel: 0.4 and about 100 million parameters."""
OPTIONS = {
    "all weights": {},
    "all weights, checkpointing": {"checkpointing": True},
    "all weights, AdamW8bit of bitsandbytes": {"optimizer": "bitsandbytes.optim.AdamW8bit"},
    "all weights, AdamWScheduleFree": {"optimizer": "schedulefree.AdamWScheduleFree"},
    "LoRA 16": {"rank": 16},
    "LoRA 16, checkpointing": {"rank": 16, "checkpointing": True},
    "LoRA 16, base bf16": {"rank": 16, "base": "bf16"},
    "LoRA 16, base bf16, checkpointing": {"rank": 16, "base": "bf16", "checkpointing": True},
    "LoRA 16, base fp8": {"rank": 16, "base": "fp8"},
    "LoRA 16, base fp8, checkpointing": {"rank": 16, "base": "fp8", "checkpointing": True},
    "LoRA 16, base nf4, checkpointing": {"rank": 16, "base": "nf4", "checkpointing": True},
}
TEXT = 64
"""Width of the text states."""


def write_pipeline(folder: str | Path, widths: Sequence[int]) -> int:
    """Write a Stable Diffusion pipeline without text encoder.

    Args:
        folder: folder to write.
        widths: channels of the levels of its network.

    Returns:
        Number of parameters of the network.
    """
    import diffusers
    import torch

    torch.manual_seed(0)
    network: Any = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=tuple(widths),
        norm_num_groups=8,
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=TEXT,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
    )
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker"))
    diffusers.StableDiffusionPipeline(
        unet=network,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        feature_extractor=None,
        requires_safety_checker=False,
        **absent,
    ).save_pretrained(folder)
    return sum(value.numel() for value in network.parameters())


def resident() -> float:
    """The greatest resident set of this process so far.

    Returns:
        Number of MiB.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: str | Path, option: str) -> float:
    """Train two networks with an option in this process.

    Args:
        folder: folder of the pipelines `first` and `measured`.
        option: key of `OPTIONS`.

    Returns:
        The peak of the second network in MiB, above that of the first.

    Raises:
        ImportError: A package of the option is not installed.
    """
    train(Path(folder, "first"), 8, **OPTIONS[option])
    before = resident()
    train(Path(folder, "measured"), 32, **OPTIONS[option])
    return resident() - before


def import_libraries() -> None:
    """Import what every option needs."""
    import peft  # noqa: F401
    import torch

    from diffcore.integrations.diffusers import PretrainedNetwork  # noqa: F401

    torch.set_num_threads(1)


def train(
    pipeline: str | Path,
    size: int,
    rank: int = 0,
    base: Any = "float32",
    checkpointing: bool = False,
    optimizer: str = "torch.optim.AdamW",
) -> None:
    """Take two steps.

    Args:
        pipeline: folder of a pipeline.
        size: height and width of the latents.
        rank: rank of a LoRA; 0 trains all weights.
        base: data type of the frozen weights.
        checkpointing: whether activations are recomputed.
        optimizer: import path of the optimizer.
    """
    import torch

    from diffcore.integrations.diffusers import LoRA, PretrainedNetwork
    from diffcore.training.optimization.compute import Compute
    from diffcore.training.optimization.lr import LearningRate
    from diffcore.training.optimization.optimizers import build_optimizer

    if base == "nf4":
        import_module("bitsandbytes")
    module, _, name = optimizer.rpartition(".")
    factory = getattr(import_module(module), name)
    network = PretrainedNetwork(pipeline, LoRA(rank), base=base).train()
    Compute(checkpointing=checkpointing).apply(network)
    built = build_optimizer(factory, [network], LearningRate(1e-4), False)
    x, text = torch.randn(2, 4, size, size), torch.randn(2, 16, TEXT)
    for _ in range(2):
        output = network(x, torch.tensor([3.0, 700.0]), encoder_hidden_states=text)
        output.square().mean().backward()
        built.step()
        built.zero_grad()


def measure_options(network: str) -> tuple[float, dict[str, str]]:
    """Measure every option with one network, each in a process of its own.

    Args:
        network: key of `WIDTHS`.

    Returns:
        Millions of parameters, and for each option the peak in MiB, or why it was not measured.
    """
    # Forked processes share the imported libraries, and have a peak of their own.
    context = multiprocessing.get_context("fork")
    import_libraries()
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        context.Pool(1, maxtasksperchild=1) as pool,
    ):
        pool.apply(write_pipeline, (Path(folder, "first"), SMALLEST))
        count = pool.apply(write_pipeline, (Path(folder, "measured"), WIDTHS[network]))
        for option in OPTIONS:
            try:
                found[option] = f"{pool.apply(measure, (folder, option)):.0f}"
            except (ImportError, RuntimeError, ValueError) as error:  # nf4 needs a GPU
                found[option] = f"not measured: {error}".partition("\n")[0]
    return count / 1e6, found
