"""The trainer, in this process with a tiny network: the same run however it is split, and refused where it cannot be right."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from diffcore.core.process import Process
from diffcore.guidance import CFG
from diffcore.io.safetensors import read_weights
from diffcore.training import checkpoint
from diffcore.training.data import Digits
from diffcore.training.ema import Decay
from diffcore.training.lr import LearningRate
from diffcore.training.state import build_state
from diffcore.training.trainer import Trainer
from tests.helpers.training_runs import crash_after, hashes, refused_run

STEPS = 6


class Network(nn.Module):
    """A perceptron on 8x8 images that remembers which labels it was given."""

    def __init__(self, classes=10, dropout=0.0):
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.labels = nn.Embedding(classes + 1, 32)
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Linear(32, 64), nn.Dropout(dropout), nn.SiLU(), nn.Linear(64, 64)
        )
        self.image = nn.Linear(64, 32)
        self.register_buffer("calls", torch.tensor(0))
        self.given = []

    def forward(self, x, time, class_labels=None):
        self.calls += self.training
        self.given.append(class_labels)
        label = 0 if class_labels is None else self.labels(class_labels)
        hidden = self.image(x.flatten(1)) + self.time(time[:, None] / 1000) + label
        return self.layers(hidden).view_as(x)


class Items(Dataset):
    """A data set of these items."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


PROCESS = Process(shape=(1, 8, 8), classes=10, dropout=0.1)
GREY, NAN = torch.zeros(1, 8, 8), torch.full((1, 8, 8), math.nan)


pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, **options):
    defaults = {
        "network": Network,
        "data": Digits(),
        "process": PROCESS,
        "optimizer": torch.optim.AdamW,
        "folder": folder,
        "steps": STEPS,
        "lr": LearningRate(1e-3, warmup=10),
        "ema": Decay(0.9),
        "batch_size": 16,
        "log_every": 1,
        "trackers": [],
    }
    return Trainer(**(defaults | options))


def trained(folder, **options):
    """The state of a run after its last step."""
    return trainer(folder, **options).train()


def reports(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder, step=STEPS):
    return checkpoint.read(folder / "checkpoints" / f"step-{step:08d}").tensors


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_runs_folder_holds_what_sampling_and_resuming_need(tmp_path):
    made = trained(
        tmp_path / "run", steps=5, save_every=2, keep=2, sample_every=3, config="network: {}\n"
    )
    files = {
        "config.yaml",
        "process.json",
        "ema.safetensors",
        "metrics.jsonl",
        "samples/step-00000003.png",
        *(
            f"checkpoints/step-0000000{step}/{name}"
            for step in (4, 5)
            for name in (
                "model.safetensors",
                "ema.safetensors",
                "training.safetensors",
                "manifest.json",
            )
        ),
    }
    assert hashes(tmp_path / "run").keys() == files
    assert Process.load(tmp_path / "run/process.json") == PROCESS
    assert (tmp_path / "run/config.yaml").read_text() == "network: {}\n"
    assert [report["step"] for report in reports(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert set(reports(tmp_path / "run")[0]) == {"step", "loss", "grad_norm", "lr", "skipped"}
    average = weights(tmp_path / "run", 5)["ema.safetensors"]
    for name, value in read_weights(tmp_path / "run/ema.safetensors").items():
        assert torch.equal(value, average[name]), name
        assert torch.equal(value, made.average.shadow[name]), name
    for name, value in weights(tmp_path / "run", 5)["model.safetensors"].items():
        assert torch.equal(value, made.network.state_dict()[name]), name


def test_the_tracker_writes_tensorboards_events(tmp_path):
    trained(tmp_path, steps=1, trackers=["tensorboard"])
    assert any("tfevents" in path.name for path in tmp_path.rglob("*"))


def test_pictures_along_the_way_change_nothing(tmp_path):
    trained(tmp_path / "with", sample_every=1, network=partial(Network, dropout=0.2))
    trained(tmp_path / "without", network=partial(Network, dropout=0.2))
    assert len(list((tmp_path / "with/samples").iterdir())) == STEPS
    others = {
        name: digest
        for name, digest in hashes(tmp_path / "with").items()
        if not name.startswith("samples/")
    }
    assert others == hashes(tmp_path / "without")


def test_the_loss_falls_on_digits(tmp_path):
    trained(tmp_path, steps=100, batch_size=32, log_every=10, lr=LearningRate(1e-2, warmup=10))
    losses = [report["loss"] for report in reports(tmp_path)]
    assert losses[-1] < 0.75 * losses[0]


def test_the_learning_rate_is_the_curve_at_each_optimizer_step(tmp_path):
    seen, lr = [], LearningRate(1e-2, 3, "cosine")

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    trained(tmp_path, optimizer=partial(Optimizer, momentum=0.5), lr=lr, accumulation=4)
    expected = [lr(step, STEPS) for step in range(STEPS)]
    assert seen == [[value] for value in expected]
    assert [report["lr"] for report in reports(tmp_path)] == expected


def test_the_condition_is_dropped_sample_by_sample_at_the_stated_rate(tmp_path):
    made = trained(
        tmp_path, process=Process(shape=(1, 8, 8), classes=10, dropout=0.3), steps=20, batch_size=64
    )
    given = torch.stack(made.network.given[1:])  # the first is the probe before training
    share = (given == 10).double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 1280) ** 0.5)
    assert all(0 < dropped < 40 for dropped in (given == 10).sum(1).tolist())  # not whole batches
    assert set(given.flatten().tolist()) == set(range(11))


