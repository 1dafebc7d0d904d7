"""torch's fused Adam and AdamW clip within the step, and skip a step that is not finite."""

import math
from functools import partial

import pytest
import torch

from diffcore.training import trainer
from diffcore.training.construction import build_state
from diffcore.training.optimization.gradients import apply_gradient
from tests.helpers.training_runs import (
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    read_reports,
    refused_run,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ADAMW = partial(torch.optim.AdamW, fused=True)
FUSED = {"optimizer": ADAMW}


def gradients(state, seed):
    """Random gradients of the parameters of a run, which they receive."""
    generator = torch.Generator().manual_seed(seed)
    for value in state.modules.parameters():
        value.grad = torch.randn(value.shape, generator=generator)
    return [value.grad.clone() for value in state.modules.parameters()]


def moments(state):
    """Everything that a step changes, by the name of the parameter."""
    optimizer = state.optimizer.optimizer
    return {
        name: {"value": value.detach().clone()}
        | {key: each.clone() for key, each in optimizer.state[value].items()}
        for name, value in state.network.named_parameters()
    }


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("clip", [0.01, 1e6, math.inf])
def test_the_coefficient_is_that_of_clip_grad_norm(tmp_path, kind, clip):
    options = {"weight_decay": 0.1, "betas": (0.8, 0.9)}
    state = build_state(make_trainer(tmp_path, optimizer=partial(kind, fused=True, **options)))
    expected = [torch.nn.Parameter(value.detach().clone()) for value in state.modules.parameters()]
    other = kind(expected, lr=state.settings.lr.peak, **options)
    for seed in range(3):
        for value, gradient in zip(expected, gradients(state, seed), strict=True):
            value.grad = gradient
        norm = apply_gradient(state.accelerator, state.optimizer, clip)
        assert norm == torch.nn.utils.clip_grad_norm_(expected, clip)
        other.step()
    own = state.optimizer.optimizer
    for value, true in zip(state.modules.parameters(), expected, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-6, atol=1e-7)
        for key, moment in other.state[true].items():
            scale = float(moment.abs().max())
            torch.testing.assert_close(own.state[value][key], moment, rtol=1e-5, atol=1e-6 * scale)
        assert value.grad is None


def test_the_gradient_is_clipped_in_one_pass(tmp_path, monkeypatch):
    state = build_state(make_trainer(tmp_path, **FUSED))
    monkeypatch.delattr(type(state.accelerator), "clip_grad_norm_")
    gradients(state, 0)
    assert apply_gradient(state.accelerator, state.optimizer, 1.0) > 1


@pytest.mark.parametrize("element", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_neither_parameters_nor_moments(tmp_path, element):
    state = build_state(make_trainer(tmp_path, **FUSED))
    take = partial(apply_gradient, state.accelerator, state.optimizer, 1.0)
    gradients(state, 0)
    take()
    before = moments(state)
    gradients(state, 1)
    next(iter(state.modules.parameters())).grad.view(-1)[0] = element
    assert not take().isfinite()
    after = moments(state)
    for name, values in before.items():
        assert values["step"] == 1
        assert all(torch.equal(after[name][key], value) for key, value in values.items())
    gradients(state, 2)
    take()
    assert all(values["step"] == 2 for values in moments(state).values())


def test_a_run_without_a_finite_step_keeps_its_weights(tmp_path):
    class NaN(LabelRecorder):
        def forward(self, x, time, class_labels=None):
            return super().forward(x, time, class_labels) * math.nan

    own = make_trainer(tmp_path / "own", network=NaN, patience=2, **FUSED)
    state, _ = refused_run(own, "2 steps in a row were not finite")
    initial = dict(build_state(make_trainer(tmp_path / "other")).network.named_parameters())
    for name, value in state.network.named_parameters():
        assert torch.equal(value, initial[name])
        # β w + (1 - β) w is w to rounding
        torch.testing.assert_close(state.average.shadow[name], initial[name], rtol=1e-6, atol=1e-7)


def test_a_fused_sgd_takes_a_step_with_zero_gradient(tmp_path):
    optimizer = partial(torch.optim.SGD, momentum=0.9, fused=True)
    state = build_state(make_trainer(tmp_path, optimizer=optimizer))
    gradients(state, 0)
    next(iter(state.modules.parameters())).grad.fill_(math.nan)
    apply_gradient(state.accelerator, state.optimizer, 1.0)
    for value in state.modules.parameters():
        buffer = state.optimizer.optimizer.state[value]["momentum_buffer"]
        assert torch.equal(buffer, torch.zeros_like(buffer))


def test_a_fused_run_is_that_of_the_other_implementation_and_resumes_bit_for_bit(tmp_path):
    options = {"save_every": 3, "keep": 9, "clip": 0.1}
    train(tmp_path / "straight", **options, **FUSED)
    crash_after(make_trainer(tmp_path / "resumed", **options, **FUSED), 3)
    train(tmp_path / "resumed", resume=True, **options, **FUSED)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    train(tmp_path / "plain", **options)
    found, expected = (read_checkpoint(tmp_path / name) for name in ("straight", "plain"))
    for file, tensors in expected.items():
        for name, value in tensors.items():
            torch.testing.assert_close(found[file][name], value, rtol=1e-4, atol=1e-6)


CONFIG = "optimizer: {{class_path: torch.optim.AdamW, init_args: {{weight_decay: 0.01{}}}}}\n"


def test_a_run_resumes_with_another_implementation_and_says_that_it_rounds(tmp_path, capsys):
    plain = partial(torch.optim.AdamW, fused=False)
    options = {"save_every": 3, "keep": 9}
    crash_after(make_trainer(tmp_path, optimizer=plain, config=CONFIG.format(""), **options), 3)
    state = train(tmp_path, resume=True, config=CONFIG.format(", fused: true"), **options, **FUSED)
    assert state.optimizer.optimizer.param_groups[0]["fused"]
    assert "differ in {'fused': (False, True)}" in capsys.readouterr().err
    train(tmp_path / "straight", **options)
    found, expected = (
        read_checkpoint(folder)["model.safetensors"] for folder in (tmp_path, tmp_path / "straight")
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_another_option_of_the_optimizer_is_refused(tmp_path):
    crash_after(make_trainer(tmp_path, config=CONFIG.format(""), save_every=3), 3)
    config = CONFIG.format(", amsgrad: true")
    with pytest.raises(ValueError, match=r"optimizer\.init_args\.amsgrad"):
        train(tmp_path, resume=True, config=config, save_every=3)


@pytest.fixture
def overflowing(monkeypatch):
    """Gradients overflow as in fp16 while their scale, at first 4, is above 1."""
    build = trainer.build_accelerator

    def build_with_scaler(settings):
        accelerator = build(settings)
        scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

        def unscale(optimizer):
            if scaler.get_scale() > 1:
                optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
            scaler.unscale_(optimizer.optimizer)

        accelerator.unscale_gradients = unscale
        return accelerator

    monkeypatch.setattr(trainer, "build_accelerator", build_with_scaler)


def test_the_scaler_of_fp16_skips_steps_and_finds_its_scale(tmp_path, overflowing, monkeypatch):
    state = train(tmp_path / "scaled", clip=0.1, **FUSED)
    assert state.accelerator.scaler.get_scale() == 1.0
    reports = read_reports(tmp_path / "scaled")
    assert [line["skipped"] for line in reports] == [1, 1, 0, 0, 0, 0]
    assert all(values["step"] == 4 for values in moments(state).values())
    monkeypatch.undo()
    train(tmp_path / "plain", clip=0.1, **FUSED)
    plain = read_reports(tmp_path / "plain")
    assert reports[2]["grad_norm"] != plain[2]["grad_norm"]  # which has learnt for two steps
