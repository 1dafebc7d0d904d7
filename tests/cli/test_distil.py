"""`diffcore distil`: students of a tiny run, their samples, and mistakes that are refused."""

import json
from pathlib import Path

import pytest
import yaml

from diffcore.cli.commands.distil.methods import METHODS
from diffcore.core.process import Process
from diffcore.run import Run
from tests.conftest import forget_accelerate
from tests.helpers.training_runs import train

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--training-steps=2", "--batch-size=8", "--save-every=1", "--log-every=1", "--trackers=[]")
PAIRS = ("--data.count=12", "--data.steps=2")


def options(method):
    """Options of a short training."""
    return (f"--method={method}", *SHORT, *(PAIRS if method == "Reflow" else ()))


@pytest.fixture
def distil(diffcore):
    """Run `diffcore distil`, several times in one process."""

    def command(*words):
        forget_accelerate()
        return diffcore("distil", *words)

    return command


QUICK = "Consistency"


@pytest.mark.parametrize(
    "method",
    [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != QUICK)],
)
def test_a_student_of_each_method_is_trained_and_sampled_as_it_was_trained(
    distil, diffcore, trained, method
):
    ended = distil(trained, *options(method), "--steps=2", "--folder=student")
    assert ended.status == 0, ended.err
    assert f"method     {method}: " in ended.err
    assert "sampling   2 steps of" in ended.err
    settings = yaml.safe_load(Path("student/config.yaml").read_text())
    assert settings["init"] == str(trained)
    assert settings["sample_steps"] == 2
    process = Process.load(Path("student/process.json"))
    assert process.estimate == METHODS[method].estimate
    if process.estimate == "mean_velocity":
        scale = settings["network"]["init_args"]["scale"]
        assert scale * process.time.scale == pytest.approx(METHODS[method].interval)
    sampled = diffcore("sample", "student", "--labels=0-1", "--out=s.npy", "--threads=1")
    assert sampled.status == 0, sampled.err
    assert "2 samples of 2 network evaluations each" in sampled.out
    one = diffcore("sample", "student", "--labels=0", "--steps=1", "--out=one.npy", "--threads=1")
    assert "1 samples of 1 network evaluations each" in one.out


def test_the_shortest_step_of_shortcut_is_no_longer_than_that_of_the_student():
    arguments = METHODS["Shortcut"].arguments
    assert [arguments(steps, False)["steps"] for steps in (1, 16, 20, 100)] == [16, 16, 32, 128]


def test_the_teacher_is_guided_as_its_run_is_sampled_and_the_student_is_not(distil, trained):
    settings = yaml.safe_load(
        distil(trained, "--method=Reflow", "--folder=s", "--print_config").out
    )
    teacher = settings["data"]["init_args"]["teacher"]
    assert teacher["init_args"]["folder"] == str(trained)
    assert teacher["init_args"]["guidance"]["init_args"]["scale"] == 1.5
    assert settings["guidance"]["init_args"]["scale"] == 1.0
    assert settings["network"]["init_args"]["block_out_channels"] == [8, 8]
    given = ("--scale=3", "--lr.peak=0.5", "--steps=3", "--training-steps=7", "--seed=4")
    settings = yaml.safe_load(
        distil(trained, "--method=Reflow", "--folder=s", *given, "--print_config").out
    )
    assert settings["data"]["init_args"]["teacher"]["init_args"]["guidance"]["init_args"][
        "scale"
    ] == pytest.approx(3)
    chosen = (settings["lr"]["peak"], settings["sample_steps"], settings["steps"], settings["seed"])
    assert chosen == (0.5, 3, 7, 4)


