"""The chat template sees the data, and data never become control tokens, whatever it does with them.

The templates are small ones of our own that behave like those of the models they are named after.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

import critique_rm as rm
from conftest import assistant, make_tokenizer, pair, sized, talk, user
from critique_rm import Answer, CritiqueRMError, Encoder, Message, Pair

TURN = "<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n"
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
TEMPLATES = {
    "strips": f"{{% for m in messages %}}{TURN}{{{{ m.content | trim }}}}{END}{{% endfor %}}",
    "splits reasoning": (  # as Qwen 3: the last answer gets a block, earlier ones lose theirs
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% set thought = m.reasoning_content or '' %}{% set content = m.content %}"
        "{% if not thought and '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        f"{TURN}{{% if loop.last %}}<think>\n{{{{ thought.strip('\n') }}}}\n</think>\n\n{{% endif %}}"
        "{{ content.lstrip('\n') }}"
        f"{CALLS}{END}{{% else %}}{TURN}{{{{ m.content }}}}{END}{{% endif %}}{{% endfor %}}"
    ),
    "looks at a command": (  # as SmolLM3
        "{% if '/no_think' in messages[0].content %}{% set mode = 'off' %}{% else %}"
        "{% set mode = 'on' %}{% endif %}<|im_start|>system\nReasoning: {{ mode }}<|im_end|>\n"
        "{% for m in messages %}" + TURN + "{{ m.content.replace('/no_think', '').rstrip() }}"
        "<|im_end|>\n{% endfor %}"
    ),
    "escapes tool results": (  # as Llama 3.1
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + TURN + "{% if m.role == 'tool' %}{{ m.content | tojson }}"
        "{% else %}{{ m.content }}{% endif %}" + CALLS + "<|im_end|>\n{% endfor %}"
    ),
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CONVERSATIONS = {
    "plain": [user("2 + 2?"), assistant("It is 4.")],
    "white space": [user("\n 2 + 2? \n"), assistant("\n\nIt is 4. \n")],
    "reasoning": [user("2 + 2?"), assistant("<think>\nTwo and two.\n</think>\n\nIt is 4.")],
    "reasoning twice": [
        *(user("1 + 1?"), assistant("<think>one</think>2")),
        *(user("2 + 2?"), assistant("<think>two</think>4")),
    ],
    "reasoning without its beginning": [user("2 + 2?"), assistant("Two and\ntwo.\n</think>\nIt is 4.")],
    "a command": [{"role": "system", "content": "Be brief. /no_think"}, user("2?"), assistant("4")],
    "quotes": [user('"2" \\ + é?'), {"role": "tool", "content": '{"a": "é\\n"}'}, assistant('"4"')],
}


def make_encoder(template: str) -> Encoder:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATES[template]
    return Encoder(tokenizer, 512, True)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_encoded_is_what_the_template_writes_up_to_the_end_token(template, messages):
    encoder = make_encoder(template)
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_end|>\n")
    ids = encoder.encode(talk(messages)).tolist()
    if template != "splits reasoning" and "think>" in text:  # it prints the marks of the data
        assert not {encoder.control.ids["<think>"], encoder.control.ids["</think>"]} & set(ids)
        assert encoder.tokenizer.decode(ids).replace(rm.BREAK, "") == text.removesuffix("\n")
    else:
        assert ids == encoder.tokenizer(text.removesuffix("\n"))["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", range(3))
def test_no_data_become_control_tokens(template, place):
    encoder, data = make_encoder(template), ["How many", "The train", "right"]
    control = set(encoder.control.ids.values())

    def control_tokens(texts: list[str]) -> list[int]:
        prompt = talk([{"role": "tool", "content": texts[0]}, user(texts[0])])
        [[ids]] = encoder.encode_answers([Answer(prompt, texts[1], (texts[2],))])
        return [i for i in ids if i in control]

    own = control_tokens(data)
    for token in encoder.control.ids:
        for text in ("{}", "See {} there", "{0}{0} {0}\n", "<th{0}ink>", "{1}{0}{2}", "</{0}", " <think>{0}</think>", "{0}</think> x"):
            texts = [*data]
            texts[place] = text.format(token, token[:2], token[2:])
            assert control_tokens(texts) == own


@pytest.mark.parametrize(
    "response, critique",
    [
        ("It is 4.", "</think> wrong"),
        ("<think>It is 4.", "no </think> end"),
        ("It <think>is</think> 4.", "x"),
    ],
)
def test_marks_of_reasoning_elsewhere_do_not_move_what_is_said(response, critique):
    """In a prompt, in a critique, or in the midst of an answer; Qwen 3's template would move it."""
    encoder = make_encoder("splits reasoning")
    prompt = talk([user("a </think> b")])
    [[ids]] = encoder.encode_answers([Answer(prompt, response, (critique,))])
    text = encoder.tokenizer.decode(ids).replace(rm.BREAK, "")
    assert text == (
        "<|im_start|>user\na </think> b<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        f"{response}{rm.SEPARATOR}{critique}<|im_end|>"
    )


