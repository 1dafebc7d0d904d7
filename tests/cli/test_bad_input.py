"""Bad input gives one line with problem and remedy, a non-zero status, and no written file."""

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from diffcore.io.safetensors import read_weights, write_weights
from tests.helpers.products import sampled

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = ("train", "digits", "--folder=new", "--steps=2")
IMAGES = (*NEW, "--data=ImageFolder", "--data.size=8", "--data.channels=L", "--data.folder")
RUN = "RUN"  # stands for the tiny run's folder
SAMPLE = ("sample", RUN, "--steps=2", "--out=x.png")
EPSILON = ("sample", "epsilon", "--steps=2", "--out=x.png", "--labels=1")


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


@pytest.fixture
def place(diffcore, inputs, monkeypatch):
    """Run a command in the folder of what the arguments name."""
    monkeypatch.chdir(inputs)
    return diffcore


@pytest.fixture(scope="module")
def inputs(trained, tmp_path_factory):
    """The folder of what the arguments name, which no case changes."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs(trained)
    return folder


def write_inputs(trained):
    for name, text in {
        "stepz.yaml": "stepz: 3\n",
        "peek.yaml": "lr: {peek: 3}\n",
        "torn.yaml": "lr: [1,\n",
        "system.yaml": "data: {class_path: os.system, init_args: {command: touch pwned}}\n",
        "tag.yaml": "data: !!python/object/apply:os.system [touch pwned]\n",
        "broken/a.png": "no image",
        "broken/b.jpg": "no image",
        "no-images/notes.txt": "no image",
        "file": "not a folder",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("binary.yaml").write_bytes(bytes(range(128, 256)))
    for label in range(3):
        Path(f"three/{label}").mkdir(parents=True)
        Image.new("L", (8, 8), label).save(f"three/{label}/1.png")
    for name in (
        "without-process",
        "without-config",
        "without-weights",
        "epsilon",
        "undropped",
        "misspelt",
    ):
        shutil.copytree(trained, name)
    Path("without-process/process.json").unlink()
    Path("without-config/config.yaml").unlink()
    Path("without-weights/ema.safetensors").unlink()
    shutil.rmtree("without-weights/checkpoints")
    change("epsilon", prediction="epsilon")
    change("undropped", dropout=0.0)
    change("misspelt", predicton="edm")


def change(run, **fields):
    path = Path(run, "process.json")
    record = json.loads(path.read_text()) | fields
    del record["sha256"]
    path.write_text(json.dumps(record))


CASES = {
    # commands and options
    "no command": ((), "COMMAND"),
    "unknown command": (("trian",), ("trian", "train")),
    "unknown option": ((*NEW, "--stepz=3"), ("stepz", "did you mean 'steps'")),
    "abbreviated option": ((*NEW, "--save=3"), "unrecognized arguments: --save=3"),
    "unknown option of sample": ((*SAMPLE, "--labelz=3"), ("labelz", "did you mean 'labels'")),
    "unknown option of info": (("info", RUN, "--foo"), "--foo"),
    "nested option": ((*NEW, "--lr.peek=3"), ("peek", "did you mean 'lr.peak'")),
    "option of a class": ((*NEW, "--objective.weight.gama=3"), ("gama", "did you mean 'gamma'")),
    "option of guidance": ((*SAMPLE, "--guidance.scal=3"), ("scal", "did you mean 'scale'")),
    "unknown class": ((*NEW, "--objective.weight=MinSNRR"), ("MinSNRR", "did you mean 'MinSNR'")),
    "unknown sampler": ((*SAMPLE, "--sampler=DDIMM"), ("DDIMM", "did you mean 'DDIM'")),
    "unknown grid": ((*SAMPLE, "--grid=Karas"), ("Karas", "did you mean 'Karras'")),
    "unknown guidance": ((*SAMPLE, "--guidance=CGF"), ("CGF", "did you mean 'CFG'")),
    "unknown schedule": (("plot", "schedules", "Cosin"), ("Cosin", "did you mean 'Cosine'")),
    "unknown data": ((*NEW, "--data=Digit"), ("Digit", "did you mean 'Digits'")),
    "not an integer": ((*NEW, "--steps=many"), ("steps", "int", "many")),
    "null": ((*NEW, "--steps=null"), ("steps", "int", "None")),
    "not a choice": (
        (*NEW, "--process.prediction=epsilonn"),
        ("epsilonn", "'epsilon'", "'v_prediction'"),
    ),
    # files
    "nothing to train": (("train",), ("name a recipe", "digits")),
    "unknown recipe": (("train", "digitz"), ("digitz", "digits", "YAML file")),
    "unknown file": (("train", "nope.yaml"), ("nope.yaml does not exist", "digits")),
    "unknown config": (("train", "--config=nope.yaml"), "nope.yaml"),
    "misspelt key": (("train", "stepz.yaml"), ("stepz", "did you mean 'steps'")),
    "misspelt nested key": (("train", "peek.yaml"), ("peek", "did you mean 'peak'")),
    "torn yaml": (("train", "torn.yaml"), ("torn.yaml", "line 2")),
    "binary yaml": (("train", "binary.yaml"), "binary.yaml"),
    "a class that is not trusted": (("train", "system.yaml"), "os.system"),
    "a python tag": (("train", "tag.yaml"), "os.system"),
    "a network that is not trusted": ((*NEW, "--network=subprocess.run"), "subprocess.run"),
    "no module to trust": ((*NEW, "--trust"), "--trust expects the name of a module"),
    # training
    "no steps": (
        ("train", "digits", "--folder=new", "--steps=0"),
        "steps is 0, expected at least 1",
    ),
    "no batch": ((*NEW, "--batch-size=0"), "batch_size is 0, expected at least 1"),
    "uneven parts": (
        (*NEW, "--batch-size=9", "--accumulation=2"),
        "batch_size is 9, expected a multiple of",
    ),
    "a learning rate of the optimizer": (
        (*NEW, "--optimizer.lr=1"),
        "optimizer\": Option 'lr' is not accepted: use lr.peak",
    ),
    "a null learning rate": ((*NEW, "--lr.peak=0"), "peak is 0.0, expected a positive"),
    "no condition to drop": ((*NEW, "--process.classes=0"), ("dropout is 0.1", "set dropout: 0")),
    "another shape": ((*NEW, "--process.shape=[1,9,9]"), ("(1, 8, 8)", "(1, 9, 9)")),
    "another range": ((*NEW, "--process.low=0"), ("[-1, 0.875]", "set process.low")),
    "epsilon at a table's zero": (
        (
            *NEW,
            "--process.schedule=ZeroTerminalSNR",
            "--process.schedule.inner=Discrete",
            "--process.prediction=epsilon",
        ),
        ("epsilon", "use v_prediction"),
    ),
    "a folder with a run": (
        (*NEW, f"--folder={RUN}"),
        ("holds a run already", "--resume true", "another folder"),
    ),
    "nothing to resume": ((*NEW, "--resume=true"), ("holds no run to resume", "--resume auto")),
    "fewer steps than taken": (
        ("train", f"{RUN}/config.yaml", "--resume=true", "--steps=3"),
        "the run has taken 4",
    ),
    "another network": (
        (
            "train",
            f"{RUN}/config.yaml",
            "--resume=true",
            "--network.init_args.block_out_channels=[4,8]",
        ),
        ("another network.init_args.block_out_channels", "--init"),
    ),
    "unknown tracker": ((*NEW, "--trackers=[tensorbord]"), ("tensorbord", "tensorboard")),
    # images
    "no folder": ((*IMAGES, "nowhere"), "nowhere is not a folder"),
    "no images": ((*IMAGES, "no-images"), ("no-images holds no images", ".png")),
    "unreadable images": (
        (*IMAGES, "broken"),
        ("2 unreadable of 2 images", "a.png", "b.jpg", "unreadable: skip"),
    ),
    # runs
    "no run": (("sample", "nowhere"), ("nowhere", "does not exist")),
    "no run named": (("sample",), ("run's folder comes first", "diffcore sample RUN")),
    "a file for a run": (("sample", "file"), ("file", "file is a file, expected the folder")),
    "no run to describe": (("info", "nowhere"), ("nowhere", "does not exist")),
    "no process record": (
        ("sample", "without-process", "--labels=1"),
        "without-process/process.json is missing",
    ),
    "no config": (
        ("sample", "without-config", "--labels=1"),
        "without-config/config.yaml is missing",
    ),
    "no weights": (
        ("sample", "without-weights", "--labels=1"),
        ("without-weights/ema.safetensors", "resume the run"),
    ),
    "a misspelt record": (
        ("sample", "misspelt", "--labels=1"),
        ("process.json", "did you mean 'prediction'"),
    ),
    # sampling
    "a label too many": ((*SAMPLE, "--labels=0-11"), ("[10, 11] are out of range", "0 .. 9")),
    "a negative label": ((*SAMPLE, "--labels=-1"), ("-1", "range such as 0-9")),
    "a backward range": ((*SAMPLE, "--seeds=5-2"), "5-2 runs backwards"),
    "too few seeds": ((*SAMPLE, "--labels=0-9", "--seeds=0-3"), "seeds are 4, expected 10"),
    "a seed beyond 64 bits": (
        (*SAMPLE, "--labels=1", "--seeds=99999999999999999999"),
        ("99999999999999999999", "64 bits"),
    ),
    "no steps of sampling": (
        ("sample", RUN, "--labels=1", "--steps=0"),
        "steps is 0, expected at least 1",
    ),
    "no rows": ((*SAMPLE, "--labels=1", "--batch-size=0"), "batch_size is 0, expected at least 1"),
    "no samples": ((*SAMPLE, "--labels=1", "--per-label=0"), "per_label is 0, expected at least 1"),
    "guidance without a condition": (
        (*SAMPLE, "--guidance.scale=2"),
        ("CFG(scale=2.0", "needs a condition", "label"),
    ),
    "guidance without dropout": (
        ("sample", "undropped", "--labels=1", "--guidance.scale=2"),
        ("without condition dropout", "use CFG(1.0), or train with dropout"),
    ),
    "epsilon from pure noise": (EPSILON, ("pure noise", "epsilon", "use v_prediction", "Karras")),
    "negative guidance": ((*SAMPLE, "--labels=1", "--guidance.scale=-1"), "scale is -1.0"),
    "eta beyond 1": ((*SAMPLE, "--labels=1", "--sampler=DDIM", "--sampler.eta=2"), "eta is 2.0"),
    "unknown device": ((*SAMPLE, "--labels=1", "--device=gpu"), ("gpu", "cpu, cuda")),
    "a device without numbers": ((*SAMPLE, "--labels=1", "--device=meta"), "use auto or cpu"),
    "a device without a backend": ((*SAMPLE, "--labels=1", "--device=privateuseone"), "use auto"),
    "a device as an image": ((*SAMPLE, "--labels=1", "--image=/dev/zero"), "not a regular file"),
    "a device that is not here": ((*SAMPLE, "--labels=1", "--device=xpu"), "xpu"),
    "negative threads": ((*SAMPLE, "--labels=1", "--threads=-1"), ("threads", "-1")),
    "more threads than torch survives": (
        (*SAMPLE, "--labels=1", "--threads=9999999"),
        ("threads is 9999999", "expected at most 1024"),
    ),
    "a trillion samples": (
        (*SAMPLE, "--labels=1", "--per-label=1000000000000"),
        ("per_label is 1000000000000", "1,000,000 samples"),
    ),
    "a trillion steps": (
        (*SAMPLE, "--labels=1", "--steps=1000000000000"),
        ("steps is 1000000000000", "at most 100,000"),
    ),
    # output
    "a wrong suffix": (
        ("sample", RUN, "--labels=1", "--out=x.jpg"),
        ("x.jpg", ".png", ".safetensors"),
    ),
    "a plot's wrong suffix": (
        ("plot", "schedules", "Cosine", "--out=x.txt"),
        ("x.txt", ".png, .svg or .pdf"),
    ),
    "nothing to plot": (("plot", "schedules"), ("required", "components")),
    "no kind of plot": (("plot", "schedule"), ("expected schedules or weights", "'schedule'")),
    "no weight to plot": (("plot", "weights"), ("name a weight", "--configs digits")),
    "an unknown weight": (("plot", "weights", "MinSRN"), ("MinSRN", "did you mean 'MinSNR'")),
    "a config that a pipeline completes": (
        ("plot", "weights", "--configs=finetune-text-to-image"),
        ("finetune-text-to-image", "config.yaml"),
    ),
    "an unknown config to plot": (
        ("plot", "weights", "--configs=digit"),
        ("no recipe 'digit'", "digits"),
    ),
    "an output under a file": (
        ("sample", RUN, "--labels=1", "--steps=1", "--out=file/x.png"),
        "file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(place, trained, case):
    argv, words = CASES[case]
    before = files()
    ended = place(*(str(word).replace(RUN, str(trained)) for word in argv))
    lines = ended.err.splitlines()
    assert ended.status not in (0, None)
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("diffcore")
    assert ": error: " in lines[0]
    for word in (words,) if isinstance(words, str) else words:
        assert word in lines[0]
    assert len(lines[0].replace(str(trained), "")) < 400  # a sentence or two
    assert ended.out == ""
    assert files() == before


# Files that changed -------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    bit = random.Random(0).randrange(8 * len(data) // 2, 8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def other(path):
    """Whole and hashed, but another network's."""
    write_weights(path, {"x.weight": read_weights(path)["conv_in.weight"]})


