"""`diffcore evaluate` and `diffcore features`: equal numbers however the work is split, and what is
refused.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from diffcore.cli.evaluation.request import failed_bounds, spread_labels
from diffcore.cli.main import main
from diffcore.core.process import Process
from diffcore.core.random import Stream, normal
from diffcore.evaluation.comparison import METRICS
from diffcore.evaluation.digits import to_scan_units
from diffcore.evaluation.frechet_distance import frechet_distance
from diffcore.evaluation.label_accuracy import LabelClassifier
from diffcore.io.files import hash_file
from diffcore.sampling.images import load_image, save_image, to_image
from diffcore.training.data import Digits

HELD_OUT = "{class_path: Digits, init_args: {split: test}}"
MEASURED = [name for name in METRICS if name not in ("inception_score", "clip_score")]
OPTIONS = (
    f"--reference={HELD_OUT}",
    "--features=pixels",
    "--n=24",
    "--repeats=2",
    "--steps=2",
    "--force",
    "--batch-size=8",
    "--threads=1",
)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def check_by_hand(record, paths):
    """Distance and accuracy of the files, in the range of the process, without the command."""
    test, train = Digits("test"), Digits("train")
    x0 = torch.stack([load_image(path, Process(shape=(1, 8, 8))) for path in paths])
    labels = torch.tensor([int(path.stem.split("-")[1]) for path in paths])
    distance = frechet_distance(to_scan_units(x0), to_scan_units(test.x0)) / 256
    assert record["frechet_distance"]["values"][0] == pytest.approx(distance, rel=0.01)
    accuracy = LabelClassifier(train.x0, train.labels).accuracy(x0, labels)
    assert record["label_accuracy"]["values"][0] == pytest.approx(accuracy, abs=1 / 24)


def evaluate(folder, *options):
    assert main(["evaluate", str(folder), *OPTIONS, *options]) == 0
    return (folder / "evaluation.json").read_text()


def test_the_result_is_equal_to_the_last_digit_after_an_interruption(run, one_thread):
    first = evaluate(run)
    record = json.loads(first)
    assert list(record)[: len(MEASURED)] == MEASURED
    assert record["n"] == 24
    assert record["seeds"] == "0-47"
    assert record["weights"] == hash_file(run / "ema.safetensors")
    for name in ("frechet_distance", "label_accuracy"):
        assert {"samples", "spread", "values"} <= set(record[name])
    assert "training_data" not in record["label_accuracy"]
    assert record["label_accuracy"]["reference"] > 0.9
    assert record["frechet_distance"]["samples"] > 2 * record["frechet_distance"]["training_data"]
    assert (run / "evaluation" / "closest.png").is_file()
    folder = next((run / "evaluation").glob("samples-*"))
    images = sorted(folder.glob("*.png"))
    assert len(images) == 48
    check_by_hand(record, [path for path in images if int(path.stem.rpartition("-")[2]) < 24])
    for image in images[5:40]:
        image.unlink()
    shutil.rmtree(run / "evaluation" / "features")
    assert evaluate(run) == first
    assert len(list(folder.glob("*.png"))) == 48


def launch(ranks, *words):
    """Run a command on several ranks, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, "-m", "diffcore", *words]
    environments = [{**os.environ, **common, "RANK": str(rank)} for rank in range(ranks)]
    processes = [subprocess.Popen(command, env=environment) for environment in environments]
    assert [process.wait(timeout=300) for process in processes] == [0] * ranks


@pytest.mark.slow
def test_two_ranks_and_a_longer_evaluation_share_the_samples(run, one_thread):
    single = evaluate(run)
    shutil.rmtree(run / "evaluation")
    launch(2, "evaluate", str(run), *OPTIONS)
    assert (run / "evaluation.json").read_text() == single
    before = {path.name for path in run.glob("evaluation/samples-*/*.png")}
    record = json.loads(evaluate(run, "--n=30"))
    assert record["n"] == 30
    assert before < {path.name for path in run.glob("evaluation/samples-*/*.png")}
    assert len(list(run.glob("evaluation/samples-*"))) == 1


def test_a_small_number_of_samples_is_refused_unless_it_is_forced(run, capsys):
    words = [word for word in OPTIONS if word != "--force"]
    assert main(["evaluate", str(run), *words]) == 1
    assert (
        "n is 24, expected at least 320, 5 for each of the 64 features" in capsys.readouterr().err
    )
    assert not (run / "evaluation").exists()


