"""`diffcore likelihood`: equal numbers in two runs, the record, and what is refused."""

import io
import json
import math
import shutil
import tarfile

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.cli.commands import likelihood as command
from diffcore.cli.evaluation.likelihood_data import read_data
from diffcore.cli.evaluation.likelihood_request import LikelihoodRequest
from diffcore.cli.image_model import ImageModel, PipelineOptions, load_image_model
from diffcore.cli.main import main
from diffcore.core.random import Stream, normal
from diffcore.evaluation.likelihood import variational_bound
from diffcore.evaluation.likelihood.bits import bits_per_dimension
from diffcore.evaluation.likelihood.dequantisation import TruncatedNormal
from diffcore.evaluation.likelihood.trace import Hutchinson
from diffcore.io.files import hash_file
from diffcore.run import Run
from diffcore.samplers import AdaptiveRungeKutta, Heun
from diffcore.training.data import Digits
from tests.cli.test_evaluate import launch
from tests.helpers.tiny_pipelines import dit_pipeline

HELD_OUT = "{class_path: Digits, init_args: {split: test}}"
FAST = ("--n=3", "--threads=1", "--batch-size=3", "--solver.rtol=1e-2", "--solver.atol=1e-2")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def likelihood(folder, *options, data=HELD_OUT):
    assert main(["likelihood", str(folder), data, *FAST, *options]) == 0
    return json.loads((folder / "likelihood.json").read_text())


def test_the_result_is_equal_twice_and_is_that_of_the_function(run, one_thread, capsys):
    first = likelihood(run)
    text = (run / "likelihood.json").read_text()
    assert likelihood(run) == first
    assert (run / "likelihood.json").read_text() == text
    (name,) = first
    record = first[name]
    assert name == f"ode, TruncatedNormal, {HELD_OUT}"
    test, rows = Digits("test"), torch.tensor([0, 99, 198])
    expected = bits_per_dimension(
        Run(run).denoiser(),
        test.x0[rows],
        TruncatedNormal(17),
        trace=Hutchinson(),
        solver=AdaptiveRungeKutta(rtol=1e-2, atol=1e-2),
        condition=test.labels[rows],
        batch_size=3,
    )
    assert record["values"] == expected.bits.tolist()
    assert record["bits_per_dimension"] == expected.mean
    assert record["standard_error"] == expected.standard_error
    assert record["spread"] == pytest.approx(expected.standard_error * math.sqrt(3))
    assert record["bins"] == 17
    assert record["bins_are_detected"]
    assert record["conditional"]
    assert record["weights"] == hash_file(run / "ema.safetensors")
    printed = capsys.readouterr().out
    assert f"{expected.mean:.4f}" in printed
    assert "17 values from -1 to 1 (found in the data)" in printed


def test_results_of_several_methods_are_kept_until_the_weights_change(run, one_thread):
    likelihood(run)
    likelihood(run, "--dequantisation=uniform", "--importance=2", "--conditional=false")
    record = likelihood(run, "--method=bound", "--steps=3", "--variance=0.5")
    assert [name.partition(",")[0] for name in record] == ["ode", "ode", "bound"]
    bound = record[f"bound, {HELD_OUT}"]
    parts = bound["prior"] + bound["transitions"] + bound["decoder"]
    assert bound["bits_per_dimension"] == pytest.approx(parts)
    assert bound["evaluations"] == 3
    uniform = record[f"ode, Uniform, {HELD_OUT}"]
    assert uniform["importance"] == 2
    assert not uniform["conditional"]
    stale = {"ode, old": {"network_hash": "0"}}
    (run / "likelihood.json").write_text(json.dumps(record | stale))
    again = likelihood(run, "--method=bound", "--steps=3", "--variance=0.5")
    assert list(again) == list(record)


def test_raw_weights_are_recorded_apart(run, one_thread):
    assert main(["likelihood", str(run), "Digits", *FAST, "--weights=raw", "--n=1"]) == 0
    record = json.loads((run / "evaluation" / "likelihood.json").read_text())
    assert not (run / "likelihood.json").exists()
    (found,) = record.values()
    assert found["selected_weights"] == "raw"
    assert found["standard_error"] is None


def test_images_of_a_folder_have_256_values(run, tmp_path, one_thread):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    record = likelihood(run, "--conditional=false", data=str(folder))
    assert record[f"ode, TruncatedNormal, {folder}"]["bins"] == 256


