"""What generating, training and scoring agree on: records, tokens, tries, rewards, folders."""

import gzip
import itertools
import json
import math
import os
import re
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import critique_rm as rm
from critique_rm import Answer, CritiqueRMError, Encoder, Message, Pair, build_trie, read_pairs

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Records


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def talk(messages: list[dict]) -> tuple[Message, ...]:
    return tuple(Message(**message) for message in messages)


def lines(*records: dict | list) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path, *records: dict) -> str:
    path.write_bytes(lines(*records))
    return str(path)


ASKED, TALKED = [user("p")], [user("p"), assistant("q"), user("s")]
CHAT = [assistant("c")], [assistant("r")]
PLAIN = {"id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}
WHOLE = {"id": "a", "chosen": TALKED + CHAT[0], "rejected": TALKED + CHAT[1]}
PANDALM = {"idx": 7, "instruction": "do", "input": "", "response1": "x", "response2": "y"}
LLMBAR = {"input": "p", "output_1": "x", "output_2": "y"}
HH = "\n\nHuman: p\n\nAssistant: q\n\nHuman: s\n\nAssistant: "


def votes(*sides: int) -> dict:
    return {f"annotator{n}": side for n, side in enumerate(sides, 1)}


def pair(prompt: str | list = "p", chosen: str = "c", rejected: str = "r", **fields) -> Pair:
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    return Pair(**{"id": "a"} | fields, prompt=talk(prompt), chosen=chosen, rejected=rejected)


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


def complaint(source: str) -> str:
    with pytest.raises(CritiqueRMError) as caught:
        read_pairs(source)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    return str(caught.value)


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


# --------------------------------------------------------------------------------------------------
# Text and tokens

HONEST = [
    [user("How many minutes?"), assistant("x\n\nCritique: right")],
    [user("  How\n\n\nmany "), assistant("é ☃ "), user("and \t\ttrain?"), assistant(" \n ok")],
    [user("\ue0001\ue001 {{ bos_token }}" + "x" * 50), assistant("")],
]


def squeeze(text: str) -> str:
    """Phi-3's control tokens swallow the white space behind them."""
    return re.sub(r"(<\|(user|assistant|end)\|>)\s+", r"\1", text)


def decode(encoder: Encoder, ids) -> str:
    return squeeze(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def encode_answer(encoder: Encoder, prompt: str, response: str, critique: str) -> np.ndarray:
    [[ids]] = encoder.encode_answers([Answer(talk([user(prompt)]), response, (critique,))])
    return ids


@pytest.mark.parametrize("messages", HONEST)
def test_ids_and_text_equal_those_of_the_tokenizer_and_its_template(tokenizer, messages):
    encoder = Encoder(tokenizer, 512, True)
    text, ids = encoder.render(talk(messages)), encoder.encode(talk(messages))
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(text) and not whole.removeprefix(text).strip()
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decode(encoder, ids) == squeeze(text)
    assert ids[-1] == encoder.end_id != ids[-2]
    assert [n for n, i in enumerate(ids[:-1]) if i == tokenizer.bos_token_id] in ([], [0])


@pytest.mark.parametrize("place", range(3))
def test_control_tokens_in_prompt_response_or_critique_are_ordinary_text(tokenizer, place):
    encoder, data = Encoder(tokenizer, 512, True), ["How many", "The train", "right"]
    control = [i for token, i in tokenizer.get_added_vocab().items() if token.strip()]
    own = [i for i in encode_answer(encoder, *data) if i in control]
    for token in tokenizer.get_added_vocab():
        for text in ("{}", "See {} there", "a{}b", "{0}{0} {0}\n", "x{1}{0}{2}"):
            texts = [*data]
            texts[place] = text.format(token, token[:2], token[2:])
            ids = encode_answer(encoder, *texts)
            assert [i for i in ids if i in control] == own
            messages = [user(texts[0]), assistant(texts[1] + rm.SEPARATOR + texts[2])]
            assert decode(encoder, ids) == squeeze(encoder.render(talk(messages)))


def changed(before: list, after: list) -> list:
    """What is left of `before` without the beginning and the end that both share."""
    n_start = len(os.path.commonprefix([before, after]))
    n_end = len(os.path.commonprefix([before[n_start:][::-1], after[n_start:][::-1]]))
    return before[n_start : len(before) - n_end]


def test_a_forged_control_token_changes_no_token_of_the_text_around_it(tokenizer):
    encoder = Encoder(tokenizer, 512, True)
    for token in filter(str.strip, tokenizer.get_added_vocab()):
        texts = [f"The train\n\n\nasks {word} The\n\n\nuser" for word in ("ß", token)]
        honest, forged = (encode_answer(encoder, "How", text, "right").tolist() for text in texts)
        assert tokenizer.decode(changed(honest, forged)).strip() == "ß"


def test_characters_outside_the_vocabulary_change_no_other_token():
    tokenizer = make_tokenizer("plain")
    tokenizer.backend_tokenizer.model.byte_fallback = False
    tokenizer.backend_tokenizer.model.unk_token = "<unk>"
    encoder, messages = Encoder(tokenizer, 512, True), talk(HONEST[1])
    expected = tokenizer(encoder.render(messages), add_special_tokens=False)["input_ids"]
    assert encoder.encode(messages).tolist() == expected


@pytest.mark.parametrize("named", [False, True])
def test_the_date_does_not_change_the_ids(monkeypatch, named):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    messages, tokenizer = HONEST[0], make_tokenizer("llama3")
    before = Encoder(make_tokenizer("llama3"), 512, True).encode(talk(messages)).tolist()
    if named:  # as Command R's: several templates by name
        tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "no"}
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert "02 Jan 2031" in tokenizer.apply_chat_template(messages, tokenize=False)
    for _ in range(2):  # also when the frozen template is read again
        assert Encoder(tokenizer, 512, True).encode(talk(messages)).tolist() == before
    assert tokenizer.apply_chat_template(messages, tokenize=False).count("26 Jul 2024") == 1


def test_a_strangers_template_is_read_to_its_last_token():
    tokenizer = make_tokenizer("chatml")
    ids = Encoder(tokenizer, 512, True, keep_tail=True).encode(talk(HONEST[0]))
    whole = tokenizer.apply_chat_template(HONEST[0], tokenize=False)
    assert whole.endswith("\n") and ids.tolist() == tokenizer(whole)["input_ids"]


BAD_TEMPLATES = {
    "{{ raise_exception('no system role') }}": "no system role",
    "{{ messages[0].content }}": "end with the assistant's message",
    "{% for m in %}": "chat template",
    "{{ messages[0].content + 3 }}": "chat template",
    "{{ messages[0].content + messages[1].content }}": "set its eos_token",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_an_unusable_template_is_refused_with_the_reason(template):
    tokenizer = make_tokenizer("plain")
    tokenizer.chat_template, tokenizer.eos_token = template, None
    with pytest.raises(CritiqueRMError, match=BAD_TEMPLATES[template]):
        Encoder(tokenizer, 512, True).encode(talk(HONEST[0]))


# --------------------------------------------------------------------------------------------------
# Overlong pairs

LIMIT = 160
CRITIQUES = {"chosen_critiques": ("right, c",), "rejected_critiques": ("wrong, r",)}


def words(letter: str, n: int) -> str:
    return " ".join(f"{letter}{k}☃" for k in range(n))


def sized(n_prompt: int, n_chosen: int, n_rejected: int, **fields) -> Pair:
    texts = words("p", n_prompt), words("c", n_chosen), words("r", n_rejected)
    return replace(pair(*texts, **CRITIQUES), **fields)


def segments(encoder: Encoder, ids: np.ndarray) -> tuple[str, str, str]:
    """Prompt, response and critique of a one-turn sequence, from its ids."""
    marked = squeeze(encoder.render(talk([user("\uf000"), assistant("\uf000")])))
    before, between, end = marked.split("\uf000")
    text = decode(encoder, ids)
    assert text.startswith(before) and text.endswith(end)
    prompt, answer = text.removeprefix(before).removesuffix(end).split(between)
    return prompt, *answer.split(rm.SEPARATOR)


@pytest.mark.parametrize(
    "sizes, whole",
    [
        ((500, 3, 2), {"chosen", "rejected"}),
        ((2, 500, 3), {"prompt", "rejected"}),
        ((2, 500, 500), {"prompt"}),
        ((500, 500, 2), {"rejected"}),
        ((30, 25, 500), set()),
    ],
)
def test_overlong_pairs_keep_critique_end_token_and_one_prompt(tokenizer, sizes, whole):
    pair, encoder = sized(*sizes), Encoder(tokenizer, LIMIT, True)
    [encoded] = encoder.encode_pairs([pair], "a")
    both = [*encoded.chosen, *encoded.rejected]
    assert LIMIT - 12 <= max(map(len, both)) <= LIMIT and encoder.counts["truncated"] == 1
    assert {ids[-1] for ids in both} == {encoder.end_id}
    (prompt, chosen, good), (same, rejected, bad) = (segments(encoder, ids) for ids in both)
    assert prompt == same and (good, bad) == ("right, c", "wrong, r")
    assert prompt and chosen and rejected and pair.prompt[0].content.endswith(prompt)
    assert pair.chosen.startswith(chosen) and pair.rejected.startswith(rejected)
    uncut = {"prompt": prompt == pair.prompt[0].content}
    uncut |= {"chosen": chosen == pair.chosen, "rejected": rejected == pair.rejected}
    assert {name for name in uncut if uncut[name]} >= whole


def test_the_oldest_turns_of_a_long_conversation_go_first(tokenizer):
    turns = [user(words("p", 300)), assistant("see you"), user("The second train?")]
    encoder = Encoder(tokenizer, LIMIT, True)
    [encoded] = encoder.encode_pairs([sized(1, 2, 3, prompt=talk(turns))], "a")
    for text in (decode(encoder, ids) for ids in (*encoded.chosen, *encoded.rejected)):
        assert "see you" in text and "The second train?" in text
        assert "p299☃" in text and "p0☃" not in text


def test_pairs_left_out_are_counted_by_reason(capsys):
    good = {"rejected_critiques": CRITIQUES["chosen_critiques"]}
    pairs = [
        sized(2, 3, 4),
        sized(300, 3, 4),
        sized(2, 3, 4, rejected_critiques=()),
        sized(2, 3, 4, chosen_critiques=(words("k", 300),)),
        sized(2, 3, 0, rejected=words("c", 3), **good),
        sized(2, 300, 0, rejected=words("c", 301), **good),
    ]
    encoder = Encoder(make_tokenizer("chatml"), LIMIT, True)
    assert [e.pair for e in encoder.encode_pairs(pairs, "a.jsonl")] == pairs[:2]
    line = capsys.readouterr().err
    for part in ("2 of 6 pairs", "1 without critique", "1 dropped as too long", "2 with equal"):
        assert part in line
    with pytest.raises(CritiqueRMError, match="a.jsonl: no pair.*1 without.*generate.py.*--no-"):
        encoder.encode_pairs(pairs[2:3], "a.jsonl")


# --------------------------------------------------------------------------------------------------
# Packing


def test_a_small_trie_by_hand():
    #  5 ─ 6 ─ 7 ─ 8
    #       └─ 9
    sequences = [np.array(s, np.int32) for s in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7], [5, 6, 9])]
    trie = build_trie(sequences, [10, 20, 30, 40])
    assert trie.ids.tolist() == [5, 6, 7, 8, 9]
    assert trie.positions.tolist() == [0, 1, 2, 3, 2]
    assert trie.ends.tolist() == [5, 5, 4, 4, 5]
    assert trie.last.tolist() == [3, 4, 2, 4] and trie.owners.tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize("seed", range(8))
