"""critique_rm.py, text and tokens: what is encoded, control tokens in data, overlong pairs."""

import os
import re
from datetime import datetime

import numpy as np
import pytest

import critique_rm as rm
from conftest import CRITIQUES, assistant, make_tokenizer, sized, talk, user, words
from critique_rm import Answer, CritiqueRMError, Encoder

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


REFUSAL = "the chat template refuses the turns user, assistant"
BAD_TEMPLATES = {  # template: what the message must hold
    "{{ raise_exception('no system role') }}": f"{REFUSAL}.*no system role",
    "{{ messages[0].content + 3 }}": REFUSAL,
    "{{ 1 / 0 }}": REFUSAL,
    "{{ messages.x.y }}": REFUSAL,
    "{{ f() }}": REFUSAL,
    "{% for m in %}": "chat template",
    "{{ messages[0].content }}": "end with the assistant's message",
    "{{ messages[0].content + messages[1].content }}": "set its eos_token",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_an_unusable_template_is_refused_with_the_reason_in_one_line(template):
    tokenizer = make_tokenizer("plain")
    tokenizer.chat_template, tokenizer.eos_token = template, None
    with pytest.raises(CritiqueRMError, match=BAD_TEMPLATES[template]) as caught:
        Encoder(tokenizer, 512, True).encode(talk(HONEST[0]))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Overlong pairs

LIMIT = 160


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
