"""Peak memory of fine-tuning by option, on a CPU.

    python -m scripts.benchmarks.memory --network tiny
    python -m scripts.benchmarks.memory --network large

Each option runs in a process of its own: the network of a pipeline is loaded, and two steps of
AdamW are taken on random latents (2, 4, 32, 32) and random text states. Reported is the greatest
resident set minus that before the network was loaded, as a row of a Markdown table.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTHS = {"tiny": (16, 32), "large": (128, 256, 512)}
"""Channels of the levels of a UNet2DConditionModel: 0.4 and about 100 million parameters."""
OPTIONS = {
    "all weights": {"rank": 0},
    "all weights, checkpointing": {"rank": 0, "checkpointing": True},
    "LoRA 16": {"rank": 16},
    "LoRA 16, checkpointing": {"rank": 16, "checkpointing": True},
    "LoRA 16, base bf16": {"rank": 16, "base": "bf16"},
    "LoRA 16, base bf16, checkpointing": {"rank": 16, "base": "bf16", "checkpointing": True},
    "LoRA 16, base fp8, checkpointing": {"rank": 16, "base": "fp8", "checkpointing": True},
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
    """Take two steps with an option in this process.

    Args:
        folder: folder of the pipeline.
        option: key of `OPTIONS`.

    Returns:
        The peak in MiB above what the imported libraries need.
    """
    import torch

    from diffcore.integrations.diffusers import LoRA, PretrainedNetwork
    from diffcore.training.optimization.compute import Compute

    settings: dict[str, Any] = dict(OPTIONS[option])
    before = resident()
    network = PretrainedNetwork(
        folder, LoRA(settings["rank"]), base=settings.get("base", "float32")
    ).train()
    Compute(checkpointing=settings.get("checkpointing", False)).apply(network)
    trained = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    x, text = torch.randn(2, 4, 32, 32), torch.randn(2, 16, TEXT)
    for _ in range(2):
        output = network(x, torch.tensor([3.0, 700.0]), encoder_hidden_states=text)
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident() - before


def main() -> None:
    """Print the table, or measure one option."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=WIDTHS, default="tiny")
    parser.add_argument("--option", choices=OPTIONS, default=None)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    if arguments.option:
        print(f"{measure(arguments.folder, arguments.option):.0f}")
        return
    with tempfile.TemporaryDirectory() as folder:
        count = write_pipeline(folder, WIDTHS[arguments.network])
        print(f"| {count / 1e6:.1f} million parameters | peak, MiB |\n|---|---|")
        for option in OPTIONS:
            command = [sys.executable, "-m", "scripts.benchmarks.memory", "--option", option]
            done = subprocess.run(
                [*command, "--folder", folder], check=True, capture_output=True, text=True
            )
            print(f"| {option} | {done.stdout.split()[-1]} |", flush=True)


if __name__ == "__main__":
    main()
