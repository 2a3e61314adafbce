"""What README.md, docs/ and the scripts' docstrings say is what the scripts do."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import critique_rm as rm
import make_flags
import test_fields
import test_records
import train

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "generate", "evaluate")
PAGES = (ROOT / "README.md", ROOT / "data/README.md", *sorted(ROOT.glob("docs/*.md")))
README = PAGES[0].read_text()


def code_blocks(language: str) -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    """Script and arguments of each command of the pages and of the scripts' docstrings."""
    text = "\n".join(code_blocks("bash"))
    for name in SCRIPTS:
        text += "\n" + (ROOT / f"{name}.py").read_text().split('"""')[1]
    found = []
    for line in re.split(r"\n|&&|>", text):
        words = shlex.split(line, comments=True) if re.match(r" *(python|torchrun|srun) ", line) else []
        places = [n for n, word in enumerate(words) if word.endswith(".py")]
        if places:
            found.append(words[places[0] :])
    return found


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


@pytest.mark.parametrize("code", code_blocks("python"), ids=lambda code: code.strip().splitlines()[-1])
def test_names_that_documented_python_imports_exist(code):
    imports = re.findall(r"^from (\w+) import (.+)$", code, re.MULTILINE)
    assert imports
    compile(code, "README.md", "exec")
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name)


def test_the_exercise_exchanges_half_of_the_critiques(monkeypatch, tmp_path):
    code = next(code for code in code_blocks("python") if "half.jsonl" in code)
    (tmp_path / "runs").mkdir()
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    rows = [json.loads(line) for line in Path("runs/half.jsonl").read_text().splitlines()]
    pairs = rm.read_pairs("data/train.jsonl") + rm.read_pairs("data/test.jsonl")
    assert [row["id"] for row in rows] == [pair.id for pair in pairs]
    moved = 0
    for row, pair in zip(rows, pairs):
        moved += row["chosen_critique"] != pair.chosen_critiques[0]
        moved += row["rejected_critique"] != pair.rejected_critiques[0]
    assert moved == 400  # of 800


def test_the_drawing_of_a_trie_shows_what_each_token_sees():
    drawing = re.search(r"may look at:.*\n((?:   .*\n)+?)   ```", README)[1]
    drawn = [re.findall(r"(?<= )[x.](?= |$)", line[20:]) for line in drawing.splitlines()]
    sequences = [np.array(ids, np.int32) for ids in ([0, 1, 2], [0, 3, 4])]
    trie = rm.build_trie(sequences, owners=[0, 1])
    index = np.arange(len(trie))
    seen = (index[None, :] <= index[:, None]) & (index[:, None] < trie.ends[None, :])
    assert drawn == [["x" if sees else "." for sees in row] for row in seen]
    marked = [n for n, line in enumerate(drawing.splitlines()) if "is read here" in line]
    assert marked == trie.last.tolist()


def test_files_and_pages_named_in_the_pages_exist():
    table = re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE)
    sources = [name for name in table if name.endswith((".py", "/"))]
    assert len(sources) == 7 and all((ROOT / name).exists() for name in sources)
    links = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text()):
            links.append(page.parent / target)
        for name in re.findall(r"(?<!/)\btests/\w+\.\w+", page.read_text()):
            links.append(ROOT / name)
    missing = [link for link in links if not link.exists()]
    assert len(links) > 30 and not missing


def test_each_page_is_linked_from_the_readme():
    assert {page.name for page in ROOT.glob("docs/*.md")} == set(re.findall(r"\(docs/(\w+\.md)\) \|", README))


def test_the_readme_is_short():
    without_code = re.sub(r"^ *```.*?^ *```", "", README, flags=re.DOTALL | re.MULTILINE)
    text = [line for line in without_code.splitlines() if not line.startswith("|")]
    assert len(" ".join(text).split()) <= 1300


def test_the_tests_that_the_readme_picks_exist():
    word = re.search(r"`pytest -k (\w+)`", README)[1]
    others = [path for path in ROOT.glob("tests/test_*.py") if path != Path(__file__)]
    assert any(re.search(rf"^def test_\w*{word}", path.read_text(), re.MULTILINE) for path in others)


def test_the_readme_installs_the_torch_of_the_requirements():
    assert re.findall(r"torch==[\d.]+", README) == re.findall(
        r"torch==[\d.]+", (ROOT / "requirements.txt").read_text()
    )


def test_the_page_of_flags_is_what_the_parsers_say():
    assert (ROOT / "docs/flags.md").read_text() == make_flags.make_page()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_a_default_only_where_there_is_one(name):
    page = importlib.import_module(name).make_parser().format_help()
    text = " ".join(page.split())
    assert not re.search(r"None|False|default: (\[|\{|\))", text)
    expected = {"train": "2048", "generate": "512", "evaluate": "4096"}
    assert f"(default: {expected[name]})" in text
    seed_is_zero = "shuffling (default: 0)" in text or "tiny model (default: 0)" in text
    assert seed_is_zero == (name != "generate")  # 0 is a default like others


def test_the_page_of_data_names_each_format_that_is_read():
    text = " ".join((ROOT / "docs/data.md").read_text().split())
    sentence = re.search(r"in the formats of (.*?) or ours:", text)[1]
    without_details = re.sub(r" \(.*?\)", "", sentence)
    named = {name for name in re.split(", ?", without_details) if name}
    tested = {name.partition(",")[0] for name in {**test_records.FORMATS, **test_fields.READ}}
    assert {*rm.LABELLED} <= named <= tested


MEASURING = ("bench_generate", "bench_speed", "benchmark_seeds", "kill_generate", "kill_train")
TRYING = ("try_grpo", "try_vllm")


@pytest.mark.parametrize("name", [*MEASURING, *TRYING])
def test_measuring_scripts_start(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


def test_what_bench_memory_measures_is_there():
    names = importlib.import_module("bench_memory").PHASES.values()
    assert all(hasattr(train, name) or hasattr(rm, name) for name in names)


def sections(name: str) -> dict[str, str]:
    """The code of a script's sections by their titles, each of which follows a ruled line."""
    _, *parts = re.split(r"^# -{98}\n# ", (ROOT / f"{name}.py").read_text(), flags=re.MULTILINE)
    return dict(part.split("\n", 1) for part in parts)


@pytest.mark.parametrize("name", ["critique_rm", *SCRIPTS])
def test_sections_are_those_of_the_docstring_and_of_the_journey(name):
    docstring = (ROOT / f"{name}.py").read_text().split('"""')[1]
    listed = re.search(r"^Sections,.*:\n((?:    .*\n)+)", docstring, re.MULTILINE)[1]
    code = sections(name)
    assert [line.strip() for line in listed.splitlines()] == list(code)
    journey = README.partition("## The journey of one pair")[2].partition("\n| file |")[0]
    steps = re.split(r"^(\d)\. ", journey, flags=re.MULTILINE)[1:]
    steps = dict(zip(steps[::2], steps[1::2]))
    numbers = {title[0] for title in code if title[0].isdigit()}
    assert numbers and numbers <= steps.keys()
    for number in numbers:
        functions = re.findall(r"`(?:(\w+)\.)?(\w+)`", steps[number])
        here = "".join(text for title, text in code.items() if title[0] == number)
        defined = [name for _, name in functions if f"def {name}(" in here]
        assert defined, f"step {number} names no function of that section"
