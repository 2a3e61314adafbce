"""train.py: what a run prints and leaves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, pipeline

import critique_rm as rm
import train
from conftest import ROOT, VISIBLE_GPUS, read_lines, run_here, run_script


def test_last_line_of_stdout_is_the_summary(finished):
    folder, out, _ = finished
    summary = json.loads(out.splitlines()[-1])
    assert list(summary) == [
        *("out", "steps", "pairs", "seconds", "pairs_per_second", "tokens_per_second"),
        *("peak_memory_gb", "test_accuracy"),
    ]
    assert (summary["out"], summary["steps"], summary["pairs"]) == (str(folder), 6, 20)
    assert summary == json.loads((folder / "run.json").read_text())["summary"]


def test_metrics_have_one_line_a_step(finished):
    rows = read_lines(finished[0] / "metrics.jsonl")
    assert list(rows[0]) == [
        *("step", "epoch", "loss", "accuracy", "margin"),
        *("min_reward", "mean_reward", "max_reward", "grad_norm", "lr"),
        *("n_pairs", "n_tokens", "padding_share", "seconds"),
    ]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["n_pairs"] for row in rows] == [4, 4, 2, 4, 4, 2]
    assert all(0 <= row["padding_share"] < 0.25 for row in rows)


def test_accuracy_in_the_summary_is_that_of_the_scores(finished):
    folder, out, _ = finished
    scores = read_lines(folder / "scores-test.jsonl")
    right = [row["chosen_reward"] > row["rejected_reward"] for row in scores]
    assert len(scores) == 12
    assert json.loads(out.splitlines()[-1])["test_accuracy"] == sum(right) / 12
    pair = rm.read_pairs(str(ROOT / "data" / "test.jsonl"))[0]
    assert scores[0]["id"] == pair.id
    assert scores[0]["chosen_words"] == len(pair.chosen.split())
    assert scores[0]["rejected_critique_words"] == len(pair.rejected_critiques[0].split())


@pytest.mark.skipif(
    not torch.version.cuda or not list(Path("/dev").glob("nvidia[0-9]*")), reason="needs a GPU"
)
def test_gpu_computes_in_bf16_what_the_cpu_does_in_fp32(
    finished, small, test_file, tmp_path, monkeypatch
):
    """Losses of the same steps, and the rewards of one model, differ by rounding, but do differ."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if VISIBLE_GPUS is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE_GPUS)
    folder, scores = tmp_path / "run", tmp_path / "scores.jsonl"
    code, _, err = run_script("train.py", *small, "--out", folder)
    assert code == 0, err
    code, _, err = run_script("evaluate.py", finished[0], "--data", test_file, "--save-scores", scores)
    assert code == 0, err
    losses = [[row["loss"] for row in read_lines(f / "metrics.jsonl")] for f in (finished[0], folder)]
    files = finished[0] / "scores-test.jsonl", scores
    rewards = [[row["chosen_reward"] for row in read_lines(file)] for file in files]
    for cpu, gpu in (losses, rewards):
        assert 0 < np.abs(np.subtract(cpu, gpu)).max() < 0.05
    devices = [json.loads((f / "run.json").read_text())["device"] for f in (finished[0], folder)]
    assert devices[0] != devices[1]


def test_run_is_a_plain_hugging_face_folder(finished):
    folder, _, _ = finished
    pair = rm.read_pairs(str(ROOT / "data" / "test.jsonl"))[0]
    expected = read_lines(folder / "scores-test.jsonl")[0]["chosen_reward"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = rm.Encoder(tokenizer, 2048, True).render(
        (*pair.prompt, rm.Message("assistant", pair.chosen + rm.SEPARATOR + pair.chosen_critiques[0]))
    )
    score = pipeline("text-classification", str(folder))
    assert score(text, add_special_tokens=False)[0]["score"] == pytest.approx(expected, abs=1e-5)


def test_model_card_scores_as_it_says(finished):
    folder, _, _ = finished
    pair = rm.read_pairs(str(ROOT / "data" / "test.jsonl"))[0]
    code = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names = {"prompt": pair.prompt[0].content, "response": pair.chosen}
    names |= {"critique": pair.chosen_critiques[0], "print": lambda value: names.update(out=value)}
    exec(code.replace("THIS_FOLDER", str(folder)), names)
    expected = read_lines(folder / "scores-test.jsonl")[0]["chosen_reward"]
    assert names["out"] == pytest.approx(expected, abs=1e-5)


def test_nothing_is_left_over(finished):
    names = {path.name for path in finished[0].iterdir()}
    assert names.isdisjoint({"sharded", "draft", "checkpoints", "tokenizer"})
    assert {"run.json", "metrics.jsonl", "scores-test.jsonl", "config.json", "README.md"} <= names


def test_the_tiny_tokenizer_saw_the_pairs_of_the_run_alone(finished):
    pairs = rm.read_pairs(str(ROOT / "data" / "train.jsonl"))
    order = np.random.default_rng(0).permutation(len(pairs))[:10]
    expected = train.train_tokenizer([pairs[n] for n in order], train.parse_arguments([]))
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    assert tokenizer.get_vocab() == expected.get_vocab()


def test_each_test_file_has_its_own_scores(model_and_pairs, tmp_path):
    args, model, pairs = model_and_pairs
    names = ("a/test.jsonl", "b/test.jsonl", "c/test-2.jsonl")
    tests = {name: [pair] for name, pair in zip(names, pairs)}
    train.score_tests(model, tests, tmp_path, args)
    found = {path.name: read_lines(path)[0]["id"] for path in tmp_path.iterdir()}
    stems = ("test", "test-2", "test-2-2")
    assert found == {f"scores-{s}.jsonl": e.pair.id for s, e in zip(stems, pairs)}


class Board:
    """Stands for TensorBoard's writer, which need not be installed."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.rows: dict[int, dict[str, float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.setdefault(step, {})[name] = value

    def flush(self) -> None:
        pass


def test_tensorboard_is_given_the_rows_of_the_metrics(tmp_path, monkeypatch):
    boards = []

    def open_board(*args, **options) -> Board:
        boards.append(Board(*args, **options))
        return boards[-1]

    monkeypatch.setattr(train, "import_tensorboard", lambda: open_board)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    write_row = train.open_metrics(tmp_path, 1, for_tensorboard=True)
    write_row({"step": 2, "loss": 0.5})
    write_row({"step": 3, "loss": 0.25, "valid_accuracy": 1.0})
    assert boards[0].folder == str(tmp_path / "tensorboard") and boards[0].purge_step == 2
    assert [{"step": 1}, *boards[0].rows.values()] == read_lines(tmp_path / "metrics.jsonl")


def test_tensorboard_that_is_missing_is_one_line(small, tmp_path, mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(rm.CritiqueRMError, match="needs a package: pip install tensorboard"):
        run_here(*small, "--tensorboard", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
