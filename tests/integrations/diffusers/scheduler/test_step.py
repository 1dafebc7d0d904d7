"""One step of a DiffcoreScheduler: its arithmetic in half precision, and its clipping."""

import torch

from diffcore.integrations.diffusers import DiffcoreScheduler

X, OUTPUT = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()


def step(scheduler, output, x):
    scheduler.set_timesteps(4)
    return scheduler.step(output, scheduler.timesteps[0], x)


def test_a_step_in_half_precision_is_the_rounded_step_in_float32():
    scheduler = DiffcoreScheduler()
    for dtype in (torch.float16, torch.bfloat16):
        x, output = X.to(dtype), OUTPUT.to(dtype)
        half, exact = step(scheduler, output, x), step(scheduler, output.float(), x.float())
        assert torch.equal(half.prev_sample, exact.prev_sample.to(dtype))
        assert torch.equal(half.pred_original_sample, exact.pred_original_sample.to(dtype))


def test_eps_follows_the_clipped_x0():
    scheduler = DiffcoreScheduler(clip=1.0)
    found = step(scheduler, OUTPUT, X)
    before, after = scheduler.call.plan.all_knots[:2]
    x0 = ((X - before.sigma * OUTPUT) / before.alpha).clamp(-1, 1)
    assert (x0.abs() == 1).float().mean() > 0.5
    eps = (X - before.alpha * x0) / before.sigma
    torch.testing.assert_close(found.pred_original_sample, x0, rtol=0, atol=1e-4)
    expected = after.alpha * x0 + after.sigma * eps
    torch.testing.assert_close(found.prev_sample, expected, rtol=1e-5, atol=1e-5)
