"""The gradient scaler of fp16 is part of a checkpoint, and its scale does not enter the numbers."""

import math

import pytest
import torch

from diffcore.io.plain_data import read_json
from diffcore.training import trainer
from tests.helpers.training_runs import (
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    read_reports,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def scaled(monkeypatch):
    """Runs scale their gradients as in fp16, with a scale that doubles every two steps."""
    build = trainer.build_accelerator

    def build_with_scaler(settings):
        accelerator = build(settings)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return accelerator

    monkeypatch.setattr(trainer, "build_accelerator", build_with_scaler)


def scale(folder, step):
    manifest = read_json(folder / f"checkpoints/step-{step:08d}/manifest.json")
    return manifest["state"]["gradient_scaler"]["scale"]


def test_a_resumed_run_goes_on_with_its_scale(tmp_path, scaled):
    options = {"save_every": 1, "keep": 9}
    train(tmp_path / "straight", **options)
    crash_after(make_trainer(tmp_path / "resumed", **options), 3)
    train(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    assert [scale(tmp_path / "resumed", step) / 2**10 for step in range(1, 7)] == [1, 2, 2, 4, 4, 8]


def test_the_scale_does_not_enter_the_weights(tmp_path, scaled, monkeypatch):
    # accelerate takes the scale out before clipping with fp16 alone, which needs a GPU.
    train(tmp_path / "scaled", clip=math.inf)
    monkeypatch.undo()
    train(tmp_path / "plain", clip=math.inf)
    found, expected = (
        read_checkpoint(tmp_path / name)["model.safetensors"] for name in ("scaled", "plain")
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.fixture
def overflowing(monkeypatch):
    """Gradients overflow as in fp16 while their scale, at first 4, is above a limit."""

    def install(limit, growth_interval=2000):
        build = trainer.build_accelerator

        def build_with_scaler(settings):
            accelerator = build(settings)
            scaler = accelerator.scaler = torch.amp.GradScaler(
                "cpu", init_scale=4.0, growth_interval=growth_interval
            )
            clip = accelerator.clip_grad_norm_

            def unscale_and_clip(parameters, norm):
                parameters = list(parameters)
                if scaler.get_scale() > limit:
                    parameters[0].grad.fill_(math.inf)
                (optimizer,) = accelerator._optimizers
                scaler.unscale_(optimizer.optimizer)
                return clip(parameters, norm)

            accelerator.clip_grad_norm_ = unscale_and_clip
            return accelerator

        monkeypatch.setattr(trainer, "build_accelerator", build_with_scaler)

    return install


def test_the_search_for_a_scale_does_not_exhaust_the_patience(tmp_path, overflowing):
    overflowing(1.0)
    state = train(tmp_path, patience=2)
    assert state.accelerator.scaler.get_scale() == 1.0
    assert [line["skipped"] for line in read_reports(tmp_path)] == [1, 1, 0, 0, 0, 0]


def test_gradients_that_overflow_at_every_scale_stop_the_run(tmp_path, overflowing):
    overflowing(0.0)
    with pytest.raises(ValueError, match="2 steps in a row were not finite"):
        train(tmp_path, patience=2, steps=20)
    assert len(read_reports(tmp_path)) == 4  # of which two halved the scale to 1


def test_a_step_after_which_the_scale_grows_has_the_noise_of_its_own_scale(
    tmp_path, overflowing, monkeypatch
):
    options = {"accumulation": 2, "steps": 2}
    overflowing(math.inf, growth_interval=1)
    assert train(tmp_path / "scaled", **options).accelerator.scaler.get_scale() == 16.0
    monkeypatch.undo()
    train(tmp_path / "plain", **options)
    found, expected = (read_reports(tmp_path / name) for name in ("scaled", "plain"))
    for own, other in zip(found, expected, strict=True):
        assert own["grad_variance"] == pytest.approx(other["grad_variance"], rel=1e-4)