def test_each_sequence_of_a_trie_is_the_ancestors_of_its_last_token(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 4 * seed + 1)
    sequences = [rng.integers(0, 2, n).astype(np.int32) for n in lengths]
    trie = build_trie(sequences, range(len(sequences)))
    for sequence, q in zip(sequences, trie.last):
        path = [k for k in range(q + 1) if k <= q < trie.ends[k]]
        assert trie.ids[path].tolist() == sequence.tolist()
        assert trie.positions[path].tolist() == list(range(len(sequence)))
    assert len(trie) == len({tuple(s[: k + 1]) for s in sequences for k in range(len(s))})


def chain(length: int, number: int = 0) -> rm.Trie:
    return build_trie([np.arange(length, dtype=np.int32)], [number])


@pytest.mark.parametrize(
    "share, expected",
    [(True, [[[5], [3, 2]], [[2], [2]]]), (False, [[[5]], [[3]], [[2], [2], [2]]])],
)
def test_packing_a_few_tries_by_hand(share, expected):
    packed = rm.pack([[chain(n)] for n in (2, 5, 3, 2, 2)], 10, 1, share)
    assert [[[len(trie) for trie in row] for row in rows] for rows in packed] == expected


def test_on_a_gpu_attention_does_not_compile_for_each_shape(mesh, monkeypatch):
    """As far as that can be seen without a GPU: cuDNN, which does, is off, and GPUs are counted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(rm.dist, "init_device_mesh", lambda kind, shape: (kind, shape))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert rm.start_processes() == (torch.device("cuda", 0), ("cuda", (1,)))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(OSError, match="only 1 GPUs here; lower --nproc-per-node"):
        rm.start_processes()


@pytest.mark.parametrize("charge_tokens, n_rows", [(62, [1, 10]), (2048, [11])])
def test_where_micro_batches_cost_much_padding_is_cheaper(charge_tokens, n_rows):
    """By hand: a row of 100 and ten of 60 are (100 + 62) / 100 = 1.62 a token for the first alone
    and (1,100 + 62) / 700 = 1.66 together; with 2,048 for each, 21 and 4.5."""
    packed = rm.pack([[chain(n)] for n in (100, *[60] * 10)], 2000, charge_tokens, share=False)
    assert [len(rows) for rows in packed] == n_rows


@pytest.mark.parametrize("share, n_tries, most_wasted", [(True, 1, 0.08), (False, 2, 0.28)])
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_every_unit_is_packed_once_within_the_budget(n_ranks, share, n_tries, most_wasted):
    rng, number = np.random.default_rng(0), itertools.count()
    units = [[chain(n, next(number)) for n in rng.integers(20, 200, n_tries)] for _ in range(200)]
    ranks = [rm.pack(units, 2048, 64, share, rank, n_ranks) for rank in range(n_ranks)]
    batches = [[rm.collate(rows, CPU) for rows in packed] for packed in ranks]
    packed = sum(batches, [])
    found = [set(batch.owners.tolist()) for batch in packed]
    wholes = [{int(trie.owners[0]) for trie in unit} for unit in units]
    assert all(sum(whole <= numbers for numbers in found) == 1 for whole in wholes)
    assert sum(map(len, found)) == next(number)
    n_tokens, largest = sum(b.n_tokens for b in packed), [
        max(b.ids.numel() for b in same_time) for same_time in zip(*batches, strict=True)
    ]
    assert n_tokens == sum(len(trie) for unit in units for trie in unit)
    assert max(largest) <= 2048
    assert 1 - n_tokens / (n_ranks * sum(largest)) < most_wasted  # padding, and waiting for others


@pytest.mark.parametrize("rank, expected", [(0, [[[5]], [[4]]]), (1, [[[4]], []]), (2, [[[4]], []])])
def test_a_rank_with_fewer_units_gets_empty_micro_batches(rank, expected):
    packed = rm.pack([[chain(n)] for n in (4, 4, 4, 5)], 1, 0, True, rank, n_ranks=3)
    assert [[[len(trie) for trie in row] for row in rows] for rows in packed] == expected


# --------------------------------------------------------------------------------------------------
# Dtype


@pytest.mark.parametrize(
    "wanted, capability, hidden_size, expected",
    [
        ("auto", "amx_bf16", 576, torch.bfloat16),
        ("auto", "avx512_bf16", 4096, torch.bfloat16),
        ("auto", "bf16", 576, torch.bfloat16),  # Arm
        ("auto", "avx2", 4096, torch.float32),
        ("auto", "amx_bf16", 128, torch.float32),  # the tiny model: the same on all machines
        ("float32", "amx_bf16", 4096, torch.float32),
        ("bfloat16", "avx2", 128, torch.bfloat16),
    ],
)
def test_dtype_follows_what_the_cpu_can(mesh, monkeypatch, wanted, capability, hidden_size, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx": True, capability: True})
    assert rm.choose_dtype(wanted, CPU, hidden_size) == expected


def test_all_ranks_compute_in_the_dtype_that_the_weakest_can(mesh, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(rm.dist, "all_reduce", lambda tensor, op: tensor.zero_())  # another cannot
    assert rm.choose_dtype("auto", CPU, 4096) == torch.float32


# --------------------------------------------------------------------------------------------------
# Rewards

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": WINDOWS | {"head_dim": 8},
    "Gemma3Text": WINDOWS | {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
    "Qwen3_5Text": LINEAR | {"head_dim": 8},
    "Jamba": {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
}
RECURRENT = ("Qwen3_5Text", "Jamba")
KINDS = [(name, kind) for name in ARCHITECTURES for kind in ("eager", "sdpa")]
for kind in (("Gemma2", "sdpa"), *((name, "eager") for name in RECURRENT)):  # Gemma 2 has no sdpa
    KINDS.remove(kind)
OTHERS = {  # positions that are learned, or not taken from mask and position_ids; experts
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2},
    "Bloom": {},
    "Falcon": {"alibi": True},
    "Mpt": {},
    "Mixtral": {"num_local_experts": 2},
}


def save_tiny(make_config, name: str, folder, **changes) -> str:
    torch.manual_seed(0)
    config = make_config(name, **(ARCHITECTURES | OTHERS)[name], **changes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


def load(folder: str, mesh, attention: str | None = None, head_seed: int | None = None):
    config = rm.load_config(folder)
    config._attn_implementation = attention
    model = rm.build_model(config, torch.float32, mesh)
    rm.read_weights(model, folder, CPU, head_seed)
    return model.train()  # as in training: there must be no dropout


def random_groups(*n_critiques: int) -> list[list[np.ndarray]]:
    """Groups of sequences: a prompt, two responses to it, some critiques of each."""
    rng = np.random.default_rng(0)

    def draw(low: int, high: int) -> np.ndarray:
        return rng.integers(1, TINY["vocab_size"], rng.integers(low, high)).astype(np.int32)

    groups = []
    for n in n_critiques:
        prompt = draw(5, 12)
        answers = [np.concatenate([prompt, draw(3, 8)]) for _ in range(2)]
        groups.append([np.concatenate([a, draw(1, 9)]) for a in answers for _ in range(n)])
    return groups


def rewards_together(model, groups: list[list[np.ndarray]]) -> torch.Tensor:
    """Rewards from one batch: two tries in its first row, padding in others."""
    longest, number = max(len(s) for group in groups for s in group), itertools.count()
    share = rm.shares_prefixes(model, longest)
    units = [rm.build_tries(group, [next(number) for _ in group], share) for group in groups]
    rows = [units[0] + units[1], *units[2:]] if share else [[t] for unit in units for t in unit]
    batch = rm.collate(rows, CPU)
    return rm.compute_rewards(model, batch, share)[batch.owners.argsort()]


def rewards_alone(model, groups: list[list[np.ndarray]]) -> torch.Tensor:
    """Rewards from Hugging Face's own classifier, sequence by sequence."""
    ids = [torch.from_numpy(s.astype(np.int64))[None] for group in groups for s in group]
    return torch.cat([model(input_ids=i).logits[:, 0] for i in ids])


