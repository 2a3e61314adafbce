"""Nothing in a record or a message passes unread: it is used, refused by name, or named on stderr."""

import gzip
import json
import lzma
import math
import re
from datetime import datetime

import pytest

import critique_rm as rm
from conftest import PLAIN, assistant, complaint, lines, pair, talk, user, write
from critique_rm import Answer, CritiqueRMError, Message, Pair, read_pairs

BARE = {"id": "a", "chosen": "c", "rejected": "r"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALL_AS_TEXT = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
MORE = json.dumps({"tool_calls": [CALL]})
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
SYSTEM = {"role": "system", "content": "s"}

READ = {  # name: (record, the pair written by hand)
    "question": (BARE | {"question": "p"}, pair()),
    "query": (BARE | {"query": "p"}, pair()),
    "input alone": (BARE | {"input": "p"}, pair()),
    "instruction": (BARE | {"instruction": "p", "input": ""}, pair()),
    "LLaMA-Factory, Alpaca": (BARE | {"instruction": "p", "input": "q"}, pair("p\n\nq")),
    "an instruction of blanks": (BARE | {"instruction": " ", "input": "q"}, pair(" \n\nq")),
    "context of messages": (BARE | {"context": [user("p")]}, pair()),
    "messages": (BARE | {"messages": [user("p")]}, pair()),
    "LLaMA-Factory, ShareGPT": (
        BARE
        | {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "p"}]}
        | {"chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
        pair([SYSTEM, user("p")]),
    ),
    "system": (PLAIN | {"system": "s"}, pair([SYSTEM, user("p")])),
    "system, said twice": (
        PLAIN | {"prompt": [SYSTEM, user("p")], "system": "s"},
        pair([SYSTEM, user("p")]),
    ),
    "system, empty": (PLAIN | {"system": "", "history": []}, pair()),
    "history behind the system message": (
        PLAIN | {"prompt": [SYSTEM, user("p")], "history": [["h", "i"]]},
        pair([SYSTEM, user("h"), assistant("i"), user("p")]),
    ),
    "arguments encoded twice": (
        PLAIN | {"chosen": [assistant("c") | {"tool_calls": [{"function": {"arguments": '"{}"'}}]}]},
        pair(chosen_more='{"tool_calls": [{"function": {"arguments": "\\"{}\\""}}]}'),
    ),
    "history": (
        PLAIN | {"history": [["h", "i"], ["j", "k"]]},
        pair([user("h"), assistant("i"), user("j"), assistant("k"), user("p")]),
    ),
    "tools": (PLAIN | {"tools": TOOLS}, pair([Message("tools", json.dumps(TOOLS))._asdict(), user("p")])),
    "tools as text": (
        PLAIN | {"tools": json.dumps(TOOLS)},
        pair([Message("tools", json.dumps(TOOLS))._asdict(), user("p")]),
    ),
    "tool call in the prompt": (
        PLAIN
        | {"prompt": [user("p"), assistant("") | {"tool_calls": [CALL]}, {"role": "tool", "content": "3 C"}]},
        pair([user("p"), assistant("") | {"more": MORE}, {"role": "tool", "content": "3 C"}]),
    ),
    "tool call as response, in OpenAI's way": (
        PLAIN | {"chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL_AS_TEXT]}]},
        pair(chosen="", chosen_more=MORE),
    ),
    "tool call without content": (
        PLAIN | {"chosen": [{"role": "assistant", "tool_calls": [CALL]}]},
        pair(chosen="", chosen_more=MORE),
    ),
    "reasoning": (
        PLAIN | {"rejected": [assistant("r") | {"reasoning_content": "two"}]},
        pair(rejected_more='{"reasoning_content": "two"}'),
    ),
    "parts of text": (
        PLAIN | {"prompt": [{"role": "user", "content": [{"type": "text", "text": t, "image": None} for t in "pq"]}]},
        pair("pq"),
    ),
    "RewardBench 2": (
        PLAIN
        | {"id": 3, "subset": "Focus", "chosen": ["c"], "rejected": ["r"], "num_correct": 1}
        | {"num_incorrect": 1, "total_completions": 2, "models": ["m", "n"]}
        | {"additional_metadata": {"category": "x"}},
        pair(id="3/1-1", group="3", subset="Focus"),
    ),
    "RM-Bench": (
        PLAIN | {"id": 9, "domain": "chat", "chosen": ["c"], "rejected": ["r"]},
        pair(id="9/1-1", group="9", subset="chat"),
    ),
    "fields that are null": (PLAIN | {"question": None, "tools": None, "foo": None}, pair()),
    "marks of other formats that are null": (
        PLAIN | {"overall_preference": None, "response_A": None, "annotator1": None},
        pair(),
    ),
    "UltraFeedback's prompt, not the first message": (
        {"id": "a", "prompt": "p"}
        | {side: [SYSTEM, user("p"), assistant(side[0])] for side in rm.SIDES},
        pair([SYSTEM, user("p")]),
    ),
    "pandas's id": (PLAIN | {"id": 3.0}, pair(id="3")),
    "CLoud": (
        PLAIN | {"chosen_feedback": ["x", "y"], "rejected_feedback": ["z"]},
        pair(chosen_critiques=("x", "y"), rejected_critiques=("z",)),
    ),
    "JudgeBench": (
        {"pair_id": "a", "original_id": 7, "source": "mmlu-pro-law", "question": "p"}
        | {"response_model": "m", "response_A": "r", "response_B": "c", "label": "B>A"},
        pair(subset="mmlu-pro"),
    ),
    "HelpSteer3": (
        {"id": "a", "context": [user("p")], "response1": "c", "response2": "r", "domain": "code"}
        | {"overall_preference": -2, "individual_preference": [{"score": -2}], "language": "en"}
        | {"feedback1": ["The response is mostly helpful. It is right."], "feedback2": "Wrong."},
        pair(subset="code", chosen_critiques=("It is right.",), rejected_critiques=("Wrong.",)),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_plainly_meant_is_read(tmp_path, capsys, name):
    record, expected = READ[name]
    assert read_pairs(write(tmp_path / "a.jsonl", record)) == [expected]
    assert "ignored" not in capsys.readouterr().err


PART = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED = {  # name: (record, what the message must name)
    "two prompts": (PLAIN | {"question": "q"}, "'prompt' and 'question' could both be the prompt"),
    "context of text": (BARE | {"context": "a passage"}, "'context' is 'a passage'"),
    "context beside a question": (BARE | {"context": "x", "question": "q"}, "'question' and 'context'"),
    "two system texts": (PLAIN | {"prompt": [SYSTEM, user("p")], "system": "t"}, "'system'"),
    "history of messages": (PLAIN | {"history": [user("x")]}, "'history'"),
    "a prompt that ends with an answer": (PLAIN | {"prompt": [user("p"), assistant("x")]}, "'prompt'"),
    "a prompt that is none of the messages": (
        {"prompt": "another", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
        "'prompt' is none of the messages",
    ),
    "tools that are no list": (PLAIN | {"tools": "{}"}, "'tools'"),
    "content null": (PLAIN | {"chosen": [assistant(None)]}, "'content' is None"),
    "an image": (PLAIN | {"prompt": [{"role": "user", "content": [PART]}]}, "message 1 of 'prompt' .*image"),
    "an unknown key of a message": (
        PLAIN | {"chosen": [assistant("c") | {"function_call": {"name": "f"}}]},
        "message 1 of 'chosen' has 'function_call'",
    ),
    "feedback and critique": (
        PLAIN | {"chosen_critique": "x", "chosen_feedback": "y"},
        "'chosen_critique' and 'chosen_feedback'",
    ),
    "critiques that do not run along": (
        PLAIN | {"rejected": ["r", "s"], "rejected_critique": ["x"]},
        "'rejected_critique' .*list of 2",
    ),
    "JudgeBench's tie": (
        {"question": "p", "response_A": "a", "response_B": "b", "label": "A=B"},
        "'label' is 'A=B'; expected A>B or B>A",
    ),
    "HelpSteer3's label": (
        {"context": [user("p")], "response1": "a", "response2": "b", "overall_preference": 4},
        "'overall_preference'",
    ),
    "a fractional id": (PLAIN | {"id": 1.5}, "'id' is 1.5"),
    "an instruction of messages beside an input": (
        BARE | {"instruction": [SYSTEM, user("p")], "input": "q"},
        "'instruction' and 'input' could both",
    ),
    "history alone": (BARE | {"history": [["a", "b"]]}, "'history' ends with an answer"),
    "a part that says more": (
        PLAIN | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "p", "x": 1}]}]},
        "message 1 of 'prompt' has the part",
    ),
    "ShareGPT and OpenAI at once": (
        PLAIN | {"prompt": [{"from": "human", "text": "p"}]},
        "message 1 of 'prompt'",
    ),
    "a number that is none in tools": (PLAIN | {"tools": [{"x": math.nan}]}, "tools cannot be written as JSON"),
    "half a surrogate in a call": (
        PLAIN | {"chosen": [assistant("c") | {"name": "\ud800"}]},
        "message 1 of 'chosen'.* surrogate",
    ),
    "a margin of true": (PLAIN | {"margin": True}, "'margin' is True"),
    "a margin that fp32 does not hold": (PLAIN | {"margin": 1e39}, "'margin' is 1e\\+39"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_mean_two_things_is_refused_by_name(tmp_path, name):
    record, expected = REFUSED[name]
    assert re.search(f"a.jsonl:1: .*{expected}", complaint(write(tmp_path / "a.jsonl", record)))


NO_PROMPT = {  # TRL's implicit prompt is what both responses begin with; never where it may be another
    "a field that may be it": {"ask": "Name a thing.", "chosen": "The x is", "rejected": "The y is"},
    "messages that may be it": {"talk": [user("p")], "chosen": "The x is", "rejected": "The y is"},
    "nothing in common": {"chosen": "Red.", "rejected": "Blue."},
    "half a word in common": {"chosen": "Red.", "rejected": "Reddish."},
    "all in common": {"chosen": "The red.", "rejected": "The red."},
}


@pytest.mark.parametrize("name", NO_PROMPT)
def test_an_implicit_prompt_is_not_guessed(tmp_path, name):
    source = write(tmp_path / "a.jsonl", NO_PROMPT[name])
    assert re.search("a.jsonl:1: no field 'prompt'.*'chosen', 'rejected'", complaint(source))


def test_an_implicit_prompt_ends_with_white_space(tmp_path):
    record = BARE | {"chosen": "Q: 2?\nA: 4", "rejected": "Q: 2?\nA: 5", "chosen_model": "m", "n": 3}
    assert read_pairs(write(tmp_path / "a.jsonl", record)) == [pair("Q: 2?\nA: ", "4", "5")]


def test_unknown_fields_are_named_once_a_file_and_typos_are_guessed(tmp_path, capsys):
    typo = PLAIN | {"chosen_critque": "x", "rejected_critique": "y"}
    known = {"chosen_model": "m", "score_chosen": 3, "metadata": {"a": 1}}
    source = write(tmp_path / "a.jsonl", typo | known, PLAIN | {"id": "b", "chosen_critque": "x", "zz": 1})
    read_pairs(source)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{source}: ignored: 'chosen_critque' (2 records; is 'chosen_critique' meant?), 'zz' (1 record)"
    )