@pytest.mark.slow
def test_a_student_whose_input_is_the_scale_of_guidance_is_sampled_at_any_scale(
    distil, diffcore, trained
):
    ended = distil(
        trained, *options(QUICK), "--guidance-range=1,4", "--sample-every=2", "--folder=student"
    )
    assert ended.status == 0, ended.err
    settings = Run(Path("student")).settings()
    assert settings["network"]["class_path"] == "diffcore.networks.GuidanceEmbedding"
    assert settings["objective"]["init_args"]["guidance_range"] == [1.0, 4.0]
    record = Process.load(Path("student/process.json")).conditions["guidance_scale"]
    assert (record.low, record.high, record.null) == (1.0, 4.0, (1.5,))  # that of the run
    found = {}
    for word in ("", "--condition.guidance_scale=1.5", "--condition.guidance_scale=4"):
        words = ("student", "--labels=0-1", "--out=s.npy", "--threads=1", *filter(None, [word]))
        assert diffcore("sample", *words).status == 0
        found[word] = Path("s.npy").read_bytes()
    assert len(set(found.values())) == 2  # the default is 1.5
    ended = diffcore("sample", "student", "--condition.guidance_scale=5", "--threads=1")
    assert ended.status == 1
    assert "expected within the range [1, 4]" in ended.err


@pytest.mark.slow
def test_a_student_is_exported_as_what_diffusers_samples_alone(distil, diffcore, trained):
    words = ("--grid=Trailing", "--folder=student")
    assert distil(trained, *options(QUICK), *words).status == 0
    ended = diffcore("export", "student", "--format=diffusers", "--out=out")
    assert ended.status == 0, ended.err
    first, second, *remarks = ended.out.splitlines()
    assert "a ConsistencyModelPipeline with a LCMScheduler" in first
    assert float(second.split(": ")[1].split()[0]) < 1e-4
    assert second.endswith("(4 steps)")
    assert len(remarks) == 2
    assert "no consistency model" not in ended.out
    ended = diffcore("export", "student", "--format=diffusers", "--out=o", "--grid=UniformBlend")
    assert ended.status == 1
    assert "set the grid to Trailing()" in ended.err


@pytest.mark.slow
def test_a_student_resumes_and_refuses_a_teacher_that_was_trained_further(distil, trained):
    command = (trained, *options("Reflow"), "--folder=student")
    assert distil(*command).status == 0
    ended = distil(*command, "--training-steps=3", "--resume=true")
    assert ended.status == 0, ended.err
    assert "resumed at step 2" in ended.err
    values = json.loads(Path("student/straightness.json").read_text())
    assert values["teacher"] > 0
    assert values["student"] > 0
    other = distil(*command, "--scale=2", "--training-steps=4", "--resume=true")
    assert other.status == 1
    assert "guidance" in other.err


@pytest.mark.slow
def test_rounds_of_reflow_start_from_the_round_before(distil, trained):
    ended = distil(trained, *options("Reflow"), "--rounds=2", "--folder=student")
    assert ended.status == 0, ended.err
    first, last = Path("student/rounds/1"), Path("student")
    for folder, teacher, scale in ((first, trained, 1.5), (last, first, 1.0)):
        settings = Run(folder).settings()
        own = settings["data"]["init_args"]["teacher"]["init_args"]
        assert own["folder"] == str(teacher)
        assert own["guidance"]["init_args"]["scale"] == scale
        assert settings["init"] == str(teacher)


