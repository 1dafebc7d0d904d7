"""`diffcore doctor`: every fault that is planted appears, and clean settings have none."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from diffcore.core.process import Process
from diffcore.doctor import images, resources
from diffcore.doctor.data import check_items, check_labels, read_sample
from diffcore.doctor.settings import average_weights, check_settings
from diffcore.doctor.training import check_training
from diffcore.guidance import CFG
from diffcore.schedules import Cosine
from diffcore.training.averages.ema import Decay
from diffcore.training.data.adapters import as_data_source
from diffcore.training.data.image_files import ImageFiles
from diffcore.training.optimization.lr import LearningRate
from tests.helpers.image_folders import write
from tests.helpers.training_runs import LabelRecorder, ListDataset, hashes, make_trainer

PLAIN = Process(Cosine(), shape=(1, 4, 4), sigma_data=0.5)


def marks(findings):
    return {finding.name: finding.mark for finding in findings}


def text(findings, name):
    return next(finding.text for finding in findings if finding.name == name)


def examine_items(*items, process=PLAIN):
    return check_items(read_sample(as_data_source(ListDataset(*items)), process, 0, 2048), process)


def drawn(scale=0.5, shift=0.0, count=64):
    x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    return list((x.clamp(-1, 1) + shift).clamp(-1, 1))


def test_the_recipe_digits_is_clean_and_nothing_is_written(diffcore, tiny, tmp_path):
    ended = diffcore("doctor", "digits", *tiny, "--steps", 400)
    assert ended.status == 0, ended.out + ended.err
    assert "0 wrong" in ended.out
    for name in ("overfit one batch", "memory", "disk", "time", "gradient norm", "condition"):
        assert f"ok       {name}: " in ended.out, name
    assert not list((tmp_path / "here").iterdir())


def test_quick_does_not_train_and_out_receives_findings_and_a_figure(diffcore, tmp_path):
    ended = diffcore(
        "doctor",
        "digits",
        "--quick",
        "--out",
        "found",
        "--ema.warmup",
        "false",
        "--ema.decay",
        0.9999,
    )
    assert ended.status == 1
    assert "wrong    averaged weights: 96% of the average are the initial weights" in ended.out
    assert "overfit" not in ended.out
    assert set(hashes(tmp_path / "here" / "found")) == {"findings.json", "effective-weight.png"}
    findings = json.loads((tmp_path / "here" / "found" / "findings.json").read_text())
    assert {"wrong", "ok"} == {finding["mark"] for finding in findings}


def test_a_recipe_is_meant_also_beside_a_folder_of_its_name(diffcore):
    Path("digits").mkdir()
    ended = diffcore("doctor", "digits", "--batch_size", "0", "--quick")
    assert "no model_index.json" not in ended.err + ended.out
    assert "the training refuses to start" in ended.out


def test_settings_that_training_refuses_are_wrong(diffcore):
    ended = diffcore("doctor", "digits", "--quick", "--process.low", 0)
    assert ended.status == 1
    assert "wrong    settings: the training refuses to start: item 0 of the data" in ended.out


def test_faults_of_files_are_findings_of_the_command(diffcore, tmp_path):
    folder = tmp_path / "images"
    for number in range(4):
        write(folder / f"{number}.png", number * 40, size=(8, 8))
    (folder / "broken.png").write_bytes(b"no image")
    ended = diffcore(
        "doctor", "digits", "--quick", "--data", "ImageFolder", "--data.folder", folder,
        "--data.size", 8, "--data.channels", "L", "--process.classes", 0, "--process.dropout", 0,
        "--network.num_class_embeds", "null", "--sample-every", 0,
    )  # fmt: skip
    assert ended.status == 1, ended.err
    assert (
        "wrong    unreadable files: 1 of 5 images cannot be read, such as broken.png" in ended.out
    )


def test_items_that_cannot_be_read_are_wrong():
    findings = examine_items(*drawn(), torch.full((1, 4, 4), 7.0), torch.zeros(1, 2, 2))
    assert marks(findings)["items"] == "wrong"
    assert "2 of 66 items" in text(findings, "items")


@pytest.mark.parametrize(
    "items, name, mark",
    [
        (drawn(), "data range", "ok"),
        ([x.abs() for x in drawn()], "data range", "wrong"),
        ([torch.full((1, 4, 4), 0.5)] * 3, "data range", "wrong"),
        (drawn(), "sigma_data", "ok"),
        (drawn(0.3), "sigma_data", "warning"),
        (drawn(0.1), "sigma_data", "wrong"),
        (drawn(), "duplicates", "ok"),
        ([*drawn(), drawn()[3]], "duplicates", "warning"),
        (drawn(count=1) * 5, "duplicates", "wrong"),
    ],
)
def test_range_scale_and_repetition_of_items(items, name, mark):
    assert marks(examine_items(*items))[name] == mark


def test_statistics_are_measured_by_channel():
    process = Process(shape=(2, 4, 4))
    x = torch.stack([torch.full((4, 4), -1.0), torch.eye(4)])
    (finding,) = [f for f in examine_items(x, process=process) if f.name == "data range"]
    assert finding.values == {
        "min": [-1.0, 0.0], "max": [-1.0, 1.0], "mean": [-1.0, 0.25],
        "std": [0.0, pytest.approx(0.1875**0.5)],
    }  # fmt: skip
    assert "Channel 0 is constant" in finding.text


@pytest.mark.parametrize(
    "labels, mark, words",
    [
        ([0, 1] * 20, "ok", "2 classes with 20 to 20"),
        ([0] * 20, "wrong", "1 of 2 classes have no items, such as 1 (dogs)"),
        ([0] * 40 + [1], "warning", "the rarest is 1 (dogs) with 1"),
        ([0] * 400 + [1] * 20, "warning", "the rarest is 1 (dogs) with 20"),
    ],
)
def test_labels_are_counted(labels, mark, words):
    (finding,) = check_labels(labels, Process(classes=2), ("cats", "dogs"))
    assert (finding.mark, words in finding.text) == (mark, True)


def test_modes_sizes_and_equal_files_of_images(tmp_path):
    write(tmp_path / "a.png", (9, 80, 7), "RGB", (16, 16))
    write(tmp_path / "b.png", 90, "L", (16, 16))
    write(tmp_path / "c.png", (1, 2, 3, 4), "RGBA", (16, 16))
    clean = images.check_files(ImageFiles(tmp_path, 16, "RGB", "crop", "skip"))
    assert marks(clean) == {
        "unreadable files": "ok", "channel modes": "warning", "image sizes": "ok",
        "equal files": "ok",
    }  # fmt: skip
    assert "1 are grey among colour images" in text(clean, "channel modes")
    assert "1 are transparent" in text(clean, "channel modes")
    write(tmp_path / "d.png", (1, 2, 3, 4), "RGBA", (16, 16))
    write(tmp_path / "e.png", (1, 2, 3), "RGB", (4, 20))
    found = images.check_files(ImageFiles(tmp_path, 16, "RGB", "crop", "skip"))
    assert "1 of 5 images (20%) are scaled up" in text(found, "image sizes")
    assert "such as c.png and d.png" in text(found, "equal files")
    grey = images.check_files(ImageFiles(tmp_path, 32, "L", "pad", "skip"))
    assert "4 lose their colour" in text(grey, "channel modes")
    assert marks(grey)["image sizes"] == "wrong"


class Words:
    """A tokenizer of one token for each word."""

    model_max_length = 3

    def __call__(self, text, truncation):
        assert not truncation
        return type("Encoded", (), {"input_ids": text.split()})


def test_captions_that_are_empty_shared_or_cut_are_found():
    good = images.check_captions(("a cat", "a dog"), (0, 1), {"tokenizer": Words()})
    assert good.mark == "ok"
    found = images.check_captions(
        ("", "a cat", "one two three four"), (0, 1, 1, 1, 1, 2), {"tokenizer": Words()}
    )
    assert found.mark == "warning"
    assert found.values == {
        "distinct": 3, "empty": 1, "shared": 3, "cut": {"tokenizer": 1},
    }  # fmt: skip


def test_the_shares_of_an_average_with_warm_up_are_those_of_its_recursion():
    decay, steps = Decay(0.98), 60
    shares = [1.0]  # of the initial weights, then of the weights after each step
    for step in range(1, steps + 1):
        shares = [decay(step) * share for share in shares] + [1 - decay(step)]
    initial, first_half, half_life = average_weights(decay, steps)
    assert initial == pytest.approx(shares[0])
    assert first_half == pytest.approx(sum(shares[: steps // 2 + 1]))
    assert sum(shares[-half_life:]) >= 0.5 > sum(shares[-half_life + 1 :])


def test_the_shares_of_an_average_are_those_of_the_recursion():
    decay, steps = Decay(0.9, warmup=False), 40
    initial, first_half, half_life = average_weights(decay, steps)
    assert initial == pytest.approx(0.9**40)
    assert first_half == pytest.approx(0.9**20)
    assert 0.9 ** (half_life - 1) > 0.5 >= 0.9**half_life


@pytest.mark.parametrize(
    "options, name, mark",
    [
        ({"ema": Decay(0.99)}, "averaged weights", "ok"),
        ({"ema": Decay(0.9999)}, "averaged weights", "warning"),
        ({"ema": Decay(0.9999, warmup=False)}, "averaged weights", "wrong"),
        ({}, "learning rate", "ok"),
        ({"lr": LearningRate(1e-3, warmup=450)}, "learning rate", "wrong"),
        ({"lr": LearningRate(1e-3, warmup=300)}, "learning rate", "warning"),
        ({"lr": LearningRate(0.1)}, "learning rate", "warning"),
        ({"lr": LearningRate(1e-9)}, "learning rate", "warning"),
        ({}, "null label", "ok"),
        ({"dropout": 0.0}, "null label", "warning"),
        ({"dropout": 0.0, "guidance": CFG(2.0)}, "null label", "wrong"),
        ({"dropout": 0.9}, "null label", "warning"),
    ],
)
def test_settings_are_judged(tmp_path, options, name, mark):
    dropout = options.pop("dropout", 0.1)
    process = Process(shape=(1, 8, 8), classes=10, dropout=dropout)
    trainer = make_trainer(tmp_path, process=process, steps=450, **options)
    assert marks(check_settings(trainer))[name] == mark


class Blind(nn.Module):
    """A network that ignores time and label, with a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, time, class_labels=None):
        return self.layer(x.flatten(1)).view_as(x)