# --------------------------------------------------------------------------------------------------
# Lists of responses


def test_all_unknown_fields_are_named(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", PLAIN | {f"k{n:02}": n for n in range(30)} | {"response": "x"})
    read_pairs(source)
    names = re.findall(r"'(\w+)' \(1 record\)", capsys.readouterr().err)
    assert names == [f"k{n:02}" for n in range(30)] + ["response"]


def test_lists_of_responses_give_all_pairs_in_one_group(tmp_path):
    record = PLAIN | {"chosen": ["c", "d"], "rejected": ["r", "s", "t"]}
    record |= {"chosen_critique": ["1", ["2", "3"]], "rejected_critique": [None, "5", "6"]}
    pairs = read_pairs(write(tmp_path / "a.jsonl", record))
    assert [p.id for p in pairs] == ["a/1-1", "a/1-2", "a/1-3", "a/2-1", "a/2-2", "a/2-3"]
    assert {p.group for p in pairs} == {"a"}
    assert [(p.chosen_index, p.rejected_index) for p in pairs] == [(i, j) for i in (0, 1) for j in (0, 1, 2)]
    expected = {"c": ("1",), "d": ("2", "3"), "r": (), "s": ("5",), "t": ("6",)}
    for p in pairs:
        assert p.chosen_critiques == expected[p.chosen]
        assert p.rejected_critiques == expected[p.rejected]
    assert [(p.chosen, p.rejected) for p in pairs] == [(c, r) for c in "cd" for r in "rst"]


def test_one_chosen_of_four_is_a_list_too(tmp_path):
    record = PLAIN | {"id": 7, "subset": "Focus", "chosen": ["c"], "rejected": ["r", "s", "t"]}
    record |= {"num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m"] * 4}
    pairs = read_pairs(write(tmp_path / "a.jsonl", record))
    assert [(p.id, p.group, p.subset) for p in pairs] == [(f"7/1-{n}", "7", "Focus") for n in (1, 2, 3)]


