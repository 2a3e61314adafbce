"""evaluate.py: the statistics against values by hand, the command as its users run it."""

import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
from conftest import run_script
from critique_rm import CritiqueRMError, PairScore

ROOT = Path(__file__).parent.parent


def score(n: int, margin: float, subset: str = "", prompt: str | None = None, words=(1, 2)):
    return PairScore(str(n), prompt or str(n), subset, margin, 0.0, *words, None, None)


def row(rows: list[evaluate.Row], scorer: str, subset: str) -> evaluate.Row:
    return next(r for r in rows if (r.scorer, r.subset) == (scorer, subset))


def test_a_tie_is_wrong_and_counted():
    scores = [score(0, 1.0), score(1, 0.0), score(2, -1.0), score(3, 2.0)]
    (model, length) = evaluate.tabulate(scores)
    assert (model.accuracy, model.ties, model.pairs) == (0.5, 0.25, 4)
    assert (length.scorer, length.accuracy) == ("longer response wins", 0.0)


def test_rewardbench_sections_match_the_reference_figures():
    """The subset accuracies in the benchmark's README give these section scores."""
    sections = {name: dict.fromkeys(weights, 0.0) for name, weights in evaluate.REWARDBENCH.items()}
    accuracy = {subset: 0.5 for weights in sections.values() for subset in weights}
    accuracy |= {"alpacaeval-easy": 1.0, "math-prm": 1.0}
    rows = {row.subset: row.accuracy for row in evaluate.rewardbench_rows("m", accuracy)}
    assert rows["RewardBench Chat"] == pytest.approx((100 + 0.5 * 258) / 358)
    assert rows["RewardBench Reasoning"] == pytest.approx((984 + 0.5 * 984) / 1968)
    assert rows["RewardBench"] == pytest.approx(np.mean([rows[f"RewardBench {s}"] for s in sections]))


def test_rewardbench_weights_add_up_to_the_published_counts():
    totals = {name: sum(weights.values()) for name, weights in evaluate.REWARDBENCH.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


def test_a_section_needs_all_its_subsets():
    assert evaluate.rewardbench_rows("m", {"llmbar-natural": 1.0}) == []


def test_interval_matches_the_normal_one_for_independent_pairs():
    correct = np.arange(1000) % 10 < 7
    low, high = evaluate.bootstrap_interval(correct, [str(n) for n in range(1000)], seed=0)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.004)


def test_interval_is_wider_when_pairs_share_prompts():
    """Ten equal pairs a prompt are worth one: the interval of 100 prompts, not of 1,000 pairs."""
    correct = np.repeat(np.arange(100) % 10 < 7, 10)
    low, high = evaluate.bootstrap_interval(correct, [str(n // 10) for n in range(1000)], seed=0)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 100)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.015)


def test_a_judge_counts_where_both_orders_are_answered(tmp_path):
    answers = [("chosen", "chosen"), ("chosen", "rejected"), ("rejected", None), ("rejected",) * 2]
    path = tmp_path / "verdicts.jsonl"
    with path.open("w") as file:
        for n, (first, second) in enumerate(answers):
            verdicts = {"chosen_first": first, "rejected_first": second}
            file.write(json.dumps({"id": str(n), "with_critiques": True, "verdicts": verdicts}) + "\n")
    rows = evaluate.tabulate([score(n, 1.0) for n in range(4)], judges=[str(path)])
    judge = row(rows, "judge with critiques", "all")
    assert (judge.accuracy, judge.inconsistent) == (pytest.approx(0.5), pytest.approx(1 / 3))
    assert (judge.pairs, judge.coverage, judge.ties) == (3, 0.75, None)


def test_verdicts_of_another_file_are_refused(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    verdicts = {"chosen_first": "chosen", "rejected_first": "chosen"}
    path.write_text(json.dumps({"id": "x", "with_critiques": False, "verdicts": verdicts}))
    with pytest.raises(CritiqueRMError, match="no id in it is one of the pairs"):
        evaluate.tabulate([score(0, 1.0)], judges=[str(path)])


def test_pairs_that_were_not_scored_lower_the_coverage():
    assert evaluate.tabulate([score(0, 1.0)], n_pairs=4)[0].coverage == 0.25


def test_subsets_have_rows_and_names_cannot_break_the_table():
    rows = evaluate.tabulate([score(0, 1.0, "a|b"), score(1, -1.0, "c")])
    assert row(rows, "reward model", "a|b").accuracy == 1.0
    assert row(rows, "reward model", "c").accuracy == 0.0
    assert "| reward model | a\\|b | 1 | 1.0000 |" in evaluate.to_markdown(rows)


def test_evaluating_a_run_repeats_its_test(finished, test_file, tmp_path):
    folder, out, _ = finished
    table, scores = tmp_path / "table.json", tmp_path / "scores.jsonl"
    options = ["--data", test_file, "--json", table, "--scores", scores]
    code, markdown, err = run_script("evaluate.py", folder, *options, processes=2)
    assert code == 0, err
    accuracy = json.loads(out.splitlines()[-1])["test_accuracy"]
    assert markdown.splitlines()[2].startswith(f"| reward model | all | 12 | {accuracy:.4f} |")
    assert json.loads(table.read_text())["rows"][0]["accuracy"] == accuracy
    mine, trained = (
        [json.loads(line)["chosen_reward"] for line in path.read_text().splitlines()]
        for path in (scores, folder / "scores-test.jsonl")
    )
    np.testing.assert_allclose(mine, trained, atol=1e-5)


def test_single_answers_get_the_reward_they_have_in_a_pair(finished, tmp_path, mesh, capsys):
    folder, _, _ = finished
    pair = json.loads((ROOT / "data" / "test.jsonl").read_text().splitlines()[0])
    answers = tmp_path / "answers.jsonl"
    rows = [
        {"id": "a", "prompt": pair["prompt"], "response": pair["chosen"], "critique": pair["chosen_critique"]},
        {"id": "b", "prompt": pair["prompt"], "response": pair["chosen"]},
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = evaluate.score_single(evaluate.parse_arguments([str(folder), "--score", str(answers)]))
    captured = capsys.readouterr()
    first, second = map(json.loads, captured.out.splitlines())
    expected = json.loads((folder / "scores-test.jsonl").read_text().splitlines()[0])
    assert first == {"id": "a", "reward": pytest.approx(expected["chosen_reward"], abs=1e-5)}
    assert (second, code) == ({"id": "b", "reward": None}, 1)
    assert "1 of 2 answers have no reward" in captured.err


def test_a_folder_without_a_head_is_refused_in_one_line(finished, tmp_path):
    folder, _, _ = finished
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    from safetensors.torch import load_file, save_file

    stored = load_file(next(folder.glob("*.safetensors")))
    save_file({k: v for k, v in stored.items() if k != "score.weight"}, tmp_path / "model.safetensors")
    code, out, err = run_script("evaluate.py", tmp_path, "--data", ROOT / "data" / "test.jsonl")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"evaluate.py: {tmp_path}: 1 weights are not in")
    assert "it has no reward head" in err and "Traceback" not in err