EMPTY = (
    '--objective.discriminator={{"class_path":"NetworkDiscriminator",'
    '"init_args":{{"network":"torch.nn.Identity"}}}}'
)
REFUSED = {
    "no teacher": (("--method=Reflow",), "the teacher comes first"),
    "missing": (("none", "--method=Reflow"), "does not exist: name the folder of a run"),
    "neither": (("tmp", "--method=Reflow"), "which holds neither config.yaml of a run nor"),
    "rounds of settings": (
        ("{run}", "--method=Reflow", "--rounds=2", "--print_config"),
        "prints the settings of one training: leave --rounds out",
    ),
    "other objective": (
        ("{run}", "--method=Consistency", "--objective=ContinuousConsistency"),
        "the objective ContinuousConsistency has no teacher, since an option replaces that of",
    ),
    "no method": (("{run}",), "method is missing, expected one of"),
    "unknown method": (("{run}", "--method=Magic"), "method is Magic, expected one of"),
    "no steps": (("{run}", "--method=Reflow", "--steps=0"), "steps is 0, expected 1 to 1000"),
    "text": (("{run}", "--method=Reflow", "--steps=x"), "steps is 'x', expected an integer"),
    "untrained": (("{run}", "--method=Reflow", "--training-steps=0"), "training_steps is 0"),
    "scale": (("{run}", "--method=Reflow", "--scale=-1"), "scale is -1.0, expected a finite w"),
    "scales of one": (
        ("{run}", "--method=DistributionMatching", "--guidance-range=1,8"),
        "use Consistency, MeanFlow, Shortcut, or --scale",
    ),
    "scales": (("{run}", "--method=MeanFlow", "--guidance-range=8"), "such as 1,8"),
    "no range": (("{run}", "--method=MeanFlow", "--guidance-range=8,1"), "0 <= low < high"),
    "default scale": (
        ("{run}", "--method=MeanFlow", "--guidance-range=2,3", "--scale=4"),
        "scale is 4, the default w of samples, expected within guidance_range 2,3",
    ),
    "rounds": (("{run}", "--method=Reflow", "--rounds=0"), "rounds is 0, expected 1"),
    "shape": (
        ("{run}", "--method=Reflow", "--data.count=2", "--data.steps=1", "--process.shape=[1,4,4]"),
        "shape",
    ),
    "no pairs": (("{run}", "--method=Reflow", "--data.count=0"), "count of the pairs is 0"),
    "guided student": (
        ("{run}", *options("Reflow"), "--guidance.scale=2", "--process.dropout=0"),
        "trained without condition dropout",
    ),
    "empty discriminator": (
        ("{run}", *options("DistributionMatching"), "--objective.adversarial=0.1", EMPTY),
        "the further network discriminator has no parameters that require a gradient",
    ),
    "no features": (
        (
            "{run}",
            *options("DistributionMatching"),
            "--objective.adversarial=0.1",
            '--objective.discriminator={{"class_path":"FeatureDiscriminator",'
            '"init_args":{{"blocks":["none"]}}}}',
        ),
        "discriminator.blocks names none, which is no module of the teacher",
    ),
    "unknown option": (("{run}", "--method=Reflow", "--stepz=3"), "--stepz"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_before_training_in_one_line(distil, trained, case):
    words, message = REFUSED[case]
    Path("tmp").mkdir()
    ended = distil(*(word.format(run=trained) for word in words), "--folder=student")
    assert ended.status in (1, 2)
    assert message in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert not Path("student/checkpoints").exists()


def test_a_teacher_that_predicts_x0_is_refused_where_the_clean_end_is_needed(distil, tmp_path):
    folder = tmp_path / "teacher"
    process = Process(shape=(1, 8, 8), classes=10, dropout=0.1, prediction="sample")
    network = (
        "{class_path: diffcore.networks.Perceptron, init_args: {shape: [1, 8, 8], classes: 10}}"
    )
    config = f"network: {network}\nprocess: {{prediction: sample}}\n"
    from diffcore.networks import Perceptron

    train(folder, process=process, network=lambda: Perceptron([1, 8, 8], classes=10), config=config)
    for method in METHODS:
        if METHODS[method].estimate != "posterior_mean":
            ended = distil(folder, f"--method={method}", "--folder=student")
            assert "predicts sample, of which a student" in ended.err
            assert ended.status == 1


def test_a_student_of_few_steps_is_no_teacher(distil, tmp_path, trained):
    copy = tmp_path / "copy"
    train(copy, config="network: torch.nn.Identity\nprocess: {}\n")
    from dataclasses import replace

    process = Process.load(copy / "process.json")
    replace(process, estimate="consistency").save(copy / "process.json")
    ended = distil(copy, "--method=Reflow", "--folder=student")
    assert ended.status == 1
    assert "estimate consistency" in ended.err


def test_the_help_names_the_methods_and_the_options(distil):
    out = distil("--help").out
    assert all(name in out for name in (*METHODS, "--training_steps", "--scale", "--rounds"))
