"""train.py, checkpoints: interrupted equals uninterrupted, and damage is noticed."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import critique_rm as rm
import train
from conftest import read_lines, run_here, start_script, stopped_at


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(
    finished, small, mesh, tmp_path, monkeypatch, capsys
):
    """SIGTERM in the first step, SIGKILL, which no process can see coming, after the third."""
    folder = tmp_path / "run"
    command = [*small, "--out", folder, "--save-every-steps", "2", "--eval-every-steps", "1", "--resume"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, command)])
    with stopped_at(1):
        assert train.main() == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: ") and f"--out {folder} --resume" in last
    assert len(read_lines(folder / "metrics.jsonl")) == 1

    process = start_script("train.py", *command)
    for line in process.stderr:
        if "step 3:" in line:
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len(read_lines(folder / "metrics.jsonl")) < 6

    run_here(*command)
    expected = weights(finished.folder)
    assert all(torch.equal(value, expected[name]) for name, value in weights(folder).items())
    rows, whole = (read_lines(path / "metrics.jsonl") for path in (folder, finished.folder))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in whole]


@pytest.mark.parametrize("damage", ["byte", "cut", "gone", "no checksums"])
def test_a_damaged_checkpoint_is_passed_over(model_and_pairs, tmp_path, capsys, damage):
    _, model, _ = model_and_pairs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    head = model.score.weight
    with torch.no_grad():
        for step in (0, 7, 9):
            head.fill_(step)
            train.save_checkpoint(tmp_path, step, model, optimizer)
        head.fill_(-1)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in folders] == ["step-00000007", "step-00000009"]

    def spoil(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        {
            "byte": lambda: path.write_bytes(data),
            "cut": lambda: path.write_bytes(data[:-1]),
            "gone": path.unlink,
            "no checksums": (folder / "checksums.json").unlink,
        }[damage]()

    spoil(folders[1])
    assert train.load_checkpoint(tmp_path, model, optimizer) == 7
    assert "step-00000009 is damaged" in capsys.readouterr().err and not folders[1].exists()
    assert torch.all(head.full_tensor() == 7)
    spoil(folders[0])
    with pytest.raises(rm.CritiqueRMError, match="no checkpoint is whole"):
        train.load_checkpoint(tmp_path, model, optimizer)
