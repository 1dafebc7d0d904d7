"""`diffcore doctor FOLDER`: a config that does not describe its network is found."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from diffcore.cli.image_model import ImageModel
from diffcore.cli.network_doctor import items_of
from diffcore.core.denoiser import Denoiser
from diffcore.core.oracle import GaussianMixture
from diffcore.core.process import Process
from diffcore.doctor.process import check_process, claimed_hypotheses, draw_errors, format_scores
from diffcore.evaluation.identification import process_hypotheses, score_difference
from diffcore.schedules import Discrete, Flow, Shifted, ZeroTerminalSNR
from diffcore.training.data.image_folder import ImageFolder
from tests.helpers.image_folders import write
from tests.helpers.oracles import ExactNetwork

D = 16
SPECTRUM = torch.logspace(0, -3, D, dtype=torch.float64)
POINTS = (
    torch.randn(128, D, generator=torch.Generator().manual_seed(0)).double() * SPECTRUM.sqrt()
).float()
BASE = Process(shape=(D,), sigma_data=float(POINTS.std()))
HYPOTHESES = process_hypotheses(BASE)
LINEAR = "epsilon, linear (DDPM), conditioned on index"


def judge(trained, claim):
    """The verdict on an exact network of one process whose config describes another."""
    oracle = GaussianMixture(torch.zeros(1, D).double(), SPECTRUM.diag()[None], process=trained)
    return check_process(Denoiser(ExactNetwork(oracle, trained), claim), POINTS)


def further(*values):
    """A case that varies only the field that differs."""
    return pytest.param(*values, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    "trained, claim, mark",
    [
        (LINEAR, LINEAR, "ok"),
        (LINEAR, "v_prediction, linear (DDPM), conditioned on index", "wrong"),
        further(LINEAR, "epsilon, scaled linear (Stable Diffusion), conditioned on index", "wrong"),
        further(LINEAR, "epsilon, linear (DDPM), conditioned on t", "wrong"),
        ("v_prediction, scaled linear, zero terminal SNR, conditioned on index", LINEAR, "wrong"),
        ("flow_prediction, flow, conditioned on 1000 t",
         "flow_prediction, flow, conditioned on t", "wrong"),
        ("v_prediction, cosine, conditioned on index",
         "v_prediction, cosine table (iDDPM), conditioned on index", "ok"),
    ],
)  # fmt: skip
def test_the_config_is_judged_by_the_error_of_the_network(trained, claim, mark):
    found = judge(HYPOTHESES[trained], HYPOTHESES[claim])
    assert found.finding.mark == mark
    assert found.claim == claim
    assert trained in found.finding.values["best"]
    if mark == "wrong":
        assert f"the config describes {claim}, but the network denoises best" in found.finding.text


def test_a_flow_that_receives_its_level_does_not_reveal_its_shift():
    process = HYPOTHESES["flow_prediction, flow, conditioned on 1000 t"]
    found = judge(process, replace(process, schedule=Shifted.by_time_shift(Flow(), 3.0)))
    assert found.finding.mark == "ok"
    assert any("shift of its training cannot be measured" in note for note in found.notes)


def test_a_flow_that_receives_the_time_before_its_shift_reveals_it():
    names = claimed_hypotheses(BASE)[1]
    shifted = "flow_prediction, flow shifted by 3 (SD3), conditioned on 1000 t before the shift"
    claim = "flow_prediction, flow, conditioned on 1000 t"
    found = judge(names[shifted], names[claim])
    assert found.finding.mark == "wrong"
    assert shifted in found.finding.values["best"]  # and e^1.15, which is 3.16


@pytest.mark.slow
def test_a_process_of_ones_own_is_a_hypothesis_with_every_prediction():
    claim = replace(BASE, schedule=ZeroTerminalSNR(Discrete("cosine")), prediction="sample")
    name, names = claimed_hypotheses(claim)
    assert names[name] == claim
    own = [process for process in names.values() if process.schedule == claim.schedule]
    assert {process.prediction for process in own} == {"sample", "v_prediction", "flow_prediction"}
    assert judge(replace(claim, prediction="v_prediction"), claim).finding.mark == "wrong"


def test_the_difference_of_a_score_to_itself_is_0_and_errors_shrink_with_images():
    scores = judge(HYPOTHESES[LINEAR], HYPOTHESES[LINEAR]).scores
    assert score_difference(scores[0], scores[0]) == (0, 0)
    difference, error = score_difference(scores[-1], scores[0])
    assert difference > 0 < error


def test_an_untrained_network_is_a_warning():
    class Zero(torch.nn.Module):
        def forward(self, x, time):
            return torch.full_like(x, 3.0)

    found = check_process(Denoiser(Zero(), HYPOTHESES[LINEAR]), POINTS)
    assert found.finding.mark == "warning"
    assert "under every hypothesis" in found.finding.text
    assert not found.notes


@pytest.mark.slow
def test_the_table_marks_the_config_and_the_figure_is_written(tmp_path):
    claim = "sample, cosine, conditioned on t"
    found = judge(HYPOTHESES[LINEAR], HYPOTHESES[claim])
    lines = format_scores(found, 3)
    assert len(lines) == 5
    assert lines[-1].endswith(f"{claim}  <- the config")
    draw_errors(found, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_flipped_prediction_type_in_a_pipelines_config_is_found(diffcore, tmp_path):
    """A network is trained, saved as a pipeline of diffusers, and its scheduler's config edited."""
    import diffusers
    from experiments.identification import train_network
    from PIL import Image

    from diffcore.training.data import Digits

    name = "epsilon, linear (DDPM), conditioned on index"
    network = train_network(name, 150)
    folder = tmp_path / "pipeline"
    scheduler = diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
    for index, x0 in enumerate(Digits("test").x0[:64]):
        pixels = ((x0[0] + 1) * 127.5).round().byte().numpy()
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    ended = diffcore("doctor", folder, "--data", tmp_path / "images", "--out", tmp_path / "out")
    assert ended.status == 0, ended.out + ended.err
    assert (tmp_path / "out" / "denoising-error.png").exists()
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(config))
    ended = diffcore("doctor", folder, "--data", tmp_path / "images")
    assert ended.status == 1, ended.out + ended.err
    assert (
        "the config describes v_prediction, linear (DDPM), conditioned on index, but" in ended.out
    )
    assert "the network denoises best as epsilon, linear" in ended.out


