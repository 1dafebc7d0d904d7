"""Fine-tuning runs that several test files read."""

import pytest


@pytest.fixture(scope="session")
def _finetune_folder(tmp_path_factory):
    import torch

    from tests.helpers.finetune_runs import write_finetune_runs

    folder, threads = tmp_path_factory.mktemp("finetune"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_finetune_runs()
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def workspace(_finetune_folder, monkeypatch, one_thread):
    """The current folder, with `pipeline`, `images`, `cache` and the runs `runs/full`, `runs/lora`.

    Tests share it: they write only to names of their own.
    """
    monkeypatch.chdir(_finetune_folder)
    return _finetune_folder
