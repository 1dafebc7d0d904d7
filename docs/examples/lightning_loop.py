"""A module of Lightning with the process and the objective of diffcore; `pip install lightning`.

python lightning_loop.py [STEPS]
"""

import sys

import lightning
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from diffcore import Denoiser, Objective, Process
from diffcore.objectives import MinSNR, SampleKey
from diffcore.schedules import Cosine


class Diffusion(lightning.LightningModule):
    """Trains a network with an objective; `denoiser` samples it afterwards."""

    def __init__(self, network: torch.nn.Module, process: Process, objective: Objective):
        super().__init__()
        objective.check(process)
        self.denoiser, self.objective = Denoiser(network, process), objective

    def training_step(self, batch, batch_index):
        """The mean loss of a batch (x_0, labels)."""
        x0, labels = batch
        index = self.global_rank * len(x0) + torch.arange(len(x0))
        whole = self.trainer.world_size * len(x0)
        key = SampleKey(seed=0, step=self.global_step, index=index, batch=whole)
        draw = self.objective.draw(self.denoiser.process, key, self.device)
        loss = self.objective(self.denoiser, x0, labels, draw).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """AdamW with a constant learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    network = UNet2DModel(8, 1, 1, block_out_channels=[32, 64], num_class_embeds=11, **levels)
    process = Process(Cosine(), shape=(1, 8, 8), sigma_data=0.75, classes=10, dropout=0.1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labelled = TensorDataset(images, torch.tensor(digits.target))
    data = DataLoader(labelled, 64, shuffle=True, drop_last=True)
    module = Diffusion(network, process, Objective(MinSNR(5.0)))
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    print(f"step {steps}: loss {trainer.callback_metrics['loss']:.3f}")