# Of another network's weights every key is listed: 5 thousand characters.
@pytest.mark.parametrize("damage", [truncate, flip, other])
def test_damaged_weights_are_named_and_not_sampled(diffcore, trained, damage):
    shutil.copytree(trained, "run")
    damage(Path("run/ema.safetensors"))
    ended = diffcore("sample", "run", "--labels=1", "--out=x.png")
    assert ended.status != 0
    assert len(ended.err.splitlines()) == 1
    assert "run/ema.safetensors" in ended.err
    assert len(ended.err) < 400
    assert not Path("x.png").exists()


@pytest.mark.parametrize(
    ("damage", "name"),
    sampled(
        [truncate, flip, Path.unlink],
        ["model.safetensors", "training.safetensors", "manifest.json"],
        count=3,
    ),
)
def test_a_damaged_newest_checkpoint_is_named_before_the_previous_one_is_used(
    diffcore, trained, damage, name
):
    shutil.copytree(trained, "run")
    damage(Path("run/checkpoints/step-00000004", name))
    ended = diffcore("train", "run/config.yaml", "--folder=run", "--resume=true")
    assert ended.status == 0, ended.err
    assert ended.err.index(f"step-00000004/{name}") < ended.err.index("resumed at step 2")
    for path in trained.rglob("*"):
        if path.is_file() and path.name not in ("config.yaml", "speed.jsonl"):
            assert Path("run", path.relative_to(trained)).read_bytes() == path.read_bytes(), (
                path.name
            )


# info reads the last line only: "Unterminated string starting at: line 1 column 13".
def test_a_torn_line_of_metrics_does_not_hide_the_run(diffcore, trained):
    shutil.copytree(trained, "run")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    ended = diffcore("info", "run")
    assert ended.status == 0, ended.err
    assert "step 4" in ended.out


# Labels of later items reach the network unchecked: an IndexError, or training as the null label.
@pytest.mark.parametrize(
    "option", ["--process.classes=5", "--network.init_args.num_class_embeds=3"]
)
def test_labels_that_do_not_fit_stop_the_run_without_a_traceback(diffcore, tiny, option):
    ended = diffcore("train", "digits", *tiny, "--folder=new", "--steps=2", option)
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith("diffcore train: error: ")
    assert "label" in ended.err
