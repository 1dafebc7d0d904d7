"""Students that give exactly what an objective trains, and their gradients there and elsewhere."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffcore.core.oracle import GaussianMixture
from diffcore.core.prediction import Prediction
from diffcore.distillation.flow_map import FlowMap
from diffcore.objectives.draw import SampleKey
from diffcore.objectives.networks import Networks
from diffcore.objectives.objective import Objective
from diffcore.schedules import Level


class ExactStudent(nn.Module):
    """The exact flow map of a mixture in 2-D plus M x' + c with parameters M = 0 and c = 0.

    The change keeps f(x, 0) = x, and depends on both levels of a mean velocity.
    """

    def __init__(self, oracle: GaussianMixture, estimate: str, steps: int = 8) -> None:
        super().__init__()
        self.exact = FlowMap(oracle, estimate, steps)
        self.process = self.exact.process
        self.matrix = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def move_away(self) -> None:
        self.matrix.data = torch.tensor([[0.4, 0.2], [-0.2, 0.4]], dtype=torch.float64)
        self.shift.data = torch.tensor([0.4, 0.4], dtype=torch.float64)

    def forward(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Prediction:
        x0, eps = self.exact(x, level, condition)
        here = level.to(x)
        a, z = here.blend, x / (here.alpha + here.sigma)
        change = z @ self.matrix.T + self.shift
        if self.process.estimate == "consistency":
            x0 = x0 + a * change
            return Prediction(x0, (x - here.alpha * x0) / here.sigma)
        r = a if level.end is None else level.end.to(x).blend
        mean = eps - x0 + (1 + a - r) * change
        return Prediction(z - a * mean, z + (1 - a) * mean)


def loss_gradients(
    objective: Objective,
    oracle: GaussianMixture,
    student: ExactStudent,
    parts: int = 6,
    count: int = 100,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the gradient of the loss, over parts of `count` samples."""
    process = replace(student.process, classes=0, dropout=0.0)
    teacher = getattr(objective, "teacher", None)
    networks = Networks(None if teacher is None else teacher.denoiser(), averaged=student)
    found = []
    for part in range(parts):
        draw = objective.draw(process, SampleKey(part, step, torch.arange(count), count))
        draw = draw._replace(noise=draw.noise.double())
        x0 = oracle.sample(torch.arange(count) + part * count)
        loss = objective(student, x0, None, draw, networks=networks).mean()
        gradient = torch.autograd.grad(loss, list(student.parameters()))
        found.append(torch.cat([value.flatten() for value in gradient]))
    table = torch.stack(found)
    return table.mean(0), table.std(0) / parts**0.5
