"""The rows of the README's table: what diffusers does, and what diffcore does.

python beside_diffusers.py [NAME]
"""

import sys

import diffusers
import torch
from diffusers.training_utils import EMAModel, compute_snr

from diffcore import Process, sample
from diffcore.core.oracle import GaussianMixture
from diffcore.objectives import MinSNR
from diffcore.samplers import DDIM, DDPM
from diffcore.schedules import Discrete, Laplace, Trailing, ZeroTerminalSNR
from diffcore.training.averages.ema import EMA, Decay

STD = 0.5
TABLE = Discrete()
PROCESS = Process(TABLE, prediction="epsilon", shape=(4,), sigma_data=STD)
ORACLE = GaussianMixture(torch.zeros(1, 4), STD**2 * torch.eye(4)[None], process=PROCESS)
"""The exact denoiser of data with standard deviation 0.5."""


def epsilon(x, t, alphas_cumprod):
    """The exact ε of the Gaussian at an index of a table; index -1 is clean, as for a network."""
    alpha_square = torch.cat([alphas_cumprod, torch.ones(1)])[t]
    return x * (1 - alpha_square).sqrt() / (alpha_square * STD**2 + 1 - alpha_square)


def denoise(scheduler, x, steps, **options):
    """The loop of a pipeline of diffusers with the exact ε."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(epsilon(x, t, scheduler.alphas_cumprod), t, x, **options).prev_sample
    return x


def last_step():
    """61 steps with trailing spacing, on data with standard deviation 0.5."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    theirs = denoise(scheduler, noise, 61)
    ours = sample(ORACLE, DDIM(), Trailing(), 61, seeds=range(4000)).x
    print(f"diffusers: last timestep {scheduler.timesteps[-1]}, deviation {theirs.std():.3g}")
    print(f"diffcore: 61 evaluations, deviation {ours.std():.3g}")
    return float(theirs.std()), float(ours.std())


def zero_terminal_snr():
    """ε prediction at pure noise, where it does not determine x_0."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    theirs = denoise(scheduler, torch.randn(8, 4), 50)
    print(f"diffusers: {theirs.isnan().float().mean():.0%} NaN, no error")
    try:
        Process(ZeroTerminalSNR(TABLE), prediction="epsilon", shape=(4,))
    except ValueError as error:
        print(f"diffcore: {error}")
        return float(theirs.isnan().float().mean()), str(error)
    raise AssertionError("diffcore accepted it")


def min_snr():
    """The Min-SNR weight of an ε network at zero SNR."""
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    snr = compute_snr(scheduler, torch.tensor([999]))
    theirs = float(snr.clamp(max=5) / snr)  # as in the training examples of diffusers
    ours = MinSNR(5.0).target_weight("epsilon", torch.tensor(-torch.inf).double(), STD)
    print(f"diffusers' examples: weight {theirs}\ndiffcore: weight {float(ours)}")
    return theirs, float(ours)


def laplace():
    """The median λ of the Laplace schedule, which is 0 in the paper (2407.03297)."""
    squares = diffusers.DDPMScheduler(beta_schedule="laplace").alphas_cumprod.double()
    theirs = float((squares / (1 - squares)).log().median())
    ours = Laplace().logsnr(0.5)
    print(f"diffusers: median λ {theirs:.2f}\ndiffcore: median λ {ours:.2f}")
    return theirs, ours


def batch_size():
    """Whether the first of four samples is the one that its seed gives alone."""
    one, four = (
        denoise(diffusers.DDPMScheduler(), noise[:count], 20, generator=generator)
        for count in (1, 4)
        for generator in [torch.Generator().manual_seed(0)]
        for noise in [torch.randn(4, 4, generator=torch.Generator().manual_seed(1))]
    )
    theirs = torch.equal(one[0], four[0])
    alone, among = (
        sample(ORACLE, DDPM(), Trailing(), 20, seeds=range(count)).x for count in (1, 4)
    )
    ours = torch.equal(alone[0], among[0])
    print(f"the first sample is the same in a batch of four: diffusers {theirs}, diffcore {ours}")
    return theirs, ours


def half_precision_average():
    """5000 averages of decay 0.9999, late in training, of bfloat16 weights that rose to 2."""
    layer = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    theirs, ours = EMAModel(layer.parameters(), decay=0.9999), EMA(layer, Decay(0.9999))
    torch.nn.init.constant_(layer.weight, 2.0)
    theirs.optimization_step = 100_000
    for step in range(100_000, 105_000):
        theirs.step(layer.parameters())
        ours.update(step)
    found = float(theirs.shadow_params[0]), float(ours.shadow["weight"])
    print("diffusers: average {:.4g}\ndiffcore: average {:.4g}".format(*found))
    return found


CHECKS = {
    check.__name__.replace("_", "-"): check
    for check in (
        last_step,
        zero_terminal_snr,
        min_snr,
        laplace,
        batch_size,
        half_precision_average,
    )
}

if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        print(f"{name}: {CHECKS[name].__doc__}")
        CHECKS[name]()
