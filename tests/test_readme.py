"""Every command of the README and of the scripts' docstrings is one that the scripts accept."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import critique_rm
import test_critique_rm
import test_fields

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "generate", "evaluate")


def commands() -> list[list[str]]:
    pages = "\n".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    text = "\n".join(re.findall(r"```bash\n(.*?)```", pages, re.DOTALL))
    for name in SCRIPTS:
        text += "\n" + (ROOT / f"{name}.py").read_text().split('"""')[1]
    lines = re.split(r"\n|&&|>", text)
    found = [shlex.split(line, comments=True) for line in lines if re.match(r" *(python|torchrun|srun) ", line)]
    return [words[next(n for n, w in enumerate(words) if w.endswith(".py")) :] for words in found]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_documented_command_is_accepted(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("verdicts.jsonl").touch()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    script, *arguments = words
    if script.startswith("tests/"):
        assert (ROOT / script).exists()
        return
    importlib.import_module(script.removesuffix(".py")).parse_arguments(arguments)


def test_commands_of_all_scripts_are_documented():
    assert {words[0] for words in commands()} >= {f"{name}.py" for name in SCRIPTS}


def test_files_named_in_the_readme_exist():
    table = re.findall(r"^\| `([^`]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = [name for name in table if re.fullmatch(r"[\w./]+(\.py|/)", name)]
    assert names and all((ROOT / name).exists() for name in names)


def test_the_readme_names_each_format_that_is_read():
    text = " ".join((ROOT / "README.md").read_text().split())
    sentence = re.search(r"in the formats of (.*?) or ours:", text)[1]
    without_details = re.sub(r" \(.*?\)", "", sentence)
    named = {name for name in re.split(", ?", without_details) if name}
    tested = {name.partition(",")[0] for name in {**test_critique_rm.FORMATS, **test_fields.READ}}
    assert {*critique_rm.LABELLED} <= named <= tested


@pytest.mark.parametrize("name", ["bench_generate", "bench_speed", "kill_generate", "kill_train", "try_vllm"])
def test_measuring_scripts_start(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out