def test_overlapping_control_tokens_are_all_broken():
    encoder = make_encoder("strips")
    hidden = encoder.control.hide("<|im_start<|im_end|>|><think><think></think")
    assert not encoder.control.pattern.search(hidden)
    assert hidden.replace(rm.BREAK, "") == "<|im_start<|im_end|>|><think><think></think"


COMPLETES = {  # a template that would complete a token, and the messages with which it would
    "<{{ m.content }}": "|im_end|>",
    "{{ m.content }}|>": "q <|im_end",
    "<{{ m.name }}{{ m.content }}": "x",
    "{{ m.content.replace('**', '') }}": "<|im**_end|>",
    "{{ m.content | lower }}": "<|IM_END|>",
}


@pytest.mark.parametrize("template", COMPLETES)
def test_a_template_cannot_make_a_control_token_of_data(template):
    tokenizer = make_tokenizer("chatml")
    shown = f"{{% if m.role == 'user' %}}{template}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{TURN}{shown}{END}{{% endfor %}}"
    encoder = Encoder(tokenizer, 512, True)
    last = Message("assistant", "r")
    honest = encoder.encode([Message("user", "[a] > <b>", '{"name": "n"}'), last])
    assert encoder.tokenizer.decode(honest).count("<|im_end|>") == 2
    more = '{"name": "|im_end|>"}' if "name" in template else '{"name": "n"}'
    with pytest.raises(CritiqueRMError, match="makes a control token of what a text holds"):
        encoder.encode([Message("user", COMPLETES[template], more), last])


def test_control_tokens_are_hidden_in_what_json_escapes():
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens(['<|"|>'])
    tokenizer.chat_template = TEMPLATES["splits reasoning"]
    encoder = Encoder(tokenizer, 512, True)
    more = json.dumps({"reasoning_content": 'x <|"|> y'})
    ids = encoder.encode([*talk([user("p")]), Message("assistant", "r", more)])
    assert tokenizer.convert_tokens_to_ids('<|"|>') not in ids
    assert f'x <{rm.BREAK}|"|> y' in tokenizer.decode(ids)


def test_an_end_token_of_one_letter_is_refused():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.add_special_tokens({"eos_token": "¤"})
    with pytest.raises(CritiqueRMError, match="the end token '¤' is a single character"):
        Encoder(tokenizer, 512, True)


def test_a_tokenizer_that_makes_control_tokens_of_other_text_is_noticed():
    from tokenizers import AddedToken, normalizers

    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("<stop>", normalized=True)])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    encoder = Encoder(tokenizer, 512, True)
    assert len(encoder.encode(talk([user("＜ stop"), assistant("x")])))
    with pytest.raises(CritiqueRMError, match="makes control tokens of its text"):
        encoder.encode(talk([user("＜stop＞"), assistant("x")]))


# --------------------------------------------------------------------------------------------------
# What messages say beside their content


def answer(**more) -> Pair:
    return pair(chosen_more=json.dumps(more))


def test_tool_calls_tools_and_reasoning_reach_the_template():
    encoder = make_encoder("escapes tool results")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    prompt = [Message("tools", json.dumps(tools)), *talk([user("p")])]
    last = Message("assistant", "", json.dumps({"tool_calls": [CALL]}))
    dicts = [user("p"), assistant("") | {"tool_calls": [CALL]}]
    text = encoder.tokenizer.apply_chat_template(dicts, tools=tools, tokenize=False)
    assert "Oslo" in text and '"parameters"' in text
    ids = encoder.encode([*prompt, last])
    assert ids.tolist() == encoder.tokenizer(text.removesuffix("\n"))["input_ids"]

    encoder = make_encoder("splits reasoning")
    last = Message("assistant", "4", '{"reasoning_content": "two <|im_end|>"}')
    text = encoder.render([*talk([user("p")]), last])
    assert text.endswith(f"<think>\ntwo <{rm.BREAK}|im_end|>\n</think>\n\n4<|im_end|>")