def gradient(p: torch.nn.Parameter) -> torch.Tensor:
    if p.grad is None:
        return torch.zeros(p.shape)
    return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad


@pytest.mark.parametrize("name, attention", KINDS)
def test_packed_rewards_and_gradients_equal_hugging_face_on_each_sequence(
    tmp_path, mesh, make_config, name, attention
):
    folder, groups = save_tiny(make_config, name, tmp_path), random_groups(1, 2, 8)
    ours = load(folder, mesh, attention)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation=attention
    ).eval()
    assert rm.shares_prefixes(ours, 40) == (name not in RECURRENT)
    together, alone = rewards_together(ours, groups), rewards_alone(theirs, groups)
    assert alone.std() > 0.1
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for rewards in (together, alone):
        (rewards * torch.linspace(-1, 1, len(rewards))).sum().backward()
    scale = max(gradient(p).norm() for p in theirs.parameters())
    for (name, p), expected in zip(ours.named_parameters(), theirs.parameters()):
        assert (gradient(p) - gradient(expected)).norm() <= 1e-5 * scale, name


@pytest.mark.parametrize("name", OTHERS)
def test_rewards_of_other_architectures_are_right_or_refused(tmp_path, mesh, make_config, name):
    folder, groups = save_tiny(make_config, name, tmp_path), random_groups(1, 2, 3)
    try:
        model = load(folder, mesh)
    except CritiqueRMError:
        assert name not in ("GPT2", "OPT")
        return
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        together, alone = rewards_together(model, groups), rewards_alone(theirs, groups)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Gemma3Text", "Jamba"])
def test_neighbours_order_and_padding_do_not_change_a_reward(tmp_path, mesh, make_config, name):
    model = load(save_tiny(make_config, name, tmp_path), mesh)
    groups = random_groups(1, 3, 2, 5)
    expected = sum(rm.score_groups(model, groups, 10**6), [])
    singles = [[s] for group in groups for s in group]
    for budget in (1, 100):
        backwards = rm.score_groups(model, [g[::-1] for g in groups[::-1]], budget)
        assert sum(backwards, [])[::-1] == pytest.approx(expected, abs=5e-6)
        apart = rm.score_groups(model, singles, budget)
        assert sum(apart, []) == pytest.approx(expected, abs=5e-6)


