"""The studies of MeanFlow's mean velocity and of reward tuning: their measurements and tables."""

import json

import torch
from experiments.students import mean_velocity, reward

from diffcore.run import Run


def test_the_reward_is_the_ink_that_is_drawn():
    x0 = torch.tensor([3.0, -0.5, 0.25, -2.0]).expand(2, 1, 1, 4)
    torch.testing.assert_close(reward.ink(x0), torch.full((2,), -0.25))
    assert reward.no_reward(x0).tolist() == [0, 0]


def test_a_student_without_tuning_has_no_divergence_to_itself(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(reward, "SAMPLES", 4)
    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("config.yaml", "ema.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    process = json.loads((trained / "process.json").read_text()) | {"estimate": "consistency"}
    del process["sha256"]
    (folder / "process.json").write_text(json.dumps(process))
    denoiser = Run(folder).denoiser()
    pixel, divergence = reward.measure_chains(denoiser, folder)
    assert divergence < 1e-8
    assert -1 <= pixel <= 1
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter.mul_(1.1)
    assert reward.measure_chains(denoiser, folder)[1] > 1e-4


def test_the_table_of_rewards_begins_with_the_reference():
    values = {"brightness": -0.4, "divergence": 1.25, "frechet_distance": 0.5}
    rows = [
        {"strength": strength, "training_steps": 5, **values, "label_accuracy": 1.0}
        for strength in (None, 0.1)
    ]
    lines = reward.format_table(rows).splitlines()
    assert lines[2] == "| the reference | 5 | -0.400 | 1.2 | 0.500 | 1.000 |"
    assert lines[3].startswith("| β = 0.1 |")


def test_the_error_of_the_mean_velocity_falls_and_is_measured_once(tmp_path, monkeypatch):
    setting = mean_velocity.Setting(5.0, 1.0)
    monkeypatch.setattr(mean_velocity, "SETTINGS", {"slow": setting})
    monkeypatch.setattr(mean_velocity, "MEASUREMENTS", 4)
    out = tmp_path / "rows.jsonl"
    lines = list(mean_velocity.run_study(out, 40))
    errors = [json.loads(line)["error"] for line in lines]
    assert len(errors) == 4
    assert errors[-1] < 0.99 < errors[0] < 1.05
    assert list(mean_velocity.run_study(out, 40)) == []
    table = mean_velocity.format_table(json.loads(line) for line in lines)
    assert table.splitlines()[-1].startswith(f"| slow | 40 | {errors[-1]:.4f} |")
