"""A loop of accelerate with the process and the objective of diffcore, for any number of devices.

accelerate launch accelerate_loop.py [STEPS]
"""

import sys
from itertools import chain, repeat

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from diffcore import Denoiser, Objective, Process
from diffcore.objectives import MinSNR, SampleKey
from diffcore.schedules import Cosine

steps, batch = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, 64
accelerator = Accelerator()
torch.manual_seed(0)
levels = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
network = UNet2DModel(8, 1, 1, block_out_channels=[32, 64], num_class_embeds=11, **levels)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
data = DataLoader(
    TensorDataset(images, torch.tensor(digits.target)), batch, shuffle=True, drop_last=True
)

process = Process(Cosine(), shape=(1, 8, 8), sigma_data=0.75, classes=10, dropout=0.1)
objective, optimizer = Objective(MinSNR(5.0)), torch.optim.AdamW(network.parameters(), lr=1e-3)
objective.check(process)
network, optimizer, data = accelerator.prepare(network, optimizer, data)
denoiser = Denoiser(network, process)

ranks, rank = accelerator.num_processes, accelerator.process_index
index = rank * batch + torch.arange(batch)  # of these samples in the batch of all ranks
for step, (x0, labels) in zip(range(steps), chain.from_iterable(repeat(data)), strict=False):
    key = SampleKey(seed=0, step=step, index=index, batch=ranks * batch)
    draw = objective.draw(process, key, accelerator.device)
    loss = objective(denoiser, x0, labels, draw).mean()
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    if step in (0, steps - 1):
        accelerator.print(f"step {step + 1}: loss {loss:.3f}")