def test_a_missed_bound_is_status_1(run, capsys):
    with pytest.raises(SystemExit, match=r"label_accuracy is .*, required >= 1"):
        main(["evaluate", str(run), *OPTIONS, "--require=label_accuracy>=1"])


def digits_folder(folder, split):
    source = Digits(split)
    pixels = ((source.x0 + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for index, (image, label) in enumerate(zip(pixels, source.labels.tolist(), strict=True)):
        save_image(to_image(image), folder / str(label) / f"{index:04}.png")
    return folder


def test_a_folder_is_measured_by_features_of_a_classifier_of_ones_own(tmp_path, capsys):
    file, images = tmp_path / "features.safetensors", digits_folder(tmp_path / "images", "test")
    training = ["features", "train", "Digits", f"--out={file}", "--width=8", "--steps=60"]
    assert main([*training, "--threads=1"]) == 0
    first = file.read_bytes()
    assert main([*training, "--threads=1"]) == 0
    assert file.read_bytes() == first
    words = [f"--reference={HELD_OUT}", "--training=Digits", f"--features={file}", "--threads=1"]
    assert main(["evaluate", str(images), *words, f"--out={tmp_path / 'out'}"]) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name, expected in (("frechet_distance", 0), ("precision", 1), ("coverage", 1)):
        assert record[name]["samples"] == pytest.approx(expected, abs=1e-6)
    assert record["frechet_distance"]["training_data"] > 0.01
    assert record["label_accuracy"]["samples"] == record["label_accuracy"]["reference"] > 0.5
    assert record["inception_score"]["samples"] > 1.1
    assert record["features_hash"] == hash_file(file)
    assert record["n"] == 297


@pytest.mark.parametrize(
    "words, message",
    [
        (["--features=nonsense"], "features is 'nonsense', expected pixels"),
        (["--features=inception"], "weights-inception-2015-12-05-6726825d.pth to"),
        (["--features=dinov2"], "hf download facebook/dinov2-base"),
        (["--reference=Digitz"], "names no data"),
        (["--n=1"], "n is 1, expected 2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_remedy(
    run, words, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["evaluate", str(run), *OPTIONS, *words]) == 1
    assert message in capsys.readouterr().err


def test_labels_are_in_the_proportions_of_the_reference_at_every_number():
    labels = [0] * 500 + [1] * 300 + [2] * 200
    found = spread_labels(labels, 0, 1000)
    for count in (50, 200, 1000):
        shares = torch.bincount(torch.tensor(found[:count]), minlength=3) / count
        assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=3 / count)
    assert spread_labels(labels, 100, 50) == found[100:150]


def test_bounds_are_numbers_or_multiples_of_the_training_data():
    results = {"frechet_distance": {"samples": 6.0, "training_data": 2.0}, "recall": {"samples": 0}}
    assert failed_bounds(["frechet_distance<=3x", "recall<=0"], results) == []
    assert failed_bounds(["frechet_distance<=2.5x"], results) == [
        "frechet_distance is 6, required <= 5"
    ]
    assert failed_bounds(["recall>=-1e-3"], results) == []
    for wrong in ("fid<=3", "recall<3", "recall<=3x", "recall<=1.2.3", "recall<=."):
        with pytest.raises(ValueError, match="require is"):
            failed_bounds([wrong], results)


def test_a_bound_that_cannot_be_read_is_refused_before_the_samples_are_drawn(run, capsys):
    assert main(["evaluate", str(run), *OPTIONS, "--require=recall<3"]) == 1
    assert "require is 'recall<3', expected a bound such as" in capsys.readouterr().err
    assert main(["evaluate", str(run), *OPTIONS, "--require=fid<=3"]) == 1
    assert "require is 'fid<=3', expected one of frechet_distance" in capsys.readouterr().err
    assert not (run / "evaluation").exists()


def test_values_beyond_the_range_are_refused(tmp_path, run, capsys):
    import numpy as np

    np.save(tmp_path / "wide.npy", 3 * normal(0, Stream.NOISE, torch.arange(9), (1, 8, 8)).numpy())
    assert main(["evaluate", str(run), *OPTIONS, f"--reference={tmp_path / 'wide.npy'}"]) == 1
    assert "expected -1 to 1" in capsys.readouterr().err
