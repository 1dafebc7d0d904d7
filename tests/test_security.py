"""A run folder or a config cannot run code: a spec names classes, never a function that
is called.
"""

import pickle

import pytest
import yaml

from diffcore.run import Run


class Evil:
    """Pickled, it would write a file when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "network",
    [
        {"class_path": "torch.load", "init_args": {"f": "evil.pt", "weights_only": False}},
        {
            "class_path": "diffusers.AutoModel.from_pretrained",
            "init_args": {"pretrained_model_or_path": "nowhere"},
        },
        {
            "class_path": "torch.hub.load",
            "init_args": {"repo_or_dir": ".", "model": "evil", "source": "local"},
        },
        {"class_path": "os.system", "init_args": {"command": "touch evil"}},
        "torch.load",
    ],
    ids=str,
)
def test_a_function_in_a_runs_config_is_refused_and_not_called(tmp_path, monkeypatch, network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "evil"))))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"network": network}))
    with pytest.raises(
        ValueError,
        match=r"is not a class|not allowed|to be a function that returns|does not specify a type",
    ):
        Run(tmp_path).network()
    assert not (tmp_path / "evil").exists()
