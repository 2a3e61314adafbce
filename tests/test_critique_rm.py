"""What generating, training and scoring agree on: records, tokens, tries, rewards, model folders."""

import datetime
import gzip
import itertools
import json
import math
import os
import re
import sys

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
    *((without(PLAIN, field), field) for field in ("chosen", "rejected")),
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
    assert re.search(f"a.jsonl:2: .*'{field}'.*{expected}", message) and len(message) < 400


@pytest.mark.parametrize("record, field", BAD_RECORDS)
def test_bad_record_is_refused_with_file_line_and_field(tmp_path, record, field):
    message = complaint(write(tmp_path / "a.jsonl", record))
    assert re.search(f"a.jsonl:1: .*{field}", message) and len(message) < 400


def test_a_line_or_array_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rm, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(rm, "MAX_ARRAY_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines(PLAIN) + b"x" * 2000)
    assert "a.jsonl:2: line longer" in complaint(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.json").write_bytes(gzip.compress(b"[" + b" " * 10**6))
    assert "b.json: JSON array over" in complaint(str(tmp_path / "b.json"))


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



def changed(before: list, after: list) -> list:
    """What is left of `before` without the beginning and the end that both share."""
    n_start = len(os.path.commonprefix([before, after]))
    n_end = len(os.path.commonprefix([before[n_start:][::-1], after[n_start:][::-1]]))
    return before[n_start : len(before) - n_end]


def test_a_forged_control_token_changes_no_token_of_the_text_around_it(tokenizer):
    encoder = Encoder(tokenizer, 512, True)
    for token in control_tokens(tokenizer):
        texts = [f"The train\n\n\nasks {word} The\n\n\nuser" for word in ("ß", token)]
        honest, forged = (encoder.encode(talk([user("How"), assistant(t)])).tolist() for t in texts)
        assert tokenizer.decode(changed(honest, forged)).strip() == "ß"


def test_the_date_does_not_change_the_ids(monkeypatch):
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    tokenizer, messages = make_tokenizer("llama3"), HONEST[0]
    before = Encoder(make_tokenizer("llama3"), 512, True).encode(talk(messages))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert "02 Jan 2031" in tokenizer.apply_chat_template(messages, tokenize=False)
    assert Encoder(tokenizer, 512, True).encode(talk(messages)).tolist() == before.tolist()
    frozen = tokenizer.chat_template
    assert Encoder(tokenizer, 512, True).tokenizer.chat_template == frozen
    assert "26 Jul 2024" in tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_strangers_template_is_read_to_its_last_token():
    tokenizer = make_tokenizer("chatml")
    ids = Encoder(tokenizer, 512, True, keep_tail=True).encode(talk(HONEST[0]))
    whole = tokenizer.apply_chat_template(HONEST[0], tokenize=False)
    assert whole.endswith("\n") and ids.tolist() == tokenizer(whole)["input_ids"]


@pytest.mark.parametrize(
    "template, eos, expected",
    [
        ("{{ raise_exception('no such role') }}", "</s>", "no such role"),
        ("{{ messages[0].content }}", "</s>", "end with the assistant's message"),
        ("{% for m in %}", "</s>", "chat template"),
        ("{{ messages[0].content + messages[1].content + 3 }}", "</s>", "chat template"),
        (None, None, "set its eos_token"),
    ],
)
def test_an_unusable_template_is_one_line(template, eos, expected):
    tokenizer = make_tokenizer("plain")
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    with pytest.raises(CritiqueRMError, match=expected):
        Encoder(tokenizer, 512, True).encode(talk(HONEST[0]))


# --------------------------------------------------------------------------------------------------
# Overlong pairs

LIMIT = 160


def words(letter: str, n: int) -> str:
    return " ".join(f"{letter}{k}☃" for k in range(n))


def pair_of(n_prompt: int, n_chosen: int, n_rejected: int, **changes) -> Pair:
    texts = (Message("user", words("p", n_prompt)),), words("c", n_chosen), words("r", n_rejected)
    return rm.replace(Pair("a", *texts, ("right, c",), ("wrong, r",)), **changes)


def segments(encoder: Encoder, ids) -> list[str]:
    """Prompt, response and critique of a one-turn sequence, from its ids."""
    text = decode(encoder, ids)
    marked = squeeze(encoder.render((Message("user", "\uf000"), Message("assistant", "\uf000"))))
    before, between, end = marked.split("\uf000")
    assert text.startswith(before) and text.endswith(end)
    prompt, answer = text.removeprefix(before).removesuffix(end).split(between)
    return [prompt, *answer.split(rm.SEPARATOR)]


@pytest.mark.parametrize(
    "sizes, whole",
    [
        ((500, 3, 2), ("chosen", "rejected")),
        ((2, 500, 3), ("prompt", "rejected")),
        ((2, 500, 500), ("prompt",)),
        ((500, 500, 2), ("rejected",)),
        ((30, 25, 500), ()),
    ],
)
def test_overlong_pairs_keep_critique_end_token_and_one_prompt(tokenizer, sizes, whole):
    pair, encoder = pair_of(*sizes), Encoder(tokenizer, LIMIT, True)
    [encoded] = encoder.encode_pairs([pair], "a")
    assert encoder.counts["truncated"] == 1
    sequences = [*encoded.chosen, *encoded.rejected]
    assert LIMIT - 12 <= max(map(len, sequences)) <= LIMIT
    assert {ids[-1] for ids in sequences} == {encoder.end_id}
    (prompt, chosen, good), (same, rejected, bad) = (segments(encoder, ids) for ids in sequences)
    assert prompt == same and (good, bad) == ("right, c", "wrong, r")
    assert pair.prompt[0].content.endswith(prompt)
    assert pair.chosen.startswith(chosen) and pair.rejected.startswith(rejected)
    kept = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert min(map(len, kept.values())) > 0
    texts = {"prompt": pair.prompt[0].content, "chosen": pair.chosen, "rejected": pair.rejected}
    assert {name for name in kept if kept[name] == texts[name]} >= set(whole)


def test_the_oldest_turns_of_a_long_conversation_go_first(tokenizer):
    turns = [user(words("p", 300)), assistant("see you"), user("The second train?")]
    encoder = Encoder(tokenizer, LIMIT, True)
    [encoded] = encoder.encode_pairs([pair_of(1, 2, 3, prompt=talk(turns))], "a")
    for ids in (*encoded.chosen, *encoded.rejected):
        text = decode(encoder, ids)
        assert "see you" in text and "The second train?" in text
        assert "p299☃" in text and "p0☃" not in text


def test_pairs_left_out_are_counted_by_reason(capsys):
    pairs = [
        pair_of(2, 3, 4),
        pair_of(300, 3, 4),
        pair_of(2, 3, 4, rejected_critiques=()),
        pair_of(2, 3, 4, chosen_critiques=(words("k", 300),)),
        pair_of(2, 3, 3, rejected=words("c", 3), rejected_critiques=("right, c",)),
        pair_of(2, 300, 0, rejected=words("c", 301), rejected_critiques=("right, c",)),
    ]
    encoder = Encoder(make_tokenizer("chatml"), LIMIT, True)
    assert [e.pair for e in encoder.encode_pairs(pairs, "a.jsonl")] == pairs[:2]
    line = capsys.readouterr().err
    for part in ("a.jsonl: 2 of 6 pairs", "1 without critique", "1 dropped as too long", "2 with equal"):
        assert part in line
    with pytest.raises(CritiqueRMError, match="a.jsonl: no pair.*1 without.*generate.py.*--no-crit"):
        encoder.encode_pairs(pairs[2:3], "a.jsonl")


def test_each_critique_makes_a_sequence_and_none_without_critiques():
    pair = pair_of(2, 3, 4, chosen_critiques=("one", "two"))
    tokenizer = make_tokenizer("chatml")
    [encoded] = Encoder(tokenizer, LIMIT, True).encode_pairs([pair], "a")
    assert ["one" in tokenizer.decode(ids) for ids in encoded.chosen] == [True, False]
    encoder = Encoder(tokenizer, LIMIT, False)
    [[plain]] = encoder.encode_answers(pair.answers[:1])
    assert plain.tolist() == encoder.encode((*pair.prompt, Message("assistant", pair.chosen))).tolist()


# --------------------------------------------------------------------------------------------------
# Packing


def test_a_small_trie_by_hand():
    #  5 ─ 6 ─ 7 ─ 8     numbers 30 (5 6 7), 10 (5 6 7 8), 20 (5 6 9), 40 (5 6 9 again)
    #       └─ 9
    sequences = [np.array(s, np.int32) for s in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7], [5, 6, 9])]
    trie = build_trie(sequences, [10, 20, 30, 40])
    assert trie.ids.tolist() == [5, 6, 7, 8, 9]
    assert trie.positions.tolist() == [0, 1, 2, 3, 2]
    assert trie.ends.tolist() == [5, 5, 4, 4, 5]
    assert trie.last.tolist() == [3, 4, 2, 4]
    assert trie.numbers.tolist() == [10, 20, 30, 40]


def random_sequences(rng: np.random.Generator, n: int, longest: int = 12) -> list[np.ndarray]:
    return [rng.integers(0, 2, rng.integers(1, longest)).astype(np.int32) for _ in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_is_the_ancestors_of_its_last_token(seed):
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng, 1 + seed)
    trie = build_trie(sequences, range(len(sequences)))
    for sequence, q in zip(sequences, trie.last):
        path = [k for k in range(q + 1) if k <= q < trie.ends[k]]
        assert trie.ids[path].tolist() == sequence.tolist()
        assert trie.positions[path].tolist() == list(range(len(sequence)))
    assert len(trie) == len({tuple(s[: k + 1]) for s in sequences for k in range(len(s))})


def chain(length: int, number: int = 0) -> rm.Trie:
    return build_trie([np.arange(length, dtype=np.int32)], [number])


def test_packing_a_few_tries_by_hand():
    units = [[chain(n)] for n in (2, 5, 3, 2, 2)]
    packed = rm.pack(units, 10, share=True)
    assert [[[len(t) for t in row] for row in rows] for rows in packed] == [[[5], [3, 2]], [[2], [2]]]
    packed = rm.pack(units, 10, share=False)
    assert [[[len(t) for t in row] for row in rows] for rows in packed] == [[[5], [3]], [[2]] * 3]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_every_unit_is_dealt_once_and_whole_within_the_budget(monkeypatch, n_ranks, share):
    rng, number = np.random.default_rng(n_ranks), itertools.count()
    units = [
        [chain(n, next(number)) for n in rng.integers(20, 200, rng.integers(1, 3))] for _ in range(200)
    ]
    monkeypatch.setattr(rm.dist, "get_world_size", lambda: n_ranks)
    found, n_batches, n_tokens, n_cells = [], [], 0, 0
    for rank in range(n_ranks):
        monkeypatch.setattr(rm.dist, "get_rank", lambda: rank)
        batches = rm.deal(units, 2048, share)
        n_batches.append(len(batches))
        for batch in (rm.collate(rows, CPU) for rows in batches):
            found.append(set(batch.numbers.tolist()))
            assert batch.ids.numel() <= 2048
            n_tokens, n_cells = n_tokens + batch.n_tokens, n_cells + batch.ids.numel()
    wholes = [{trie.numbers[0] for trie in unit} for unit in units]
    assert all(any(unit <= batch for batch in found) for unit in wholes)
    assert sum(map(len, found)) == sum(map(len, wholes)) and len(set(n_batches)) == 1
    assert n_tokens == sum(len(trie) for unit in units for trie in unit)
    assert 1 - n_tokens / n_cells < (0.05 if share else 0.2)


# --------------------------------------------------------------------------------------------------
# Rewards

KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
HYBRID = {
    **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "linear_num_key_heads": 2},
    **{"shared_expert_intermediate_size": 16, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": KINDS,
    "Gemma3Text": KINDS,
    "Mistral": {"sliding_window": 4},
    "Qwen3Next": HYBRID,
    "Jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
}
OTHERS = {  # positions that are not those of the mask and position_ids
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2},
    "Bloom": {},
    "Falcon": {"alibi": True},
    "Mpt": {},
}