class Constant(nn.Module):
    """A network whose output depends on no weight but by a factor of 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, time, class_labels=None):
        return 0 * self.scale * x


class Exploding(Constant):
    def forward(self, x, time, class_labels=None):
        return self.scale * x * 1e30


def trained_findings(tmp_path, **options):
    process = Process(shape=(1, 8, 8), classes=10, dropout=0.1, sigma_data=0.75)
    trainer = make_trainer(tmp_path, process=process, **options)
    findings, state, timing = check_training(trainer)
    return findings, (trainer, state, timing)


def test_a_sound_network_learns_one_batch(tmp_path):
    findings, (trainer, state, timing) = trained_findings(
        tmp_path / "run", network=LabelRecorder, lr=LearningRate(1e-2)
    )
    assert set(marks(findings).values()) == {"ok"}, findings
    resources_found = resources.check_resources(trainer, state, timing)
    assert marks(resources_found) == {"memory": "ok", "disk": "ok", "time": "ok"}
    memory = resources_found[0].values
    numbers = sum(p.numel() for p in state.network.parameters())
    assert memory["gradients"] == 4 * numbers
    assert memory["optimizer"] == pytest.approx(8 * numbers, rel=0.01)
    assert not (tmp_path / "run").exists()


def test_a_network_that_ignores_its_inputs_is_found(tmp_path):
    findings, _ = trained_findings(tmp_path, network=Blind)
    found = marks(findings)
    assert found["time conditioning"] == found["condition"] == "wrong"
    assert found["unused parameters"] == "warning"
    assert "2 trained parameters receive no gradient, such as idle.weight" in text(
        findings, "unused parameters"
    )


def test_a_network_that_does_not_learn_is_found(tmp_path):
    findings, _ = trained_findings(tmp_path, network=Constant)
    found = marks(findings)
    assert found["overfit one batch"] == found["gradient norm"] == "wrong"
    assert "the gradient is 0" in text(findings, "gradient norm")


def test_a_loss_that_is_not_finite_is_found(tmp_path):
    findings, _ = trained_findings(tmp_path, network=Exploding)
    found = marks(findings)
    assert found["overfit one batch"] == found["gradient norm"] == "wrong"
    assert "not finite" in text(findings, "overfit one batch")


def test_too_little_memory_and_disk_are_wrong(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, network=LabelRecorder)
    assert set(marks(resources.check_size(trainer)).values()) == {"ok"}
    monkeypatch.setattr(resources, "machine_memory", lambda: 1000)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: usage)
    assert marks(resources.check_size(trainer)) == {"memory": "wrong", "disk": "wrong"}
