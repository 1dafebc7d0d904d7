"""Previews: the samples that the settings name, by the averaged weights, in folder and trackers."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.core.process import Process
from diffcore.guidance import CFG
from diffcore.run import Run
from diffcore.sampling import images
from diffcore.sampling.generation import sample
from diffcore.training.data import Digits
from diffcore.training.data.latents import LatentDataset
from diffcore.training.reports.previews import Previews
from tests.helpers.finetune_runs import finetune_command, run_command
from tests.helpers.training_runs import PROCESS, LabelRecorder, make_trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Digits()


def pixels(path):
    """The bytes of an image file, (height, width, 3)."""
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": (1,), "prompts": ("a",)}, "expected one of them"),
        ({"negative": "ugly"}, "negative is 'ugly' without previews.prompts"),
        ({"per_label": -1}, "per_label is -1, expected at least 0"),
        ({"seeds": (2**63,)}, r"seeds has 9223372036854775808, expected within \[-2\^63, 2\^63\)"),
        ({"prompts": "a cat"}, "prompts is 'a cat', expected a list"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Previews(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": (3, 11)}, "labels has 11, expected 0 .. 10"),
        ({"labels": (-1,)}, "labels has -1"),
        ({"labels": (3,), "seeds": (1, 2)}, r"seeds are 2, expected 4: 1 labels x 4"),
        ({"seeds": (1, 2)}, r"seeds are 2, expected 40: 10 labels x 4"),
        ({"prompts": ("a cat",)}, "the data has no captions"),
    ],
)
def test_previews_that_do_not_fit_the_data_are_refused_before_the_run(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, sample_every=2, previews=Previews(**settings))
    assert not list(tmp_path.iterdir())


def test_without_settings_the_first_classes_have_four_samples_each():
    shown = Previews().samples(DATA, PROCESS)
    assert list(shown.seeds) == list(range(40))
    assert shown.condition == [label for label in range(10) for _ in range(4)]
    assert shown.rows == [str(label) for label in range(10)]


def test_without_classes_any_number_of_seeds_is_drawn():
    process = Process(shape=(1, 8, 8))
    assert len(Previews().samples(DATA, process).seeds) == 16
    shown = Previews(seeds=(5, 6, 7), per_label=2).samples(DATA, process)
    assert shown[:3] == ((5, 6, 7), None, ["", ""])
    with pytest.raises(ValueError, match="labels has 0, expected no label without classes"):
        Previews(labels=(0,)).samples(DATA, process)


def test_a_preview_has_the_named_labels_and_seeds_by_the_averaged_weights(tmp_path):
    previews = Previews(labels=(7, 2, 10), per_label=2, seeds=(9, 8, 7, 6, 5, 4))
    train(tmp_path, sample_every=3, sample_steps=3, guidance=CFG(1.5), previews=previews)
    denoiser = Run(tmp_path).denoiser(network=LabelRecorder())
    x = sample(
        denoiser,
        steps=3,
        seeds=(9, 8, 7, 6, 5, 4),
        condition=[7, 7, 2, 2, 10, 10],
        guidance=CFG(1.5),
        batch_size=6,
    ).x
    expected = images.draw_grid(x, PROCESS, ["7", "2", "none"], 2)
    assert np.array_equal(pixels(tmp_path / "samples/step-00000006.png"), np.asarray(expected))


def test_more_samples_than_one_batch_are_drawn(tmp_path):
    previews = Previews(labels=(0,), per_label=41)
    train(tmp_path, steps=1, sample_every=1, sample_steps=2, previews=previews)
    assert pixels(tmp_path / "samples/step-00000001.png").shape[1] > 41 * 40


def test_previews_may_change_when_a_run_resumes(tmp_path):
    train(tmp_path, steps=2, sample_every=1, sample_steps=2)
    again = {"steps": 4, "sample_every": 1, "sample_steps": 2, "resume": True}
    train(tmp_path, **again, previews=Previews(labels=(3,)))
    heights = [len(pixels(path)) for path in sorted((tmp_path / "samples").iterdir())]
    assert heights[0] == heights[1] > heights[2] == heights[3]


@pytest.mark.slow
def test_a_fine_tuning_run_shows_prompts_that_are_encoded_once(workspace, monkeypatch):
    """With the negative prompt in place of the empty one."""
    run, prompts = workspace / "runs/prompts", ["a red cat", "a dog"]
    options = (
        "--sample-every=2",
        "--sample-steps=2",
        "--sampler=DDIM",
        "--previews.negative=blurred",
        "--previews.per_label=2",
    )
    command = finetune_command(run, *options)
    assert run_command(*command, f"--previews.prompts={prompts}") == 0
    data, device = LatentDataset("images", "pipeline", cache="cache"), torch.device("cpu")
    monkeypatch.setattr("diffcore.integrations.diffusers.encode_prompts", None)  # all is cached
    banks = [
        data.prompt_wrapper(prompts, negative, device).keywords["prompts"]
        for negative in ("blurred", "")
    ]
    assert banks[0].texts == tuple(prompts)
    pairs = list(zip(*(bank.tensors.values() for bank in banks), strict=True))
    assert all(torch.equal(first[:2], second[:2]) for first, second in pairs)
    assert not all(torch.equal(first[2], second[2]) for first, second in pairs)
    found, full = (
        pixels(folder / "samples/step-00000004.png") for folder in (run, workspace / "runs/full")
    )
    assert 0 < len(found) < len(full)
