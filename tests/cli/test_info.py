"""`diffcore info`: a run, and this machine."""

import torch

from diffcore.run import Run


def test_info_describes_a_run(diffcore, trained):
    ended = diffcore("info", trained)
    assert ended.status == 0, ended.err
    parameters = sum(parameter.numel() for parameter in Run(trained).network().parameters())
    for fact in (
        f"{parameters:,}",
        "UNet2DModel",
        "Cosine",
        "v_prediction",
        "step-00000004",
        "10",
        "step 4",
    ):
        assert fact in ended.out, fact


def test_info_describes_this_machine(diffcore):
    ended = diffcore("info")
    assert ended.status == 0
    assert torch.__version__.split("+")[0] in ended.out
