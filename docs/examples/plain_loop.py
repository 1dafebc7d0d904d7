"""A PyTorch loop of one's own with the process, the objective and the sampler of diffcore.

python plain_loop.py [STEPS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from diffcore import Denoiser, Objective, Process, sample
from diffcore.guidance import CFG
from diffcore.objectives import MinSNR, SampleKey
from diffcore.schedules import Cosine


class SmallNetwork(torch.nn.Module):
    """Two convolutions, with the time and the label added between them; label 10 is "none"."""

    def __init__(self, width=64):
        super().__init__()
        self.first = torch.nn.Conv2d(1, width, 3, padding=1)
        self.time, self.label = torch.nn.Linear(1, width), torch.nn.Embedding(11, width)
        self.middle = torch.nn.Conv2d(width, width, 3, padding=1)
        self.last = torch.nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, time, class_labels):
        hidden = self.time(time[:, None] / 1000) + self.label(class_labels)
        hidden = torch.nn.functional.silu(self.first(x) + hidden[..., None, None])
        return self.last(torch.nn.functional.silu(self.middle(hidden)))


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # from -1 to 1
data = DataLoader(
    TensorDataset(images, torch.tensor(digits.target)), 128, shuffle=True, drop_last=True
)

process = Process(
    Cosine(), prediction="v_prediction", shape=(1, 8, 8), sigma_data=0.75, classes=10, dropout=0.1
)
denoiser, objective = Denoiser(SmallNetwork(), process), Objective(MinSNR(5.0))
objective.check(process)
optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
step = 0
while step < steps:
    for x0, labels in data:
        key = SampleKey(seed=0, step=step, index=torch.arange(len(x0)), batch=len(x0))
        draw = objective.draw(process, key)  # noise levels, noise, dropped labels
        loss = objective(denoiser, x0, labels, draw).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step in (1, steps):
            print(f"step {step}: loss {loss:.3f}")
        if step == steps:
            break

samples = sample(denoiser, seeds=range(10), condition=range(10), guidance=CFG(2.0))
print("samples", tuple(samples.x.shape), "evaluations", samples.evaluations)
