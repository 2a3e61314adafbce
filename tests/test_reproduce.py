"""tests/reproduce.sh, with stand-ins for python and torchrun: its commands are ones we accept."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import train
from conftest import ROOT
from critique_rm import read_pairs

TRAIN, TEST = ROOT / "data" / "train.jsonl", ROOT / "data" / "test.jsonl"
# Notes its command; a run leaves a folder, and `python -c` asks how many pairs there are.
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >> "$COMMANDS"
echo >> "$COMMANDS"
case "$*" in
    *--out*) for word in "$@"; do if [[ $before == --out ]]; then mkdir -p "$word"; fi; before=$word; done ;;
    -c*read_pairs*) echo 304 ;;
    "- "*) cat > "$COMMANDS.py" ;;  # what exchanges critiques
    *) echo "a table" ;;
esac
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the script was run with one seed and two sizes, of which the second is too large."""
    folder = tmp_path_factory.mktemp("reproduce")
    for name in ("python", "torchrun"):
        path = folder / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "COMMANDS": str(folder / "commands")}
    environment |= {"SEEDS": "0", "SIZES": "32 304", "TRAIN_FLAGS": "--lr 5e-5 --batch-pairs 4"}
    command = [ROOT / "tests" / "reproduce.sh", folder / "out"]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return folder


@pytest.fixture
def commands(folder) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "commands").read_text().splitlines()]


def arguments_of(script: str, commands: list[list[str]]) -> list[list[str]]:
    return [words[2:] for words in commands if words[1] == str(ROOT / script)]


def test_runs_with_and_without_critiques_of_all_sizes_and_shares_are_started(commands):
    runs = {}
    for words in arguments_of("train.py", commands):
        args = train.parse_arguments(words)
        assert (args.lr, args.batch_pairs, args.seed, args.resume) == (5e-5, 4, 0, True)
        assert [args.train, *args.test] == [str(TRAIN), str(TEST)]
        critic = Path(args.critiques).name if args.critiques else None
        runs[Path(args.out).name] = (args.no_critiques, args.max_pairs, critic)
    shares = ("0.25", "0.50", "0.75", "1.00")
    assert runs == {
        "critiques-0": (False, None, None),
        "none-0": (True, None, None),
        "critiques-0-32": (False, 32, None),
        "none-0-32": (True, 32, None),
        **{f"shuffled_{s}-0": (False, None, f"shuffled_{s}.jsonl") for s in shares},
        "weak-0": (False, None, "weak_critiques.jsonl"),
    }


def test_tables_are_made_of_runs_that_are_there(commands):
    kinds = []
    for words in arguments_of("evaluate.py", commands):
        args = evaluate.parse_arguments(words)
        if args.compare:
            kinds.append(("compare", *(Path(file).parent.name for file in args.compare)))
            assert {Path(file).name for file in args.compare} == {"scores-test.jsonl"}
        elif args.curve:
            kinds.append(("curve", len(args.curve)))
        else:
            kinds.append(("data", Path(args.run).name, len(args.probe)))
    assert kinds == [
        ("compare", "critiques-0", "none-0"),
        ("data", "critiques-0", 5),
        ("data", "none-0", 0),
        ("compare", "critiques-0-32", "none-0-32"),
        ("curve", 9),
    ]


def test_what_exchanges_critiques_writes_those_of_all_pairs(folder, commands, tmp_path, monkeypatch):
    """A quarter of the critiques belongs to another response; all pairs have two, as before."""
    (quarter, *_) = [words[2:] for words in commands if words[1] == "-" and words[3] == "0.25"]
    path, share, seed, *sources = quarter
    assert (share, seed, sources) == ("0.25", "0", [str(TRAIN), str(TEST)])
    assert path == str(folder / "out" / "critics" / "0" / "shuffled_0.25.jsonl")
    path = str(tmp_path / "shuffled.jsonl")
    monkeypatch.setattr(sys, "argv", ["-", path, share, seed, *sources])
    exec((folder / "commands.py").read_text(), {})
    before = read_pairs(str(TRAIN)) + read_pairs(str(TEST))
    after = read_pairs(str(TRAIN), critiques=path) + read_pairs(str(TEST), critiques=path)
    assert [pair.id for pair in after] == [pair.id for pair in before]
    n_moved = 0
    for old, new in zip(before, after):
        n_moved += new.chosen_critiques != old.chosen_critiques
        n_moved += new.rejected_critiques != old.rejected_critiques
        assert len(new.chosen_critiques) == len(new.rejected_critiques) == 1
    assert n_moved == pytest.approx(0.25 * 2 * len(before), rel=0.05)
