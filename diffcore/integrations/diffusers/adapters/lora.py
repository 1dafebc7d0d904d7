"""`LoRA`: the adapter of peft that is trained in place of the weights of a network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from diffcore.integrations.diffusers.adapters.layer_names import (
    exact_pattern,
    find_pattern,
    is_named,
)
from diffcore.io.extras import has_extra, missing

__all__ = ["ATTENTION_LAYERS", "TEXT_LAYERS", "Kind", "LoRA", "TextLoRA"]

Kind = Literal["lora", "rslora", "dora", "loha", "lokr"]
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Ends of the names of the attention layers of CLIP."""


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter of peft, whose change of the weights is 0 at first.

    | kind | changed weight | source |
    |---|---|---|
    | lora | W + (α / r) B A | Hu et al. 2021 (2106.09685) |
    | rslora | W + (α / √r) B A | Kalajdzievski 2023 (2312.03732) |
    | dora | m (W + (α / r) B A) / ‖W + (α / r) B A‖ by rows | Liu et al. 2024 (2402.09353) |
    | loha | W + (α / r) (B₁ A₁) ∘ (B₂ A₂) | Hyeon-Woo et al. 2021 (2108.06098) |
    | lokr | W + (α / r) C ⊗ (B A) | Yeh et al. 2023 (2309.14859) |

    diffusers loads the adapters of lora, rslora, dora and lokr. `diffcore lora merge` and
    `diffcore sample --lora` read all kinds; `diffcore lora convert` reads lora, rslora and dora,
    because the other formats express only changes of low rank.

    Args:
        rank: r; 0 trains all weights of the network instead.
        alpha: α; 0 for alpha = rank.
        targets: ends of the names of the adapted layers, each of whole words between dots.
        kind: form of the change.
        dropout: share of the layer's inputs (lora, rslora, dora) or of the rank's rows (loha, lokr)
            that is dropped in training.
        ranks: rank of the layers whose names match a regular expression, in place of `rank`; the
            expression matches the end of the name from a dot on, or the whole name, such as
            `mid_block.*: 32`. Of several that match, the first one counts.
        lr_ratio: λ, the learning rate of B divided by that of A and of all else that is trained
            (LoRA+, Hayou et al. 2024, 2402.12354: η_B = λ η_A with λ > 1, such as 16); 1 for the
            same. Only for lora, rslora and dora.

    Raises:
        ValueError: a number is out of range, or an expression is none; or lr_ratio is given for a
            kind without B.

    Example:
        >>> LoRA(rank=16, kind="dora").kind
        'dora'
    """

    rank: int = 0
    alpha: int = 0
    targets: list[str] = field(default_factory=lambda: list(ATTENTION_LAYERS))
    kind: Kind = "lora"
    dropout: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}, expected 1 or more, or 0 to train all weights")
        if self.alpha < 0 or not self.targets:
            raise ValueError(
                f"alpha is {self.alpha} and targets are {self.targets}, expected alpha of at least "
                "0 (0: the rank) and at least one suffix"
            )
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a share within [0, 1)")
        for pattern, rank in self.ranks.items():
            self._check_rank(pattern, rank)
        self._check_ratio()

    def _check_rank(self, pattern: str, rank: int) -> None:
        if not self.rank or rank < 1:
            raise ValueError(
                f"ranks has {rank} for {pattern}, expected at least 1, and a positive rank for the "
                f"other layers (rank is {self.rank})"
            )
        find_pattern([pattern], "")

    def _check_ratio(self) -> None:
        if not 0 < self.lr_ratio < math.inf:
            raise ValueError(
                f"lr_ratio is {self.lr_ratio}, expected a positive finite ratio of learning rates"
            )
        if self.lr_ratio != 1 and not (self.rank and self.is_low_rank):
            raise ValueError(
                f"lr_ratio is {self.lr_ratio}, but a {self.kind} of rank {self.rank} has no B: "
                "choose a positive rank and the kind lora, rslora or dora, or leave lr_ratio out"
            )

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is a product B A, which the formats of LoRA files express."""
        return self.kind in ("lora", "rslora", "dora")

    def add_to(self, network: Any, unread: Sequence[str] = ()) -> None:
        """Add the adapter to the layers of a network; peft freezes its other weights.

        Args:
            network: ModelMixin of diffusers, or text encoder of transformers.
            unread: names of modules whose output is not used; their layers are not adapted.

        Raises:
            ValueError: No layer has one of the suffixes, an expression matches no adapted layer, a
                rank is larger than the inputs or the outputs of all its layers, or peft is not
                installed.
        """
        if not has_extra("peft"):
            raise missing("peft", "LoRA (leave lora out to train all weights)")
        layers: dict[str, nn.Module] = {}
        for target in self.targets:
            found = {
                name: module
                for name, module in network.named_modules()
                if is_named(name, target) and not any(f".{part}." in f".{name}" for part in unread)
            }
            if not found:
                raise ValueError(
                    f"no layer of {type(network).__name__} ends in {target}: correct the targets "
                    "of LoRA, such as to_q"
                )
            layers |= found
        for pattern in self.ranks:
            if not any(find_pattern([pattern], name) for name in layers):
                raise ValueError(
                    f"ranks has {pattern!r}, which matches no adapted layer of "
                    f"{type(network).__name__}: correct it, such as mid_block.*"
                )
        self._check_sizes(layers)
        network.add_adapter(self._config(list(layers) if unread else list(self.targets)))

    def _check_sizes(self, layers: Mapping[str, nn.Module]) -> None:
        """Raise ValueError for a rank that no layer can use. A LoKr takes it for a whole matrix."""
        if self.kind == "lokr":
            return
        largest: dict[str | None, int] = {}
        for name, layer in layers.items():
            pattern = find_pattern(self.ranks, name)
            largest[pattern] = max(largest.get(pattern, 0), _largest_rank(layer))
        for pattern, useful in largest.items():
            rank = self.rank if pattern is None else self.ranks[pattern]
            if 0 < useful < rank:
                what = "rank" if pattern is None else f"the rank of {pattern!r}"
                raise ValueError(
                    f"{what} is {rank}, but the largest adapted layer has {useful} inputs or "
                    f"outputs: expected at most {useful}; 16 is usual"
                )

    def written_config(self, network: Any) -> dict[str, Any]:
        """The configuration of peft that is written beside the weights of the adapter.

        diffusers sorts the patterns on writing, and the first one that matches counts on loading:
        so each pattern of `ranks` is replaced by the names of its layers.

        Args:
            network: network with the adapter.

        Returns:
            The arguments of the configuration of peft.
        """
        config: dict[str, Any] = network.peft_config["default"].to_dict()
        config["base_model_name_or_path"] = None  # a folder of this machine
        layers = [name for name, module in network.named_modules() if _is_adapted(module)]
        found = {name: find_pattern(self.ranks, name) for name in layers}
        return config | {
            "rank_pattern": {
                exact_pattern(name, layers): self.ranks[pattern]
                for name, pattern in found.items()
                if pattern is not None
            }
        }

    def _config(self, targets: list[str]) -> Any:
        """The config of peft."""
        from peft import LoHaConfig, LoKrConfig, LoraConfig

        alpha = self.alpha or self.rank
        shared: dict[str, Any] = {
            "r": self.rank,
            "target_modules": targets,
            "rank_pattern": dict(self.ranks),
        }
        if self.is_low_rank:
            return LoraConfig(
                lora_alpha=alpha,
                lora_dropout=self.dropout,
                use_rslora=self.kind == "rslora",
                use_dora=self.kind == "dora",
                init_lora_weights="gaussian",
                **shared,
            )
        kind = LoHaConfig if self.kind == "loha" else LoKrConfig
        return kind(alpha=alpha, rank_dropout=self.dropout, **shared)

    def describe(self) -> str:
        """Kind, rank and α as text.

        Returns:
            The text, such as "LoRA of rank 16, alpha 16"; with the ratio of learning rates if B
            has another one.
        """
        spelled = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "loha": "LoHa"}
        name = spelled.get(self.kind, "LoKr")
        ratio = f", learning rate of B x {self.lr_ratio:g}" if self.lr_ratio != 1 else ""
        return f"{name} of rank {self.rank}, alpha {self.alpha or self.rank}{ratio}"

    def learning_rate_factors(self, network: nn.Module) -> dict[str, float]:
        """The factors of the learning rate of the adapter's parameters.

        Args:
            network: network with the adapter, or a module that contains it.

        Returns:
            Name of each B -> `lr_ratio`; empty if the ratio is 1.
        """
        if self.lr_ratio == 1:
            return {}
        names = (name for name, _ in network.named_parameters())
        return {name: self.lr_ratio for name in names if ".lora_B." in name}


