"""train.py, arguments and the run folder: what is claimed, refused, resumed, left as it was."""

import fcntl
import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import critique_rm as rm
import train
from conftest import run_here


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_an_existing_run_is_refused_and_left_as_it_was(finished, small, mesh):
    folder, _, _ = finished
    before = fingerprint(folder)
    with pytest.raises(rm.CritiqueRMError) as refusal:
        run_here(*small, "--out", folder)
    advice = "choose another --out, or add --resume or --overwrite"
    assert str(refusal.value) == f"{folder} exists; {advice}"
    assert fingerprint(folder) == before


def test_resuming_a_finished_run_gives_its_summary(finished, small, mesh):
    folder, out, _ = finished
    before = fingerprint(folder)
    assert run_here(*small, "--out", folder, "--resume") == json.loads(out.splitlines()[-1])
    assert fingerprint(folder) == before


def test_resuming_a_finished_run_with_something_else_is_refused(finished, small, mesh):
    with pytest.raises(rm.CritiqueRMError, match="arguments 'lr' was 0.001 and is now 0.1"):
        run_here(*small, "--out", finished[0], "--resume", "--lr", "0.1")


def test_resuming_a_finished_run_with_other_data_is_refused(finished, small, mesh, tmp_path):
    shutil.copytree(finished[0], copy := tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    record["data"] = dict.fromkeys(record["data"], "another")
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(rm.CritiqueRMError, match="data .*train.jsonl' was 'another' and is now"):
        run_here(*small, "--out", copy, "--resume")


def test_overwrite_does_not_start_anew_at_each_restart(finished, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(rm.CritiqueRMError, match="exists; choose another"):
        train.claim_folder(train.parse_arguments(["--out", str(finished[0]), "--overwrite"]))


def test_resume_without_out_or_with_overwrite_is_a_usage_error(capsys):
    for extra in ([], ["--out", "x", "--overwrite"]):
        with pytest.raises(SystemExit) as stop:
            train.parse_arguments(["--resume", *extra])
        assert stop.value.code == 2
    assert "--resume needs --out" in capsys.readouterr().err


def test_a_damaged_run_json_is_not_taken_for_a_new_run(tmp_path, small, mesh):
    (tmp_path / "run.json").write_text('{"argum')
    with pytest.raises(rm.CritiqueRMError, match="run.json is damaged; start anew with --overwrite"):
        run_here(*small, "--out", tmp_path, "--resume")


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    args = train.parse_arguments(["--out", str(tmp_path), "--overwrite"])
    with pytest.raises(rm.CritiqueRMError, match="something else than a run"):
        train.claim_folder(args)


def test_runs_without_a_name_take_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse_arguments([])
    assert [str(train.claim_folder(args)) for _ in range(2)] == ["runs/001", "runs/002"]


def test_a_run_that_cannot_start_deletes_nothing_and_leaves_nothing(finished, small, tmp_path, mesh):
    folder, _, _ = finished
    before = fingerprint(folder)
    with pytest.raises(rm.CritiqueRMError, match="no usable config.json"):
        run_here(*small, "--model", tmp_path, "--out", folder, "--overwrite")
    with pytest.raises(rm.CritiqueRMError, match="is --model too"):
        run_here(*small, "--model", folder, "--out", folder, "--overwrite")
    assert fingerprint(folder) == before
    with pytest.raises(rm.CritiqueRMError, match="no usable config.json"):
        run_here(*small, "--model", tmp_path, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "option, complaint",
    [
        ("--lr=-1", "argument --lr: -1 is not above 0"),
        ("--lr=nan", "argument --lr: nan is not above 0"),
        ("--seed=-1", "argument --seed: -1 is below 0"),
        ("--epochs=0", "argument --epochs: 0 is below 1"),
    ],
)
def test_a_number_out_of_range_is_a_usage_error(option, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_arguments([option])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_a_locked_folder_is_refused(tmp_path, small, mesh):
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(rm.CritiqueRMError, match="run is in use by another run"):
            run_here(*small, "--out", folder, "--resume")


def test_a_folder_that_is_not_that_of_rank_zero_is_refused(tmp_path, mesh, monkeypatch):
    with pytest.raises(rm.CritiqueRMError, match="all machines share"):
        train.lock_folder(tmp_path / "missing")
    monkeypatch.setattr(rm, "on_rank_zero", lambda function: "written elsewhere")
    with pytest.raises(rm.CritiqueRMError, match="all machines share"):
        train.lock_folder(tmp_path)


def test_too_little_disk_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=35e9))
    with torch.device("meta"):
        model = torch.nn.Linear(1000, 970_000, bias=False)
        train.check_disk(tmp_path, model, keeps_best=False)
        model.add_module("more", torch.nn.Linear(1000, 30_000, bias=False))
        with pytest.raises(rm.CritiqueRMError, match="35.0 GB are free, 36.0 GB are needed"):
            train.check_disk(tmp_path, model, keeps_best=False)
        model.more.requires_grad_(False)  # it is in the result, not in checkpoints
        with pytest.raises(rm.CritiqueRMError, match="35.0 GB are free, 35.0 GB are needed"):
            train.check_disk(tmp_path, model, keeps_best=False)


def test_resume_names_what_differs():
    old = {"arguments": {"lr": 1e-3, "out": "a"}, "data": {"a.jsonl": "1"}, "template": "t"}
    train.check_same_run(old, {**old, "arguments": {"lr": 1e-3, "out": "b"}})
    with pytest.raises(rm.CritiqueRMError, match="template was 't' and is now 'u'"):
        train.check_same_run(old, {**old, "template": "u"})
    with pytest.raises(rm.CritiqueRMError, match="--dtype was 'bfloat16' and is now 'float32'"):
        train.check_same_run(old | {"dtype": "bfloat16"}, old | {"dtype": "float32"})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"prompt": "a", "chosen": "b"}\n', "pairs.jsonl:1: no field 'rejected'"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "run generate.py on it first"),
    ],
)
def test_bad_pairs_are_refused_in_one_line(tmp_path, capsys, monkeypatch, content, complaint):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", "--train", str(path), "--out", str(out)])
    assert train.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("train.py: ")


def test_bad_model_is_refused_in_one_line_without_a_traceback(tmp_path, capsys, monkeypatch):
    flags = ["--model", str(tmp_path), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert train.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"train.py: {tmp_path}: no usable config.json")