def test_what_the_template_does_not_show_is_counted(capsys):
    shown = answer(tool_calls=[CALL])
    unseen = answer(tool_calls=[CALL], name="x", reasoning_content="y")
    encoder = make_encoder("escapes tool results")
    encoder.use_critiques = False
    assert len(encoder.encode_pairs([shown, unseen, pair()], "a.jsonl")) == 3
    assert capsys.readouterr().err == (
        "a.jsonl: 3 of 3 pairs used; 1 with 'name' that the chat template does not show whole, "
        "1 with 'reasoning_content' that the chat template does not show whole\n"
    )
    encoder = make_encoder("strips")
    encoder.use_critiques = False
    tools = [Message("tools", '[{"name": "f"}]'), Message("user", "p")]
    encoder.encode_pairs([pair(chosen="c"), sized(1, 1, 2, prompt=tuple(tools))], "b.jsonl")
    assert "1 with 'tools' that the chat template does not show whole" in capsys.readouterr().err


def test_messages_that_the_template_does_not_write_are_counted(capsys):
    tokenizer = make_tokenizer("chatml")
    shown = f"{{% if m.role in ('user', 'assistant') %}}{TURN}{{{{ m.content }}}}{END}{{% endif %}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{shown}{{% endfor %}}"
    encoder = Encoder(tokenizer, 512, False)
    lost = pair([{"role": "system", "content": "s"}, user("p")])
    encoder.encode_pairs([lost, pair(id="b"), lost], "a.jsonl")
    expected = "2 with a message of role 'system' that the chat template does not show whole"
    assert f"3 of 3 pairs used; {expected}" in capsys.readouterr().err
    assert encoder.encode_singles([lost.answers[0]])
    assert "1 with a message of role 'system'" in encoder.describe_counts()


def test_one_message_may_show_what_another_does_not(capsys):
    tokenizer = make_tokenizer("chatml")
    who = "{{ m.name if m.role == 'assistant' else '' }}"
    tokenizer.chat_template = f"{{% for m in messages %}}{TURN}{who}{{{{ m.content }}}}{END}{{% endfor %}}"
    encoder = Encoder(tokenizer, 512, False)
    named = pair([user("p") | {"more": '{"name": "x"}'}], chosen_more='{"name": "y"}')
    encoder.encode_pairs([named], "a.jsonl")
    assert "1 with 'name' that the chat template does not show whole" in capsys.readouterr().err


PARTS = {  # templates that leave out a part of a content: of which role, and of what
    "{{ m.content[:8] }}": ("user", "a long question"),
    "{{ m.content.split('\n')[0] }}": ("user", "one\ntwo"),
    "{{ m.content.split('</think>')[-1] }}": ("user", "one </think> two"),
}


@pytest.mark.parametrize("template", PARTS)
def test_contents_that_are_shown_in_part_are_counted_and_critiques_refused(template, capsys):
    role, content = PARTS[template]
    tokenizer = make_tokenizer("chatml")
    shown = f"{{% if m.role == '{role}' %}}{template}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{TURN}{shown}{END}{{% endfor %}}"
    Encoder(tokenizer, 512, False).encode_pairs([pair(content), pair("short", id="b")], "a")
    n = 1 if "</think>" not in content else 0  # a broken mark is not split at
    expected = f"{n} with a message of role 'user'" if n else "none cut or left out"
    assert f"2 of 2 pairs used; {expected}" in capsys.readouterr().err
    tokenizer.chat_template = f"{{% for m in messages %}}{TURN}{template}{END}{{% endfor %}}"
    both = {"chosen_critiques": (content,), "rejected_critiques": ("x",)}
    if n:
        with pytest.raises(CritiqueRMError, match="does not show the whole critique"):
            Encoder(tokenizer, 512, True).encode_pairs([pair(content, **both)], "a")


@pytest.mark.parametrize("plain", ["It is 4.", "<think>two</think>It is 4.", "two</think>It is 4."])
def test_marks_that_are_no_tokens_are_hidden_as_well(plain, capsys):
    """A Llama with Qwen 3's template: the marks are text, and a critique that names them is whole."""
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = TEMPLATES["splits reasoning"].replace("<|im_end|>", "<|eot_id|>")
    encoder = Encoder(tokenizer, 512, True)
    answer = Answer(talk([user("p")]), plain, ("no </think> is there",))
    [[ids]] = encoder.encode_answers([answer])
    text = tokenizer.decode(ids).replace(rm.BREAK, "")
    thought = "two" if "two" in plain else ""
    expected = f"<think>\n{thought}\n</think>\n\nIt is 4.{rm.SEPARATOR}no </think> is there<|eot_id|>"
    assert text.endswith(expected)
    assert not encoder.counts["truncated"] and not encoder.describe_counts()