def test_the_null_embedding_is_trained_only_by_dropped_samples(tmp_path):
    for dropout, moves in ((0.5, True), (0.0, False)):
        folder = tmp_path / str(dropout)
        optimizer = torch.optim.SGD
        made = trained(
            folder,
            process=Process(shape=(1, 8, 8), classes=10, dropout=dropout),
            optimizer=optimizer,
        )
        torch.manual_seed(0)
        first = build_state(trainer(tmp_path / "other", process=made.settings.process))
        assert torch.equal(made.network.labels.weight[10], first.network.labels.weight[10]) != moves


def test_without_classes_the_network_is_given_no_labels(tmp_path):
    made = trained(tmp_path, process=Process(shape=(1, 8, 8)))
    assert made.network.given == [None] * (1 + STEPS)  # once before training


# The same run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulation_equals_one_batch(tmp_path, accumulation):
    trained(tmp_path / "whole", clip=0.1)
    trained(tmp_path / "parts", clip=0.1, accumulation=accumulation)
    for whole, parts in zip(reports(tmp_path / "whole"), reports(tmp_path / "parts"), strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)
    for name in ("model.safetensors", "ema.safetensors"):
        own, other = (weights(tmp_path / folder)[name] for folder in ("whole", "parts"))
        for key in own.keys() - {"calls"}:
            torch.testing.assert_close(other[key], own[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"workers": 2}, {"log_every": 1, "save_every": 2}, {"keep": 1}], ids=repr
)
def test_what_does_not_enter_the_weights_changes_no_bit(tmp_path, options):
    trained(tmp_path / "first")
    trained(tmp_path / "second", **options)
    first, second = (hashes(tmp_path / folder) for folder in ("first", "second"))
    assert {name: second[name] for name in first} == first


def test_runs_of_another_seed_differ(tmp_path):
    for seed in (0, 1, 2**40):  # a 32-bit seed would confuse the first and the last
        trained(tmp_path / str(seed), seed=seed, steps=1)
    assert len({reports(tmp_path / str(seed))[0]["loss"] for seed in (0, 1, 2**40)}) == 3