@dataclass(frozen=True)
class TextLoRA(LoRA):
    """A low-rank adapter of text encoders, which is trained together with the network.

    Args:
        rank: r; 0 leaves the text encoders as they are.
        alpha: α; 0 for alpha = rank.
        targets: ends of the names of the adapted layers, each of whole words between dots.
        kind: lora, rslora or dora, see `LoRA`.
        dropout: share of the layer's inputs that is dropped in training.
        ranks: rank of the layers whose names match a regular expression, see `LoRA`.
        lr_ratio: learning rate of B divided by that of A (LoRA+); 1 for the same.

    Raises:
        ValueError: see `LoRA`; or the kind is loha or lokr, which diffusers does not load into text
            encoders.

    Example:
        >>> TextLoRA(rank=8).targets
        ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """

    targets: list[str] = field(default_factory=lambda: list(TEXT_LAYERS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_low_rank:
            raise ValueError(
                f"kind is {self.kind!r}, which diffusers does not load into text encoders: "
                "expected lora, rslora or dora"
            )


def _largest_rank(layer: nn.Module) -> int:
    """The largest rank of the weight of a layer, 0 if it is unknown."""
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)
    if isinstance(layer, nn.Conv2d):
        inputs = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        return min(inputs, layer.out_channels)
    return 0


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
