"""The change between two pipelines as adapters of low rank."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffcore.integrations.diffusers.adapters.files import Adapters
from diffcore.integrations.diffusers.adapters.layer_names import is_named
from diffcore.integrations.diffusers.adapters.low_rank import extract_low_rank
from diffcore.integrations.diffusers.loading.index import PipelineIndex

__all__ = ["extract_adapters"]


def extract_adapters(
    tuned: PipelineIndex, base: PipelineIndex, rank: int, targets: Sequence[str]
) -> tuple[Adapters, float]:
    """The low-rank changes that are closest to the change between two pipelines.

    The network is compared, and each text encoder that both have.

    Args:
        tuned: fine-tuned pipeline.
        base: pipeline that the fine-tuning started from.
        rank: rank of the change of each layer.
        targets: ends of the names of the layers, of whole words between dots; "all": every linear
            and convolutional layer. Text encoders take part only with "all".

    Returns:
        The changes, without layers that are equal in both; and their share of the squared norm of
        the change of these layers.

    Raises:
        ValueError: the rank is not positive, no layer has such a name, the networks differ in their
            layers, or no layer differs.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    encoders = {name for name in base.parts & tuned.parts if name.startswith("text_encoder")}
    parts = [base.network_name, *sorted(encoders if "all" in targets else ())]
    found: Adapters = {}
    kept = total = 0.0
    for part in parts:
        changes = {}
        before, after = _weights(base, part, targets), _weights(tuned, part, targets)
        if {n: v.shape for n, v in before.items()} != {n: v.shape for n, v in after.items()}:
            raise ValueError(
                f"the layers of {part} in {tuned.folder} are not those in {base.folder}: name the "
                "pipeline that the fine-tuning started from"
            )
        for name, weight in before.items():
            norm = float((after[name].double() - weight.double()).square().sum())
            if norm:
                changes[name], share = extract_low_rank(weight, after[name], rank)
                kept, total = kept + share * norm, total + norm
        found |= {part: changes} if changes else {}
    if not found:
        raise ValueError(
            f"the layers {', '.join(targets)} are equal in {tuned.folder} and {base.folder}: there "
            "is no change to extract"
        )
    return found, kept / total


def _weights(index: PipelineIndex, part: str, targets: Sequence[str]) -> dict[str, Any]:
    """Weights of the linear and convolutional layers of a part that have one of the names."""
    model: nn.Module = index.read(part)
    found = {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and ("all" in targets or any(is_named(name, target) for target in targets))
    }
    if not found:
        raise ValueError(f"no layer of {part} ends in {', '.join(targets)}: correct the targets")
    return found
