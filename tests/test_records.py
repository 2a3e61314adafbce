"""critique_rm.py, records and files: what is read of each format, and what is refused with its place."""

import gzip
import json
import math
import os
import re
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import critique_rm as rm
from conftest import ASKED, PLAIN, assistant, complaint, lines, pair, talk, user, write
from critique_rm import Answer, CritiqueRMError, read_pairs

TALKED = [user("p"), assistant("q"), user("s")]
CHAT = [assistant("c")], [assistant("r")]
WHOLE = {"id": "a", "chosen": TALKED + CHAT[0], "rejected": TALKED + CHAT[1]}
PANDALM = {"idx": 7, "instruction": "do", "input": "", "response1": "x", "response2": "y"}
LLMBAR = {"input": "p", "output_1": "x", "output_2": "y"}
HH = "\n\nHuman: p\n\nAssistant: q\n\nHuman: s\n\nAssistant: "


def votes(*sides: int) -> dict:
    return {f"annotator{n}": side for n, side in enumerate(sides, 1)}


ULTRA = {"prompt_id": "f0", "messages": TALKED, "score_chosen": 8.5, "score_rejected": 8}
FORMATS = {
    "ours": (
        PLAIN | {"chosen_critique": "g", "rejected_critique": ["b", "w"], "margin": 0.5},
        pair(chosen_critiques=("g",), rejected_critiques=("b", "w"), margin=0.5),
    ),
    "ours, messages": (PLAIN | {"prompt": TALKED, "subset": "z"}, pair(TALKED, subset="z")),
    "ours, nulls": (
        PLAIN | {"chosen": "", "chosen_critique": None, "rejected_critique": [], "margin": None},
        pair(chosen=""),
    ),
    "TRL, explicit, plain": (PLAIN, pair()),
    "TRL, explicit, chat": (
        {"id": "a", "prompt": TALKED, "chosen": CHAT[0], "rejected": CHAT[1]},
        pair(TALKED),
    ),
    "TRL, implicit, plain": (
        {"id": "a", "chosen": "The sky is blue.", "rejected": "The sky is black."},
        pair("The sky is ", "blue.", "black."),
    ),
    "TRL, implicit, chat": (WHOLE, pair(TALKED)),
    "UltraFeedback-binarized": (WHOLE | {"prompt": "p"} | ULTRA, pair(TALKED)),
    "HH-RLHF": (
        {"id": "a", "chosen": HH + "c\n\nmore", "rejected": HH + "r"},
        pair(TALKED, "c\n\nmore"),
    ),
    "RewardBench": (
        PLAIN | {"id": 3, "subset": "hep-go", "chosen_model": "m", "rejected_model": "n"},
        pair(id="3", subset="hep-go"),
    ),
    "PandaLM": (
        PANDALM | {"input": "on this"} | votes(2, 0, 2),
        pair("do\n\non this", "y", "x", id="pandalm-7", subset="pandalm"),
    ),
    "PandaLM, boolean and empty": (
        PANDALM | {"response1": True, "response2": ""} | votes(1, 1, 1),
        pair("do", "True", "", id="pandalm-7", subset="pandalm"),
    ),
    "LLMBar": (LLMBAR | {"id": "a", "label": 2}, pair("p", "y", "x")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_becomes_the_pair_written_by_hand(tmp_path, name):
    record, expected = FORMATS[name]
    assert read_pairs(write(tmp_path / "a.jsonl", record)) == [expected]


def test_pandalm_ties_are_dropped_and_counted(tmp_path, capsys):
    ballots = enumerate([votes(1, 2, 0), votes(0, 0, 1), votes(1, 1, 2)])
    pairs = read_pairs(write(tmp_path / "a.jsonl", *(PANDALM | {"idx": n} | v for n, v in ballots)))
    assert [(pair.id, pair.chosen) for pair in pairs] == [("pandalm-2", "x")]
    assert "a.jsonl: 2 pairs without a majority" in capsys.readouterr().err


def test_file_kinds_are_told_apart_by_content(tmp_path):
    rows = [FORMATS["ours"][0], PLAIN | {"id": "é", "prompt": "☃"}]
    plain = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    array, bom = json.dumps(rows, indent=1).encode(), b"\xef\xbb\xbf"
    kinds = [plain, array, bom + plain, bom + array]
    for data in (*kinds, *map(gzip.compress, kinds), lines(*rows)):
        (tmp_path / "a.txt").write_bytes(data)
        assert read_pairs(str(tmp_path / "a.txt")) == [FORMATS["ours"][1], pair("☃", id="é")]


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def full_disk(file) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CritiqueRMError, match="file was not written: No space left on device"):
        rm.replace_file(tmp_path / "file", ["new"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_critiques_come_from_another_file_by_id(tmp_path):
    first = PLAIN | {"chosen_critique": "old", "rejected_critique": "old"}
    pairs = write(tmp_path / "pairs", first, first | {"id": "b"})
    other = write(tmp_path / "other", PLAIN | {"rejected_critique": ["x", "y"]}, PLAIN | {"id": "z"})
    a, b = read_pairs(pairs, critiques=other)
    assert (a.id, a.chosen_critiques, a.rejected_critiques) == ("a", (), ("x", "y"))
    assert (b.id, b.chosen_critiques, b.rejected_critiques) == ("b", (), ("x", "y"))  # by its text
    for other in PLAIN | {"id": "z"}, PLAIN | {"chosen": "another"}:
        with pytest.raises(CritiqueRMError, match="no critique in it is of a response of .*pairs;"):
            read_pairs(pairs, critiques=write(tmp_path / "other", other))


def test_one_file_of_critiques_serves_data_sets_that_use_the_same_ids(tmp_path):
    rows = [PLAIN, PLAIN | {"prompt": "another"}]
    files = [write(tmp_path / str(n), row) for n, row in enumerate(rows)]
    both = [row | {"chosen_critique": row["prompt"]} for row in rows]
    joint = write(tmp_path / "joint", *both)
    for file, row in zip(files, rows):
        (pair,) = read_pairs(file, critiques=joint)
        assert pair.chosen_critiques == (row["prompt"],)


def test_missing_ids_come_from_the_content_and_repeats_are_numbered(tmp_path, capsys):
    bare = {name: value for name, value in PLAIN.items() if name != "id"}
    ids = [p.id for p in read_pairs(write(tmp_path / "a.jsonl", bare, bare | {"margin": 1}, bare))]
    assert "a.jsonl: 1 pairs repeat an earlier one" in capsys.readouterr().err
    assert re.fullmatch("[0-9a-f]{16}", ids[0]) and ids[0] != ids[1] and ids[2] == ids[0] + "-2"
    assert read_pairs(write(tmp_path / "b.jsonl", PLAIN, bare))[1].id == ids[0]
    panda = [PANDALM | votes(1, 1, 1) | {"idx": None, "input": text} for text in ("x", "y")]
    assert len({p.id for p in read_pairs(write(tmp_path / "c.jsonl", *panda))}) == 2


def test_answers_are_read_one_by_one(tmp_path):
    rows = [{"id": 5, "prompt": "p", "response": "r", "critique": ["c", "d"]}]
    rows += [{"prompt": ASKED, "response": "", "id": None}]
    answers = rm.read_answers(write(tmp_path / "a.jsonl", *rows))
    assert answers == [Answer(talk(ASKED), "r", ("c", "d"), "5"), Answer(talk(ASKED), "")]


# --------------------------------------------------------------------------------------------------
# Files, good and bad

PACKED = gzip.compress(lines(*[PLAIN | {"id": n, "chosen": str(n**9)} for n in range(200)]))
BAD_FILES = {  # name: (content, what the message must hold behind the file)
    "empty": (b"", ": no preference pair"),
    "blank": (b"\n \r\n", ": no preference pair"),
    "empty array": (b"[]\n", ": no preference pair"),
    "array, not text": (json.dumps([PLAIN])[:-1].encode() + b", \xff", "not UTF-8 text, after item 0"),
    "gzip, cut": (PACKED[:-20], "complete"),
    "gzip, damaged": (PACKED[:300] + b"\0\1\2" + PACKED[303:], "complete"),
    "gzip, two bytes": (PACKED[:2], "complete"),
    "binary": (bytes(range(255, 0, -1)), ": UTF-16 text, not UTF-8"),
    "UTF-16": ('{"prompt": "p"}'.encode("utf-16"), ": UTF-16 text, not UTF-8"),
    "line, cut": (lines(PLAIN) + b'{"prompt": ', ":2: not valid JSON"),
    "line, nested": (b'{"prompt": ' + b"[" * 200_000, ":1: not valid JSON"),
    "line, number": (b"3\n", ":1: expected a JSON object"),
    "line, array": (lines(PLAIN, [1]), ":2: expected a JSON object"),
    "line, long number": (b'{"id": ' + b"1" * 5000 + b"}", ":1: not valid JSON"),
    "array, cut": (json.dumps([PLAIN])[:-1].encode(), ": item 2: not valid JSON"),
    "array, nested": (b"[" * 200_000, ": item 1: not valid JSON"),
    "array of text": (json.dumps([PLAIN, "x"]).encode(), ": item 2: expected a JSON object, found 'x'"),
    "array, bad item": (json.dumps([PLAIN, {"prompt": "p"}]).encode(), ": item 2: .*'chosen'"),
    "ids": (lines(PLAIN, PLAIN | {"id": "b"}, PLAIN), ":3: id 'a' .*a.jsonl:1;"),
    "prompts": (lines(WHOLE | {"chosen": ASKED + CHAT[0]}), ":1: 'chosen' and 'rejected' differ"),
    "transcript": (lines({"chosen": HH + "c", "rejected": "r"}), ":1: .*'rejected'"),
    "transcripts": (lines({"chosen": "\n\nHuman: p", "rejected": HH + "r"}), ":1: .*'chosen'"),
}
BAD_MESSAGES = (3, {"role": "user"}, {"role": "root", "content": "p"}, {"role": [], "content": ""})
BAD_VALUES = [  # (otherwise good record, field, bad values; ... stands for a missing field)
    (PLAIN, "prompt", (None, 3, "", " ", [], {}, math.nan, *([m] for m in BAD_MESSAGES))),
    (PLAIN, "chosen", (..., None, 3, True, {}, [], [3], "\ud800", ASKED)),
    (PLAIN, "rejected", (..., None, [assistant([1])])),
    (PLAIN, "chosen_critique", (3, "", " ", ["good", None], {}, "\udfff")),
    (PLAIN, "margin", ("x", math.nan, math.inf, [1], {}, [], 10**400)),
    (PLAIN, "id", ("", 1.5, True, [1], "\ud800")),
    (PLAIN, "subset", (5, ["s"])),
    (PANDALM | votes(1, 1, 1), "annotator2", (..., 3, "1", None, [1])),
    (PANDALM | votes(1, 1, 1), "instruction", (..., "", 3)),
    (PANDALM | votes(1, 1, 1), "response1", (..., 3, None)),
    (LLMBAR | {"label": 1}, "label", (..., 0, 3, None, "1", [])),
    (LLMBAR | {"label": 1}, "output_2", (..., [])),
]


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name):
    content, expected = BAD_FILES[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    assert re.search("a.jsonl.*" + expected, complaint(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    "record, field, value",
    [pytest.param(r, f, v, id=f"{f}-{v!r:.20}") for r, f, values in BAD_VALUES for v in values],
)
def test_a_bad_value_is_refused_with_file_line_and_field(tmp_path, record, field, value):
    bad = {k: v for k, v in (record | {"id": "b", field: value}).items() if v is not ...}
    message = complaint(write(tmp_path / "a.jsonl", PLAIN, bad))
    assert re.search(f"a.jsonl:2: .*('{field}'|'content'|annotators|'prompt')", message)


def test_a_line_or_array_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rm, "MAX_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines(PLAIN) + b"x" * 2000)
    assert "a.jsonl:2: line longer" in complaint(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.json").write_bytes(gzip.compress(b"[" + b" " * 10**6))
    assert "b.json: item 1: not valid JSON, or over 16 MB" in complaint(str(tmp_path / "b.json"))


def test_bad_records_are_skipped_and_counted_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rm, "MAX_LINE_BYTES", 1000)
    good = [PLAIN, PLAIN | {"id": "b"}]
    long = b'{"prompt": "' + b"x" * 5000 + b'"}\n'
    data = long + lines(good[0], [1], PLAIN | {"chosen": 3}) + b"{\xff}\n" + lines(good[1])
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.json").write_text(json.dumps([3, good[0], PLAIN | {"margin": "x"}, good[1]]))
    for name, n_bad, first in ("a.jsonl", 4, ":1: line longer"), ("b.json", 2, ": item 1: expected"):
        assert [p.id for p in read_pairs(str(tmp_path / name), skip_bad=True)] == ["a", "b"]
        said = capsys.readouterr().err
        assert f"{name}: {n_bad} bad records skipped, the first: {tmp_path}/{name}{first}" in said


def test_an_array_is_read_like_its_lines(tmp_path):
    rows = [PLAIN | {"id": str(n), "chosen": "é\"]," * (n * n)} for n in range(60)]
    expected = read_pairs(write(tmp_path / "a.jsonl", *rows))
    for n, text in enumerate([json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False)]):
        (tmp_path / f"{n}.json").write_text(text + "\n ")
        assert read_pairs(str(tmp_path / f"{n}.json")) == expected


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three of the things that happen to files."""
    for _ in range(rng.integers(1, 4)):
        a, b = sorted(rng.integers(0, len(data) + 1, 2))
        junk = [
            *(b"\x00", b"\xef\xbb\xbf", b"\r", b"\n", b"\\ud800", b"\xff\xfe", b'"', b"\\", b"[", b"]"),
            *(b"{" * 3000, b"9" * 5000, b"1e999", b"NaN", b"-0", b"null", b"true", b"{}", b'"":1,'),
            *(b'"chosen": 1, ', b'"prompt": [[]], ', b'"id": "a", ', b"\xe2\x80\xa8", b"\x1f\x8b"),
        ][rng.integers(24)]
        data = [
            lambda: data[:a],
            lambda: data[a:],
            lambda: data[:a] + data[b:],
            lambda: data[:a] + junk + data[a:],
            lambda: data[:a] + junk + data[b:],
            lambda: data[:b] + data[a:],
            lambda: data[:a] + rng.bytes(3) + data[a + 3 :],
        ][rng.integers(7)]()
    return data


@pytest.fixture
def memory_path():
    """A folder in memory where there is one: a disk takes a millisecond for each file."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def test_ten_thousand_damaged_files_give_records_or_a_complaint(memory_path):
    rng, path, n_read = np.random.default_rng(0), memory_path / "a.jsonl", 0
    seeds = [lines(PLAIN, record | {"id": "b"}) for record, _ in FORMATS.values()]
    seeds += [json.dumps([PLAIN, WHOLE | {"id": "b"}], indent=1).encode(), PACKED]
    seeds.append(gzip.compress(lines(PLAIN) + b"\n" * 10**3))
    for n in range(10_000):
        path.write_bytes(mutate(seeds[n % len(seeds)], rng))
        try:
            pairs = read_pairs(str(path), skip_bad=bool(n % 2))
        except CritiqueRMError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 500
            assert str(error).isprintable()
            continue
        n_read += 1
        for p in pairs:
            texts = [m.content for m in p.prompt] + [p.chosen, p.rejected, p.id, p.subset]
            "".join([*texts, *p.chosen_critiques, *p.rejected_critiques]).encode()
            assert p.prompt and math.isfinite(p.margin) and {m.role for m in p.prompt} <= {*rm.ROLES}
    assert 1000 < n_read < 9000


def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(150):
            file.write(b"x" * 10**6)
    tracemalloc.start()
    assert "bomb.gz:1: line longer than 16 MB" in complaint(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_a_name_that_is_no_file_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in complaint("no-one/no-such-set:test")
    assert complaint(str(tmp_path / "gone.jsonl")).endswith("gone.jsonl: no such file")
    assert str(tmp_path) in complaint(str(tmp_path))


@pytest.mark.parametrize("name, n_pairs", [("train", 304), ("test", 96)])
def test_the_weak_critic_has_criticised_every_embedded_response(name, n_pairs):
    data = Path(__file__).parent.parent / "data"
    strong = read_pairs(str(data / f"{name}.jsonl"))
    weak = read_pairs(str(data / f"{name}.jsonl"), critiques=str(data / "weak_critiques.jsonl"))
    assert [pair.id for pair in weak] == [pair.id for pair in strong] and len(weak) == n_pairs
    for one, other in zip(weak, strong):
        for a, b in zip(one.answers, other.answers):
            assert len(a.critiques) == 1 and a.critiques != b.critiques
