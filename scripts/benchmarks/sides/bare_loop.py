"""The digits recipe in bare PyTorch, with which training by diffcore is compared."""

import math
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from diffcore.training.data import Digits

__all__ = ["RECIPE", "BareLoop", "build_network"]

RECIPE = files("diffcore.recipes") / "digits.yaml"


class BareLoop:
    """The digits recipe as a careful user of PyTorch writes it; only the data comes from diffcore.

    Args:
        device: device of the network and the data.
        fused: implementation of AdamW; None is torch's default.
    """

    def __init__(self, device: torch.device, fused: bool | None = None) -> None:
        recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        self.recipe, self.batch, self.device = recipe, recipe["batch_size"], device
        digits = Digits()
        self.x0, self.labels = digits.x0.to(device), digits.labels.to(device)
        self.network = build_network(recipe).to(device).train()
        options = recipe["optimizer"]["init_args"] | {"fused": fused}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), **options)
        self.shadow = [parameter.detach().clone() for parameter in self.network.parameters()]
        self.steps, self.order = 0, torch.zeros(0, dtype=torch.int64)
        self.history: list[tuple[Tensor, Tensor]] = []

    def step(self) -> None:
        """Draw a batch, levels, noise and dropped labels, and take one step."""
        x0, labels = self.next_batch()
        strata = torch.arange(self.batch, device=self.device) / self.batch
        t = (torch.rand((), device=self.device) + strata) % 1
        dropped = torch.rand(self.batch, device=self.device) < self.recipe["process"]["dropout"]
        labels = labels.masked_fill(dropped, self.recipe["process"]["classes"])
        self.history.append(self.update(x0, labels, t, torch.randn_like(x0)))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next images (B, 1, 8, 8) and labels (B,) of successive random permutations."""
        if len(self.order) < self.batch:
            self.order = torch.cat((self.order, torch.randperm(len(self.x0))))
        index, self.order = self.order[: self.batch].to(self.device), self.order[self.batch :]
        return self.x0[index], self.labels[index]

    def update(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step of the optimizer and of the averaged weights.

        Args:
            x0: (B, 1, 8, 8) images.
            labels: (B,) labels, some of them dropped.
            t: (B,) times in [0, 1].
            noise: (B, 1, 8, 8) noise.

        Returns:
            The losses (B,), and the norm of the gradient before clipping.
        """
        losses = self.losses(x0, labels, t, noise)
        losses.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.average()
        return losses.detach(), norm

    def losses(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Min-SNR on v: min(SNR, γ) / (SNR + 1) = min(α², γ σ²), α = cos(πt/2), σ = sin(πt/2).

        Args:
            x0: (B, 1, 8, 8) images.
            labels: (B,) labels, some of them dropped.
            t: (B,) times in [0, 1].
            noise: (B, 1, 8, 8) noise.

        Returns:
            The losses (B,).
        """
        angle = (t * (math.pi / 2)).view(-1, 1, 1, 1)
        alpha, sigma = torch.cos(angle), torch.sin(angle)
        gamma = self.recipe["objective"]["weight"]["init_args"]["gamma"]
        weight = torch.minimum(alpha**2, gamma * sigma**2)
        v = self.network(alpha * x0 + sigma * noise, 1000 * t - 1, class_labels=labels).sample
        return (weight * (v - (alpha * noise - sigma * x0)) ** 2).flatten(1).mean(1)

    def lr(self) -> float:
        """The learning rate of the next step, a number: linear warm-up times half a cosine."""
        peak, warmup = self.recipe["lr"]["peak"], self.recipe["lr"]["warmup"]
        steps = self.recipe["steps"]
        progress = min(max(self.steps - warmup, 0) / (steps - warmup), 1)
        return float(
            peak * min(1, (self.steps + 1) / warmup) * (1 + math.cos(math.pi * progress)) / 2
        )

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights, in float32, towards the network's."""
        decay = min(self.recipe["ema"]["decay"], (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, list(self.network.parameters()), 1 - decay)


def build_network(recipe: dict[str, Any]) -> nn.Module:
    """Build the network of a recipe with its own constructor.

    Args:
        recipe: settings of the recipe.

    Returns:
        The network, with random weights.
    """
    import diffusers

    name = recipe["network"]["class_path"].removeprefix("diffusers.")
    network: nn.Module = getattr(diffusers, name)(**recipe["network"]["init_args"])
    return network
