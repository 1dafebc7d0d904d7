"""Both sides of the comparison of pipelines do the same work; no times are tested."""

import pytest
import torch
from benchmarks.pipeline_overhead import PAIRS, create_calls, measure_pipelines

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array:DeprecationWarning"
)  # of diffusers, in set_timesteps


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_make_the_same_latents(name):
    ours, theirs = create_calls(PAIRS[name], 4)
    made = theirs()
    assert ours().shape == (1, 4, 16, 16)
    assert ((ours() - made).abs().max() / made.abs().max()).item() < 1e-5
    assert torch.equal(theirs(), made)


def test_few_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs is 29"):
        measure_pipelines(29)
