"""The studies of tuned knots and of the default sampler, on a few samples of a mixture."""

import json

import pytest
from benchmarks.accuracy import plane
from experiments import default_sampler, tuning
from experiments.tuning import Sizes, TuningProblem

from diffcore.guidance import CFG
from diffcore.samplers import AdamsMoulton
from diffcore.schedules import Trailing, UniformBlend

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # of diffusers
]

SMALL = Sizes(
    fitted=12,
    held_out=12,
    test=16,
    flow_steps=80,
    starts=1,
    iterations=4,
    samplers=(AdamsMoulton(2),),
    grids=(Trailing(), UniformBlend(1.25, 0.5)),
    methods=("UniPC 2", "flow Heun"),
)


@pytest.mark.slow
def test_a_row_has_the_errors_of_all_sides_from_the_same_noise(tmp_path):
    problem = TuningProblem.solve(plane(), 1.0, SMALL)
    row = problem.measure(5)
    errors = {name: value["median"] for name, value in row["errors"].items()}
    assert errors["chosen"] < errors["untuned"] < errors["diffusers"] < 0.5
    assert row["is_better"]
    rows = [{"problem": "mixture", "scale": 1.0, "evaluations": 5, **row}]
    table = tuning.format_table(json.loads(json.dumps(rows)))
    assert f"{errors['untuned'] / errors['chosen']:.2f}" in table
    tuning.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_tiny_pipeline_network_follows_its_prompt():
    denoiser = tuning.tiny_pipeline()
    problem = TuningProblem.solve(denoiser, 7.5, Sizes(fitted=4, held_out=4, test=4, flow_steps=6))
    guided = problem.test.ends
    alone = TuningProblem.solve(denoiser, 1.0, problem.sizes).test.ends
    assert problem.test.guidance == CFG(7.5)
    assert (guided - alone).abs().max() > 1e-3


def test_candidates_are_ranked_by_their_ratios_to_the_best_of_each_row():
    def row(method, evaluations, median, tail):
        key = {"problem": "a", "scale": 1.0, "evaluations": evaluations}
        return {**key, "method": method, "median": median, "tail": tail, "far": 0.5}

    rows = [row("x", 5, 1.0, 4.0), row("y", 5, 2.0, 2.0), row("x", 20, 1.0, 1.0)]
    rows += [row("y", 20, 8.0, 1.0)]
    lines = default_sampler.format_table(rows).splitlines()[2:]
    assert lines[0].startswith("| x | 1.00 | 1.00 | 1.41 | 2.00 | 50.00% |")
    assert lines[1].startswith("| y | 4.00 | 8.00 | 1.00 | 1.00 | 50.00% |")
    assert set(default_sampler.group_problems(rows)) == {
        "All",
        "Fewer than 10 evaluations",
        "20 evaluations or more",
    }
