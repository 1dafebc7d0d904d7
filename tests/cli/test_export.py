"""`diffcore export`: a run as a DiffcorePipeline, or as a stock pipeline with equal samples."""

import json
import re
import shutil

import diffusers
import pytest
import torch

from diffcore.guidance import CFG
from diffcore.integrations.diffusers import DiffcorePipeline
from diffcore.samplers import DDIM, Heun
from diffcore.schedules import Trailing

pytestmark = pytest.mark.usefixtures("one_thread")


def samples(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=[3, 5], num_inference_steps=5, **options).images


def test_a_run_becomes_a_pipeline_with_the_given_defaults(diffcore, trained, tmp_path):
    options = ["--sampler", "Heun", "--steps", "7", "--guidance.scale", "3", "--grid", "Trailing"]
    ended = diffcore("export", trained, "--out", tmp_path / "out", *options)
    assert ended.status == 0
    assert ended.out == (
        f"{trained} -> {tmp_path / 'out'}: a DiffcorePipeline: load it by "
        f"diffcore.DiffcorePipeline.from_pretrained({str(tmp_path / 'out')!r})\n"
    )
    pipe = DiffcorePipeline.from_pretrained(tmp_path / "out")
    assert (pipe.scheduler.settings.sampler, pipe.scheduler.settings.grid) == (Heun(), Trailing())
    assert (pipe.guidance, pipe.config.num_inference_steps) == (CFG(3.0), 7)
    left = DiffcorePipeline.from_pretrained(trained / "pipeline")
    ways = {"sampler": DDIM(), "grid": Trailing(), "output_type": "latent"}
    made = samples(pipe, seeds=[0, 1], guidance=CFG(1.0), **ways)
    assert torch.equal(made, samples(left, seeds=[0, 1], guidance=CFG(1.0), **ways))


def test_a_run_becomes_a_stock_pipeline_and_its_omissions_are_printed(diffcore, trained, tmp_path):
    ended = diffcore(
        "export", trained, "--format", "diffusers", "--out", tmp_path / "out", "--sampler", "DDIM"
    )
    assert ended.status == 0
    first, second, *remarks = ended.out.splitlines()
    assert first.endswith(
        "a ConsistencyModelPipeline with a DDIMScheduler, which diffusers loads alone"
    )
    assert (
        0
        < float(re.match(r"greatest difference from diffcore's samples: (\S+) of", second)[1])
        < 1e-5
    )
    assert [remark[:26] for remark in remarks] == [
        "use a num_inference_steps ",
        "ConsistencyModelPipeline i",
        "left out: guidance CFG(sca",
    ]
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    own = DiffcorePipeline.from_pretrained(trained / "pipeline")
    generator = torch.Generator().manual_seed
    made = samples(stock, batch_size=2, generator=generator(0), output_type="pt")
    ours = samples(
        own,
        generator=generator(0),
        output_type="pt",
        sampler=DDIM(),
        guidance=CFG(1.0),
        grid=Trailing(),
    )
    torch.testing.assert_close(made, ours, rtol=0, atol=1e-5)


def test_a_run_without_a_pipeline_is_exported_from_its_weights_and_out_is_replaced(
    diffcore, trained, tmp_path
):
    run, out = tmp_path / "run", tmp_path / "deep" / "out"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "pipeline")
    for _ in range(2):
        assert diffcore("export", run, "--out", out).status == 0
    one, other = (DiffcorePipeline.from_pretrained(place) for place in (out, trained / "pipeline"))
    assert one.process == other.process
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.unet.parameters(), other.unet.parameters(), strict=True)
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def unexpressed(folder):
    """Condition the network on 1000 t, which no scheduler of diffusers can do."""
    path = folder / "pipeline" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"time": config["time"] | {"variable": "t"}}))


def stock(folder):
    path = folder / "pipeline" / "model_index.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"_class_name": "StableDiffusionPipeline"})
    )


REFUSED = [
    (
        unexpressed,
        ["--format", "diffusers"],
        r"have the time input index i .* or export a DiffcorePipeline",
    ),
    (stock, [], "holds a StableDiffusionPipeline, which diffusers loads as it is"),
    (
        lambda folder: (folder.parent / "out").mkdir(),
        [],
        "exists and holds no pipeline: name another folder",
    ),
    (lambda folder: None, ["--format", "stock"], "format"),
    (shutil.rmtree, [], "is not a run's folder"),
]


@pytest.mark.parametrize(
    ("damage", "options", "message"), REFUSED, ids=[message[:20] for *_, message in REFUSED]
)
def test_impossible_exports_are_refused_in_one_line(
    diffcore, trained, tmp_path, damage, options, message
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    damage(run)
    (run / "pipeline/sha256.json").unlink(missing_ok=True)
    ended = diffcore("export", run, "--out", tmp_path / "out", *options)
    assert ended.status
    assert re.search(message, ended.err.splitlines()[-1])
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_export_with_different_samples_is_refused_and_leaves_nothing(
    diffcore, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffcore.integrations.diffusers.pipeline.parity.TOLERANCE", 0.0)
    ended = diffcore("export", trained, "--format", "diffusers", "--out", tmp_path / "out")
    assert ended.status == 1
    assert "samples of the exported pipeline differ from those of diffcore by" in ended.err
    assert list(tmp_path.glob("*out*")) == []


def test_a_run_that_does_not_come_first_is_refused(diffcore):
    assert "the run's folder comes first" in diffcore("export", "--out", "x").err


def test_an_export_leaves_neighbouring_files_alone(diffcore, trained, tmp_path):
    (tmp_path / ".out.d").mkdir()
    (tmp_path / ".out.local").write_text("mine")
    assert diffcore("export", trained, "--out", tmp_path / "out").status == 0
    assert {path.name for path in tmp_path.glob("*out*")} == {"out", ".out.d", ".out.local"}
    ended = diffcore("export", trained, "--out", tmp_path / "none", "--steps", "0")
    assert (ended.status, ended.err) == (
        1,
        "diffcore export: error: steps is 0, expected at least 1\n",
    )
