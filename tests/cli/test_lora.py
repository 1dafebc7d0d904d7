"""`diffcore lora`: an adapter is merged, extracted and converted; what does not fit is named."""

import re

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from diffcore.cli.main import main
from diffcore.integrations.diffusers.adapters.files import read_adapters, write_adapters
from diffcore.integrations.diffusers.adapters.low_rank import LowRank
from diffcore.integrations.diffusers.loading.index import PipelineIndex
from tests.helpers import text_networks
from tests.helpers.captioned_images import write_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, an adapter of it, and the pipeline of another family."""
    folder = tmp_path_factory.mktemp("lora")
    index = PipelineIndex(write_pipeline(folder / "pipeline"))
    rows, columns = index.read_architecture("unet").get_submodule(LAYER).weight.shape
    torch.manual_seed(0)
    change = LowRank(torch.randn(2, columns), torch.randn(rows, 2), 3.0)
    write_adapters(folder / "style.safetensors", {"unet": {LAYER: change}}, index, "diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    text_networks.flux(flow).save_pretrained(folder / "flux")
    return folder


def weight(pipeline):
    return PipelineIndex(pipeline).read("unet").get_submodule(LAYER).weight


def test_adapters_are_merged_with_their_strengths(folder, tmp_path, capsys):
    style, out = folder / "style.safetensors", tmp_path / "merged"
    words = ["lora", "merge", f"{style}=0.5", str(style), "--pipeline", str(folder / "pipeline")]
    assert main([*words, "--out", str(out)]) == 0
    assert "2 adapters merged into 1 layers of unet" in capsys.readouterr().out
    change = read_adapters(style, PipelineIndex(folder / "pipeline"))["unet"][LAYER]
    expected = weight(folder / "pipeline") + 1.5 * 3.0 / 2 * change.up @ change.down
    torch.testing.assert_close(weight(out), expected)
    assert main([*words, "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    diffusers.StableDiffusionPipeline.from_pretrained(out)


def test_the_merged_pipeline_has_the_scheduler_of_the_run(folder, tmp_path):
    run = tmp_path / "run"
    diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", steps_offset=1
    ).save_pretrained(run / "scheduler")
    adapters = read_adapters(folder / "style.safetensors", PipelineIndex(folder / "pipeline"))
    name = run / "pytorch_lora_weights.safetensors"
    write_adapters(name, adapters, PipelineIndex(folder / "pipeline"), "diffusers")
    words = ["lora", "merge", str(run), "--pipeline", str(folder / "pipeline")]
    assert main([*words, "--out", str(tmp_path / "merged")]) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_the_change_is_extracted_and_converted(folder, tmp_path, capsys):
    base, style = str(folder / "pipeline"), str(folder / "style.safetensors")
    tuned, file, other = (
        str(tmp_path / name) for name in ("tuned", "a.safetensors", "b.safetensors")
    )
    assert main(["lora", "merge", style, "--pipeline", base, "--out", tuned]) == 0
    words = ["lora", "extract", tuned, "--base", base, "--rank", "2", "--out", file]
    assert main([*words, "--format", "kohya"]) == 0
    assert "1 layers of rank 2" in capsys.readouterr().out
    words = ["lora", "convert", file, "--pipeline", base, "--format", "comfyui", "--out", other]
    assert main(words) == 0
    expected = read_adapters(style, PipelineIndex(base))["unet"][LAYER].delta()
    found = read_adapters(other, PipelineIndex(base))["unet"][LAYER].delta()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "name what to do with an adapter: merge, extract, convert, base"),
        (["mix"], "name what to do with an adapter: merge, extract, convert, base"),
        (["merge", "none", "--pipeline", "P", "--out", "o"], "none holds no adapter"),
        (["merge", "STYLE", "--pipeline", "FLUX", "--out", "o"], "it belongs to another pipeline"),
        (["merge", "STYLE", "--pipeline", "none", "--out", "o"], "none"),
        (["extract", "P", "--base", "P", "--out", "o"], "there is no change to extract"),
        (["extract", "P", "--base", "FLUX", "--out", "o"], ""),
        (["extract", "P", "--base", "P", "--out", "o", "--rank", "0"], "rank is 0"),
        (["extract", "P", "--base", "P", "--out", "o", "--targets", "[to_x]"], "ends in to_x"),
        (["convert", "BAD", "--pipeline", "P", "--format", "kohya", "--out", "o"], "no tensor of"),
        (
            ["convert", "TEXT", "--pipeline", "P", "--format", "kohya", "--out", "o"],
            "cannot be read",
        ),
        (["convert", "HALF", "--pipeline", "P", "--format", "kohya", "--out", "o"], "no matching"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    folder, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    save_file({"unet.a.oft_blocks": torch.zeros(2, 2)}, "bad.safetensors")
    save_file({f"unet.{LAYER}.lora_A.weight": torch.zeros(2, 16)}, "half.safetensors")
    (tmp_path / "text.safetensors").write_text("no header, and no tensors")
    names = {"P": "pipeline", "FLUX": "flux", "STYLE": "style.safetensors"}
    paths = {name: str(folder / path) for name, path in names.items()}
    paths |= {name: f"{name.lower()}.safetensors" for name in ("BAD", "TEXT", "HALF")}
    assert main(["lora", *(paths.get(word, word) for word in words)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(re.escape(message), error), error