@pytest.mark.parametrize("low, high, value", [(-1.0, 1.0, -0.6), (0.0, 1.0, 0.2), (0.0, 2.0, 0.4)])
def test_images_are_scaled_to_the_range_of_the_process(tmp_path, low, high, value):
    process = Process(shape=(1, 8, 8), low=low, high=high, classes=2, dropout=0.0)
    model = ImageModel(Denoiser(torch.nn.Identity(), process))
    write(tmp_path / "a" / "1.png", 51)
    write(tmp_path / "b" / "1.png", 51)
    source = ImageFolder(tmp_path, 8, "L")
    x0, labels = items_of(source, model, 5)
    assert x0.unique().tolist() == pytest.approx([value], abs=1e-6)
    assert labels.tolist() == [0, 1]  # without dropout the null label was never trained
    model = ImageModel(Denoiser(torch.nn.Identity(), replace(process, dropout=0.1)))
    assert items_of(source, model, 5)[1] is None


@pytest.mark.slow
def test_a_run_is_examined_on_its_own_data_or_on_a_folder(diffcore, trained, tmp_path):
    before = sorted(path.stat().st_mtime_ns for path in trained.rglob("*"))
    ended = diffcore("doctor", trained, "--count", 8)
    assert ended.status in (0, 1), ended.err
    assert "The config describes v_prediction, cosine, conditioned on index." in ended.out
    assert sorted(path.stat().st_mtime_ns for path in trained.rglob("*")) == before
    for shade in (10, 200):
        write(tmp_path / "images" / f"{shade}.png", shade)
    assert "on 2 images" in diffcore("doctor", trained, "--data", tmp_path / "images").out
    shutil.copytree(trained / "pipeline", tmp_path / "pipeline", dirs_exist_ok=True)
    ended = diffcore("doctor", tmp_path / "pipeline")
    assert "a pipeline names no data: give a folder of images, --data IMAGES" in ended.err