def test_reasoning_beside_a_content_leaves_no_marks_to_it():
    encoder = make_encoder("splits reasoning")
    marks = [encoder.control.ids[mark] for mark in ("<think>", "</think>")]
    more = '{"reasoning_content": "r"}'
    for content in ("x", "a</think>b", "<think>a</think>b"):
        ids = encoder.encode([*talk([user("p")]), Message("assistant", content, more)])
        assert [i for i in ids if i in marks] == marks


def test_a_token_that_spells_a_field_hides_no_field():
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens(["content", "tool_calls", "arguments"])
    tokenizer.chat_template = TEMPLATES["escapes tool results"]
    encoder = Encoder(tokenizer, 512, True)
    more = json.dumps({"tool_calls": [CALL]})
    text = encoder.render([*talk([user("the content")]), Message("assistant", "", more)])
    assert f"the c{rm.BREAK}ontent" in text and "Oslo" in text


def test_a_tool_call_may_be_the_answer_where_it_is_all_that_is_shown():
    tokenizer = make_tokenizer("chatml")
    only = f"{{% if m.tool_calls %}}{CALLS}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{TURN}{only}{END}{{% endfor %}}"
    called = pair(chosen="", chosen_more=json.dumps({"tool_calls": [CALL]}))
    encoder = Encoder(tokenizer, 512, False)
    [encoded] = encoder.encode_pairs([called], "a")
    assert "Oslo" in tokenizer.decode(encoded.chosen[0]) and not encoder.describe_counts()
    critiques = {"chosen_critiques": ("c",), "rejected_critiques": ("r",)}
    with pytest.raises(CritiqueRMError, match="does not show the whole critique"):
        Encoder(tokenizer, 512, True).encode_pairs([replace(called, **critiques)], "a")


def test_tools_and_calls_are_never_cut():
    tools = Message("tools", json.dumps([{"name": "f" * 30}]))
    encoder = make_encoder("escapes tool results")
    encoder.max_length_tokens = 160
    long = sized(300, 3, 4, prompt=(tools, Message("user", "word " * 300)))
    [encoded] = encoder.encode_pairs([long], "a")
    text = encoder.tokenizer.decode(encoded.chosen[0])
    assert "f" * 30 in text and len(encoded.chosen[0]) <= 160 and encoder.counts["truncated"] == 1


# --------------------------------------------------------------------------------------------------
# What a template refuses


def test_a_refused_pair_is_named_or_skipped_and_counted(capsys):
    tokenizer = make_tokenizer("gemma")  # it knows no system role
    encoder = Encoder(tokenizer, 512, False)
    pairs = [pair(id="x"), pair([{"role": "system", "content": "s"}, user("p")], id="y", where="f:5")]
    with pytest.raises(CritiqueRMError, match="^f:5: the chat template refuses .*not supported"):
        encoder.encode_pairs(pairs, "f")
    assert [e.pair.id for e in encoder.encode_pairs(pairs, "f", skip_bad=True)] == ["x"]
    assert "f: 1 of 2 pairs used; 1 refused, the first: f:5: the chat" in capsys.readouterr().err


def test_a_token_without_an_embedding_is_refused_only_where_it_is_used():
    tokenizer = make_tokenizer("chatml")
    n = len(tokenizer)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.add_tokens(["é" * 2])
    encode = Encoder(tokenizer, 512, True, n_embeddings=n).encode
    assert encode(talk([user("<image_soft_token>"), assistant("x")])).max() < n
    tokenizer.chat_template = "<image_soft_token>" + tokenizer.chat_template
    with pytest.raises(CritiqueRMError, match=f"the token '<image_soft_token>' is {n}, the model has {n}"):
        Encoder(tokenizer, 512, True, n_embeddings=n).encode(talk([user("p"), assistant("x")]))


@pytest.mark.parametrize("response, expected", [("b", -2), ("", -2)])
def test_another_models_reward_is_read_at_the_last_token_that_is_not_its_padding(response, expected):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    pad_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = talk([user("a"), assistant(response)])
    whole = Encoder(tokenizer, 512, True, keep_tail=True).encode(messages)
    cut = Encoder(tokenizer, 512, True, keep_tail=True, pad_id=pad_id).encode(messages)
    assert whole[-1] == pad_id
    last = np.flatnonzero(whole != pad_id)[-1]
    assert cut.tolist() == whole[: last + 1].tolist() and last == len(whole) + expected
