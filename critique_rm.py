"""What generating, training and scoring must agree on.

The path of one preference pair, top to bottom: a record is read (`read_pairs`), each of its answers
becomes token ids (`Encoder`), answers that share a beginning become one trie (`build_trie`), tries
become micro-batches (`pack`), the model reads them (`compute_rewards`), and two rewards become a
loss (`pairwise_loss`). train.py, generate.py and evaluate.py import from here, never each other.

Method: Ye et al., "Improving Reward Models with Synthetic Critiques", arXiv 2405.20850.

Shapes: B pairs, S sequences, R rows, T tokens in a row, H hidden size.
"""

import argparse
import ctypes
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import sys
import warnings
import zlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# --------------------------------------------------------------------------------------------------
# Errors, messages, arguments


class CritiqueRMError(Exception):
    """A mistake in the input or the surroundings: where it is, what was found, what to do."""


@contextmanager
def explain(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of other packages into a CritiqueRMError that adds what they say."""
    try:
        yield
    except kinds as error:
        raise CritiqueRMError(f"{problem} ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    text = str(error).partition("; use sys.")[0]  # there Python advises its programmers
    return next(iter(text.splitlines()), type(error).__name__)


def say(message: str) -> None:
    """Writes one line to stderr, on rank 0 only (torchrun sets RANK)."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def say_error(script: str, error: BaseException) -> None:
    """Writes an error as one line to stderr.

    Ours once on each machine, since its ranks meet the same ones; others may be of one rank alone.
    """
    rank = "" if os.environ.get("LOCAL_RANK", "0") == "0" else f"rank {os.environ['RANK']}: "
    if not rank or not isinstance(error, CritiqueRMError):
        print(f"{script}: {rank}{_first_line(error)}", file=sys.stderr, flush=True)


def natural(text: str, least: int = 0) -> int:
    """The type of an argument that is a whole number, 0 or more."""
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return int(text)


def positive_int(text: str) -> int:
    return natural(text, least=1)


# --------------------------------------------------------------------------------------------------
# Records


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Answer:
    """One response to one prompt, with the critiques written about it (none, one or several)."""

    prompt: tuple[Message, ...]
    response: str
    critiques: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Pair:
    """One preference: `chosen` was judged better than `rejected`, by at least `margin`."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_critiques: tuple[str, ...] = ()
    rejected_critiques: tuple[str, ...] = ()
    subset: str = ""
    margin: float = 0.0

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """Chosen and rejected, each on its own: what a critic or the model may see at a time."""
        return (
            Answer(self.prompt, self.chosen, self.chosen_critiques),
            Answer(self.prompt, self.rejected, self.rejected_critiques),
        )


SIDES = ("chosen", "rejected")
ROLES = ("system", "developer", "user", "assistant", "tool")  # templates print them: no free text
MAX_LINE_BYTES = 16 * 2**20
CRITIQUES_MISSING = "run generate.py on it first, or pass --no-critiques"


def read_pairs(source: str, skip_bad: bool = False, critiques: str | None = None) -> list[Pair]:
    """Reads preference pairs from a file, or from a Hub data set `NAME` or `NAME:SPLIT`.

    Files are JSON lines or one JSON array, plain or gzipped, told apart by content. Each record is
    recognised by its fields: ours, TRL's preference formats, UltraFeedback-binarized, HH-RLHF
    transcripts, RewardBench, PandaLM's test set (majority of three annotators, ties dropped) and
    LLMBar. Records without an id get one from their content. With `critiques`, another such file,
    which may hold the pairs of several, what it says of each pair takes the place of its critiques.

    Raises CritiqueRMError naming file, line, field, what was found and what to do; with `skip_bad`
    records that are wrong in themselves are left out and counted instead.
    """
    found = list(read_rows(source, _parse_pair, skip_bad))
    decided = [(where, pair) for where, pair in found if pair]
    if n_ties := len(found) - len(decided):
        say(f"{source}: {n_ties} pairs without a majority for one side dropped")
    if not decided:
        raise CritiqueRMError(f"{source}: no preference pair in it; expected a JSON object a line")
    pairs = _with_unique_ids(decided, source)
    return _replace_critiques(pairs, critiques, source) if critiques else pairs


def _replace_critiques(pairs: list[Pair], source: str, about: str) -> list[Pair]:
    """Takes critiques from another file, by id and text; pairs it lacks are left without."""

    def identity(pair: Pair) -> tuple:  # two data sets may use one id
        return pair.id, pair.prompt, pair.chosen, pair.rejected

    others = {identity(pair): pair for _, pair in read_rows(source, _parse_pair) if pair}
    if not any(identity(pair) in others for pair in pairs):
        advice = "it must hold their ids and texts, as generate.py writes them"
        raise CritiqueRMError(f"{source}: no pair in it is one of {about}; {advice}")
    names = [f"{side}_critiques" for side in SIDES]
    return [
        replace(pair, **{name: getattr(others.get(identity(pair)), name, ()) for name in names})
        for pair in pairs
    ]


def read_answers(source: str, skip_bad: bool = False) -> list[Answer]:
    """Reads single records {prompt, response, critique?, id?}, to be scored on their own."""
    answers = [answer for _, answer in read_rows(source, _parse_answer, skip_bad)]
    if not answers:
        raise CritiqueRMError(f"{source}: no answer in it; expected a JSON object a line")
    return answers


def read_rows(
    source: str, parse: Callable[[dict], Any] = dict, skip_bad: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yields (where, what `parse` makes of the object) from a file or a Hub data set.

    Raises CritiqueRMError that begins with `where`; `skip_bad` says how many it left out instead.
    """
    bad = []
    for where, record in _read_records(source):
        try:
            parsed = parse(_object(record))
        except CritiqueRMError as error:
            bad.append(f"{where}: {error}")
            if not skip_bad:
                raise CritiqueRMError(bad[0]) from None
        else:
            yield where, parsed
    if bad:
        say(f"{source}: {len(bad)} bad records skipped, the first: {bad[0]}")


def digest(*values: object) -> str:
    """A short stable hash of JSON-like values (64 bits as hex): for ids and to notice changes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _with_unique_ids(located: list[tuple[str, Pair]], source: str) -> list[Pair]:
    """Refuses explicit ids that clash; makes missing ones from the content, numbering repeats."""
    seen: dict[str, str] = {}
    pairs, n_repeats = [], 0
    for where, pair in located:
        if pair.id in seen:
            raise CritiqueRMError(
                f"{where}: id {pair.id!r} was already used at {seen[pair.id]}; "
                "make ids unique, or remove them and they are made from the content"
            )
        wanted = pair.id or digest(asdict(pair))
        names = (f"{wanted}-{n}" if n > 1 else wanted for n in itertools.count(1))
        pair_id = next(name for name in names if name not in seen)
        n_repeats += pair_id != wanted
        seen[pair_id] = where
        pairs.append(replace(pair, id=pair_id))
    if n_repeats:
        say(f"{source}: {n_repeats} pairs repeat an earlier one to the letter (kept, ids numbered)")
    return pairs


def _read_records(source: str) -> Iterator[tuple[str, bytes | object]]:
    """Yields lines of bytes or what an array holds; no more than one is in memory at a time."""
    if not os.path.exists(source):
        yield from _read_hub(source)
        return
    problem = f"{source}: cannot be read; is the file complete?"
    with explain(problem, OSError, EOFError, zlib.error), open(source, "rb") as raw:
        stream = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        is_array = stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
        yield from (_read_array if is_array else _read_lines)(source, stream)


def _read_lines(source: str, stream) -> Iterator[tuple[str, bytes]]:
    parts = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(parts, 1):
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            yield f"{source}:{number}", line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):  # the rest of a long one
            line = next(parts, b"")


def _read_array(source: str, stream) -> Iterator[tuple[str, object]]:
    text, decode = io.TextIOWrapper(stream, "utf-8-sig"), json.JSONDecoder().raw_decode
    buffer, number = "", 0
    while True:
        buffer, before = buffer.lstrip(" \t\r\n"), "," if number else "["
        try:
            if buffer[:1] != before:
                raise ValueError(f"expected {before}")
            item = buffer[1:].lstrip(" \t\r\n")
            value, end = decode(item)
        except (ValueError, RecursionError) as error:  # wrong, or not yet read to its end
            with explain(f"{source}: not UTF-8 text, after item {number}", UnicodeDecodeError):
                more = text.read(max(2**14, len(buffer)))
            if not more and "".join(buffer.split()) == ("]" if number else "[]"):
                return
            if not more or len(buffer) > MAX_LINE_BYTES or isinstance(error, RecursionError):
                problem = f"not valid JSON, or over 16 MB ({_first_line(error)})"
                raise CritiqueRMError(f"{source}: item {number + 1}: {problem}") from None
            buffer += more
        else:
            buffer, number = item[end:], number + 1
            yield f"{source}: item {number}", value


def _read_hub(source: str) -> Iterator[tuple[str, dict]]:
    name, _, split = source.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or re.search(r"\.jsonl?(\.gz)?$", name):
        raise CritiqueRMError(f"{source}: no such file")
    advice = "to read it as a Hub data set run: pip install datasets"
    with explain(f"{source}: no such file; {advice}", ImportError):
        from datasets import load_dataset
    with explain(f"{source}: neither a file nor a Hub data set", Exception):  # of many kinds
        rows = load_dataset(name, split=split or "train")
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


def _object(record: bytes | object) -> dict:
    """The JSON object of a record."""
    if isinstance(record, bytes):
        if len(record) > MAX_LINE_BYTES:
            raise CritiqueRMError("line longer than 16 MB; shorten or remove it")
        with explain("not UTF-8 text; expected a JSON object", UnicodeDecodeError):
            text = record.decode("utf-8-sig")
        with explain("not valid JSON; mend or remove it", ValueError, RecursionError):
            record = json.loads(text)
    if not isinstance(record, dict):
        raise CritiqueRMError(f"expected a JSON object, found {_shorten(record)}")
    return record


def _parse_answer(row: dict) -> Answer:
    response = _text(row, "response", may_be_empty=True)
    prompt = _messages(row, "prompt", "user")
    return Answer(prompt, response, _critiques(row, "critique"), _id(row, "id"))


def _parse_pair(row: dict) -> Pair | None:
    """Recognises the format by its fields; None is a tie."""
    if "annotator1" in row:
        return _parse_pandalm(row)
    if "output_1" in row:
        return _parse_llmbar(row)
    if "prompt" not in row and str(row.get("chosen")).lstrip().startswith("Human:"):
        return _parse_transcripts(row)
    return _parse_preference(row)


def _parse_preference(row: dict) -> Pair:
    """Ours, TRL (explicit or implicit prompt, plain or chat), UltraFeedback and RewardBench."""
    (*start, chosen), (*other, rejected) = (_messages(row, side, "assistant") for side in SIDES)
    for side, last in zip(SIDES, (chosen, rejected)):
        if last.role != "assistant":
            raise CritiqueRMError(f"the last message of {side!r} is not the assistant's")
    if start != other:
        raise CritiqueRMError(
            "'chosen' and 'rejected' differ before their last message; a pair needs one prompt"
        )
    chosen, rejected = chosen.content, rejected.content
    if "prompt" not in row and not start:  # TRL's implicit prompt in plain text
        n = len(os.path.commonprefix([chosen, rejected]))
        n = chosen.rfind(" ", 0, n) + 1 if n < max(len(chosen), len(rejected)) else n
        row = row | {"prompt": chosen[:n]}
        chosen, rejected = chosen[n:], rejected[n:]
    # UltraFeedback repeats the prompt inside the messages; TRL's explicit prompt stands before them
    is_whole = start and ("prompt" not in row or start[0].role != "assistant")
    prompt = (*(() if is_whole else _messages(row, "prompt", "user")), *start)
    try:
        margin = 0.0 if row.get("margin") is None else float(row["margin"])
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise CritiqueRMError(f"'margin' is {_shorten(row['margin'])}; expected a number")
    critiques = (_critiques(row, f"{side}_critique") for side in SIDES)
    subset = _text({"subset": row.get("subset") or ""}, "subset", may_be_empty=True)
    return Pair(_id(row, "id"), prompt, chosen, rejected, *critiques, subset, margin)


def _parse_transcripts(row: dict) -> Pair:
    """HH-RLHF: two transcripts with the same beginning up to the last "Assistant:"."""
    roles, turns = {"Human": "user", "Assistant": "assistant"}, {}
    for side in SIDES:
        text = "\n\n" + _text(row, side).lstrip()
        _, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
        named = zip(parts[::2], parts[1::2])
        messages = [{"role": roles[name], "content": content} for name, content in named]
        turns[side] = messages or text
    return _parse_preference(row | turns)


def _parse_pandalm(row: dict) -> Pair | None:
    """PandaLM's testset-v1: annotators say 0 (tie), 1 or 2; some responses are JSON booleans."""
    votes = [row.get(f"annotator{n}") for n in (1, 2, 3)]
    if any(vote not in (0, 1, 2) for vote in votes):
        raise CritiqueRMError(f"annotators are {votes}; expected 0, 1 or 2 each")
    best = next((side for side in (1, 2) if votes.count(side) >= 2), None)
    if best is None:
        return None
    names = ("response1", "response2")
    row = row | {name: str(row[name]) for name in names if isinstance(row.get(name), bool)}
    parts = [_text(row, name, may_be_empty=True) for name in ("instruction", "input")]
    prompt = _text({"instruction": "\n\n".join(filter(None, parts))}, "instruction")
    pair_id = f"pandalm-{number}" if (number := _id(row, "idx")) else ""
    responses = _ordered(row, names, best)
    return Pair(pair_id, (Message("user", prompt),), *responses, subset="pandalm")


def _parse_llmbar(row: dict) -> Pair:
    if row.get("label") not in (1, 2):
        raise CritiqueRMError(f"'label' is {_shorten(row.get('label'))}; expected 1 or 2")
    prompt = (Message("user", _text(row, "input")),)
    return Pair(_id(row, "id"), prompt, *_ordered(row, ("output_1", "output_2"), row["label"]))


def _ordered(row: dict, names: tuple[str, str], best: int) -> list[str]:
    """Chosen and rejected of two responses, of which number `best` (1 or 2) was preferred."""
    texts = [_text(row, name, may_be_empty=True) for name in names]
    return texts if best == 1 else texts[::-1]


def _messages(row: dict, field: str, role: str) -> tuple[Message, ...]:
    """The messages of a field; plain text is one of `role`, and a model may answer nothing."""
    value = row.get(field)
    if not value or not isinstance(value, list):
        return (Message(role, _text(row, field, may_be_empty=role == "assistant")),)
    for n, item in enumerate(value, 1):
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            expected = f'{{"role": one of {", ".join(ROLES)}, "content": text}}'
            found = f"message {n} of {field!r} is {_shorten(item)}"
            raise CritiqueRMError(f"{found}; expected {expected}")
    return tuple(Message(m["role"], _text(m, "content", may_be_empty=True)) for m in value)


def _critiques(row: dict, field: str) -> tuple[str, ...]:
    value = row.get(field)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_text({field: item}, field) for item in values)


