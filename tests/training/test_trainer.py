"""A training run: the files that it writes, its learning rate, and the labels of its network."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffcore.core.process import Process
from diffcore.io.safetensors import read_weights
from diffcore.training.averages.ema import Decay
from diffcore.training.construction import build_state
from diffcore.training.optimization.lr import LearningRate
from tests.helpers.tiny_pipelines import GREY_DIT
from tests.helpers.training_runs import (
    PROCESS,
    STEPS,
    LabelRecorder,
    crash_after,
    hashes,
    make_trainer,
    read_checkpoint,
    read_reports,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_writes_what_sampling_and_resuming_read(tmp_path):
    run = tmp_path / "run"
    state = train(run, steps=5, save_every=2, keep=2, sample_every=3, config="network: {}\n")
    names = ("model.safetensors", "ema.safetensors", "training.safetensors", "manifest.json")
    files = {"config.yaml", "process.json", "ema.safetensors", "metrics.jsonl"}
    files |= {f"checkpoints/step-0000000{step}/{name}" for step in (4, 5) for name in names}
    files |= {"checkpoints/outputs.json", "samples/step-00000003.png"}
    assert hashes(run).keys() == files
    assert Process.load(run / "process.json") == PROCESS
    assert (run / "config.yaml").read_text() == "network: {}\n"
    reports = read_reports(run)
    assert [report["step"] for report in reports] == [1, 2, 3, 4, 5]
    entries = {"step", "loss", "grad_norm", "lr", "skipped", "logsnr", "loss_by_level"}
    assert set(reports[0]) == entries
    saved = read_checkpoint(run, 5)
    for name, value in read_weights(run / "ema.safetensors").items():
        assert torch.equal(value, saved["ema.safetensors"][name]), name
        assert torch.equal(value, state.average.shadow[name]), name
    for name, value in saved["model.safetensors"].items():
        assert torch.equal(value, state.network.state_dict()[name]), name


def test_tensorboard_shows_no_steps_of_an_interrupted_run_twice(tmp_path):
    options = {"trackers": ["tensorboard"], "steps": 6}
    crash_after(make_trainer(tmp_path, save_every=3, **options), 3)
    # The events of steps 4 and 5, whose checkpoint was not written.
    crash_after(make_trainer(tmp_path, save_every=5, resume=True, **options), 5)
    shutil.rmtree(tmp_path / "checkpoints/step-00000005")
    train(tmp_path, resume=True, **options)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_preview_images_change_nothing_else(tmp_path):
    network = partial(LabelRecorder, dropout=0.2)
    train(tmp_path / "with", sample_every=1, network=network)
    train(tmp_path / "without", network=network)
    files = hashes(tmp_path / "with")
    previews = {name for name in files if name.startswith("samples/")}
    assert len(previews) == STEPS
    assert {name: files[name] for name in files.keys() - previews} == hashes(tmp_path / "without")


def test_the_loss_decreases_on_digits(tmp_path):
    train(tmp_path, steps=100, batch_size=32, log_every=10, lr=LearningRate(1e-2, warmup=10))
    losses = [report["loss"] for report in read_reports(tmp_path)]
    assert losses[-1] < 0.75 * losses[0]


def test_the_learning_rate_is_that_of_each_optimizer_step(tmp_path):
    rates, lr = [], LearningRate(1e-2, 3, "cosine")

    class RecordingSGD(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    train(tmp_path, optimizer=partial(RecordingSGD, momentum=0.5), lr=lr, accumulation=4)
    expected = [lr(step, STEPS) for step in range(STEPS)]
    assert rates == [[value] for value in expected]
    assert [report["lr"] for report in read_reports(tmp_path)] == expected


def test_labels_are_dropped_sample_by_sample_at_the_rate_of_the_process(tmp_path):
    process = Process(shape=(1, 8, 8), classes=10, dropout=0.3)
    state = train(tmp_path, process=process, steps=20, batch_size=64)
    labels = torch.stack(state.network.calls[1:])  # the first call checks the network
    share = (labels == 10).double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 1280) ** 0.5)
    assert all(0 < dropped < 40 for dropped in (labels == 10).sum(1).tolist())  # not whole batches
    assert set(labels.flatten().tolist()) == set(range(11))


@pytest.mark.parametrize(("dropout", "is_trained"), [(0.5, True), (0.0, False)])
def test_only_dropped_labels_train_the_null_embedding(tmp_path, dropout, is_trained):
    process = Process(shape=(1, 8, 8), classes=10, dropout=dropout)
    state = train(tmp_path / "run", process=process, optimizer=torch.optim.SGD)
    initial = build_state(make_trainer(tmp_path / "other", process=process))
    null, before = (network.labels.weight[10] for network in (state.network, initial.network))
    assert torch.equal(null, before) != is_trained


def test_without_classes_the_network_receives_no_labels(tmp_path):
    state = train(tmp_path, process=Process(shape=(1, 8, 8)))
    assert state.network.calls == [None] * (1 + STEPS)  # the first call checks the network


class SharedWeights(LabelRecorder):
    """Two of its layers, and two buffers of them, are the same."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(64)
        self.layers = torch.nn.Sequential(self.layers, torch.nn.Flatten(), self.norm)
        self.again = self.layers


def test_weights_that_layers_share_are_saved_and_resumed(tmp_path):
    for folder, steps in (("straight", 4), ("resumed", 2)):
        train(tmp_path / folder, network=SharedWeights, steps=steps, keep=1)
    state = train(tmp_path / "resumed", network=SharedWeights, steps=4, keep=1, resume=True)
    assert state.network.again is state.network.layers
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "straight")
    weights = read_weights(tmp_path / "resumed/ema.safetensors")
    for name, value in weights.items():
        if name.startswith("again."):
            assert torch.equal(value, weights[name.replace("again.", "layers.")]), name


def test_every_micro_batch_has_its_own_dropout_mask(tmp_path):
    masks = []

    class MaskRecorder(LabelRecorder):
        def forward(self, x, time, class_labels=None):
            if self.training:
                ones = torch.ones(64)
                masks.append(torch.nn.functional.dropout(ones, 0.5, training=True))
            return super().forward(x, time, class_labels)

    train(tmp_path, network=MaskRecorder, steps=2, accumulation=2)
    assert len({tuple(mask.tolist()) for mask in masks}) == 4


def test_the_average_has_the_decay_of_its_step(tmp_path):
    one = train(tmp_path / "one", steps=1, ema=Decay(0.9999))
    two = train(tmp_path / "two", steps=2, ema=Decay(0.9999))
    name = "image.weight"
    decay = (1 + 2) / (10 + 2)
    before, weights = one.average.shadow[name], two.network.state_dict()[name]
    expected = decay * before + (1 - decay) * weights
    torch.testing.assert_close(two.average.shadow[name], expected, rtol=1e-6, atol=1e-8)
    assert (weights - before).abs().max() > 1e-5


def test_a_dit_drops_labels_only_where_the_process_does(tmp_path):
    labels = []

    def record(table, given):
        if table.training:
            labels.extend(given[0].tolist())

    def network():
        torch.manual_seed(0)
        found = DiTTransformer2DModel(**GREY_DIT | {"num_embeds_ada_norm": 10})
        for block in found.transformer_blocks:
            table = block.norm1.emb.class_embedder.embedding_table
            table.register_forward_pre_hook(record)
        return found

    train(tmp_path, network=network, process=replace(PROCESS, dropout=0.0), steps=3)
    assert len(labels) >= 3 * 16 * 3
    assert 10 not in labels