def test_an_empty_micro_batch_adds_no_reward_and_no_gradient(tmp_path, mesh, make_config):
    model = load(save_tiny(make_config, "Llama", tmp_path), mesh)
    rewards = rm.compute_rewards(model, rm.collate([], CPU), share=True)
    assert rewards.shape == (0,)
    rm.pairwise_loss(rewards, rewards, rewards).backward()
    assert all(p.grad is None or not p.grad.full_tensor().any() for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# Model folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_weights_of_a_language_model_are_read_with_and_without_prefix(
    tmp_path, mesh, make_config, kind, dtype
):
    source = kind.from_config(make_config("Llama"), dtype=dtype)
    source.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = load(str(tmp_path), mesh, head_seed=3).model.state_dict()
    expected = source.base_model.state_dict()
    assert read.keys() == expected.keys()
    for name, value in read.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.full_tensor(), expected[name].float())


def test_the_head_depends_on_the_seed_alone(tmp_path, mesh, make_config):
    AutoModel.from_config(make_config("Llama")).save_pretrained(tmp_path)
    heads = [load(str(tmp_path), mesh, head_seed=n).score.weight.full_tensor() for n in (3, 3, 4)]
    by_hand = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) / math.sqrt(33)
    assert torch.equal(heads[0], by_hand) and torch.equal(heads[1], by_hand)
    assert not torch.equal(heads[2], by_hand)


