"""The frozen weights under an adapter in fewer bits."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from diffcore.integrations.diffusers.loading.index import PipelineIndex
from diffcore.io.extras import has_extra, missing

__all__ = ["BasePrecision", "read_base"]

BasePrecision = Literal["float32", "bf16", "fp8", "nf4"]


def read_base(index: PipelineIndex, precision: BasePrecision) -> Any:
    """Read the network of a pipeline with its weights in a data type.

    | precision | stored weights | evaluated in |
    |---|---|---|
    | float32 | float32 | float32 |
    | bf16 | bfloat16 | bfloat16 |
    | fp8 | linear and convolutional layers in float8 e4m3 with a scale for each row | bfloat16 |
    | nf4 | linear layers in 4-bit NormalFloat of bitsandbytes (2305.14314) | bfloat16 |

    Args:
        index: pipeline.
        precision: data type of the weights.

    Returns:
        The network, a ModelMixin of diffusers.

    Raises:
        ValueError: the precision is unknown, or nf4 lacks its package or a GPU.
    """
    if precision not in get_args(BasePrecision):
        raise ValueError(
            f"base is {precision!r}, expected one of {', '.join(get_args(BasePrecision))}"
        )
    name = index.network_name
    if precision == "float32":
        return index.read(name)
    options: dict[str, Any] = {"torch_dtype": torch.bfloat16}
    if precision == "nf4":
        if not has_extra("bitsandbytes"):
            raise missing("bitsandbytes", "A frozen base in nf4 (bf16 and fp8 need no package)")
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            raise ValueError("base is nf4, which needs a GPU, and there is none: use bf16 or fp8")
        from diffusers import BitsAndBytesConfig

        quantized: Any = BitsAndBytesConfig
        options["quantization_config"] = quantized(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    network = index.read(name, **options)
    if precision == "fp8":
        _store_in_8_bits(network)
    return network


class _Scaled8Bits(nn.Module):
    """A weight as s q: q in float8 e4m3, s (out, 1, ...) such that a row fills its range."""

    def forward(self, stored: Tensor, scale: Tensor) -> Tensor:
        return stored.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        limit = torch.finfo(torch.float8_e4m3fn).max
        largest = weight.flatten(1).abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny)
        scale = (largest / limit).view(-1, *[1] * (weight.ndim - 1))
        return (weight / scale).clamp(-limit, limit).to(torch.float8_e4m3fn), scale


def _store_in_8_bits(network: nn.Module) -> None:
    """Store the weights of linear and convolutional layers in 8 bits; use widens them again."""
    for module in list(network.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.requires_grad_(False)
            register_parametrization(module, "weight", _Scaled8Bits(), unsafe=True)