def test_continuous_data_have_a_density(run, tmp_path, one_thread):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    record = likelihood(run, "--conditional=false", data=str(tmp_path / "x.npy"))
    found = record[f"ode, density, {tmp_path / 'x.npy'}"]
    assert found["bins"] is None
    assert found["dequantisation"] is None
    bound = likelihood(
        run, "--conditional=false", "--method=bound", "--steps=2", data=str(tmp_path / "x.npy")
    )
    assert bound[f"bound, {tmp_path / 'x.npy'}"]["bins"] is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["Digits", "--bins=256"], "use bins = 17"),
        (["Digits", "--dequantisation=none"], "dequantisation is none, but the data has only 17"),
        (["Digitz"], "names no data"),
        (["Digits", "--n=-1"], "n is -1"),
        (["Digits", "--importance=0"], "importance 0"),
        (["Digits", "--threads=9999"], "threads is 9999"),
        (["Digits", "--seed=-1"], "seed -1"),
        (["Digits", "--tau=0"], "tau is 0"),
        (["Digits", "--probes=0"], "probes is 0"),
        (["Digits", "--method=bound", "--steps=1"], "expected at least 2"),
        (["Digits", "--solver=DDIM", "--solver.eta=1"], "adds noise, and the density of a flow"),
        (["Digits", "--weights=nonsense"], "weights is 'nonsense'"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_remedy(run, words, message, capsys):
    assert main(["likelihood", str(run), words[0], "--n=2", *words[1:]]) == 1
    assert message in capsys.readouterr().err


def test_data_without_labels_are_refused_unless_the_result_is_unconditional(run, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.float32))
    assert main(["likelihood", str(run), str(tmp_path / "x.npy")]) == 1
    assert "label -1" in capsys.readouterr().err


def test_uniform_noise_on_continuous_data_is_refused(run, tmp_path, capsys):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    words = [str(run), str(tmp_path / "x.npy"), "--conditional=false", "--dequantisation=uniform"]
    assert main(["likelihood", *words]) == 1
    assert "the data is not quantised" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ode", "bound"])
def test_ranks_measure_chunks_whose_bits_are_those_of_one_rank(run, method, monkeypatch):
    request = LikelihoodRequest(method, n=7, batch_size=2, steps=2, solver=Heun())
    denoiser = Run(run).denoiser()
    data = read_data(HELD_OUT, ImageModel(denoiser), request)
    noise = request.resolve_dequantisation(data.bins)
    single = command._gather(command._evaluate_chunks(denoiser, data, noise, request))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(command, "read_rank", lambda rank=rank: (rank, 2))
        shares.append(command._evaluate_chunks(denoiser, data, noise, request))
    assert [len(share) for share in shares] == [2, 2]
    monkeypatch.setattr(command, "read_rank", lambda: (0, 2))
    monkeypatch.setattr(command, "end_ranks", lambda ranks: None)
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_object",
        lambda found, own: found.__setitem__(slice(2), shares),
    )
    joined = command._gather(shares[0])
    assert torch.equal(joined.bits, single.bits)
    assert joined.evaluations == single.evaluations
    assert type(joined) is type(single)


@pytest.mark.slow
def test_two_ranks_write_the_result_of_one(run, one_thread):
    words = ("--n=7", "--batch-size=2")
    single = likelihood(run, *words)
    (run / "likelihood.json").unlink()
    launch(2, "likelihood", str(run), HELD_OUT, *FAST, *words)
    assert json.loads((run / "likelihood.json").read_text()) == single


def test_a_stream_is_measured_by_its_first_items(run, tmp_path, one_thread, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for index in range(5):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8)).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png")
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(buffer.getvalue())
            buffer.seek(0)
            shard.addfile(member, buffer)
    path = tmp_path / "a.tar"
    stream = f"{{paths: [{path}], size: 8, channels: L, label: '', window: 4}}"
    data = f"{{class_path: TarStream, init_args: {stream}}}"
    options = ("--conditional=false", "--method=bound", "--steps=2")
    (found,) = likelihood(run, *options, data=data).values()
    assert found["data"].endswith("the first 3 items of the stream")
    assert len(found["values"]) == 3
    for wrong in ("--n=0", "--n=5"):
        assert main(["likelihood", str(run), data, *options, wrong]) == 1
        assert "set n to 1 .. 4, or `window`" in capsys.readouterr().err


def test_latents_have_bits_per_latent_dimension(tmp_path, one_thread, capsys):
    dit_pipeline(diffusers.DDIMScheduler()).save_pretrained(tmp_path / "dit")
    images = tmp_path / "images"
    images.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    words = ["likelihood", str(tmp_path / "dit"), str(images), "--conditional=false"]
    bound = ["--method=bound", "--steps=4", f"--out={tmp_path}"]
    assert main([*words, *bound]) == 0
    ((name, found),) = json.loads((tmp_path / "likelihood.json").read_text()).items()
    assert name == f"bound, latents, {images}"
    assert found["dimensions"] == "latent dimension"
    assert found["bins"] is None
    printed = capsys.readouterr().out
    assert "bits per latent dimension" in printed
    assert "not comparable with bits of pixels" in printed
    model = load_image_model(tmp_path / "dit", PipelineOptions(), torch.device("cpu"))
    data = read_data(str(images), model, LikelihoodRequest(conditional=False))
    assert data.x0.shape == (2, *model.denoiser.process.shape)
    expected = variational_bound(model.denoiser, data.x0, steps=4).bits
    assert found["values"] == pytest.approx(expected.tolist())
    mean = model.encode(_image(images / "0.png"))
    std = model.latents.posterior(_image(images / "0.png")[None])[1][0]
    z = normal(0, Stream.LATENT, 0, mean.shape)[0]
    torch.testing.assert_close(data.x0[0], mean + std * z)
    assert main([*words, "--bins=256"]) == 1
    assert "latents are continuous" in capsys.readouterr().err


def _image(path):
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1