def change_weights(**changes: torch.Tensor | None):
    def change(folder) -> None:
        tensors = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def change_config(**changes):
    def change(folder) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def pickle_weights(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(name: str, n_bytes: int):
    return lambda folder: os.truncate(folder / name, n_bytes)


NORM = "model.norm.weight"
BREAKAGES = {  # name: (how, what the message must hold)
    "no head": (change_weights(**{"score.weight": None}), "no reward head"),
    "missing key": (change_weights(**{NORM: None}), NORM),
    "other shape": (change_weights(**{NORM: torch.ones(31)}), rf"{NORM} is .31., expected .32."),
    "two labels": (change_weights(**{"score.weight": torch.ones(2, 32)}), "score.weight"),
    "pickled weights": (pickle_weights, "safetensors"),
    "cut weights": (cut("model.safetensors", 5000), "safetensors"),
    "empty weights": (cut("model.safetensors", 0), "safetensors"),
    "own code": (change_config(auto_map={"AutoConfig": "code.Config"}), "own code"),
    "unknown type": (change_config(model_type="new"), "config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "cut config": (cut("config.json", 30), "config.json"),
    "config of wrong types": (change_config(hidden_size="x"), "config.json"),
    "config that does not fit": (change_config(num_attention_heads=5), "config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "cut tokenizer": (cut("tokenizer.json", 300), "tokenizer"),
    "encoder": (change_config(model_type="bert"), "Bert.* no linear head .*Llama"),
    "no classifier": (change_config(model_type="mamba"), "mamba"),
}


@pytest.fixture
def reward_folder(tmp_path, make_config):
    """A reward model of others, whose template writes nothing behind its end token."""
    save_tiny(make_config, "Llama", tmp_path)
    make_tokenizer("llama3").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_model_folder_is_refused_in_one_line(reward_folder, mesh, name):
    how, expected = BREAKAGES[name]
    how(reward_folder)
    with pytest.raises(CritiqueRMError, match=expected) as caught:
        rm.load_reward_model(str(reward_folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name, limit", [("Llama", "vocab_size"), ("GPT2", "n_positions")])
def test_text_the_model_has_no_room_for_is_refused(tmp_path, mesh, make_config, name, limit):
    save_tiny(make_config, name, tmp_path, **{limit: 64})
    make_tokenizer("chatml").save_pretrained(tmp_path)
    with pytest.raises(CritiqueRMError):
        model, encoder = rm.load_reward_model(str(tmp_path), max_length_tokens=300)
        rm.score_answers(model, encoder, [Answer(talk(ASKED), words("r", 9), ("c",))])


@pytest.mark.parametrize("style", ["chatml", "gemma", "mistral", "gpt2"])
def test_a_saved_model_scores_the_same_here_and_in_transformers(tmp_path, mesh, make_config, style):
    tokenizer, out = make_tokenizer(style), tmp_path / "out"
    folder = save_tiny(make_config, "Llama", tmp_path / "in", pad_token_id=tokenizer.pad_token_id)
    encoder, config = Encoder(tokenizer, 300, True), rm.load_config(folder)
    rm.choose_pad_token(config, encoder)
    assert config.pad_token_id == tokenizer.pad_token_id != encoder.end_id
    config.problem_type = "regression"
    config.critique_rm = {"critiques": True, "max_length_tokens": 300}
    model = rm.build_model(config, torch.float32, mesh)
    rm.read_weights(model, folder, CPU)
    out.mkdir()
    rm.save_model(model, encoder, out, "card")
    assert (out / "README.md").read_text() == "card"
    assert all(path.is_file() for path in out.iterdir())

    answers = [Answer(talk(ASKED), words("a", n), ("so Critique: right",)) for n in (1, 9, 3, 5)]
    expected = rm.score_answers(model, encoder, answers)
    again = rm.load_reward_model(str(out))
    assert again[1].max_length_tokens == 300 and rm.score_answers(*again, answers) == expected
    contents = [a.response + rm.SEPARATOR + a.critiques[0] for a in answers]
    texts = [encoder.render(talk([*ASKED, assistant(content)])) for content in contents]
    pipe = transformers.pipeline("text-classification", str(out), device="cpu")
    for batch_size in (1, 4) if config.pad_token_id is not None else (1,):
        scores = pipe(texts, add_special_tokens=False, batch_size=batch_size)
        assert [s["score"] for s in scores] == pytest.approx(expected, abs=1e-5)


def test_weights_in_several_files_are_read_by_us_and_by_transformers(
    tmp_path, reward_folder, mesh, monkeypatch
):
    model, encoder = rm.load_reward_model(reward_folder)
    monkeypatch.setattr(rm, "FILE_BYTES", 20_000)
    folder = tmp_path / "split"
    folder.mkdir()
    rm.save_model(model, encoder, folder, "card")
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 3 and sum(path.stat().st_size > 20_000 for path in files) == 1  # embedding
    expected = model.state_dict()

    def whole(p: torch.Tensor) -> torch.Tensor:
        return p.full_tensor() if hasattr(p, "full_tensor") else p

    for other in (
        AutoModelForSequenceClassification.from_pretrained(folder),
        rm.load_reward_model(str(folder))[0],
    ):
        found = other.state_dict()
        assert found.keys() == expected.keys()
        for name, p in found.items():
            assert torch.equal(whole(p), whole(expected[name]))


def test_the_folder_says_how_it_is_read(reward_folder, mesh, capsys):
    def settings(**changes) -> tuple:
        _, encoder = rm.load_reward_model(str(reward_folder), **changes)
        return encoder.use_critiques, encoder.max_length_tokens, encoder.keep_tail

    assert settings() == (True, 2048, True)
    change_config(critique_rm={"critiques": False, "max_length_tokens": 99})(reward_folder)
    assert settings() == (False, 99, False)
    assert "the other way round" not in capsys.readouterr().err
    assert settings(use_critiques=True, max_length_tokens=50) == (True, 50, False)
    assert "trained without critiques" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Loss and scores


@pytest.mark.parametrize(
    "chosen, rejected, margin, centering, expected",
    [
        (1.5, 1.5, 0, 0, math.log(2)),
        (2, 0, 0, 0, math.log(1 + math.exp(-2))),
        (2, 0, 1, 0, math.log(1 + math.exp(-1))),
        (2, 1, 0, 0.1, math.log(1 + math.exp(-1)) + 0.1 * 9),
        (-200, 200, 0, 0, 400),
    ],
)
def test_loss_by_hand(chosen, rejected, margin, centering, expected):
    values = (torch.tensor([float(v)] * 3) for v in (chosen, rejected, margin))
    assert rm.pairwise_loss(*values, centering).item() == pytest.approx(3 * expected, rel=1e-6)


def test_a_reward_of_a_pair_is_the_mean_over_its_critiques(reward_folder, mesh, tmp_path):
    model, encoder = rm.load_reward_model(str(reward_folder), max_length_tokens=300)
    pairs = [
        sized(3, 2, 4, id="a", chosen_critiques=("good", "very good", "good")),
        sized(3, 5, 1, id="b", subset="s"),
        sized(2, 2, 2, id="c"),
    ]
    encoded = encoder.encode_pairs(pairs, "a")
    assert [len(e.chosen) for e in encoded] == [3, 1, 1]
    scores = rm.score_pairs(model, encoded, 500)
    for pair, score in zip(pairs, scores):
        for answer, mean in zip(pair.answers, (score.chosen_reward, score.rejected_reward)):
            singles = [replace(answer, critiques=(critique,)) for critique in answer.critiques]
            rewards = rm.score_answers(model, encoder, singles)
            assert mean == pytest.approx(np.mean(rewards), abs=1e-5)
    assert [(score.id, score.subset) for score in scores] == [("a", ""), ("b", "s"), ("c", "")]
    assert scores[0].prompt_id == scores[1].prompt_id != scores[2].prompt_id
    assert (scores[0].chosen_words, scores[0].rejected_words) == (2, 4)
    assert (scores[0].chosen_critique_words, scores[0].rejected_critique_words) == (4 / 3, 2)
    rm.write_scores(tmp_path / "scores.jsonl", scores)
    rows = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [rm.PairScore(**json.loads(row)) for row in rows] == scores


def test_an_answer_that_cannot_be_read_whole_has_no_reward(reward_folder, mesh):
    model, encoder = rm.load_reward_model(str(reward_folder), max_length_tokens=300)
    critiques = [("c",), (), (words("c", 300),), ("d",), ("c", "d")]
    answers = [Answer(talk(ASKED), "r", several) for several in critiques]
    rewards = rm.score_answers(model, encoder, answers)
    assert [reward is None for reward in rewards] == [False, True, True, False, False]
    assert rewards[4] == pytest.approx((rewards[0] + rewards[3]) / 2, abs=1e-6)
    encoder.use_critiques = False  # all five are then the same
    rewards = rm.score_answers(model, encoder, answers)
    assert rewards == [rewards[0]] * 5 and rewards[0] is not None


def test_a_reward_function_gives_the_rewards_of_single_answers_in_order(reward_folder, mesh):
    asked = []

    def critic(prompt: str | list[dict], response: str) -> str:
        asked.append((prompt, response))
        return f"about {response}"

    reward = rm.make_reward_function(str(reward_folder), critic)
    prompts = ["p", [user("q")], "p", "p"]
    completions = ["a b c", [assistant("d")], "e", "a b c"]
    rewards = reward(prompts, completions, critique=["good", None, ["x", "y"], None], extra=[1] * 4)
    assert asked == [([user("q")], "d"), ("p", "a b c")]
    model, encoder = rm.load_reward_model(str(reward_folder))
    singles = [("p", "a b c", ("good",)), ("q", "d", ("about d",))]
    singles += [("p", "e", ("x", "y")), ("p", "a b c", ("about a b c",))]
    answers = [Answer(talk([user(p)]), r, c) for p, r, c in singles]
    assert rewards == pytest.approx(rm.score_answers(model, encoder, answers), abs=1e-6)
    assert rm.make_reward_function(str(reward_folder))(["p"], ["a"]) == [None]  # no critique
    with pytest.raises(ValueError):
        reward(["p"], ["a", "b"])


@pytest.mark.parametrize("name, n_pairs", [("train", 304), ("test", 96)])
def test_the_weak_critic_has_criticised_every_embedded_response(name, n_pairs):
    data = Path(__file__).parent.parent / "data"
    strong = read_pairs(str(data / f"{name}.jsonl"))
    weak = read_pairs(str(data / f"{name}.jsonl"), critiques=str(data / "weak_critiques.jsonl"))
    assert [pair.id for pair in weak] == [pair.id for pair in strong] and len(weak) == n_pairs
    for one, other in zip(weak, strong):
        for a, b in zip(one.answers, other.answers):
            assert len(a.critiques) == 1 and a.critiques != b.critiques