def test_records_of_lists_without_ids_are_told_apart(tmp_path):
    record = {"prompt": "p", "chosen": ["c"], "rejected": ["r", "s"]}
    pairs = read_pairs(write(tmp_path / "a.jsonl", record, record, record | {"prompt": "q"}))
    groups = [p.group for p in pairs]
    assert len({p.id for p in pairs}) == 6 and groups[2] == groups[0] + "-2"
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[4] == groups[5]


def test_each_response_of_a_group_is_encoded_once(tmp_path, monkeypatch):
    from conftest import make_tokenizer

    record = PLAIN | {"chosen": ["c", "d", "e"], "rejected": ["r", "s", "t"]}
    pairs = read_pairs(write(tmp_path / "a.jsonl", record))
    encoder, asked = rm.Encoder(make_tokenizer("chatml"), 64, False), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda messages: asked.append(1) or encode(messages))
    encoded = encoder.encode_pairs(pairs, "a")
    assert len(encoded) == 9 and len(asked) == 6
    monkeypatch.undo()
    alone = [encoder.encode_pairs([p], "a")[0] for p in pairs]
    for one, other in zip(encoded, alone):
        assert one.chosen[0].tolist() == other.chosen[0].tolist()
        assert one.rejected[0].tolist() == other.rejected[0].tolist()


# --------------------------------------------------------------------------------------------------
# Critiques that stand elsewhere


def critiques_from(tmp_path, *records: dict, pairs: tuple[dict, ...] = (PLAIN,)) -> list[tuple]:
    source, other = write(tmp_path / "pairs", *pairs), write(tmp_path / "other", *records)
    read = read_pairs(source, critiques=other)
    return [(p.chosen_critiques, p.rejected_critiques) for p in read]


def test_critiques_are_found_by_prompt_and_response(tmp_path, capsys):
    singles = [{"prompt": "p", "response": "c ", "critique": c} for c in ("1", "2", "1")]
    assert critiques_from(tmp_path, *singles) == [(("1", "2"), ())]
    last = {"messages": [user("p"), assistant("r")], "critique": "3", "response": None}
    assert critiques_from(tmp_path, *singles, last)[0][1] == ("3",)
    capsys.readouterr()
    critiques_from(tmp_path, *singles)
    assert "critiques of 1 of 2 responses" in capsys.readouterr().err
    ultra = {"instruction": "p", "source": "x", "models": ["m"]}
    ultra["completions"] = [
        {"response": "r", "critique": "bad", "overall_score": 3, "model": "m"},
        {"response": "c", "critique": "good", "overall_score": 8, "model": "m"},
    ]
    assert critiques_from(tmp_path, ultra) == [(("good",), ("bad",))]


def test_helpsteer3s_feedback_is_read_without_its_grade(tmp_path, capsys):
    row = {"context": [user("p")], "response1": "r", "response2": "c", "domain": "code"}
    row["feedback1"] = ["The response is not helpful. It lies.", "The response is slightly helpful."]
    row["feedback2"] = ["The response is perfectly helpful because it is short. It is right.", "Fine."]
    assert critiques_from(tmp_path, row) == [(("It is right.", "Fine."), ("It lies.",))]
    assert "other: 3 critiques read without the grade they begin with" in capsys.readouterr().err


def test_a_side_without_a_critique_is_looked_for_elsewhere(tmp_path):
    rows = [PLAIN | {"chosen_critique": "1"}, {"prompt": "p", "response": "r", "critique": "2"}]
    assert critiques_from(tmp_path, *rows) == [(("1",), ("2",))]
    twice = [PLAIN | {"chosen_critique": c} for c in ("1", "2", "1")]
    assert critiques_from(tmp_path, *twice) == [(("1", "2"), ())]


def test_files_of_critiques_are_read_as_strictly_as_pairs(tmp_path, capsys):
    ultra = {"instruction": "p", "foo": 1, "completions": [{"response": "c", "critque": "x"}]}
    single = {"prompt": "p", "response": "r", "critique": "2"}
    assert critiques_from(tmp_path, ultra, single) == [((), ("2",))]
    assert "ignored: 'critque' (1 record; is 'critique' meant?), 'foo' (1" in capsys.readouterr().err
    with pytest.raises(CritiqueRMError, match="other:1: 'completions' is 5"):
        critiques_from(tmp_path, ultra | {"completions": 5})
    source, other = write(tmp_path / "pairs", PLAIN), write(tmp_path / "other", single, {"x": 1})
    assert read_pairs(source, True, other)[0].rejected_critiques == ("2",)


def test_an_id_goes_before_a_text(tmp_path):
    rows = [PLAIN | {"chosen_critique": "a's"}, PLAIN | {"id": "b", "chosen_critique": "b's"}]
    found = critiques_from(tmp_path, *rows, pairs=(PLAIN, PLAIN | {"id": "b"}, PLAIN | {"id": "z"}))
    assert found == [(("a's",), ()), (("b's",), ()), (("a's", "b's"), ())]


def test_a_single_answer_may_be_the_last_of_some_messages(tmp_path):
    row = {"messages": [user("p"), assistant("r")], "critique": "c", "id": 4.0}
    (answer,) = rm.read_answers(write(tmp_path / "a.jsonl", row))
    assert answer == Answer(talk([user("p")]), "r", ("c",), "4")
    for bad in ({"messages": [user("p")]}, {"response": "r"}, {"prompt": "p", "response": ["r", "s"]}):
        with pytest.raises(CritiqueRMError, match=r"a.jsonl:1: "):
            rm.read_answers(write(tmp_path / "a.jsonl", bad))


# --------------------------------------------------------------------------------------------------
# Files

TWO = [PLAIN, PLAIN | {"id": "b"}]
OTHER_FILES = {  # name: (content, what the message must say)
    "a.jsonl.xz": (lzma.compress(lines(*TWO)), "an xz file; supported: JSON lines.*xz -d"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"x" * 50, "a zstd file.*zstd -d"),
    "a.zip": (b"PK\x03\x04" + b"x" * 50, "a zip file.*unzip"),
    "a.bin": (b"\x80\x02\x00\x00" + b"x" * 50, "a binary file"),
    "a.csv": (b"prompt,chosen,rejected\np,c,r\n", "a table.*read_csv"),
    "a.json": (json.dumps({"train": TWO}, indent=1).encode(), "object over several lines.*jq"),
    "b.json": (json.dumps({"train": TWO}).encode(), "a list under 'train'.*jq -c .train"),
    "c.json.gz": (gzip.compress(json.dumps({"data": TWO}, indent=1).encode()), "over several lines"),
    "a.parquet": (b"PAR1" + b"x" * 50, "damaged parquet|pip install pyarrow"),
}


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused_whole_with_how_to_convert_them(tmp_path, name, skip_bad, capsys):
    content, expected = OTHER_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CritiqueRMError) as caught:
        read_pairs(str(tmp_path / name), skip_bad)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and re.search(expected, message)
    assert "\n" not in message and "skipped" not in capsys.readouterr().err


def test_parquet_is_read_like_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [row | {"prompt": [user("p")], "chosen_critique": ["x", "y"]} for row in TWO]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a")
    assert read_pairs(str(tmp_path / "a")) == read_pairs(write(tmp_path / "b", *rows))
    dated = {"prompt": "p", "chosen": ["c"], "rejected": ["r"], "when": datetime(2026, 1, 2)}
    parquet.write_table(pyarrow.Table.from_pylist([dated]), tmp_path / "c")
    assert len(read_pairs(str(tmp_path / "c"))[0].group) == 16


def test_nulls_that_a_table_puts_into_objects_are_no_values(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = []
    for name in "xy":
        call = {"function": {"name": "f", "arguments": {name: 1}}}
        rows.append(PLAIN | {"id": name, "chosen": [assistant("c") | {"tool_calls": [call]}]})
        rows[-1]["tools"] = [{"name": "f", "parameters": {"properties": {name: {"type": "number"}}}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a")
    assert read_pairs(str(tmp_path / "a")) == read_pairs(write(tmp_path / "b", *rows))


@pytest.mark.parametrize("array", [False, True])
def test_a_field_that_comes_twice_is_refused(tmp_path, array):
    text = '{"prompt": "p", "chosen": "c", "rejected": "r", "prompt": "q"}'
    (tmp_path / "a").write_text(f"[{text}]" if array else text)
    with pytest.raises(CritiqueRMError, match="a:( item )?1: the field 'prompt' comes twice"):
        read_pairs(str(tmp_path / "a"))
    nested = '{"prompt": [{"role": "user", "content": "a", "content": "b"}]}'
    (tmp_path / "a").write_text(nested)
    with pytest.raises(CritiqueRMError, match="the field 'content' comes twice"):
        read_pairs(str(tmp_path / "a"))


def test_a_file_of_nothing_but_bad_records_is_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": "q"})
    with pytest.raises(CritiqueRMError, match="a.jsonl:1: no field 'chosen'"):
        read_pairs(source, skip_bad=True)


def test_digests_of_plain_pairs_stay_as_they_were():
    """Ids that earlier versions made, and scores they wrote, name the same pairs and prompts."""
    plain = Pair("", (Message("user", "p"),), "c", "r")
    fields = {"id": "", "prompt": [["user", "p"]], "chosen": "c", "rejected": "r"}
    fields |= {"chosen_critiques": [], "rejected_critiques": [], "subset": "", "margin": 0.0}
    assert rm.digest_pair(plain) == rm.digest(fields)
    assert rm.digest_prompt(plain.prompt) == rm.digest([["user", "p"]])
