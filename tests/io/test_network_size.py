"""A network that a file describes is measured before memory is taken."""

from functools import partial

import pytest
import torch
import yaml
from torch import nn

from diffcore.io import network_size
from diffcore.io.network_size import BoundedFactory, build_without_memory
from diffcore.io.safetensors import check_header
from diffcore.run import Run


def layers(count):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))


def test_a_network_without_memory_has_the_shapes_of_the_network():
    build = partial(nn.Linear, 3, 5)
    shapes = {name: value.shape for name, value in build().state_dict().items()}
    empty = build_without_memory(build)
    assert {name: value.shape for name, value in empty.state_dict().items()} == shapes
    assert all(value.is_meta for value in empty.parameters())
    assert not any(value.is_meta for value in BoundedFactory(build)().parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            partial(nn.Linear, 10**6, 10**6),
            "of 1,000,000,000,000 numbers or more, and this machine",
        ),
        (partial(nn.Linear, 2**40, 2**40), "cannot be built"),
        (partial(nn.Embedding, 10**13, 1), "of 10,000,000,000,000 numbers or more"),
        (partial(layers, 10**9), "of more than 20,000 modules and parameters"),
        (lambda: nn.Sequential(*(nn.Identity() for _ in range(30_000))), "of more than 20,000"),
    ],
)
def test_a_network_that_is_too_large_is_refused_in_one_line(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        BoundedFactory(build)()
    assert "\n" not in str(caught.value)


def test_the_count_ends_with_the_network(monkeypatch):
    monkeypatch.setattr(network_size, "machine_memory", lambda: 100)
    with pytest.raises(
        ValueError, match="of 30 numbers or more, and this machine has memory for 25"
    ):
        build_without_memory(partial(nn.Linear, 5, 5))
    assert nn.Linear(5, 5)(torch.ones(1, 5)).shape == (1, 5)
    assert build_without_memory(partial(nn.Linear, 4, 4)).weight.is_meta


LINEAR = {"in_features": 3, "out_features": 10**7}


class Reading(nn.Linear):
    """A layer whose constructor reads the value of a tensor, which the meta device has not."""

    def __init__(self, size):
        super().__init__(size, size)
        self.rate = torch.linspace(0, 1, 3)[1].item()


def test_a_constructor_that_reads_values_is_counted_with_memory(monkeypatch):
    assert not BoundedFactory(partial(Reading, 3))().weight.is_meta
    monkeypatch.setattr(network_size, "machine_memory", lambda: 100)
    with pytest.raises(ValueError, match="of 30 numbers or more"):
        BoundedFactory(partial(Reading, 5))()


def describe(run, network):
    settings = yaml.safe_load(run.config.read_text())
    settings["network"] = network
    run.config.write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"class_path": "torch.nn.Linear", "init_args": LINEAR | {"in_features": 10**7}},
         "of 100,000,000,000,000 numbers or more"),
        ({"class_path": "torch.nn.Linear", "init_args": LINEAR},
         "ema.safetensors does not fit the network of"),
        ({"class_path": "diffusers.UNet2DModel", "init_args": {"layers_per_block": 10**6}},
         "of more than 20,000 modules"),
        ("torch.load", "config.yaml: network: importing 'torch.load' is not allowed"),
    ],
    ids=["too large", "unlike its weights", "too many layers", "a function"],
)  # fmt: skip
def test_a_run_whose_network_is_another_takes_no_memory(copied_run, monkeypatch, network, message):
    describe(copied_run, network)
    monkeypatch.setattr(
        BoundedFactory, "__call__", lambda factory: pytest.fail("the network was built")
    )
    with pytest.raises(ValueError, match=message):
        copied_run.denoiser()


@pytest.fixture
def copied_run(trained, tmp_path):
    for name in ("config.yaml", "process.json", "ema.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return Run(tmp_path)


@pytest.mark.parametrize("length", [0, 100, 2**40, 2**63])
def test_a_header_longer_than_its_file_is_not_read(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=rf"x.safetensors cannot be read .*{length:,} bytes"):
        check_header(path)


def test_a_header_of_a_million_tensors_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((1 << 26).to_bytes(8, "little"))
        file.truncate((1 << 26) + 8)
    with pytest.raises(ValueError, match=r"expected at most 16,777,216"):
        check_header(path)


def test_a_file_larger_than_the_memory_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
        file.truncate(2 * network_size.machine_memory())  # of which the disk stores 10 bytes
    with pytest.raises(ValueError, match="and this machine's memory"):
        check_header(path)