def save_tiny(config, folder, seed: int = 0) -> str:
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


def load(folder: str, mesh, attention: str | None = None, head_seed: int | None = None):
    config = rm.load_config(folder)
    config._attn_implementation = attention
    model = rm.build_model(config, torch.float32, mesh)
    rm.read_weights(model, folder, CPU, head_seed)
    return model.eval()


def random_groups(n_critiques: list[int], seed: int = 0) -> list[list[np.ndarray]]:
    """Groups of sequences: a prompt, two responses to it, some critiques of each."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> np.ndarray:
        return rng.integers(1, TINY["vocab_size"], rng.integers(low, high)).astype(np.int32)

    groups = []
    for n in n_critiques:
        prompt = draw(5, 12)
        answers = [np.concatenate([prompt, draw(3, 8)]) for _ in range(2)]
        groups.append([np.concatenate([a, draw(1, 9)]) for a in answers for _ in range(n)])
    return groups


def rewards_of_one_batch(model, groups: list[list[np.ndarray]]) -> torch.Tensor:
    """The first two tries share a row; the third row is padded."""
    share, number = rm.shares_prefixes(model.config), itertools.count()
    units = [rm.build_tries(group, [next(number) for _ in group], share) for group in groups]
    rows = [units[0] + units[1], *units[2:]] if share else [[t] for unit in units for t in unit]
    batch = rm.collate(rows, CPU)
    return rm.compute_rewards(model, batch)[batch.numbers.argsort()]


def rewards_alone(model, groups: list[list[np.ndarray]]) -> torch.Tensor:
    ids = [torch.from_numpy(s.astype(np.int64))[None] for group in groups for s in group]
    return torch.cat([model(input_ids=i).logits[:, 0] for i in ids])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rewards_and_gradients_equal_hugging_face_on_each_sequence(
    tmp_path, mesh, make_config, architecture, attention
):
    folder = save_tiny(make_config(architecture, **ARCHITECTURES[architecture]), tmp_path)
    ours = load(folder, mesh, attention)
    assert rm.shares_prefixes(ours.config) == (architecture not in ("Qwen3Next", "Jamba"))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention)
    groups = random_groups([1, 2, 8])
    mine, alone = rewards_of_one_batch(ours, groups), rewards_alone(theirs.eval(), groups)
    assert alone.std() > 0.1
    torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-5)
    for rewards in (mine, alone):
        (rewards * torch.linspace(-1, 1, len(rewards))).sum().backward()
    theirs = dict(theirs.named_parameters())
    scale = max(p.grad.norm() for p in theirs.values())
    for name, p in ours.named_parameters():
        gradient = p.grad.full_tensor() if p.grad is not None else torch.zeros(p.shape)
        expected = theirs[name].grad if theirs[name].grad is not None else torch.zeros(p.shape)
        assert (gradient - expected).norm() <= 1e-5 * scale, name


@pytest.mark.parametrize("architecture", OTHERS)
def test_rewards_with_other_kinds_of_position_are_right_or_refused(
    tmp_path, mesh, make_config, architecture
):
    folder = save_tiny(make_config(architecture, **OTHERS[architecture]), tmp_path)
    try:
        model = load(folder, mesh)
    except CritiqueRMError:
        return
    theirs, groups = AutoModelForSequenceClassification.from_pretrained(folder), random_groups([1, 2, 3])
    with torch.no_grad():
        mine, alone = rewards_of_one_batch(model, groups), rewards_alone(theirs.eval(), groups)
    torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["Gemma3Text", "Qwen3Next"])
def test_neighbours_order_and_padding_do_not_change_a_reward(
    tmp_path, mesh, make_config, architecture
):
    model = load(save_tiny(make_config(architecture, **ARCHITECTURES[architecture]), tmp_path), mesh)
    groups = random_groups([1, 3, 2, 5])
    expected = rm.score_groups(model, groups, 10**6)
    split = [[s] for group in groups for s in group]
    flat = [reward for rewards in expected for reward in rewards]
    for budget in (1, 64, 300):
        backwards = rm.score_groups(model, [g[::-1] for g in groups[::-1]], budget)[::-1]
        for rewards, others in zip(expected, backwards):
            assert others[::-1] == pytest.approx(rewards, abs=2e-6)
        assert sum(rm.score_groups(model, split, budget), []) == pytest.approx(flat, abs=2e-6)
    [[first, again]] = rm.score_groups(model, [[split[0][0], split[0][0]]], 64)
    assert first == again


def test_an_empty_micro_batch_adds_no_reward_and_no_gradient(tmp_path, mesh, make_config):
    model = load(save_tiny(make_config("Llama"), tmp_path), mesh)
    rewards = rm.compute_rewards(model, rm.collate([], CPU))
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
    model = load(str(tmp_path), mesh, head_seed=3)
    expected = source.base_model.state_dict()
    read = {name: p.full_tensor() for name, p in model.model.state_dict().items()}
    assert read.keys() == expected.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, expected[n].float()) for n, p in read.items())


def test_the_head_depends_on_the_seed_alone(tmp_path, mesh, make_config):
    AutoModel.from_config(make_config("Llama")).save_pretrained(tmp_path)
    heads = [load(str(tmp_path), mesh, head_seed=n).score.weight.full_tensor() for n in (3, 3, 4)]
    by_hand = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) / math.sqrt(33)
    assert torch.equal(heads[0], by_hand) and torch.equal(heads[1], by_hand)
    assert not torch.equal(heads[2], by_hand)


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_weights(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NORM = "model.norm.weight"
BREAKAGES = {  # name: (how, what the message must hold)
    "no head": (lambda f: rewrite(f, lambda t: t.pop("score.weight")), "no reward head"),
    "a missing key": (lambda f: rewrite(f, lambda t: t.pop(NORM)), "model.norm.weight"),
    "another shape": (
        lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(31)})),
        r"model.norm.weight is \[31\], expected \[32\]",
    ),
    "two labels": (
        lambda f: rewrite(f, lambda t: t.update({"score.weight": torch.ones(2, 32)})),
        "score.weight",
    ),
    "pickled weights": (pickle_weights, "safetensors"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "safetensors"),
    "own code": (lambda f: edit_config(f, auto_map={"AutoConfig": "c.C"}), "own code"),
    "own code, new type": (
        lambda f: edit_config(f, auto_map={"AutoConfig": "c.C"}, model_type="new"),
        "code|config.json",
    ),
    "unknown type": (lambda f: edit_config(f, model_type="new"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config cut": (lambda f: os.truncate(f / "config.json", 30), "config.json"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config of wrong types": (lambda f: edit_config(f, hidden_size="x"), "config.json"),
    "config that does not fit": (lambda f: edit_config(f, num_attention_heads=0), "config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer cut": (lambda f: os.truncate(f / "tokenizer.json", 300), "tokenizer"),
    "encoder": (lambda f: edit_config(f, model_type="bert"), "decoder"),
    "no classifier": (lambda f: edit_config(f, model_type="mamba"), "mamba"),
}


@pytest.fixture
def reward_folder(tmp_path, make_config):
    """A reward model of others: its head has weights, its tokenizer a template."""
    save_tiny(make_config("Llama"), tmp_path)
    make_tokenizer("llama3").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_model_folder_is_refused_in_one_line(reward_folder, mesh, name):
    how, expected = BREAKAGES[name]
    how(reward_folder)
    with pytest.raises(CritiqueRMError, match=expected) as caught:
        rm.load_reward_model(str(reward_folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_saved_model_scores_the_same_here_and_in_transformers(tmp_path, mesh, make_config, style):
    tokenizer, out = make_tokenizer(style), tmp_path / "out"
    folder = save_tiny(make_config("Llama", pad_token_id=tokenizer.pad_token_id), tmp_path / "in")
    encoder, config = Encoder(tokenizer, 300, True), rm.load_config(folder)
    rm.choose_pad_token(config, encoder)
    assert config.pad_token_id == tokenizer.pad_token_id != encoder.end_id
    config.problem_type = "regression"
    config.critique_rm = {"critiques": True, "max_length_tokens": 300}
    model = rm.build_model(config, torch.float32, mesh)
    rm.read_weights(model, folder, CPU)
    out.mkdir()
    rm.save_model(model, encoder, out, "card")
    assert (out / "README.md").read_text() == "card" and not [p for p in out.iterdir() if p.is_dir()]

    answers = [Answer(ASKED, words("a", n), ("Critique: right",)) for n in (1, 9, 3, 5)]
    expected = rm.score_answers(model.eval(), encoder, answers)
    again = rm.load_reward_model(str(out))
    assert again[1].max_length_tokens == 300 and rm.score_answers(*again, answers) == expected
    texts = [
        encoder.render((*ASKED, Message("assistant", a.response + rm.SEPARATOR + a.critiques[0])))
        for a in answers
    ]
    pipe = transformers.pipeline("text-classification", str(out), device="cpu")
    for batch_size in (1, 4) if config.pad_token_id is not None else (1,):
        scores = pipe(texts, add_special_tokens=False, batch_size=batch_size)
        assert [s["score"] for s in scores] == pytest.approx(expected, abs=1e-5)
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    ids = pipe.tokenizer(texts[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert theirs(input_ids=ids).logits.item() == pytest.approx(expected[0], abs=1e-5)


def test_the_folder_says_how_it_is_read(reward_folder, mesh, capsys):
    _, encoder = rm.load_reward_model(str(reward_folder))
    assert (encoder.use_critiques, encoder.max_length_tokens, encoder.keep_tail) == (True, 2048, True)
    edit_config(reward_folder, critique_rm={"critiques": False, "max_length_tokens": 99})
    _, encoder = rm.load_reward_model(str(reward_folder))
    assert (encoder.use_critiques, encoder.max_length_tokens, encoder.keep_tail) == (False, 99, False)
    assert "the other way round" not in capsys.readouterr().err
    assert rm.load_reward_model(str(reward_folder), use_critiques=True)[1].use_critiques
    assert "trained without critiques" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Loss and scores


@pytest.mark.parametrize(
    "chosen, rejected, margin, centering, expected",
    [
        (1.5, 1.5, 0, 0, math.log(2)),
        (2, 0, 0, 0, math.log(1 + math.exp(-2))),
        (2, 0, 1, 0, math.log(1 + math.exp(-1))),
        (2, 0, 0, 0.1, math.log(1 + math.exp(-2)) + 0.1 * 4),
        (-200, 200, 0, 0, 400),
    ],
)
def test_loss_by_hand(chosen, rejected, margin, centering, expected):
    values = (torch.tensor([float(v)] * 3) for v in (chosen, rejected, margin))
    assert rm.pairwise_loss(*values, centering).item() == pytest.approx(3 * expected, rel=1e-6)


def test_a_pairs_reward_is_the_mean_over_its_critiques(reward_folder, mesh, tmp_path):
    model, encoder = rm.load_reward_model(str(reward_folder), max_length_tokens=300)
    pairs = [
        pair_of(3, 2, 4, id="a", chosen_critiques=("good", "very good", "good")),
        pair_of(3, 5, 1, id="b", subset="s"),
        pair_of(2, 2, 2, id="c"),
    ]
    scores = rm.score_pairs(model, encoder.encode_pairs(pairs, "a"), 500)
    for pair, score in zip(pairs, scores):
        for answer, mean in zip(pair.answers, (score.chosen_reward, score.rejected_reward)):
            single = [Answer(pair.prompt, answer.response, (c,)) for c in answer.critiques]
            rewards = rm.score_answers(model, encoder, single)
            assert mean == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
    assert [score.id for score in scores] == ["a", "b", "c"] and scores[1].subset == "s"
    assert scores[0].prompt_id == scores[1].prompt_id != scores[2].prompt_id
    assert (scores[0].chosen_words, scores[0].rejected_words) == (2, 4)
    assert (scores[0].chosen_critique_words, scores[0].rejected_critique_words) == (4 / 3, 2)
    rm.write_scores(tmp_path / "scores.jsonl", scores)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [rm.PairScore(**row) for row in rows] == scores


def test_an_answer_that_cannot_be_read_whole_has_no_reward(reward_folder, mesh):
    model, encoder = rm.load_reward_model(str(reward_folder), max_length_tokens=300)
    texts = [("c",), (), (words("c", 300),), ("d",), ("c", "d")]
    rewards = rm.score_answers(model, encoder, [Answer(ASKED, "r", t) for t in texts])
    assert [reward is None for reward in rewards] == [False, True, True, False, False]
    assert rewards[4] == pytest.approx((rewards[0] + rewards[3]) / 2, abs=1e-6)
    encoder.use_critiques = False
    assert None not in rm.score_answers(model, encoder, [Answer(ASKED, "r", t) for t in texts])
