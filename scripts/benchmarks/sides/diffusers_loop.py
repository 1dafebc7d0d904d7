"""The training loop of diffusers' example train_unconditional.py, on the digits recipe.

It follows examples/unconditional_image_generation/train_unconditional.py: accelerate's prepare and
accumulate, DDPMScheduler.add_noise, the mean squared error of ε, clipping, a scheduler of the
learning rate, EMAModel, a progress bar, and the loss read after each step. Network, batch size,
options of AdamW and precision are those of the recipe; the network also receives the labels.
"""

from collections.abc import Iterator
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.sides.bare_loop import RECIPE, build_network
from diffcore.training.data import Digits

__all__ = ["DiffusersLoop"]


class _Items(Dataset[dict[str, Any]]):
    """Digits as the dictionaries that the example reads."""

    def __init__(self) -> None:
        self.digits = Digits()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x0, label = self.digits[index]
        return {"input": x0, "label": label}


class DiffusersLoop:
    """The example's loop; `step` takes one optimizer step."""

    def __init__(self) -> None:
        recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        network = build_network(recipe).train()
        self.average = EMAModel(
            network.parameters(), decay=recipe["ema"]["decay"], use_ema_warmup=True, power=0.75
        )
        options = recipe["optimizer"]["init_args"] | {"fused": None}  # torch's default
        optimizer = torch.optim.AdamW(network.parameters(), lr=recipe["lr"]["peak"], **options)
        loader = DataLoader(_Items(), batch_size=recipe["batch_size"], shuffle=True, drop_last=True)
        lr = get_scheduler(
            "cosine",
            optimizer,
            num_warmup_steps=recipe["lr"]["warmup"],
            num_training_steps=1_000_000,
        )
        self.network, self.optimizer, self.loader, self.lr = self.accelerator.prepare(
            network, optimizer, loader, lr
        )
        self.average.to(self.accelerator.device)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.bar, self.batches = tqdm(disable=None), self._batches()

    def step(self) -> None:
        """Take one step as the example does."""
        batch = next(self.batches)
        clean, network = batch["input"], self.network
        noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
        steps = self.scheduler.config.num_train_timesteps
        times = torch.randint(0, steps, (len(clean),), device=clean.device).long()
        noisy = self.scheduler.add_noise(clean, noise, times)
        with self.accelerator.accumulate(network):
            output: Tensor = network(noisy, times, class_labels=batch["label"]).sample
            loss = mse_loss(output.float(), noise.float())
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(network.parameters(), 1.0)
            self.optimizer.step()
            self.lr.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.average.step(network.parameters())
            self.bar.update(1)
        self.bar.set_postfix(loss=loss.detach().item(), lr=self.lr.get_last_lr()[0])

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader
