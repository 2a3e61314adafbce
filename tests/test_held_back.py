"""Held-back pairs: split by prompt, evaluated on the way, and a run ends with its best weights."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import critique_rm as rm
import train
from conftest import read_lines, run_here, stopped_at

ROOT = Path(__file__).parent.parent


def make_pair(prompt: str, number: int) -> rm.Pair:
    return rm.Pair(f"{prompt}{number}", (rm.Message("user", prompt),), "yes", f"no {number}")


def test_prompts_are_held_back_whole_and_by_the_seed():
    pairs = [make_pair(prompt, number) for number in range(3) for prompt in "abcdefghij"]
    splits = []
    for seed in (0, 0, 1, 2):
        kept, held_back = train.hold_back(pairs, 0.2, seed)
        prompts = [{pair.prompt for pair in part} for part in (kept, held_back)]
        assert [len(part) for part in prompts] == [8, 2] and prompts[0].isdisjoint(prompts[1])
        assert [len(kept), len(held_back)] == [24, 6]
        assert sorted(kept + held_back, key=pairs.index) == pairs
        assert kept == sorted(kept, key=pairs.index)  # in the order of the file
        splits.append(prompts[1])
    assert splits[0] == splits[1] and len({frozenset(split) for split in splits}) > 1
    assert train.hold_back(pairs[::-1], 0.2, 0)[1] == train.hold_back(pairs, 0.2, 0)[1][::-1]
    assert len(train.hold_back(pairs, 0.01, 0)[1]) == 3  # one prompt at least
    with pytest.raises(rm.CritiqueRMError, match="1 prompts are too few for --valid-share 0.2"):
        train.hold_back(pairs[::10], 0.2, 0)


def test_the_best_step_is_the_first_with_the_least_log_loss():
    losses = {2: 0.6, 4: 0.4, 6: 0.4, 8: 0.3}
    evaluations = {step: {"valid_log_loss": loss} for step, loss in losses.items()}
    assert [train.best_step(evaluations, last) for last in (1, 2, 7, 9)] == [None, 2, 4, 8]


@pytest.fixture(scope="module")
def six_pairs(test_file, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(test_file.read_text().splitlines(keepends=True)[:6]))
    return path


@pytest.fixture(scope="module")
def overfitting(six_pairs) -> list[object]:
    """Arguments of a run of 12 steps that gets worse on purpose: few pairs, a large rate."""
    size = ["--max-pairs", 12, "--batch-pairs", 4, "--epochs", 4, "--lr", 2e-2]
    data = ["--train", ROOT / "data" / "train.jsonl", "--test", six_pairs, "--valid", six_pairs]
    return [*size, *data, "--eval-every-steps", 2]


@pytest.fixture(scope="module")
def best(overfitting, mesh, tmp_path_factory):
    """The folder of such a run, and the weights that it had at each evaluation."""
    folder, seen = tmp_path_factory.mktemp("best") / "run", []
    validate = train.validate

    def note(model, *rest) -> dict[str, float]:
        seen.append({name: p.full_tensor().clone() for name, p in model.state_dict().items()})
        return validate(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "validate", note)
        run_here(*overfitting, "--out", folder)
    return folder, seen


def test_an_overfitting_run_ends_with_the_weights_of_its_best_evaluation(best):
    folder, seen = best
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "valid_log_loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    losses = [row["valid_log_loss"] for row in rows]
    k = losses.index(min(losses))
    assert 0 < k < len(rows) - 1 and losses[-1] > losses[k] + 0.1  # it did get worse
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert stored.keys() == seen[k].keys()
    assert all(torch.equal(stored[name], weight) for name, weight in seen[k].items())
    assert json.loads((folder / "run.json").read_text())["best"] == {
        "step": rows[k]["step"],
        "valid_log_loss": losses[k],
        "valid_accuracy": rows[k]["valid_accuracy"],
        "valid_pairs": 6,
    }
    # the definition, from the scores that the folder itself gives: the test file is the same here
    scores = read_lines(folder / "scores-test.jsonl")
    margins = torch.tensor([row["chosen_reward"] - row["rejected_reward"] for row in scores])
    assert -torch.nn.functional.logsigmoid(margins).mean().item() == pytest.approx(
        losses[k], rel=1e-5
    )
    assert rows[k]["valid_accuracy"] == (margins > 0).double().mean().item()


def test_an_interrupted_run_ends_with_the_same_best_weights_to_the_bit(best, overfitting, tmp_path):
    """Though its newest checkpoint, at times the best one, is lost each time."""
    flags = [*overfitting, "--out", tmp_path, "--resume", "--save-every-steps", 5]
    for n_steps in (5, 5):
        with stopped_at(n_steps), pytest.raises(rm.CritiqueRMError, match="interrupted"):
            run_here(*flags)
        newest = max((tmp_path / "checkpoints").iterdir())
        (newest / "checksums.json").unlink()
    run_here(*flags)
    whole, _ = best
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    rows, expected = (read_lines(path / "metrics.jsonl") for path in (tmp_path, whole))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]
    records = [json.loads((path / "run.json").read_text()) for path in (tmp_path, whole)]
    assert records[0]["best"] == records[1]["best"]


def test_held_back_pairs_are_evaluated_ten_times_a_run(small, mesh, tmp_path, monkeypatch):
    args = train.parse_arguments([str(flag) for flag in (*small, "--valid-share", 0.3)])
    kept, held_back = train.select_pairs({args.train: rm.read_pairs(args.train)}, args)
    assert [len(kept), len(held_back)] == [7, 3]
    monkeypatch.setattr(
        train, "validate", lambda *_: {"valid_log_loss": 0.0, "valid_accuracy": 1.0}
    )
    row = {"loss": 0.0, "accuracy": 1.0, "margin": 1.0, "n_pairs": 4, "n_tokens": 9}
    monkeypatch.setattr(train, "train_step", lambda *_: row)
    run_here(*small, "--valid-share", 0.3, "--epochs", 12, "--out", tmp_path)
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert len(rows) == 24  # 7 pairs are two steps an epoch
    evaluated = [row["step"] for row in rows if "valid_accuracy" in row]
    assert evaluated == [3, 6, 9, 12, 15, 18, 21, 24]  # ⌈24 / 10⌉ = 3