def test_the_global_random_state_is_not_used(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        trained(tmp_path / str(seed), network=partial(Network, dropout=0.5))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_resumed_run_is_the_same_run(tmp_path, stop, log_every, monkeypatch):
    options = {
        "network": partial(Network, dropout=0.2),
        "save_every": 1,
        "keep": 2,
        "log_every": log_every,
    }
    trained(tmp_path / "straight", **options)
    crash_after(trainer(tmp_path / "resumed", **options), stop, monkeypatch)
    trained(tmp_path / "resumed", resume=True, **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")


def break_newest(folder):
    path = max((folder / "checkpoints").iterdir()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    return path


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    trained(tmp_path, save_every=2)
    whole = hashes(tmp_path)
    path = break_newest(tmp_path)
    capsys.readouterr()
    trained(tmp_path, save_every=2, resume=True)
    said = capsys.readouterr().err
    assert said.index(str(path)) < said.index("resumed at step 4")
    found = hashes(tmp_path)
    assert {name: value for name, value in found.items() if "broken-" not in name} == whole
    assert any("broken-step-00000006" in name for name in found)


def test_a_broken_checkpoint_does_not_push_out_the_ones_written_after_it(tmp_path, monkeypatch):
    trained(tmp_path, save_every=2)
    break_newest(tmp_path)
    crash_after(trainer(tmp_path, save_every=1, keep=1, resume=True), 5, monkeypatch)
    assert checkpoint.newest(tmp_path / "checkpoints", print).state["step"] == 5


def test_a_resume_on_another_number_of_threads_says_what_it_costs(tmp_path, capsys):
    trained(tmp_path, steps=2)
    torch.set_num_threads(2)
    trained(tmp_path, steps=3, resume=True)
    said = capsys.readouterr().err
    assert "'threads': (1, 2)" in said
    assert "not bit for bit" in said


def test_a_run_whose_checkpoints_are_all_broken_is_not_resumed(tmp_path):
    trained(tmp_path, keep=1)
    break_newest(tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint left: start a new run in another"):
        trainer(tmp_path, resume=True).train()


def test_a_finished_run_resumed_is_left_as_it_is(tmp_path):
    trained(tmp_path)
    whole = hashes(tmp_path)
    trained(tmp_path, resume=True)
    assert hashes(tmp_path) == whole


# Refused -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    trained(tmp_path)
    whole = hashes(tmp_path)
    with pytest.raises(
        ValueError,
        match="holds a run already: continue it with --resume true, or choose another folder",
    ):
        trainer(tmp_path, seed=5).train()
    assert hashes(tmp_path) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision is fp16, which a CPU does not support: use bf16 or no"),
        (
            {"batch_size": 16, "accumulation": 3},
            "batch_size is 16, expected a multiple of 1 ranks x 3 micro-batches",
        ),
        ({"resume": True}, "holds no run to resume: leave out --resume, or choose another"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_written(tmp_path, options, message):
    if torch.accelerator.is_available() and options.get("precision") == "fp16":
        pytest.skip("an accelerator does fp16")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **options).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"accumulation": 0}, "accumulation is 0, expected at least 1"),
        ({"patience": 0}, "patience is 0, expected at least 1"),
        ({"log_every": 0}, "log_every is 0, expected at least 1"),
        ({"save_every": 0}, "save_every is 0, expected at least 1"),
        ({"keep": 0}, "keep is 0, expected at least 1"),
        ({"sample_steps": 0}, "sample_steps is 0, expected at least 1"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"sample_every": -1}, "sample_every is -1, expected at least 0"),
        ({"clip": 0.0}, "clip is 0.0, expected a positive norm"),
        ({"clip": math.nan}, "clip is nan, expected a positive norm"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        (
            {"process": Process(shape=(1, 8, 8), dropout=0.1)},
            "dropout is 0.1, .* there is no condition to drop",
        ),
        ({"data": Items()}, "Items is empty"),
        (
            {"data": Items((torch.zeros(1, 8, 9), 0))},
            r"\(1, 8, 9\), expected a float tensor .* \(1, 8, 8\)",
        ),
        ({"data": Items((GREY.byte(), 0))}, "torch.uint8 .*, expected a float tensor"),
        ({"data": Items(("an image", 0))}, "is str, expected a float tensor"),
        (
            {"data": Items((GREY + 1.01, 0))},
            r"lies in \[1.01, 1.01\], expected within the process's range \[-1, 1\]",
        ),
        ({"data": Items((GREY - 1.01, 0))}, r"lies in \[-1.01, -1.01\], expected within"),
        ({"data": Items((GREY, 10))}, r"label 10, expected 0 .. 9"),
        ({"data": Items((GREY, -2))}, r"label -2, expected 0 .. 9"),
        ({"data": Items(GREY)}, r"label -1, expected 0 .. 9"),
    ],
)
def test_bad_settings_and_data_are_refused_when_the_trainer_is_built(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


# Only the first item is looked at: a later label `classes` is silently trained as the null label, one beyond is an IndexError.
@pytest.mark.parametrize("label", [10, 11, -1])
def test_a_later_item_with_a_label_out_of_range_is_refused(tmp_path, label):
    with pytest.raises(ValueError, match=rf"label {label}, expected 0 \.\. 9"):
        trained(tmp_path, data=Items((GREY, 0), (GREY, label)))


# Not finite ----------------------------------------------------------------------------------------------------------


def test_a_nan_in_the_data_stops_the_run_naming_level_and_sample(tmp_path, capsys):
    data = Items(*[(GREY, 0)] * 3, (NAN, 1))
    made = trainer(tmp_path, data=data, batch_size=4, steps=50, patience=5)
    expected = r"5 steps in a row were not finite \(patience is 5\): step \d, sample 3 .* at λ = "
    state, _ = refused_run(made, expected)
    assert state.step == 5
    assert all(value.isfinite().all() for value in state.network.state_dict().values())
    assert all(value.isfinite().all() for value in state.average.shadow.values())
    assert [report["skipped"] for report in reports(tmp_path)] == [1] * 5
    assert capsys.readouterr().err.count("sample 3") >= 4


def test_the_level_named_is_the_one_that_the_sample_was_trained_at(tmp_path):
    asked = []

    class Recording(Network):
        def forward(self, x, time, class_labels=None):
            asked.extend(time[x.flatten(1).isnan().any(1)].tolist())
            return super().forward(x, time, class_labels)

    made = trainer(
        tmp_path, network=Recording, data=Items((GREY, 0), (NAN, 1)), batch_size=2, patience=1
    )
    with pytest.raises(ValueError, match="not finite") as caught:
        made.train()
    named = float(str(caught.value).split("λ = ")[1].split(",")[0])
    assert named == pytest.approx(PROCESS.schedule.logsnr((asked[0] + 1) / 1000), abs=1e-3)


def test_a_rare_nan_is_reported_and_survived(tmp_path, capsys):
    data = Items(*[(GREY, 0)] * 31, (NAN, 1))
    made = trained(tmp_path, data=data, batch_size=4, steps=16, patience=2)
    skipped = [report["skipped"] for report in reports(tmp_path)]
    assert sum(skipped) == 2  # once an epoch
    assert all((report["loss"] is None) == bool(report["skipped"]) for report in reports(tmp_path))
    assert all(value.isfinite().all() for value in made.network.state_dict().values())
    assert capsys.readouterr().err.count("sample 31") == 2


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_dropped_as_a_whole(tmp_path, broken):
    class Broken(Network):
        def forward(self, x, time, class_labels=None):
            out = super().forward(x, time, class_labels)
            if out.requires_grad:
                out.register_hook(
                    lambda gradient: gradient.index_fill(0, torch.tensor([0]), broken)
                )
            return out

    made = trainer(tmp_path, network=Broken, patience=2, optimizer=torch.optim.SGD)
    state, _ = refused_run(made, "2 steps in a row were not finite")
    other = build_state(trainer(tmp_path / "other"))
    for name, value in other.network.named_parameters():
        assert torch.equal(dict(state.network.named_parameters())[name], value), name


def test_patience_counts_across_reports(tmp_path):
    made = trainer(tmp_path, data=Items((NAN, 0)), batch_size=2, steps=50, patience=5, log_every=3)
    state, _ = refused_run(made, "in a row were not finite")
    assert state.step == 6  # the first report after the fifth


# What comes after the last report is neither reported nor looked at: such a run ends as if all were well.
def test_a_run_that_ends_between_reports_is_not_finite_either(tmp_path):
    with pytest.raises(ValueError, match="in a row were not finite"):
        trained(tmp_path, data=Items((NAN, 0)), batch_size=2, steps=4, patience=2, log_every=20)


# Refused before anything is written ----------------------------------------------------------------------------------


class Wide(Network):
    def forward(self, x, time, class_labels=None):
        return super().forward(x, time, class_labels).repeat(1, 2, 1, 1)


def test_a_network_whose_answer_has_another_shape_is_refused_before_the_run_begins(tmp_path):
    made = trainer(tmp_path / "run", network=Wide)
    with pytest.raises(ValueError, match=r"answers \(2, 2, 8, 8\).*process's shape"):
        made.train()
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("process", "guidance", "remedy"),
    [
        (Process(shape=(1, 8, 8), prediction="epsilon"), CFG(1.0), "predicts epsilon"),
        (Process(shape=(1, 8, 8), classes=10), CFG(2.0), "without condition dropout"),
    ],
    ids=["epsilon from pure noise", "guidance without dropout"],
)
def test_pictures_that_could_not_be_sampled_are_refused_before_the_first_step(
    tmp_path, process, guidance, remedy
):
    with pytest.raises(ValueError, match=remedy):
        trainer(tmp_path, process=process, guidance=guidance, sample_every=2)
    trainer(tmp_path, process=process, guidance=guidance, sample_every=0)


def test_an_accumulation_set_behind_our_back_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        trainer(tmp_path).train()