def _id(row: dict, field: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise CritiqueRMError(f"{field!r} is {_shorten(value)}; expected text or a number")
    return _text({field: str(value)}, field)


def _text(row: dict, field: str, may_be_empty: bool = False) -> str:
    if field not in row:
        found = ", ".join(map(_shorten, row)) or "no field at all"
        raise CritiqueRMError(f"no field {field!r}; found {found}")
    value = row[field]
    if not isinstance(value, str):
        raise CritiqueRMError(f"{field!r} is {_shorten(value)}; expected text")
    if not may_be_empty and not value.strip():
        raise CritiqueRMError(f"{field!r} is empty; remove the line or fill it in")
    if re.search("[\ud800-\udfff]", value):
        raise CritiqueRMError(f"{field!r} holds half a surrogate pair; mend the encoding")
    return value


def _shorten(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


# --------------------------------------------------------------------------------------------------
# Text and tokens

SEPARATOR = "\n\nCritique: "  # between response and critique, inside the assistant's message
PLAIN_TEMPLATE = (  # for tokenizers without a chat template of their own
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}"
    "{{ eos_token if loop.last else '\n\n' }}{% endfor %}"
)
# Llama 3 and SmolLM3 print today's date; a macro of that name hides theirs, here and wherever the
# saved template is used, so that a reward does not depend on the day.
FROZEN_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
MIN_TEXT_TOKENS = 16  # prompt and response are never cut to less than this together


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair: one sequence per critique on each side (one without critiques)."""

    pair: Pair
    chosen: list[np.ndarray]  # each (T,) int32
    rejected: list[np.ndarray]


class Encoder:
    """Turns text into token ids: the only place where it happens, for training and scoring.

    The chat template is rendered around placeholders, so it never sees the data, and the data is
    put into the rendered text afterwards. It is encoded by a twin of the tokenizer that knows the
    control tokens (any added token, special or not) by names that no data can hold, and only those
    that the template wrote are renamed: `<|im_end|>` in a response stays ten letters.

    A sequence ends with exactly one end token (the template's own end of turn, else the eos token)
    and begins with at most one bos token (the template's). `keep_tail` leaves what a template
    writes after its end token, for models of others that were trained on it.

    Raises CritiqueRMError when the tokenizer is not a fast one or has no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length_tokens: int,
        use_critiques: bool,
        keep_tail: bool = False,
    ) -> None:
        self.tokenizer, self.max_length_tokens = tokenizer, max_length_tokens
        self.use_critiques, self.keep_tail = use_critiques, keep_tail
        if not tokenizer.is_fast:
            raise CritiqueRMError("the tokenizer has no tokenizer.json; save it as a fast one")
        if tokenizer.chat_template is None:
            say("tokenizer without chat template: using plain 'User: … Assistant: …' text")
            tokenizer.chat_template = PLAIN_TEMPLATE
        tokenizer.chat_template = tokenizer.get_chat_template()  # the default one of several
        if "strftime_now" in tokenizer.chat_template and FROZEN_DATE not in tokenizer.chat_template:
            tokenizer.chat_template = FROZEN_DATE + tokenizer.chat_template
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        # runs of white space that some vocabularies (Gemma) add are text like any other
        self.control_ids = {token: i for i, token in added.items() if len(token.strip()) > 1}
        longest_first = sorted(map(re.escape, self.control_ids), key=len, reverse=True)
        self._control = re.compile("|".join(longest_first) or "(?!)")
        nonce = secrets.token_hex(8)  # no result depends on it
        self._names = {t: f"\ue000{nonce}-{n}\ue001" for n, t in enumerate(self.control_ids)}
        self._twin = self._make_twin()
        twins = {i: self._names.get(token, token) for i, token in added.items()}
        self._ids = {self._twin.token_to_id(token): i for i, token in twins.items()}
        self.skeleton = cache(self._skeleton)
        self.counts: Counter[str] = Counter()

    def _make_twin(self) -> Tokenizer:
        """The same tokenizer, its control tokens renamed."""
        spec, names = json.loads(self.tokenizer.backend_tokenizer.to_str()), self._names
        for token in spec["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
        else:  # a unigram model lists (token, score)
            model["vocab"] = [[names.get(token, token), x] for token, x in model["vocab"]]
        if unknown := model.get("unk_token"):
            model["unk_token"] = names.get(unknown, unknown)
        unused = {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(spec | unused))

    def _skeleton(self, roles: tuple[str, ...], renamed: bool) -> tuple[str, ...]:
        """The rendered template: text, left, number and right for each message, and the tail.

        Left and right are an em space, or nothing where the template strips the content.
        """
        contents = (f"\u2003\ue000{n}\ue001\u2003" for n in range(len(roles)))
        marked = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        turns = f"the turns {', '.join(roles)}; change the prompts or the template"
        with explain(f"the chat template refuses {turns}", jinja2.TemplateError, TypeError):
            text = self.tokenizer.apply_chat_template(marked, tokenize=False)
        parts = re.split("(\u2003?)\ue000(\\d+)\ue001(\u2003?)", text)
        if len(parts) == 1 or int(parts[-3]) != len(roles) - 1:
            raise CritiqueRMError("the chat template does not end with the assistant's message")
        if not self.keep_tail:
            parts[-1] = self._end(parts[-1])
        if renamed:
            parts[::4] = (self._control.sub(lambda m: self._names[m[0]], t) for t in parts[::4])
        return tuple(parts)

    def _end(self, tail: str) -> str:
        """Cuts what follows the first control token after the response, or adds the eos token."""
        if match := self._control.search(tail):
            return tail[: match.end()]
        if not self.tokenizer.eos_token:
            raise CritiqueRMError("the tokenizer has no end token; set its eos_token")
        return tail.rstrip() + self.tokenizer.eos_token

    def render(self, messages: Sequence[Message], renamed: bool = False) -> str:
        """The text of a conversation that ends with the assistant's message, as it is encoded.

        `renamed` gives the template's control tokens the names that the twin has for them.
        """
        *parts, tail = self.skeleton(tuple(message.role for message in messages), renamed)
        text = ""
        for literal, left, n, right in zip(*(parts[k::4] for k in range(4))):
            content = messages[int(n)].content
            content = content if left else content.lstrip()
            text += literal + (content if right else content.rstrip())
        return text + tail

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """Token ids (T,) int32 of a conversation that ends with the assistant's message."""
        text = self.render(messages, renamed=True)
        ids = [self._ids.get(i, i) for i in self._twin.encode(text, add_special_tokens=False).ids]
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return np.array(ids, np.int32)

    @cached_property
    def end_id(self) -> int:
        """The token every sequence ends with: the reward is read there."""
        return int(self.encode((Message("user", "a"), Message("assistant", "b")))[-1])

    def encode_answers(self, answers: Sequence[Answer]) -> list[list[np.ndarray]] | None:
        """Encodes answers to one prompt: for each answer one sequence per critique.

        Within `max_length_tokens` each critique and the end token are kept whole; the responses
        keep their beginning, the prompt its end, cut at the same place for all answers. None if
        even that does not fit.
        """
        prompt, responses = answers[0].prompt, [a.response for a in answers]
        encoded, excess = self._encode_as(prompt, answers, responses)
        if excess <= 0:
            return encoded
        blank = [Message(m.role, "") for m in prompt]
        fixed, _ = self._encode_as(blank, answers, [""] * len(answers))
        room = [self.max_length_tokens - max(map(len, sequences)) for sequences in fixed]
        offsets = [self._offsets(response) for response in responses]
        while min(room) >= MIN_TEXT_TOKENS:
            n_prompt = min(max(r - len(o), r // 2) for r, o in zip(room, offsets))
            for n_kept in range(n_prompt, -1, -1):  # a piece of a word can be more tokens alone
                cut = self._cut_prompt(prompt, n_kept)
                used = sum(len(self._offsets(m.content)) for m in cut)
                if used <= n_prompt:
                    break
            kept = [
                text if len(o) <= r - used else text[: o[r - used][0]]
                for text, r, o in zip(responses, room, offsets)
            ]
            encoded, excess = self._encode_as(cut, answers, kept)
            if excess <= 0:
                self.counts["truncated"] += 1
                return encoded
            room = [r - excess for r in room]  # tokens that merge across a cut
        self.counts["dropped as too long"] += 1
        return None

    def _encode_as(
        self, prompt: Sequence[Message], answers: Sequence[Answer], responses: list[str]
    ) -> tuple[list[list[np.ndarray]], int]:
        """The sequences of answers with this prompt and responses; the tokens above the limit."""
        encoded = []
        for answer, response in zip(answers, responses):
            critiques = answer.critiques if self.use_critiques else ()
            texts = [response + SEPARATOR + c for c in critiques] or [response]
            encoded.append([self.encode((*prompt, Message("assistant", text))) for text in texts])
        return encoded, max(map(len, itertools.chain(*encoded))) - self.max_length_tokens

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        return self.tokenizer(text, **options)["offset_mapping"]

    def _cut_prompt(self, prompt: Sequence[Message], n_tokens: int) -> list[Message]:
        """Keeps the last tokens: what is asked stands at the end of a conversation."""
        kept = []
        for role, content in reversed(prompt):
            offsets = self._offsets(content)
            if len(offsets) > n_tokens:
                content = content[offsets[-n_tokens][0] :] if n_tokens else ""
            n_tokens -= min(n_tokens, len(offsets))
            kept.append(Message(role, content))
        return kept[::-1]

    def encode_pairs(
        self, pairs: Sequence[Pair], source: str, keep_equal: bool = False
    ) -> list[EncodedPair]:
        """Encodes pairs; says how many were cut or left out, and why (never invents a critique).

        Those whose two sides read the same teach nothing; with `keep_equal` they are kept, as ties.
        Raises CritiqueRMError if no pair is left.
        """
        self.counts.clear()
        encoded = []
        for pair in pairs:
            if self.use_critiques and not (pair.chosen_critiques and pair.rejected_critiques):
                self.counts["without critique"] += 1
            elif sides := self.encode_answers(pair.answers):
                chosen, rejected = ([ids.tolist() for ids in side] for side in sides)
                if chosen == rejected and not keep_equal:
                    self.counts["with equal token sequences"] += 1
                else:
                    encoded.append(EncodedPair(pair, *sides))
        counted = [f"{n} {what}" for what, n in self.counts.items()]
        changes = ", ".join(counted) or "none cut or left out"
        say(f"{source}: {len(encoded)} of {len(pairs)} pairs used; {changes}")
        if not encoded:
            hint = f"; {CRITIQUES_MISSING}" if self.counts["without critique"] else ""
            raise CritiqueRMError(f"{source}: no pair is left to use ({changes}){hint}")
        return encoded


# --------------------------------------------------------------------------------------------------
# Packing


@dataclass(frozen=True)
class Trie:
    """Sequences that share beginnings, each shared token once, in depth-first order.

    Token k is the same as or an ancestor of token q exactly if k <= q < ends[k]: the attention mask
    of a trie is two comparisons. Positions are depths, so they continue along each path.
    """

    ids: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32, depth in the trie
    ends: np.ndarray  # (T,) int32, end of the subtree below each token
    last: np.ndarray  # (S,) int32, index of each sequence's last token
    numbers: np.ndarray  # (S,) int32, the caller's number of each sequence

    def __len__(self) -> int:
        return len(self.ids)


def build_trie(sequences: Sequence[np.ndarray], numbers: Sequence[int]) -> Trie:
    """Builds the prefix trie of token sequences, found on ids alone."""
    ids, positions, ends = np.empty((3, sum(map(len, sequences))), np.int32)
    last = np.empty(len(sequences), np.int32)
    path = previous = np.empty(0, np.int32)  # where each token of the current path stands
    n = 0
    for s in sorted(range(len(sequences)), key=lambda s: sequences[s].tolist()):
        sequence = sequences[s]
        shared = _common_prefix(previous, sequence)
        new = np.arange(n, n + len(sequence) - shared, dtype=np.int32)
        ends[path[shared:]] = n  # the branches left behind end here
        ids[new] = sequence[shared:]
        positions[new] = np.arange(shared, len(sequence))
        path, previous, n = np.concatenate([path[:shared], new]), sequence, n + len(new)
        last[s] = path[-1]
    ends[path] = n
    return Trie(ids[:n], positions[:n], ends[:n], last, np.array(numbers, np.int32))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def build_tries(sequences: Sequence[np.ndarray], numbers: Sequence[int], share: bool) -> list[Trie]:
    """One trie of all sequences, or one of each where a model cannot share prefixes."""
    if share:
        return [build_trie(sequences, numbers)]
    return [build_trie([sequence], [number]) for sequence, number in zip(sequences, numbers)]


def pack(
    units: Sequence[list[Trie]], budget_tokens: int, share: bool, rank: int = 0, n_ranks: int = 1
) -> list[list[list[Trie]]]:
    """This rank's micro-batches, as rows of tries; the tries of a unit stay together.

    The longest unit left sets the width of the rows; each row is then filled with the longest units
    that fit, one after the other, or holds one unit where a model cannot share prefixes. A row is
    never wider than its longest trie, so attention, quadratic in the row, costs what it would
    without packing. Computing a micro-batch is a collective call: all ranks get equally many, of
    one shape, so that none waits for another; some may be empty at the end.

    Within the budget the number of rows is that with the least to compute for each token of data,
    where a micro-batch counts for budget / 32 tokens more: the weights are gathered for each. On a
    GPU it counts for 2,048: on an H100, to launch its kernels takes as long as 2,500 tokens of a
    model of a billion parameters, or 6,000 of SmolLM2-135M.
    """
    extra = 2048 if torch.cuda.is_available() else budget_tokens / 32

    def order(unit: list[Trie]) -> int:
        """Longest first: minus the tokens that the unit takes."""
        return -len(unit) * max(map(len, unit))

    waiting, batches = sorted(units, key=order), []
    while waiting:
        width, rows, n_used, options = -order(waiting[0]), [], 0, []
        most = n_ranks * max(1, budget_tokens // width)
        while waiting and len(rows) < most:
            row, space = [], width
            while (k := bisect_left(waiting, -space, key=order)) < len(waiting):
                row.append(waiting.pop(k))
                n_used -= order(row[-1])
                space = space + order(row[-1]) if share else 0
            rows.append(row)
            if len(rows) % n_ranks == 0 or not waiting:
                cost = math.ceil(len(rows) / n_ranks) * width + extra
                options.append((cost / n_used, len(rows)))
        n_rows = min(options)[1]
        for unit in itertools.chain(*rows[n_rows:]):
            insort(waiting, unit, key=order)
        mine = [list(itertools.chain(*row)) for row in rows[:n_rows][rank::n_ranks]]
        batches.append(mine if share else [[trie] for row in mine for trie in row])
    return batches


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows of tries, padded to one length, and where to read the rewards."""

    ids: Tensor  # (R, T) int64
    positions: Tensor  # (R, T) int64
    ends: Tensor  # (R, T) int64
    last: Tensor  # (2, S) int64, row and column of each sequence's last token
    numbers: Tensor  # (S,) int64, the caller's number of each sequence
    n_tokens: int  # without padding


def collate(rows: Sequence[Sequence[Trie]], device: torch.device) -> Batch:
    """Lays out rows of tries as tensors; without rows, one padding token and no sequence."""
    lengths = [sum(map(len, row)) for row in rows]
    shape = (max(1, len(rows)), max(lengths, default=1))
    ids, positions = np.zeros((2, *shape), np.int64)
    ends = np.tile(np.arange(1, shape[1] + 1), (shape[0], 1))  # padding sees only itself
    last, numbers = [np.empty((2, 0), np.int64)], [np.empty(0, np.int64)]
    for r, row in enumerate(rows):
        for start, trie in zip(itertools.accumulate(map(len, row), initial=0), row):
            place = r, slice(start, start + len(trie))
            ids[place], positions[place], ends[place] = trie.ids, trie.positions, trie.ends + start
            last.append(np.stack([np.full(len(trie.last), r), trie.last + start]))
            numbers.append(trie.numbers)
    arrays = ids, positions, ends, np.concatenate(last, 1), np.concatenate(numbers)
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays), sum(lengths))


LOWEST = torch.finfo(torch.bfloat16).min  # finite in fp32 and in bf16


def attention_masks(batch: Batch, config: PreTrainedConfig) -> Tensor | dict[str, Tensor]:
    """The additive masks (R, 1, T, T): 0 where a token may look, the lowest number elsewhere.

    A token sees itself and its ancestors in the trie. Sliding-window layers see of those the last
    `sliding_window` positions; models with both kinds of layer take one mask per kind. Never
    boolean: eager attention would add it. FSDP casts the masks to the compute dtype.
    """
    index = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    key, query = index[None, None, :], index[None, :, None]
    seen = near = (key <= query) & (query < batch.ends[:, None, :])  # (R, T, T)
    if window := getattr(config, "sliding_window", None):
        near = seen & (batch.positions[:, :, None] - batch.positions[:, None, :] < window)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return torch.where(near, 0.0, LOWEST)[:, None]
    masks = {"full_attention": seen, "sliding_attention": near}
    return {kind: torch.where(masks[kind], 0.0, LOWEST)[:, None] for kind in sorted(set(kinds))}


# --------------------------------------------------------------------------------------------------
# Processes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h: what goes back to the system


def start_processes(shard_group: int | None = None) -> tuple[torch.device, dist.DeviceMesh]:
    """Joins the process group, of size 1 without torchrun: one code path for one and many.

    The mesh is that to shard a model over: all processes, or groups of `shard_group` of them that
    each hold a replica.
    """
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        if device.index >= torch.cuda.device_count():
            raise OSError(f"only {torch.cuda.device_count()} GPUs here; lower --nproc-per-node")
        torch.cuda.set_device(device)
        # cuDNN's attention compiles for every new shape, and each micro-batch has another: it made
        # an H100 as slow as two cores (measured here; see also modelscope/FunASR#3704)
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc would put weights, as they are gathered, between activations, and find no use for
        # the holes they leave: two processes of a 135M model took 3.9 GB each, and take 2.6 GB
        libc.mallopt(M_MMAP_THRESHOLD, 2**22)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)  # or small blocks come and go with every step
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        hours = timedelta(hours=3)  # ranks wait for one to download or to write the whole model
        dist.init_process_group(backend, timeout=hours, **({} if "RANK" in os.environ else alone))
        _cpu_group()  # while all are here
    n = dist.get_world_size()
    if not shard_group:
        return device, dist.init_device_mesh(device.type, (n,))
    if n % shard_group:
        raise CritiqueRMError(f"{n} processes are not groups of {shard_group}; mend --shard-group")
    shape, names = (n // shard_group, shard_group), ("replicate", "shard")
    return device, dist.init_device_mesh(device.type, shape, mesh_dim_names=names)


def meet(place: str, minutes: float = 30) -> None:
    """Waits for all ranks. Raises CritiqueRMError that names those which did not come in time."""
    try:
        dist.monitored_barrier(_cpu_group(), timedelta(minutes=minutes), wait_all_ranks=True)
    except RuntimeError as error:
        missing = re.search(r"Ranks? ([\d, ]+) failed", str(error))
        who = f"rank {missing[1]}" if missing else "a rank, which rank 0 can name,"
        raise CritiqueRMError(
            f"{who} did not come to {place} within {minutes:g} minutes; look at its last messages"
        ) from None


@cache
def _cpu_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where there are units for it; a CPU without them is 100 times slower in bf16."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def on_rank_zero(function: Callable[[], Any]) -> Any:
    """Calls a function on rank 0; its result, or its error, reaches all ranks."""
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (CritiqueRMError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise CritiqueRMError(outcome[1])
    return outcome[0]


# --------------------------------------------------------------------------------------------------
# Model


def find_model(name: str) -> str:
    """A model's folder: itself, or the snapshot of a Hub model's safetensors and text files."""
    if os.path.isdir(name):
        return name
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    with explain(f"{name}: neither a folder nor a Hub model", Exception):  # of many kinds
        return snapshot_download(name, allow_patterns=patterns)  # locks: one rank downloads a file


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    with explain(f"{folder}: no usable tokenizer", OSError, ValueError, KeyError):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_config(folder: str) -> PreTrainedConfig:
    """Reads and checks config.json; the result describes a reward model: one label, no dropout."""
    with explain(f"{folder}: no usable config.json", Exception):  # a wrong value raises many kinds
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "auto_map", None):
        raise CritiqueRMError(f"{folder}: the model asks to run its own code; that is never done")
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # both sides of a pair must see the same network
    config.dtype = torch.float32  # of the master weights, whatever the file holds
    config.num_labels = 1
    config.use_cache = False
    return config


def check_fits(config: PreTrainedConfig, encoder: Encoder) -> None:
    """Raises CritiqueRMError if there are ids or positions that the model has no embedding for."""
    if len(encoder.tokenizer) > config.vocab_size:
        raise CritiqueRMError(
            f"the tokenizer has {len(encoder.tokenizer)} tokens, the model {config.vocab_size}; "
            "they do not belong together"
        )
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if encoder.max_length_tokens > longest:
        raise CritiqueRMError(f"the model reads only {longest} tokens; lower --max-length-tokens")


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the config with new weights. Raises CritiqueRMError if it has no `score` head."""
    with explain(f"no sequence classification for {config.model_type!r} models", ValueError):
        model = AutoModelForSequenceClassification.from_config(config)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        kind = type(model).__name__
        raise CritiqueRMError(f"{kind} has no linear head named 'score'; use a decoder model")
    return model


def trunk_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    return getattr(model, model.base_model_prefix), model.score


def build_model(
    config: PreTrainedConfig, compute_dtype: torch.dtype, mesh: dist.DeviceMesh, empty: bool = True
) -> PreTrainedModel:
    """Builds a sharded model, without weights, which `read_weights` fills, or with new ones.

    The parameters are fp32 and sharded (FSDP2) block by block, then the rest of the trunk, then the
    head, so that the trunk computes in `compute_dtype` and the head in fp32. An empty one allocates
    nothing before it is sharded: no rank holds the whole model.
    """
    with torch.device("meta" if empty else "cpu"):
        model = make_model(config)
    trunk, head = trunk_and_head(model)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    blocks = next(m for m in trunk.modules() if isinstance(m, nn.ModuleList))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=mesh.shape[-1] > 1)
    fully_shard(trunk, mesh=mesh, mp_policy=policy)
    fully_shard(head, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model


def keep_gathered(model: PreTrainedModel, keep: bool) -> None:
    """Whether weights stay gathered, and gradients unreduced, after the next backward pass.

    A process that holds a whole replica can do both once a step: fewer copies, and less to send
    between replicas. Where a replica is sharded, no rank is to hold the whole.
    """
    for module in trunk_and_head(model):
        module.set_requires_gradient_sync(not keep)
        module.set_reshard_after_backward(not keep)


def read_weights(
    model: PreTrainedModel, folder: str, device: torch.device, head_seed: int | None = None
) -> None:
    """Fills a model without weights from a folder's safetensors, each rank reading its part.

    With `head_seed` the folder is a language model and the head starts anew; without it the head
    must be in the folder. Keys of a language model may carry the trunk's prefix or not.

    Raises CritiqueRMError for pickled weights, for missing keys and for shapes that do not match.
    """
    if not list(Path(folder).glob("*.safetensors")):
        raise CritiqueRMError(
            f"{folder}: no *.safetensors file; convert pickled weights elsewhere with "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    model.to_empty(device=device)
    fill_buffers(model)
    reader = dcp.HuggingFaceStorageReader(folder)
    with explain(f"{folder}: damaged safetensors", SafetensorError):
        stored = reader.read_metadata().state_dict_metadata
    weights = model.state_dict()
    if head_seed is not None:
        weights = {name: p for name, p in weights.items() if not name.startswith("score.")}
        init_head(model, head_seed)
    prefix = model.base_model_prefix + "."
    if not any(key.startswith(prefix) for key in stored):
        weights = {name.removeprefix(prefix): p for name, p in weights.items()}
    if missing := [name for name in weights if name not in stored]:
        raise CritiqueRMError(
            f"{folder}: {len(missing)} weights are not in its safetensors, such as "
            f"{', '.join(missing[:3])}; "
            + ("it has no reward head" if missing == ["score.weight"] else "its keys do not match")
        )
    for name, p in weights.items():
        if stored[name].size != p.shape:
            found, expected = list(stored[name].size), list(p.shape)
            raise CritiqueRMError(f"{folder}: {name} is {found}, expected {expected}")
    dcp.load(weights, storage_reader=reader)


def fill_buffers(model: PreTrainedModel) -> None:
    """Computes the buffers that no file holds, such as rotary frequencies and embedding scales.

    They are garbage after `to_empty`. `_init_weights` is what each model of transformers defines
    for this; the public `init_weights`, for all modules, fails on sharded recurrent ones.
    """
    stored = model.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about random numbers on shards, which reading overwrites
        for name, module in model.named_modules():
            buffers = {f"{name}.{key}" for key, _ in module.named_buffers(recurse=False)}
            if not stored >= buffers:
                model._init_weights(module)


def init_head(model: PreTrainedModel, seed: int) -> None:
    """Draws the head from N(0, 1/(H+1)): rewards start near N(0, 1), the same for any rank count.

    The deviation is that of Stiennon et al. 2020, "Learning to summarize from human feedback".
    """
    weight = model.score.weight
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    values /= math.sqrt(weight.shape[1] + 1)
    with torch.no_grad():
        weight.copy_(distribute_tensor(values, weight.device_mesh, weight.placements))


FILE_BYTES = 2**32  # in a file of the final weights


def save_model(model: PreTrainedModel, encoder: Encoder, folder: Path, card: str) -> None:
    """Writes a plain Hugging Face folder, its weights shard by shard. A collective call.

    Everything is written beside its final place first and moved at the end.
    """
    draft = folder / "draft"
    write_tensors(draft, model.state_dict(), FILE_BYTES, consolidate=True)

    def complete() -> None:
        shutil.rmtree(draft / "sharded")  # what the writer leaves behind
        model.config.save_pretrained(draft)
        encoder.tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(card)
        for path in draft.iterdir():
            path.replace(folder / path.name)
        draft.rmdir()

    on_rank_zero(complete)


def write_tensors(
    folder: Path, tensors: dict[str, Tensor], n_bytes: int, consolidate: bool = False
) -> None:
    """Writes a new folder of safetensors, each rank its part of a tensor. A collective call.

    A file holds `n_bytes`, or one tensor. `consolidate` joins the parts, left in `folder`/sharded.
    """
    on_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
    writer = dcp.HuggingFaceStorageWriter(
        str(folder),
        number_files(tensors, n_bytes),
        save_distributed=True,
        enable_consolidation=consolidate,
    )
    dcp.save(tensors, storage_writer=writer)


def number_files(tensors: dict[str, Tensor], n_bytes: int) -> dict[str, int]:
    """The file, from 1 on, that each tensor goes to: the writer holds two copies of a file."""
    numbers, number, used = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > n_bytes:
            number, used = number + 1, 0
        numbers[name], used = number, used + size
    return numbers


def shares_prefixes(config: PreTrainedConfig) -> bool:
    """Whether all layers know other tokens by our mask and positions alone.

    Recurrent and chunked layers do not, nor do models that count positions (ALiBi) or make masks
    themselves: those read one sequence per row.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        kinds <= {"full_attention", "sliding_attention"}
        and config.model_type not in ("bloom", "mpt", "gpt_neo")
        and not getattr(config, "alibi", False)
        and not getattr(config, "use_bidirectional_attention", False)
    )


def compute_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Rewards (S,) fp32 of the sequences of a micro-batch, read at each one's last token."""
    trunk, head = trunk_and_head(model)
    if shares_prefixes(model.config):
        masks = attention_masks(batch, model.config)
    else:  # one sequence per row: the model makes its own masks from what is not padding
        columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        masks = (batch.positions == columns).long()
    hidden = trunk(
        input_ids=batch.ids, attention_mask=masks, position_ids=batch.positions, use_cache=False
    ).last_hidden_state  # (R, T, H)
    return head(hidden[batch.last[0], batch.last[1]].float()).squeeze(-1)  # (S,)


def choose_pad_token(config: PreTrainedConfig, encoder: Encoder) -> None:
    """Makes the pad token differ from the end token, in the config and in the tokenizer.

    Hugging Face's classifiers read the last token that is not padding: with pad = end they read the
    token before the end and give another reward than ours. None if no token is left: they then
    score one sequence at a time.
    """
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = "right"
    wanted = [tokenizer.pad_token_id, tokenizer.unk_token_id, *encoder.control_ids.values()]
    pad = next((i for i in wanted if i not in (None, encoder.end_id)), None)
    config.pad_token_id = pad
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)


# --------------------------------------------------------------------------------------------------
# Loss


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor, centering: float = 0.0
) -> Tensor:
    """Bradley-Terry loss, summed: −log σ(r⁺ − r⁻ − margin), with r⁺, r⁻ and margins (B,) in fp32.

    `centering` × (r⁺ + r⁻)² keeps rewards near zero (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    loss = -nn.functional.logsigmoid(chosen - rejected - margins)
    return (loss + centering * (chosen + rejected) ** 2).sum()


# --------------------------------------------------------------------------------------------------
# Scoring


def load_reward_model(
    folder: str, use_critiques: bool | None = None, max_length_tokens: int | None = None
) -> tuple[PreTrainedModel, Encoder]:
    """Loads a reward model to score with: one of train.py's folders, or any like it.

    What the arguments leave open comes from the folder; a model of others is read with critiques,
    up to its longest input or 4,096 tokens, and to the last token its template writes.
    """
    device, mesh = start_processes()
    folder = find_model(folder)
    config = load_config(folder)
    ours = getattr(config, "critique_rm", None)
    ours = ours if isinstance(ours, dict) else {}
    reads_critiques = ours.get("critiques", True)
    longest = min(getattr(config, "max_position_embeddings", None) or 4096, 4096)
    encoder = Encoder(
        load_tokenizer(folder),
        max_length_tokens or ours.get("max_length_tokens", longest),
        reads_critiques if use_critiques is None else use_critiques,
        keep_tail=not ours,
    )
    if ours and encoder.use_critiques != reads_critiques:
        how = "with" if reads_critiques else "without"
        say(f"{folder}: trained {how} critiques; this tests it the other way round")
    check_fits(config, encoder)
    model = build_model(config, compute_dtype(device), mesh)
    read_weights(model, folder, device)
    return model.eval(), encoder


def score_answers(
    model: PreTrainedModel, encoder: Encoder, answers: Sequence[Answer], budget_tokens: int = 4096
) -> list[float | None]:
    """One reward per answer, the mean over its critiques; None where it cannot be scored.

    That is: without a critique where the model reads critiques, or with one that leaves no room.
    Long prompts and responses are cut, and counted in `encoder.counts`. A collective call.
    """
    usable = [bool(a.critiques) or not encoder.use_critiques for a in answers]
    encoded = [encoder.encode_answers([a]) if ok else None for a, ok in zip(answers, usable)]
    rewards = iter(score_groups(model, [e[0] for e in encoded if e], budget_tokens))
    return [float(np.mean(next(rewards))) if e else None for e in encoded]


@torch.no_grad()
def score_groups(
    model: PreTrainedModel, groups: Sequence[Sequence[np.ndarray]], budget_tokens: int
) -> list[list[float]]:
    """Rewards of groups of sequences (a group shares a prompt), each distinct sequence once.

    A collective call: every rank scores its share and all of them get all the rewards.
    """
    share = shares_prefixes(model.config)
    # A block has about 12 H² weights: in a row of 2 H tokens attention, which is slower for each
    # operation, takes as long as they do. Longer rows share more, but not enough to pay for it.
    row_tokens = min(budget_tokens, 2 * model.config.hidden_size)
    number: dict[bytes, int] = {}
    units: list[list[Trie]] = []
    for group in groups:
        new = {s.tobytes(): s for s in group if s.tobytes() not in number}
        for part in _split_group(sorted(new.values(), key=lambda s: s.tolist()), row_tokens):
            numbers = range(len(number), len(number) + len(part))
            number.update(zip((s.tobytes() for s in part), numbers))
            units += [[trie] for trie in build_tries(part, numbers, share)]
    device = next(model.parameters()).device
    rewards = torch.zeros(len(number), dtype=torch.float64, device=device)
    for rows in pack(units, budget_tokens, share, dist.get_rank(), dist.get_world_size()):
        batch = collate(rows, device)
        rewards[batch.numbers] = compute_rewards(model, batch).double()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass weights would stay gathered
    dist.all_reduce(rewards)
    values = rewards.tolist()
    return [[values[number[s.tobytes()]] for s in group] for group in groups]


def _split_group(sequences: list[np.ndarray], row_tokens: int) -> Iterator[list[np.ndarray]]:
    """Splits sorted sequences so that the trie of each part fits a row."""
    part, n_tokens, previous = [], 0, np.empty(0, np.int32)
    for sequence in sequences:
        new = len(sequence) - _common_prefix(previous, sequence)
        if part and n_tokens + new > row_tokens:
            yield part
            part, n_tokens, new = [], 0, len(sequence)
        part, n_tokens, previous = [*part, sequence], n_tokens + new, sequence
    if part:
        yield part


@dataclass(frozen=True)
class PairScore:
    """The rewards of a pair, and what a judge of length alone would go by."""

    id: str
    prompt_id: str  # a hash of the prompt, to cluster by
    subset: str
    chosen_reward: float
    rejected_reward: float
    chosen_words: int
    rejected_words: int
    chosen_critique_words: float | None  # mean over the critiques, None without
    rejected_critique_words: float | None


def score_pairs(
    model: PreTrainedModel, encoded: Sequence[EncodedPair], budget_tokens: int
) -> list[PairScore]:
    """Scores pairs; a reward is the mean over the answer's critiques. A collective call."""
    by_prompt: dict[tuple[Message, ...], list[np.ndarray]] = {}
    for e in encoded:
        by_prompt.setdefault(e.pair.prompt, []).extend([*e.chosen, *e.rejected])
    rewards = score_groups(model, list(by_prompt.values()), budget_tokens)
    streams = dict(zip(by_prompt, map(iter, rewards)))
    return [
        PairScore(
            e.pair.id,
            digest(e.pair.prompt),
            e.pair.subset,
            *(
                sum(itertools.islice(streams[e.pair.prompt], len(side))) / len(side)
                for side in (e.chosen, e.rejected)
            ),
            *(len(answer.response.split()) for answer in e.pair.answers),
            *(_mean_words(answer.critiques) for answer in e.pair.answers),
        )
        for e in encoded
    ]


def _mean_words(texts: Sequence[str]) -> float | None:
    return sum(len(text.split()) for text in texts) / len(texts) if texts else None


def write_scores(path: Path, scores: Sequence[PairScore]) -> None:
    """Writes one JSON line a pair."""
    replace_file(path, "".join(json.dumps(asdict(score)) + "\n" for score in scores))


def replace_file(path: Path, text: str | Iterable[str]) -> None:
    """Writes a file, whole or in parts, so that at any time the old or the whole new one is there.

    Raises CritiqueRMError, the old file as it was, where it cannot be written.
    """
    draft = path.with_name(path.name + ".draft")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file)
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise CritiqueRMError(f"{path} was not written: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """A new name is on disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
