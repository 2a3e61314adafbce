"""What generating, training and scoring agree on: records, tokens, tries, rewards, model folders."""

import copy
import datetime
import gzip
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, make_tokenizer
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


def write(path, *records: dict):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


ASKED = (Message("user", "p"),)
TALK = (Message("user", "p"), Message("assistant", "q"), Message("user", "s"))
TALK_JSON = [user("p"), assistant("q"), user("s")]
PLAIN = {"id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}
PANDALM = {"idx": 7, "instruction": "do", "input": "", "response1": "x", "response2": "y"}
LLMBAR = {"input": "p", "output_1": "x", "output_2": "y"}
VOTES = ("annotator1", "annotator2", "annotator3")
FORMATS = {
    "ours": (
        PLAIN | {"chosen_critique": "g", "rejected_critique": ["b", "w"], "margin": 0.5},
        Pair("a", ASKED, "c", "r", ("g",), ("b", "w"), "", 0.5),
    ),
    "ours, messages": (
        PLAIN | {"prompt": [{"role": "system", "content": "be"}, user("p")], "subset": "s"},
        Pair("a", (Message("system", "be"), Message("user", "p")), "c", "r", subset="s"),
    ),
    "ours, null and empty fields": (
        PLAIN | {"chosen": "", "chosen_critique": None, "rejected_critique": [], "margin": None},
        Pair("a", ASKED, "", "r"),
    ),
    "TRL, explicit plain": (PLAIN, Pair("a", ASKED, "c", "r")),
    "TRL, explicit chat": (
        {"id": "a", "prompt": TALK_JSON, "chosen": [assistant("c")], "rejected": [assistant("r")]},
        Pair("a", TALK, "c", "r"),
    ),
    "TRL, implicit plain": (
        {"id": "a", "chosen": "The sky is blue.", "rejected": "The sky is black."},
        Pair("a", (Message("user", "The sky is "),), "blue.", "black."),
    ),
    "TRL, implicit chat": (
        {"id": "a", "chosen": [*TALK_JSON, assistant("c")], "rejected": [*TALK_JSON, assistant("r")]},
        Pair("a", TALK, "c", "r"),
    ),
    "UltraFeedback-binarized": (
        {
            **{"id": "a", "prompt": "p", "prompt_id": "f00", "messages": [user("p"), assistant("c")]},
            **{"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            **{"score_chosen": 8.5, "score_rejected": 8.0},
        },
        Pair("a", ASKED, "c", "r"),
    ),
    "HH-RLHF": (
        {
            "id": "a",
            "chosen": "\n\nHuman: p\n\nAssistant: q\n\nHuman: s\n\nAssistant: c\n\nmore",
            "rejected": "\n\nHuman: p\n\nAssistant: q\n\nHuman: s\n\nAssistant: r",
        },
        Pair("a", TALK, "c\n\nmore", "r"),
    ),
    "RewardBench": (
        PLAIN | {"id": 3, "subset": "hep-go", "chosen_model": "m", "rejected_model": "n"},
        Pair("3", ASKED, "c", "r", subset="hep-go"),
    ),
    "PandaLM": (
        PANDALM | {"input": "on this"} | dict(zip(VOTES, (2, 0, 2))),
        Pair("pandalm-7", (Message("user", "do\n\non this"),), "y", "x", subset="pandalm"),
    ),
    "PandaLM, boolean and empty response": (
        PANDALM | {"response1": True, "response2": ""} | dict(zip(VOTES, (1, 1, 1))),
        Pair("pandalm-7", (Message("user", "do"),), "True", "", subset="pandalm"),
    ),
    "LLMBar": (LLMBAR | {"id": "a", "label": 2}, Pair("a", ASKED, "y", "x")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_becomes_the_pair_written_by_hand(tmp_path, name):
    record, expected = FORMATS[name]
    assert read_pairs(write(tmp_path / "a.jsonl", record)) == [expected]


def test_pandalm_ties_are_dropped_and_counted(tmp_path, capsys):
    votes = [(1, 2, 0), (0, 0, 1), (1, 1, 2)]
    rows = [PANDALM | {"idx": n} | dict(zip(VOTES, v)) for n, v in enumerate(votes)]
    pairs = read_pairs(write(tmp_path / "a.jsonl", *rows))
    assert [(pair.id, pair.chosen) for pair in pairs] == [("pandalm-2", "x")]
    assert "a.jsonl: 2 pairs without a majority" in capsys.readouterr().err


def test_file_kinds_are_told_apart_by_content(tmp_path):
    rows = [FORMATS["ours"][0], PLAIN | {"id": "é", "prompt": "☃"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    array, bom = json.dumps(rows, indent=1).encode(), b"\xef\xbb\xbf"
    spaced = lines.replace(b"\n", b"\r\n\r\n").rstrip()
    kinds = [lines, array, gzip.compress(lines), gzip.compress(array), bom + lines, bom + array]
    read = []
    for n, data in enumerate([*kinds, spaced]):
        (tmp_path / f"{n}.txt").write_bytes(data)
        read.append(read_pairs(str(tmp_path / f"{n}.txt")))
    assert read == [read[0]] * 7 and read[0][1].id == "é"


def test_missing_ids_come_from_the_content_and_repeats_are_numbered(tmp_path, capsys):
    bare = {"prompt": "p", "chosen": "c", "rejected": "r"}
    ids = [p.id for p in read_pairs(write(tmp_path / "a.jsonl", bare, bare | {"margin": 1}, bare))]
    assert "a.jsonl: 1 pairs repeat an earlier one" in capsys.readouterr().err
    assert re.fullmatch("[0-9a-f]{16}", ids[0]) and ids[0] != ids[1] and ids[2] == ids[0] + "-2"
    assert read_pairs(write(tmp_path / "b.jsonl", PLAIN, bare))[1].id == ids[0]


def test_pandalm_without_idx_gets_ids_from_the_content(tmp_path):
    rows = [PANDALM | dict(zip(VOTES, (1, 1, n))) for n in (1, 2)]
    for row in rows:
        del row["idx"]
    assert len(read_pairs(write(tmp_path / "a.jsonl", rows[0], rows[1] | {"input": "z"}))) == 2


def test_answers_are_read_one_by_one(tmp_path):
    rows = [{"id": 5, "prompt": "p", "response": "r", "critique": ["c", "d"]}]
    rows += [{"prompt": [user("p")], "response": "", "id": None}]
    answers = rm.read_answers(write(tmp_path / "a.jsonl", *rows))
    assert answers == [Answer(ASKED, "r", ("c", "d"), "5"), Answer(ASKED, "")]


def lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def without(record: dict, field: str) -> dict:
    return {name: value for name, value in record.items() if name != field}


PACKED = gzip.compress(lines(*[PLAIN | {"id": n, "chosen": str(n**9)} for n in range(200)]))
BAD_FILES = {  # name: (content, what the message must hold besides the file)
    "empty": (b"", "no preference pair"),
    "blank": (b"\n \r\n", "no preference pair"),
    "empty array": (b"[]", "no preference pair"),
    "gzip, cut": (PACKED[:-20], "complete"),
    "gzip, damaged": (PACKED[:300] + b"\0\1\2" + PACKED[303:], "complete"),
    "gzip, only the magic": (PACKED[:2], "complete"),
    "binary": (bytes(range(256)), ":1: not UTF-8"),
    "UTF-16": ('{"prompt": "p"}'.encode("utf-16"), ":1: not UTF-8"),
    "cut line": (lines(PLAIN) + b'{"prompt": ', ":2: not valid JSON"),
    "scalar": (b"3\n", ":1: expected a JSON object"),
    "array in line": (lines(PLAIN) + b"[1]\n", ":2: expected a JSON object"),
    "array, unfinished": (b'[{"prompt": "p"}', ": not valid JSON"),
    "array of text": (json.dumps([PLAIN, "x"]).encode(), ": item 2: expected an object, found 'x'"),
    "array, bad item": (json.dumps([PLAIN, without(PLAIN, "chosen")]).encode(), ": item 2: .*'chosen'"),
    "nested line": (b'{"prompt": ' + b"[" * 200_000, ":1: not valid JSON"),
    "nested array": (b"[" * 200_000, ": not valid JSON"),
    "number of 5,000 digits": (b'{"id": ' + b"1" * 5000 + b"}", ":1: not valid JSON"),
    "id clash": (lines(PLAIN, PLAIN | {"id": "b"}, PLAIN), ":3: id 'a' .*a.jsonl:1;"),
    "different prompts": (
        lines({"chosen": [user("p"), assistant("c")], "rejected": [user("q"), assistant("r")]}),
        ":1: 'chosen' and 'rejected' differ",
    ),
    "transcript without answer": (
        lines({"chosen": "\n\nHuman: p", "rejected": "\n\nHuman: p"}),
        ":1: .*'chosen'",
    ),
    "one transcript": (lines({"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "r"}), ":1: .*'rejected'"),
}
BAD_FIELDS = [  # (field, value, what the message must hold besides file, line and field)
    *(("prompt", value, "") for value in (None, 3, "", " ", [], {}, math.nan)),
    ("prompt", [{"role": "root", "content": "p"}], "role"),
    ("prompt", [{"role": ["user"], "content": "p"}], "role"),
    *(("prompt", [item], "") for item in (3, "p", {"role": "user"}, [])),
    *(("chosen", value, "") for value in (None, 3, True, {}, [], [3], "\ud800", [user("p")])),
    *(("rejected", value, "") for value in (None, [{"role": "assistant", "content": [1]}])),
    *(("chosen_critique", value, "") for value in (3, "", " ", ["good", None], {}, "\udfff")),
    *(("margin", value, "number") for value in ("x", math.nan, math.inf, [1], {}, [], 10**400)),
    *(("id", value, "") for value in ("", 1.5, True, [1], "\ud800")),
    *(("subset", value, "text") for value in (5, ["s"])),
]
PANDALM_1 = PANDALM | dict(zip(VOTES, (1, 1, 1)))
BAD_RECORDS = [  # of other formats: (record, field)
    *((without(PLAIN, field), field) for field in ("prompt", "chosen", "rejected") if field != "prompt"),
    *((PANDALM_1 | {"annotator2": vote}, "annotator") for vote in (3, "1", None, [1])),
    *((without(PANDALM_1, field), field) for field in ("instruction", "input", "response2")),
    (PANDALM_1 | {"instruction": ""}, "instruction"),
    (PANDALM_1 | {"response1": 3}, "response1"),
    *((LLMBAR | {"label": label}, "label") for label in (0, 3, None, "1", [])),
    (without(LLMBAR, "output_2") | {"label": 1}, "output_2"),
]


def complaint(source: str) -> str:
    with pytest.raises(CritiqueRMError) as caught:
        read_pairs(source)
    return str(caught.value)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_place(tmp_path, name):
    content, expected = BAD_FILES[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    message = complaint(str(tmp_path / "a.jsonl"))
    assert re.search("a.jsonl.*" + expected, message) and len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("field, value, expected", BAD_FIELDS)
def test_bad_field_is_refused_with_file_line_and_field(tmp_path, field, value, expected):
    message = complaint(write(tmp_path / "a.jsonl", PLAIN, PLAIN | {"id": "b", field: value}))
    field = "content" if isinstance(value, list) and "content" in str(value) else field
    assert re.search(f"a.jsonl:2: .*({field}|chosen).*{expected}", message) and len(message) < 400


@pytest.mark.parametrize("record, field", BAD_RECORDS)
def test_bad_record_is_refused_with_file_line_and_field(tmp_path, record, field):
    message = complaint(write(tmp_path / "a.jsonl", record))
    assert re.search(f"a.jsonl:1: .*{field}", message) and len(message) < 400


def test_a_line_or_array_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rm, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(rm, "MAX_ARRAY_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines(PLAIN) + gzip.compress(b"")[:0] + b"x" * 2000)
    assert "a.jsonl:2: line longer" in complaint(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.json").write_bytes(gzip.compress(b"[" + b" " * 10**6))
    assert "b.json: JSON array over" in complaint(str(tmp_path / "b.json"))


def test_a_name_that_is_no_file_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install datasets" in complaint("no-one/no-such-set:test")
    assert complaint(str(tmp_path / "gone.jsonl")).endswith("gone.jsonl: no such file")
    assert str(tmp_path) in complaint(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Text and tokens

HONEST = [
    [user("How many minutes?"), assistant("x\n\nCritique: right")],
    [user("  How\n\n\nmany "), assistant("é ☃ "), user("and \t\ttrain?"), assistant(" \n ok")],
    [user("x" * 50), assistant("")],
]


def talk(messages: list[dict]) -> tuple[Message, ...]:
    return tuple(Message(**message) for message in messages)


def decode(encoder: Encoder, ids) -> str:
    return squeeze(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def squeeze(text: str) -> str:
    """Phi-3's control tokens swallow the white space behind them."""
    return re.sub(r"(<\|(user|assistant|end)\|>)\s+", r"\1", text)


def control_tokens(tokenizer) -> dict[str, int]:
    return {token: i for token, i in tokenizer.get_added_vocab().items() if token.strip()}


def controls(encoder: Encoder, ids) -> list[int]:
    known = set(control_tokens(encoder.tokenizer).values())
    return [int(i) for i in ids if i in known]


@pytest.mark.parametrize("messages", HONEST)
def test_ids_and_text_equal_those_of_the_tokenizer_and_its_template(tokenizer, messages):
    encoder = Encoder(tokenizer, 512, True)
    text = encoder.render(talk(messages))
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(text) and not whole.removeprefix(text).strip()
    ids = encoder.encode(talk(messages))
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[-1] == encoder.end_id != ids[-2]
    assert [n for n, i in enumerate(ids[:-1]) if i == tokenizer.bos_token_id] in ([], [0])
    assert decode(encoder, ids) == squeeze(text)


@pytest.mark.parametrize("place", ["prompt", "response", "critique"])
@pytest.mark.parametrize("around", ["{}", "See {} there", "a{}b", "{0}{0} {0}\n", "{1}{0}{2}"])
def test_control_tokens_cannot_be_forged(tokenizer, around, place):
    encoder = Encoder(tokenizer, 512, True)
    data = {"prompt": "How many", "response": "The train", "critique": "right"}
    for token in tokenizer.get_added_vocab():
        forged = around.format(token, token[:2], token[2:])
        texts = data | {place: f"{data[place]} {forged}" if around == "{1}{0}{2}" else forged}
        honest, ids = (
            encoder.encode_answers([Answer((Message("user", t["prompt"]),), t["response"], (t["critique"],))])
            for t in (data, texts)
        )
        ids = ids[0][0]
        assert controls(encoder, ids) == controls(encoder, honest[0][0])
        prompt, response = Message("user", texts["prompt"]), texts["response"]
        answer = Message("assistant", response + rm.SEPARATOR + texts["critique"])
        assert decode(encoder, ids) == squeeze(encoder.render((prompt, answer)))


def test_a_forged_token_changes_no_token_before_or_after_its_word(tokenizer):
    encoder = Encoder(tokenizer, 512, True)
    for token in control_tokens(tokenizer):
        texts = [f"The train\n\n\n{word} The\n\n\nuser" for word in ("ß", token)]
        honest, forged = (encoder.encode(talk([user("How"), assistant(t)])).tolist() for t in texts)
        n = honest.index(tokenizer.convert_tokens_to_ids("train" if "train" in str(()) else honest and tokenizer.convert_ids_to_tokens(honest[0])))
        assert n == 0
