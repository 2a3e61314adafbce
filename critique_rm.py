"""What generating, training and scoring must agree on.

The path of one preference pair, top to bottom: a record is read (`read_pairs`), each of its answers
becomes token ids (`Encoder`), answers that share a beginning become one trie (`build_trie`), tries
become micro-batches (`pack`), the model reads them (`compute_rewards`), and two rewards become a
loss (`pairwise_loss`). train.py, generate.py and evaluate.py import from here, never each other.

Method: Ye et al., "Improving Reward Models with Synthetic Critiques", arXiv 2405.20850.

Sections, some with their step in README.md's journey of a pair:
    Errors, messages, arguments, files to write
    1. Records
    1. Files of records
    1. Formats of records
    3. Text and tokens
    4. Packing
    Processes
    5. Model
    6. Loss
    Scoring

Shapes: B pairs, S sequences, R rows, T tokens in a row, H hidden size.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import difflib
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
import zlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, cached_property, lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


class Later:
    """A module that is imported when something of it is first used.

    Reading records takes none of them: generate.py then starts in half a second instead of four,
    and takes 300 MB less.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


torch, nn, transformers = Later("torch"), Later("torch.nn"), Later("transformers")
dist, fsdp = Later("torch.distributed"), Later("torch.distributed.fsdp")
dcp, dtensor = Later("torch.distributed.checkpoint"), Later("torch.distributed.tensor")
safetensors, hub = Later("safetensors"), Later("huggingface_hub")

# --------------------------------------------------------------------------------------------------
# Errors, messages, arguments, files to write


class CritiqueRMError(Exception):
    """A mistake in the input or the surroundings: where it is, what was found, what to do."""


@contextmanager
def errors_as(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of other packages into a CritiqueRMError that adds what they say."""
    try:
        yield
    except CritiqueRMError:
        raise
    except kinds as error:
        raise CritiqueRMError(f"{problem} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    text = str(error).partition("; use sys.")[0]  # then comes advice about Python
    line = " ".join(text.split()) or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def log(message: str) -> None:
    """Writes one line to stderr, on rank 0 only (torchrun sets RANK)."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def log_error(script: str, error: BaseException) -> None:
    """Writes an error as one line to stderr; with CRITIQUE_RM_DEBUG set, its traceback before it.

    Ours once on each machine, since its ranks meet the same ones; others may be of one rank alone.
    """
    if os.environ.get("CRITIQUE_RM_DEBUG"):
        traceback.print_exception(error)
    where = script
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_first:
        where += f": rank {os.environ['RANK']}"
    if is_first or not isinstance(error, CritiqueRMError):
        print(f"{where}: {_first_line(error)}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Ends the process at once.

    Threads of libraries may still run or wait for answers: at an ordinary exit they took seconds to
    end, and once a rank aborted ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def nonnegative_int(text: str, least: int = 0) -> int:
    """The type of an argument that is a whole number, 0 or more."""
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return int(text)


def positive_int(text: str) -> int:
    return nonnegative_int(text, least=1)


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


class HelpFormatter(argparse.HelpFormatter):
    """Adds its default to the help of an argument, unless there is none or it says nothing.

    A default that depends on other arguments is None in the parser, and its help says it in words.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is False or action.default in EMPTY
        is_required = action.required or not action.option_strings
        if says_nothing or is_required or action.default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


# --------------------------------------------------------------------------------------------------
# 1. Records


class Message(NamedTuple):
    """One turn of a conversation.

    `more` is what it says beside its content (tool calls, reasoning, a name), as a JSON object, or
    empty. A prompt may begin with a message of role "tools": the functions that could be called.
    """

    role: str
    content: str
    more: str = ""

    @property
    def text(self) -> str:
        """All of it, for a person or a critic."""
        return "\n".join(filter(None, (self.content, self.more)))

    def to_dict(self) -> dict:
        """As chat templates and our files have it."""
        return {"role": self.role, "content": self.content} | json.loads(self.more or "{}")

    def without(self, name: str) -> "Message":
        """The message without a field of `more`."""
        more = json.loads(self.more or "{}")
        more.pop(name, None)
        return self._replace(more=to_json(more) if more else "")


@dataclass(frozen=True)
class Answer:
    """One response to one prompt, with the critiques written about it (none, one or several)."""

    prompt: tuple[Message, ...]
    response: str
    critiques: tuple[str, ...] = ()
    id: str = ""
    more: str = ""  # as in a Message
    where: str = field(default="", compare=False)  # file and line, for messages

    @property
    def message(self) -> Message:
        return Message("assistant", self.response, self.more)


@dataclass(frozen=True)
class Pair:
    """One preference: `chosen` was judged better than `rejected`, by at least `margin`.

    Pairs of one `group` compare responses of one record that lists several.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_critiques: tuple[str, ...] = ()
    rejected_critiques: tuple[str, ...] = ()
    subset: str = ""
    margin: float = 0.0
    group: str = ""
    chosen_index: int = 0  # in the lists of the group
    rejected_index: int = 0
    chosen_more: str = ""  # as in a Message
    rejected_more: str = ""
    where: str = field(default="", compare=False)  # file and line, for messages

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """Chosen and rejected, each on its own: what a critic or the model may see at a time."""
        return (
            Answer(self.prompt, self.chosen, self.chosen_critiques, more=self.chosen_more),
            Answer(self.prompt, self.rejected, self.rejected_critiques, more=self.rejected_more),
        )


SIDES = ("chosen", "rejected")
KINDS = {Pair: "a pair", Answer: "a single answer"}
ROLES = ("system", "developer", "user", "assistant", "tool")  # templates print them: no free text
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
# What a message may say beside role and content; the chat template knows these fields.
MESSAGE_FIELDS = tuple("tool_calls tool_call_id name reasoning_content reasoning thinking".split())
EMPTY = (None, "", [], {})  # a field with nothing in it is no field
MAX_LINE_BYTES = 16 * 2**20
CRITIQUE_FIELDS = ("chosen_critique", "rejected_critique", "chosen_feedback", "rejected_feedback")
ONLY_MESSAGES = ("context", "conversations", "messages")  # as text they may be half of a prompt
PROMPT_FIELDS = ("prompt", "instruction", "input", "question", "query", *ONLY_MESSAGES)
READ_FIELDS = (
    *("id", "subset", "margin", "system", "history", "tools", *SIDES, "response"),
    *("critique", *CRITIQUE_FIELDS, *PROMPT_FIELDS),
)
CRITIQUES_MISSING = "run generate.py on it first, or pass --no-critiques"
# Fields that public data sets have and that say nothing about which response is better, or say it
# again. All others that are not read are named on stderr.
UNUSED_FIELDS = frozenset(
    """
    additional_metadata agreement annotations category chosen_model chosen_rating chosen_score
    cmp_key correct_answers created custom_system_prompt dataset domain fine-grained_score flaw
    incorrect_answers index individual_preference judge lang language length meta metadata model
    models motivation_app num_correct num_incorrect original_chosen original_id original_rejected
    overall_score preference_strength principle prompt_id rejected_model rejected_rating
    rejected_score response_model score_chosen score_rejected source split task_id timestamp
    total_completions url
    """.split()
)


class Notes:
    """What is to be said of a file once it is read."""

    def __init__(self) -> None:
        self.sentences: Counter[str] = Counter()  # "{n}" stands for how often
        self.ignored: Counter[str] = Counter()  # fields by name
        self.made_ids: Counter[str] = Counter()

    def log(self, source: str) -> None:
        """Says it on stderr."""
        for sentence, n in self.sentences.items():
            log(f"{source}: {sentence.format(n=n)}")
        ignored = []
        for name, n in sorted(self.ignored.items()):
            records = f"{n} record{'s' if n > 1 else ''}"
            known = difflib.get_close_matches(name, READ_FIELDS, n=1, cutoff=0.85)
            if known and known != [name]:
                records += f"; is {known[0]!r} meant?"
            ignored.append(f"{_shorten(name)} ({records})")
        if ignored:
            log(f"{source}: ignored: {', '.join(ignored)}")


class Record:
    """A JSON object that knows which of its fields were read, so that none is dropped without a word."""

    def __init__(self, where: str, fields: dict, notes: Notes) -> None:
        self.where = where
        self.fields = fields
        self.notes = notes
        self.present = set()
        for name, value in fields.items():
            if value or isinstance(value, int | float):  # nothing else that is false says anything
                self.present.add(name)
        self.unread = set(self.present)

    def __contains__(self, name: str) -> bool:
        return name in self.present

    def get(self, name: str) -> Any:
        """The value of a field, None if it is missing; the field counts as read."""
        self.unread.discard(name)
        return self.fields.get(name)

    def text(self, name: str, may_be_empty: bool = False) -> str:
        """The text of a field. Raises CritiqueRMError if it is missing, empty or no text."""
        if name not in self.fields:
            raise CritiqueRMError(f"no field {name!r}; found {_names(self)}")
        return check_text(self.get(name), name, may_be_empty)

    def optional_text(self, name: str) -> str:
        return self.text(name) if name in self else ""

    def id(self, name: str = "id") -> str:
        """The id in a field, empty if there is none; pandas writes whole numbers as 3.0."""
        value = self.get(name)
        if value is None:
            return ""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise CritiqueRMError(f"{name!r} is {_shorten(value)}; expected text or a whole number")
        return check_text(str(value), name)

    def made_id(self) -> str:
        """An id from the content, of a record that has none; repeats are numbered."""
        made = digest(self.fields)
        self.notes.made_ids[made] += 1
        n = self.notes.made_ids[made]
        return made if n == 1 else f"{made}-{n}"

    def critiques(self, name: str) -> tuple[str, ...]:
        """The critique of a field, or several."""
        return check_critiques(self.get(name), name)

    def finish(self) -> None:
        """Notes the fields that nothing has read."""
        self.notes.ignored.update(self.unread - UNUSED_FIELDS)


def read_pairs(source: str, skip_bad: bool = False, critiques: str | None = None) -> list[Pair]:
    """Reads preference pairs from a file, or from a Hub data set `NAME` or `NAME:SPLIT`.

    Files are JSON lines or one JSON array, plain or gzipped, or parquet, told apart by content.
    Each record is recognised by its fields (see `_parse_pairs`). Lists of responses give
    all pairs of a chosen and a rejected one. Records without an id get one from their content. With
    `critiques`, another file of pairs or of single answers, what it says of a pair, or else of a
    response to a prompt, takes the place of its critiques.

    Raises CritiqueRMError naming file, line, field, what was found and what to do; with `skip_bad`
    records that are wrong in themselves are left out and counted instead.
    """
    pairs = list(stream_pairs(source, skip_bad))
    return _replace_critiques(pairs, critiques, source, skip_bad) if critiques else pairs


def stream_pairs(source: str, skip_bad: bool = False) -> Iterator[Pair]:
    """The pairs of `read_pairs` one by one, without keeping them."""
    pairs = _stream(source, skip_bad, _parse_pairs, "preference pair")
    return _with_unique_ids(pairs, source)


def read_answers(source: str, skip_bad: bool = False) -> list[Answer]:
    """Reads single records {prompt, response, critique?, id?}, to be scored on their own."""
    return list(_stream(source, skip_bad, lambda record: [_parse_answer(record)], "answer"))


def stream_pairs_or_answers(source: str, skip_bad: bool = False) -> Iterator[Pair | Answer]:
    """The pairs of a file or its single answers, whichever it holds, all with ids of their own.

    Raises CritiqueRMError at the first record of the other kind.
    """
    items = _stream(source, skip_bad, _parse_pairs_or_answer, "preference pair or answer")
    return _with_unique_ids(_of_one_kind(items), source)


def _stream(
    source: str, skip_bad: bool, parse: Callable[[Record], list], what: str
) -> Iterator[Pair | Answer]:
    """What `parse` makes of each record, then what is to be said of all of them."""
    notes = Notes()
    n_items = 0
    for _, items in read_rows(source, lambda *row: parse(Record(*row, notes)), skip_bad):
        n_items += len(items)
        yield from items
    notes.log(source)
    if not n_items:
        raise CritiqueRMError(f"{source}: no {what} in it; expected a JSON object a line")


def _of_one_kind(items: Iterable[Pair | Answer]) -> Iterator[Pair | Answer]:
    """Refuses the first item that is not of the first one's kind."""
    kind = None
    for item in items:
        kind = kind or type(item)
        if type(item) is not kind:
            found = f"{KINDS[type(item)]} in a file that begins with {KINDS[kind]}"
            raise CritiqueRMError(f"{item.where}: {found}; put pairs and answers into two files")
        yield item


def _replace_critiques(
    pairs: list[Pair], critique_file: str, source: str, skip_bad: bool
) -> list[Pair]:
    """The pairs of `source` with critiques from another file, found by id and texts, else by texts."""
    notes = Notes()
    found: dict[tuple, tuple[str, ...]] = {}
    rows = read_rows(critique_file, lambda *row: _parse_critiques(Record(*row, notes)), skip_bad)
    for _, (reviewed_pairs, answers) in rows:
        for pair in reviewed_pairs:
            for side, answer in zip(SIDES, pair.answers):
                _add_critiques(found, (side, *_pair_key(pair)), answer.critiques)
        for answer in answers:
            _add_critiques(found, _answer_key(answer), answer.critiques)
    notes.log(critique_file)
    replaced = []
    n_found = 0
    for pair in pairs:
        critiques = {}
        for side, answer in zip(SIDES, pair.answers):
            by_id = found.get((side, *_pair_key(pair)))
            critiques[f"{side}_critiques"] = by_id or found.get(_answer_key(answer), ())
        n_found += sum(map(bool, critiques.values()))
        replaced.append(replace(pair, **critiques))
    if not n_found:
        advice = "it must hold their texts, as generate.py writes them"
        raise CritiqueRMError(
            f"{critique_file}: no critique in it is of a response of {source}; {advice}"
        )
    log(f"{critique_file}: critiques of {n_found} of {2 * len(pairs)} responses of {source}")
    return replaced


def _add_critiques(found: dict, key: tuple, critiques: tuple[str, ...]) -> None:
    """Adds critiques of a pair's side or of a response to those that are there, each once."""
    known = found.get(key, ())
    found[key] = known + tuple(critique for critique in critiques if critique not in known)


def _pair_key(pair: Pair) -> tuple:
    """Id and texts, since two data sets may use one id."""
    return pair.id, pair.prompt, pair.chosen, pair.rejected, pair.chosen_more, pair.rejected_more


def _answer_key(answer: Answer) -> tuple:
    """What says that two files mean the same response; data sets strip white space or not."""
    prompt = tuple((m.role, m.content.strip(), m.more) for m in answer.prompt)
    return prompt, answer.response.strip(), answer.more


def read_rows(
    source: str, parse: Callable[[str, dict], Any] | None = None, skip_bad: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yields (where, what `parse` makes of where and object) from a file or a Hub data set.

    Raises CritiqueRMError that begins with `where`. With `skip_bad` it says how many it left out
    instead, unless nothing else is there.
    """
    n_good, bad = 0, []
    for where, record in _read_records(source):
        try:
            row = _object(record)
            row = parse(where, row) if parse else row
        except CritiqueRMError as error:
            bad.append(f"{where}: {error}")
            if not skip_bad:
                raise CritiqueRMError(bad[0]) from error
        else:
            n_good += 1
            yield where, row
    if bad and not n_good:
        raise CritiqueRMError(bad[0])
    if bad:
        log(f"{source}: {len(bad)} bad records skipped, the first: {bad[0]}")


def group_pairs(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The pairs of one record together, if it lists several responses; each other pair alone."""
    groups: list[list[Pair]] = []
    for pair in pairs:
        if pair.group and groups and groups[-1][0].group == pair.group:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def digest(*values: object) -> str:
    """A short stable hash of JSON-like values (64 bits as hex): for ids and to notice changes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _without_more(prompt: Sequence[Message]) -> list[tuple]:
    """The messages without `more` where it is empty: digests made before there was one stay."""
    return [tuple(message) if message.more else tuple(message)[:2] for message in prompt]


def write_prompt(prompt: Sequence[Message]) -> dict[str, Any]:
    """The fields of a record that say what is asked, as `read_pairs` takes them back.

    The prompt is a text where it is no more than that.
    """
    record = {}
    turns = list(prompt)
    if turns[0].role == "tools":
        record["tools"] = json.loads(turns.pop(0).content)
    is_plain = len(turns) == 1 and turns[0].role == "user" and not turns[0].more
    if is_plain and turns[0].content.strip():
        record["prompt"] = turns[0].content
    else:
        record["prompt"] = [message.to_dict() for message in turns]
    return record


def digest_prompt(prompt: Sequence[Message]) -> str:
    """A hash to tell prompts apart."""
    return digest(_without_more(prompt))


def digest_pair(pair: Pair | Answer) -> str:
    """A hash of all that a pair, or a single answer, says."""
    said = {}
    for item in fields(pair):
        value = getattr(pair, item.name)
        is_late = item.name.endswith(("group", "_index", "_more"))  # as in _without_more
        if item.compare and (value or not is_late):
            said[item.name] = value
    return digest(said | {"prompt": _without_more(pair.prompt)})


def _with_unique_ids(items: Iterable[Pair | Answer], source: str) -> Iterator[Pair | Answer]:
    """Refuses explicit ids that clash; makes missing ones from the content, numbering repeats."""
    seen: dict[str, str] = {}
    n_repeats = 0
    for item in items:
        if item.id in seen:
            raise CritiqueRMError(
                f"{item.where}: id {item.id!r} was already used at {seen[item.id]}; "
                "make ids unique, or remove them and they are made from the content"
            )
        wanted = item.id or digest_pair(item)
        item_id = wanted
        n = 1
        while item_id in seen:
            n += 1
            item_id = f"{wanted}-{n}"
        n_repeats += n > 1
        seen[item_id] = item.where
        yield item if item.id else replace(item, id=item_id)
    if n_repeats:
        what = "pairs" if isinstance(item, Pair) else "answers"
        log(f"{source}: {n_repeats} {what} repeat an earlier one exactly (kept, ids numbered)")


# --------------------------------------------------------------------------------------------------
# 1. Files of records

READABLE = "supported: JSON lines, a JSON array (either may be gzipped), parquet"
TO_JSON_LINES = "pandas.read_csv(FILE).to_json('pairs.jsonl', orient='records', lines=True)"
BLANKS = b"\xef\xbb\xbf \t\r\n"  # with the mark that some editors put at the beginning
OTHER_KINDS = {  # first bytes: what they mean, and what to do
    b"\xfd7zXZ\x00": ("an xz file", "unpack it with xz -d"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it with zstd -d"),
    b"BZh": ("a bzip2 file", "unpack it with bunzip2"),
    b"PK\x03\x04": ("a zip file", "unpack it with unzip"),
    b"ARROW1": ("an Arrow file", "write it with datasets' to_json"),
    b"\xff\xfe": ("UTF-16 text, not UTF-8", "convert it with iconv -f utf-16 -t utf-8"),
    b"\xfe\xff": ("UTF-16 text, not UTF-8", "convert it with iconv -f utf-16 -t utf-8"),
}


def _read_records(source: str) -> Iterator[tuple[str, bytes | object]]:
    """Yields lines of bytes or what an array holds; no more than one is in memory at a time."""
    if not os.path.exists(source):
        yield from _read_hub(source)
        return
    if os.path.isdir(source):
        advice = "of what save_to_disk wrote: load_from_disk(FOLDER)[SPLIT].to_json('pairs.jsonl')"
        raise CritiqueRMError(f"{source}: a folder; {READABLE}; {advice}")
    problem = f"{source}: cannot be read; is the file complete?"
    with errors_as(problem, OSError, EOFError, zlib.error), open(source, "rb") as raw:
        start = raw.peek(8)
        if start.startswith(b"PAR1"):
            yield from _read_parquet(source)
            return
        stream = gzip.open(raw) if start.startswith(b"\x1f\x8b") else raw
        start = stream.peek(4096)[:4096]
        _check_kind(source, start)
        is_array = start.lstrip(BLANKS)[:1] == b"["
        yield from (_read_array if is_array else _read_lines)(source, stream)


def _check_kind(source: str, start: bytes) -> None:
    """Refuses by its first bytes a file that holds no JSON lines: not one bad record, but all."""
    for magic, (kind, advice) in OTHER_KINDS.items():
        if start.startswith(magic):
            raise CritiqueRMError(f"{source}: {kind}; {READABLE}; {advice}")
    if b"\0" in start:
        raise CritiqueRMError(f"{source}: a binary file, not UTF-8 text; {READABLE}")
    start = start.lstrip(BLANKS)
    if source.lower().endswith((".csv", ".tsv")) and start[:1] not in (b"{", b"[", b""):
        raise CritiqueRMError(f"{source}: a table; {READABLE}; convert it: {TO_JSON_LINES}")
    first, newline, _ = start.partition(b"\n")
    if newline and first.strip() == b"{":
        advice = (
            "put each object on a line with jq -c . FILE, or items of a list with jq -c .NAME[]"
        )
        raise CritiqueRMError(f"{source}: a JSON object over several lines; {READABLE}; {advice}")


def _read_parquet(source: str) -> Iterator[tuple[str, dict]]:
    """Yields the rows of a parquet file: the form in which the Hub keeps data sets."""
    with errors_as(f"{source}: a parquet file; to read it run: pip install pyarrow", ImportError):
        from pyarrow import parquet
    with errors_as(f"{source}: damaged parquet", Exception):
        batches = parquet.ParquetFile(source).iter_batches(batch_size=256)
    number = 0
    while True:
        with errors_as(f"{source}: damaged parquet, after row {number}", Exception):
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for row in rows:
            number += 1
            yield f"{source}: row {number}", without_nulls(row)


def without_nulls(value: object) -> Any:
    """A row without nulls: a column's records have all the fields that any of them has."""
    if isinstance(value, dict):
        return {k: without_nulls(item) for k, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _read_lines(source: str, stream) -> Iterator[tuple[str, bytes]]:
    parts = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(parts, 1):
        if line.strip(BLANKS):
            yield f"{source}:{number}", line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):  # the rest of a long one
            line = next(parts, b"")


def _read_array(source: str, stream) -> Iterator[tuple[str, object]]:
    """Yields the items of an array one by one: tries to decode the next, and if it fails reads on."""
    text = io.TextIOWrapper(stream, "utf-8-sig")
    decode = json.JSONDecoder(object_pairs_hook=to_object).raw_decode
    buffer = ""  # read, and not yet decoded
    number = 0
    while True:
        buffer = buffer.lstrip(" \t\r\n")
        before = "," if number else "["
        try:
            if buffer[:1] != before:
                raise ValueError(f"expected {before}")
            item = buffer[1:].lstrip(" \t\r\n")
            value, end = decode(item)
        except CritiqueRMError as error:
            raise CritiqueRMError(f"{source}: item {number + 1}: {error}") from None
        except (ValueError, RecursionError) as error:  # wrong, or not yet read to its end
            with errors_as(f"{source}: not UTF-8 text, after item {number}", UnicodeDecodeError):
                more = text.read(max(2**14, len(buffer)))
            end_of_array = "]" if number else "[]"
            if not more and "".join(buffer.split()) == end_of_array:
                return
            if not more or len(buffer) > MAX_LINE_BYTES or isinstance(error, RecursionError):
                problem = f"not valid JSON, or over 16 MB ({_first_line(error)})"
                raise CritiqueRMError(f"{source}: item {number + 1}: {problem}") from None
            buffer += more
        else:
            buffer = item[end:]
            number += 1
            yield f"{source}: item {number}", value


def _read_hub(source: str) -> Iterator[tuple[str, dict]]:
    name, _, split = source.partition(":")
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    if not is_name or re.search(r"\.(jsonl?(\.gz)?|parquet|csv|tsv)$", name):
        raise CritiqueRMError(f"{source}: no such file")
    advice = "to read it as a Hub data set run: pip install datasets"
    with errors_as(f"{source}: no such file; {advice}", ImportError):
        from datasets import load_dataset
    with errors_as(f"{source}: neither a file nor a Hub data set", Exception):  # of many kinds
        rows = load_dataset(name, split=split or "train")
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", without_nulls(row)


def to_object(fields: list[tuple[str, object]]) -> dict:
    """A JSON object, of which no field may come twice."""
    made = dict(fields)
    if len(made) < len(fields):
        name = Counter(name for name, _ in fields).most_common(1)[0][0]
        raise CritiqueRMError(f"the field {_shorten(name)} comes twice; keep one")
    return made


def _object(record: bytes | object) -> dict:
    """The JSON object of a record."""
    if isinstance(record, bytes):
        if len(record) > MAX_LINE_BYTES:
            raise CritiqueRMError("line longer than 16 MB; shorten or remove it")
        try:  # `errors_as` would take a third of the time
            record = json.loads(record.decode("utf-8-sig"), object_pairs_hook=to_object)
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text; expected a JSON object ({_first_line(error)})"
            raise CritiqueRMError(problem) from error
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON; correct or remove it ({READABLE}) ({_first_line(error)})"
            raise CritiqueRMError(problem) from error
    if not isinstance(record, dict):
        raise CritiqueRMError(f"expected a JSON object, found {_shorten(record)}")
    _check_is_row(record)
    return record


def _check_is_row(record: dict) -> None:
    """Refuses an object that holds all rows of a data set in a list, such as {"train": [...]}."""
    lists = []
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lists.append(name)
    if lists and lists == list(record) and not {*lists} & {*READ_FIELDS}:
        found = f"an object that holds a list under {_shorten(lists[0])}"
        advice = f"expected a record; put the items on lines with jq -c .{lists[0]}[]"
        raise CritiqueRMError(f"{found}; {advice}")


# --------------------------------------------------------------------------------------------------
# 1. Formats of records


@dataclass(frozen=True)
class Labelled:
    """A format of two responses, with a label that says which of them is better."""

    mark: str  # the field that tells it from others
    responses: tuple[str, str]  # fields
    better: Callable[[Record], int]  # 1, 2, or 0 for a tie
    id: str = "id"  # field
    id_prefix: str = ""
    subset: Callable[[Record], str] = lambda record: ""
    critiques: tuple[str, str] | None = None  # fields


def _majority(record: Record) -> int:
    """What two of three annotators say: 1 or 2; 0 is a tie."""
    votes = [record.get("annotator1"), record.get("annotator2"), record.get("annotator3")]
    for vote in votes:
        if vote not in (0, 1, 2):
            raise CritiqueRMError(f"annotators are {votes}; expected 0, 1 or 2 each")
    if votes.count(1) >= 2:
        return 1
    return 2 if votes.count(2) >= 2 else 0


def _label(field: str, labels: dict[object, int]) -> Callable[[Record], int]:
    def better(record: Record) -> int:
        value = record.get(field)
        if isinstance(value, list | dict | bool) or value not in labels:
            expected = " or ".join(map(str, labels))
            raise CritiqueRMError(f"{field!r} is {_shorten(value)}; expected {expected}")
        return labels[value]

    return better


JUDGEBENCH_SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")


def _judgebench_source(record: Record) -> str:
    source = record.optional_text("source")
    return next((name for name in JUDGEBENCH_SOURCES if source.startswith(name)), source)


LABELLED = {  # by name; in this order the first whose mark is there is taken
    "PandaLM": Labelled(
        mark="annotator1",
        responses=("response1", "response2"),
        better=_majority,
        id="idx",
        id_prefix="pandalm-",
        subset=lambda record: "pandalm",
    ),
    "LLMBar": Labelled(
        mark="output_1",
        responses=("output_1", "output_2"),
        better=_label("label", {1: 1, 2: 2}),
    ),
    "JudgeBench": Labelled(
        mark="response_A",
        responses=("response_A", "response_B"),
        better=_label("label", {"A>B": 1, "B>A": 2}),
        id="pair_id",
        subset=_judgebench_source,
    ),
    "HelpSteer3": Labelled(
        mark="overall_preference",
        responses=("response1", "response2"),
        better=_label("overall_preference", {-3: 1, -2: 1, -1: 1, 0: 0, 1: 2, 2: 2, 3: 2}),
        subset=lambda record: record.optional_text("domain"),
        critiques=("feedback1", "feedback2"),
    ),
}


def _parse_pairs(record: Record) -> list[Pair]:
    """Recognises the format by its fields; a tie gives no pair, lists of responses several."""
    form = next((form for form in LABELLED.values() if form.mark in record), None)
    pairs = _read_labelled(record, form) if form else _read_preference(record)
    record.finish()
    return pairs


def _read_labelled(record: Record, form: Labelled) -> list[Pair]:
    best = form.better(record)
    prompt = _required_prompt(record)
    texts = []
    for name in form.responses:
        if isinstance(record.get(name), bool):  # PandaLM has six such responses
            texts.append(str(record.get(name)))
        else:
            texts.append(record.text(name, may_be_empty=True))
    critiques = [(), ()]
    if form.critiques:
        critiques = [_without_grade(record, record.critiques(name)) for name in form.critiques]
    number = record.id(form.id)
    subset = form.subset(record)
    if best == 0:
        record.notes.sentences[
            "{n} pairs without a majority or preference for one side dropped"
        ] += 1
        return []
    if best == 2:
        texts, critiques = texts[::-1], critiques[::-1]
    pair_id = f"{form.id_prefix}{number}" if number else ""
    return [Pair(pair_id, prompt, *texts, *critiques, subset, where=record.where)]


def _without_grade(record: Record, critiques: tuple[str, ...]) -> tuple[str, ...]:
    """HelpSteer3's feedback without its first sentence: a grade, which a critique must not give."""
    kept = []
    for critique in critiques:
        text = GRADE_SENTENCE.sub("", critique, count=1)
        if text != critique:
            record.notes.sentences["{n} critiques read without the grade they begin with"] += 1
        if text:
            kept.append(text)
    return tuple(kept)


GRADE_SENTENCE = re.compile(
    r"\A\s*The response is (not|slightly|partially|mostly|perfectly) helpful[^.]*(\.\s*|\Z)"
)


def _read_preference(record: Record) -> list[Pair]:
    """Ours, TRL (explicit or implicit prompt, plain or chat), UltraFeedback, CLoud, benchmarks."""
    is_list, sides = False, []
    for side in SIDES:
        conversations, several = _responses(record, side)
        is_list = is_list or several
        sides.append(conversations)
    starts = {messages[:-1] for messages in sides[0] + sides[1]}
    if len(starts) > 1:
        raise CritiqueRMError(
            "'chosen' and 'rejected' differ before their last message; a pair needs one prompt"
        )
    prompt = _prompt(record, starts.pop(), sides)
    if not prompt:
        prompt, sides = _implicit_prompt(record, sides)
    prompt = _with_system(record, prompt)
    critiques = []
    for side, conversations in zip(SIDES, sides):
        critiques.append(_critiques_along(record, side, len(conversations) if is_list else None))
    subset = record.optional_text("subset") or record.optional_text("domain")
    margin = _margin(record)
    record_id = record.id()
    group = (record_id or record.made_id()) if is_list else ""
    pairs = []
    for i, chosen in enumerate(sides[0]):
        for j, rejected in enumerate(sides[1]):
            pairs.append(
                Pair(
                    id=f"{group}/{i + 1}-{j + 1}" if group else record_id,
                    prompt=prompt,
                    chosen=chosen[-1].content,
                    rejected=rejected[-1].content,
                    chosen_critiques=critiques[0][i],
                    rejected_critiques=critiques[1][j],
                    subset=subset,
                    margin=margin,
                    group=group,
                    chosen_index=i,
                    rejected_index=j,
                    chosen_more=chosen[-1].more,
                    rejected_more=rejected[-1].more,
                    where=record.where,
                )
            )
    return pairs


def _responses(record: Record, side: str) -> tuple[list[tuple[Message, ...]], bool]:
    """The responses of one side, each at the end of a conversation; whether it is a list of them."""
    value = record.get(side)
    if isinstance(value, str):
        has_prompt = not record.present.isdisjoint(PROMPT_FIELDS)
        if value.lstrip().startswith("Human:") and not has_prompt:
            return [_transcript(side, value)], False
        return [(Message("assistant", check_text(value, side, may_be_empty=True)),)], False
    if isinstance(value, dict):  # one message without the list around it
        value = [value]
    several = isinstance(value, list) and value and not isinstance(value[0], dict)
    conversations = []
    for item in value if several else [value]:
        if several or isinstance(item, list):
            messages = check_messages(item, side, "assistant")
        else:
            messages = (Message("assistant", record.text(side, may_be_empty=True)),)
        if messages[-1].role != "assistant":
            raise CritiqueRMError(f"the last message of {side!r} is not the assistant's")
        conversations.append(messages)
    return conversations, bool(several)


def _transcript(side: str, text: str) -> tuple[Message, ...]:
    """HH-RLHF: turns that begin with "Human:" or "Assistant:" after an empty line."""
    roles = {"Human": "user", "Assistant": "assistant"}
    _, *parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip())
    turns = zip(parts[::2], parts[1::2])
    messages = [{"role": roles[name], "content": content} for name, content in turns]
    return check_messages(messages, side, "assistant")


def _prompt(
    record: Record, start: tuple[Message, ...] = (), sides: Sequence[list] = ()
) -> tuple[Message, ...]:
    """What is asked: earlier turns, then the one field that holds the prompt.

    `start` is what chosen and rejected have in common before their last message. Empty if there is
    no prompt at all. Raises CritiqueRMError where two fields could be the prompt.
    """
    names = [name for name in PROMPT_FIELDS if name in record.present]
    if "messages" in names and start:  # UltraFeedback-binarized repeats the chosen conversation
        if check_messages(record.fields["messages"], "messages", "user") in (sides[0][0], start):
            record.get("messages")
            names.remove("messages")
    if not names and "prompt" in record.fields and not start:
        names = ["prompt"]  # there, but empty: refused as such
    if isinstance(record.fields.get("instruction"), str) and "input" in names[1:]:
        names.remove("input")  # Alpaca's second half of a prompt
    if len(names) > 1:
        raise CritiqueRMError(f"{names[0]!r} and {names[1]!r} could both be the prompt; keep one")
    asked = _asked(record, names[0]) if names else ()
    if history := _history(record):
        n_first = sum(message.role in ("system", "developer") for message in asked[:1])
        asked = asked[:n_first] + history + asked[n_first:]
    if asked and asked[-1].role == "assistant" and not start:
        raise CritiqueRMError(f"{[*names, 'history'][0]!r} ends with an answer, not a question")
    return _join(asked, start)


def _asked(record: Record, name: str) -> tuple[Message, ...]:
    """What the field says that holds the prompt; Alpaca has it in two halves."""
    value = record.get(name)
    if name in ONLY_MESSAGES and not isinstance(value, list):
        found = _shorten(value)
        raise CritiqueRMError(f"{name!r} is {found}; expected messages, or name it 'prompt'")
    if name == "instruction" and isinstance(value, str) and "input" in record:
        value = "\n\n".join(filter(None, (value, record.text("input", may_be_empty=True))))
    return check_messages(value, name, "user")


def _required_prompt(record: Record) -> tuple[Message, ...]:
    prompt = _prompt(record)
    if not prompt:
        raise CritiqueRMError(f"no field 'prompt'; found {_names(record)}")
    return _with_system(record, prompt)


def _with_system(record: Record, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt behind the system text and the tools of the record, if it has any."""
    system = record.optional_text("system")
    if system and prompt[0].role == "system" and prompt[0].content != system:
        raise CritiqueRMError("'system' differs from the system message; keep one")
    if system and prompt[0].role != "system":
        prompt = (Message("system", system), *prompt)
    if "tools" in record:
        prompt = (_tools(record), *prompt)
    return prompt


def _join(asked: tuple[Message, ...], start: tuple[Message, ...]) -> tuple[Message, ...]:
    """Prompt and beginning of the responses, of which one may repeat the other.

    UltraFeedback's prompt is one of the messages before the response; TRL's explicit prompt may
    stand before a beginning of its own.
    """
    if not asked or not start:
        return asked or start
    if start[: len(asked)] == asked or (len(asked) == 1 and asked[0] in start):
        return start
    # a beginning of its own: what follows a question is an answer, what follows a system text not
    if start[0].role == "assistant" or asked[-1].role in ("system", "developer"):
        return asked + start
    raise CritiqueRMError("'prompt' is none of the messages before the response; keep one of them")


def _history(record: Record) -> tuple[Message, ...]:
    """LLaMA-Factory's earlier turns: a list of [question, answer]."""
    turns = record.get("history") or []
    is_pairs = isinstance(turns, list) and all(isinstance(t, list) and len(t) == 2 for t in turns)
    if not is_pairs:
        expected = "expected a list of [question, answer]"
        raise CritiqueRMError(f"'history' is {_shorten(turns)}; {expected}")
    messages = []
    for question, answer in turns:
        messages.append(Message("user", check_text(question, "history", may_be_empty=True)))
        messages.append(Message("assistant", check_text(answer, "history", may_be_empty=True)))
    return tuple(messages)


def _tools(record: Record) -> Message:
    """The functions that could be called, given as a list or as the JSON text of one."""
    tools = record.get("tools")
    if isinstance(tools, str):
        with errors_as("'tools' is text, but not JSON", ValueError, RecursionError):
            tools = json.loads(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise CritiqueRMError(f"'tools' is {_shorten(tools)}; expected a list of functions")
    return Message("tools", _more_text(tools, "tools"))


def _implicit_prompt(record: Record, sides: list) -> tuple[tuple[Message, ...], list]:
    """TRL's implicit prompt in plain text: the beginning that chosen and rejected share.

    Never where another field could be the prompt, and not where they share no whole word.
    """
    unknown = record.unread - UNUSED_FIELDS - {*CRITIQUE_FIELDS, "subset", "margin", "id"}
    could_be_prompts = [n for n in unknown if not isinstance(record.fields[n], int | float)]
    last_messages = [side[0][-1] for side in sides]
    is_plain = all(len(side) == 1 for side in sides) and not any(m.more for m in last_messages)
    texts = [message.content for message in last_messages]
    shared = os.path.commonprefix(texts)
    whole_words = re.match(r"(.*\s)?", shared, re.DOTALL)
    prompt = whole_words[0]
    if could_be_prompts or not is_plain or not prompt.strip() or texts[0] == texts[1]:
        raise CritiqueRMError(
            "no field 'prompt', and no beginning that is surely one, in both responses; found "
            + _names(record)
        )
    responses = []
    for text in texts:
        response = Message("assistant", text.removeprefix(prompt))
        responses.append([(response,)])
    return (Message("user", prompt),), responses


def _critiques_along(record: Record, side: str, n_responses: int | None) -> list[tuple[str, ...]]:
    """The critiques of each response of a side; a list of responses has a list of them beside it.

    CLoud calls them feedback.
    """
    names = [name for name in (f"{side}_critique", f"{side}_feedback") if name in record.present]
    if len(names) > 1:
        raise CritiqueRMError(f"{names[0]!r} and {names[1]!r} both hold critiques; keep one")
    name = names[0] if names else f"{side}_critique"
    value = record.get(name)
    if n_responses is None:
        return [check_critiques(value, name)]
    if value in EMPTY:
        return [()] * n_responses
    if not isinstance(value, list) or len(value) != n_responses:
        expected = f"expected a list of {n_responses}, one a response"
        raise CritiqueRMError(f"{name!r} is {_shorten(value)}; {expected}")
    return [check_critiques(item, name) for item in value]


def _margin(record: Record) -> float:
    value = record.get("margin")
    try:
        margin = 0.0 if value is None else float(math.nan if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not abs(margin) < 1e30:  # more is infinite in fp32
        raise CritiqueRMError(f"'margin' is {_shorten(value)}; expected a number")
    return margin


def _parse_answer(record: Record) -> Answer:
    """A single response, in a field of its own or as the last of some messages."""
    is_last = record.fields.get("response") is None and "messages" in record
    conversations, several = _responses(record, "messages" if is_last else "response")
    if several:
        raise CritiqueRMError("'response' is a list; write a record for each")
    *start, last = conversations[0]
    prompt = _prompt(record, tuple(start), [conversations])
    if not prompt:
        raise CritiqueRMError(f"no field 'prompt'; found {_names(record)}")
    prompt = _with_system(record, prompt)
    critiques = record.critiques("critique")
    answer = Answer(prompt, last.content, critiques, record.id(), last.more, record.where)
    record.finish()
    return answer


def _parse_pairs_or_answer(record: Record) -> list[Pair | Answer]:
    """A single answer is what has one response, and nothing that makes a pair of it."""
    has_response = "response" in record.fields or "messages" in record
    has_sides = any(record.fields.get(side) is not None for side in SIDES)
    has_label = any(form.mark in record for form in LABELLED.values())
    if has_response and not has_sides and not has_label:
        return [_parse_answer(record)]
    return _parse_pairs(record)


def _parse_critiques(record: Record) -> tuple[list[Pair], list[Answer]]:
    """What a record of --critiques says about pairs, and about single responses."""
    is_single = record.fields.get("response") is not None or "critique" in record
    if is_single:
        return [], [_parse_answer(record)]
    if "completions" in record:  # UltraFeedback
        return [], _completions(record)
    if "feedback1" in record or "feedback2" in record:  # HelpSteer3
        return [], _reviewed_responses(record)
    pairs = _parse_pairs(record)
    return pairs, [answer for pair in pairs for answer in pair.answers]


def _reviewed_responses(record: Record) -> list[Answer]:
    """HelpSteer3's two responses with their feedback, also where neither is preferred."""
    prompt = _required_prompt(record)
    answers = []
    for n in (1, 2):
        response = record.text(f"response{n}", may_be_empty=True)
        critiques = _without_grade(record, record.critiques(f"feedback{n}"))
        answers.append(Answer(prompt, response, critiques))
    record.finish()
    return answers


def _completions(record: Record) -> list[Answer]:
    """UltraFeedback's responses to one instruction, each with a critique."""
    prompt = _required_prompt(record)
    answers = []
    completions = record.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise CritiqueRMError(
            f"'completions' is {_shorten(completions)}; expected a list of objects"
        )
    for item in completions:
        completion = Record(record.where, item, record.notes)
        response = completion.text("response", may_be_empty=True)
        answers.append(Answer(prompt, response, completion.critiques("critique")))
        completion.finish()
    record.finish()
    return answers


# Values


HALF_A_SURROGATE_PAIR = re.compile("[\ud800-\udfff]")


def check_text(value: object, name: str, may_be_empty: bool = False) -> str:
    """Text that can be encoded. Raises CritiqueRMError that names the field."""
    if not isinstance(value, str):
        raise CritiqueRMError(f"{name!r} is {_shorten(value)}; expected text")
    if not may_be_empty and not value.strip():
        raise CritiqueRMError(f"{name!r} is empty; remove the line or fill it in")
    if not value.isascii() and HALF_A_SURROGATE_PAIR.search(value):
        raise CritiqueRMError(f"{name!r} holds half a surrogate pair; correct the encoding")
    return value


def check_critiques(value: object, name: str) -> tuple[str, ...]:
    """One critique, several in a list, or none."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(check_text(item, name) for item in items)


def check_messages(value: object, name: str, role: str) -> tuple[Message, ...]:
    """The messages of a field; plain text is one of `role`, and a model may answer nothing."""
    if not value or not isinstance(value, list):
        return (Message(role, check_text(value, name, may_be_empty=role == "assistant")),)
    return tuple(_message(item, f"message {n} of {name!r}") for n, item in enumerate(value, 1))


def _message(item: object, which: str) -> Message:
    """A message of a chat, in the words of OpenAI, of Transformers or of ShareGPT."""
    expected = f'{{"role": one of {", ".join(ROLES)}, "content": text}}'
    if not isinstance(item, dict):
        raise CritiqueRMError(f"{which} is {_shorten(item)}; expected {expected}")
    if "from" in item and "role" not in item:
        role = item["from"]
        item = {"role": SHAREGPT_ROLES.get(str(role), role), "content": item.get("value")} | {
            name: value for name, value in item.items() if name not in ("from", "value")
        }
    role, content = item.get("role"), item.get("content")
    more = {name: item[name] for name in MESSAGE_FIELDS if item.get(name) not in EMPTY}
    has_content = "content" in item or more
    if not isinstance(role, str) or role not in ROLES or not has_content:
        raise CritiqueRMError(f"{which} is {_shorten(item)}; expected {expected}")
    for name, value in item.items():
        is_read = name in ("role", "content") or name in more or name in UNUSED_FIELDS
        if value not in EMPTY and not is_read:
            raise CritiqueRMError(f"{which} has {_shorten(name)}, which is not read; remove it")
    if isinstance(content, list):
        content = "".join(_text_part(part, which) for part in content)
    if content is None and more:
        content = ""  # as OpenAI writes a message that only calls tools
    content = check_text(content, "content", may_be_empty=True)
    return Message(role, content, _more_text(_parse_arguments(more), which) if more else "")


def _more_text(value: object, which: str) -> str:
    """The JSON text of what stands beside a content."""
    with errors_as(f"{which} cannot be written as JSON", ValueError, TypeError, RecursionError):
        text = to_json(value)
    return check_text(text, which)


def _text_part(part: object, which: str) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    for name, value in part.items() if is_text else ():
        is_known = name in ("type", "text", "cache_control", "annotations")
        is_text = is_text and (is_known or value in EMPTY)
    if not is_text:
        raise CritiqueRMError(f"{which} has the part {_shorten(part)}; only text is read")
    return check_text(part.get("text"), "text", may_be_empty=True)


def _parse_arguments(more: dict) -> dict:
    """Tool calls as templates expect them: arguments are an object, where OpenAI has its JSON text."""
    calls = more.get("tool_calls")
    if not isinstance(calls, list):
        return more
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                parsed_arguments = json.loads(arguments)
                arguments = parsed_arguments if isinstance(parsed_arguments, dict) else arguments
            call = call | {"function": function | {"arguments": arguments}}
        parsed.append(call)
    return more | {"tool_calls": parsed}


def to_json(value: object, indent: int | None = None) -> str:
    """JSON that any reader takes. Raises ValueError for a number that is not finite."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def _names(record: Record) -> str:
    return ", ".join(map(_shorten, record.fields)) or "no field at all"


def _shorten(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


# --------------------------------------------------------------------------------------------------
# 3. Text and tokens

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
BREAK = "\u200b"  # an invisible character (zero width space)
MARK = "\ue000"  # a character of no language, to find a response in a rendered text


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair: one sequence per critique on each side (one without critiques)."""

    pair: Pair
    chosen: list[np.ndarray]  # each (T,) int32
    rejected: list[np.ndarray]

    @property
    def is_tie(self) -> bool:
        """Whether both sides read the same."""
        return [s.tolist() for s in self.chosen] == [s.tolist() for s in self.rejected]


class ControlTokens:
    """The tokens added to a vocabulary, special or not, that data must never become.

    Where a text spells one, `hide` puts an invisible character behind its first character:
    `<|im_end|>` in a response stays ordinary text. Runs of white space, which some vocabularies
    (Gemma) add, and single characters are text like any other.

    Raises CritiqueRMError for a tokenizer whose end token is a single character, since any text may
    contain it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids: dict[str, int] = {}  # by text
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if len(token.content.strip()) > 1:
                self.ids[token.content] = token_id
        if len((tokenizer.eos_token or "long").strip()) < 2:
            problem = f"the end token {tokenizer.eos_token!r} is a single character"
            raise CritiqueRMError(f"{problem}, which data may hold; set another eos_token")
        longest_first = sorted(map(re.escape, self.ids), key=len, reverse=True)
        any_token = "|".join(longest_first) or "(?!)"  # which never matches
        # first characters are looked for first, as it is faster: Gemma 3 has 6,000 such tokens
        first_characters = sorted({re.escape(token[0]) for token in self.ids})
        starts = f"(?=[{''.join(first_characters) or 'a'}])"
        self.pattern = re.compile(f"{starts}(?:{any_token})")
        self._beginning = re.compile(f"{starts}(?={any_token})(.)", re.DOTALL)
        # What control tokens have and words do not; templates may look for the rest in a text.
        characters = set("".join(self.ids))
        marks = [c for c in sorted(characters) if not c.isalnum() and c not in " /_"]
        private_use = range(0xF0000, 0xF0000 + len(marks))  # characters of no script
        self._disguises = dict(zip(map(ord, marks), private_use))

    def count(self, text: str) -> int:
        return len(self.pattern.findall(text))

    def hide(self, text: str) -> str:
        """The text with a break in each control token that it spells; overlapping ones too."""
        return self._beginning.sub(rf"\1{BREAK}", text)

    def disguise(self, text: str) -> str:
        """The text without the marks that control tokens are written with, as long as before."""
        return text.translate(self._disguises)


class ChatTemplate:
    """Writes conversations as a tokenizer's chat template does, from data that cannot forge tokens.

    The template sees the data (it may strip, split or escape them), with control tokens hidden, and
    so are the marks of reasoning (`<think>…</think>`) if the template looks for them. The one
    exception: those that enclose the reasoning with which an answer begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: ControlTokens) -> None:
        self.tokenizer = tokenizer
        self.control = control
        if tokenizer.chat_template is None:
            log("tokenizer without chat template: using plain 'User: … Assistant: …' text")
            tokenizer.chat_template = PLAIN_TEMPLATE
        with errors_as("the tokenizer has no usable chat template", Exception):
            tokenizer.chat_template = tokenizer.get_chat_template()  # the default one of several
            is_dated = "strftime_now" in tokenizer.chat_template
        if is_dated and FROZEN_DATE not in tokenizer.chat_template:
            tokenizer.chat_template = FROZEN_DATE + tokenizer.chat_template
        self.probe = lru_cache(1024)(self._probe)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation. Raises CritiqueRMError if data would become control tokens."""
        text = self.apply(messages, self.control.hide)
        n_written = self.control.count(text)
        if n_written > self.probe(shape_of(messages)).n_control:
            # A template may write more of them for what data say; then as many as for these data
            # in other characters, with which no control token can be written.
            disguised = self.apply(messages, self.control.disguise)
            if n_written > self.control.count(disguised):
                raise CritiqueRMError(
                    "the chat template makes a control token of what a text holds"
                )
        return text

    def apply(self, messages: Sequence[Message], hide: Callable[[str], str]) -> str:
        """What the template writes, `hide` applied to all that comes from the data."""
        tools = None
        turns = []
        for message in messages:
            if message.role == "tools":
                tools = map_texts(json.loads(message.content), hide)
                continue
            more = map_texts(json.loads(message.more or "{}"), hide)
            content = self._hide_content(message, hide)
            turns.append({"role": message.role, "content": content, **more})
        roles = ", ".join(turn["role"] for turn in turns)
        problem = f"the chat template refuses the turns {roles}; change the prompts or the template"
        with errors_as(problem, Exception):  # templates are programs
            return self.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)

    def _hide_content(self, message: Message, hide: Callable[[str], str]) -> str:
        """Hides a content, but for the marks of the reasoning with which an answer begins.

        The opening one may be missing. Reasoning in a field of its own leaves none to the content.
        """
        text = message.content
        start = ""
        for opening, closing in self.reasoning_marks:
            thought, found, answer = text.partition(closing)
            blank = thought[: len(thought) - len(thought.lstrip())]
            head = blank + opening if thought.startswith(blank + opening) else blank
            thought = thought[len(head) :]
            is_block = found and opening not in thought and SEPARATOR not in thought
            if is_block and message.role == "assistant" and "reasoning" not in message.more:
                start = head + self._hide_marks(hide(thought)) + closing
                text = answer
                break
        return start + self._hide_marks(hide(text))

    def _hide_marks(self, text: str) -> str:
        """Breaks the marks of reasoning that are no control tokens."""
        for mark in itertools.chain(*self.reasoning_marks):
            text = text.replace(mark, mark[0] + BREAK + mark[1:])
        return text

    @cached_property
    def reasoning_marks(self) -> list[tuple[str, str]]:
        """The pairs of marks, like <think> and </think>, that the template looks for in an answer.

        Candidates are control tokens and what its source spells. Found by trying whether it does
        more than print them, in the last answer or an earlier one.
        """
        self.__dict__["reasoning_marks"] = marks = []  # `apply` below reads it
        spelled = re.findall(r"</\w+>|\[/\w+\]", self.tokenizer.chat_template)
        closings = dict.fromkeys([*self.control.ids, *spelled])
        for closing in closings:
            opening = closing[:1] + closing[2:]
            is_pair = closing[1:2] == "/" and (opening in self.control.ids or closing in spelled)
            if is_pair:
                answer = f"{opening}b{closing}c"
                turns = [Message("user", "a"), Message("assistant", answer)] * 2
                with suppress(CritiqueRMError):
                    if self.apply(turns, str).count(answer) < 2:
                        marks.append((opening, closing))
        return marks

    def _probe(self, shape: tuple[Message, ...]) -> "Probe":
        """What the template does with messages of this shape, whatever their contents."""
        marked = []
        for n, message in enumerate(shape):
            content = message.content if message.role == "tools" else f"{MARK}{n}{MARK}"
            marked.append(message._replace(content=content))
        text = self.apply(marked, self.control.disguise)
        shown = [message.content in text for message in marked]
        return Probe(self.control.count(text), shown)

    @cached_property
    def tail(self) -> tuple[str, str]:
        """What the template writes after a response, and what is kept of it.

        That is its first control token, or else the eos token.
        """
        turns = [Message("user", "a"), Message("assistant", MARK)]
        _, mark, written = self.apply(turns, str).rpartition(MARK)
        if not mark:
            raise CritiqueRMError("the chat template does not end with the assistant's message")
        if match := self.control.pattern.search(written):
            return written, written[: match.end()]
        if not self.tokenizer.eos_token:
            raise CritiqueRMError("the tokenizer has no end token; set its eos_token")
        return written, written.rstrip() + self.tokenizer.eos_token

    def cut_tail(self, text: str) -> str:
        """Cuts what follows the first control token after the response, or adds the eos token."""
        written, kept = self.tail
        if text.endswith(written):
            return text[: len(text) - len(written)] + kept
        # a template may end tool calls, or an empty response, in another way
        end = max((match.end() for match in self.control.pattern.finditer(text)), default=0)
        if not end or text[end:].strip():
            raise CritiqueRMError("the chat template does not end this answer with an end token")
        return text[:end]

    def unseen(self, messages: Sequence[Message], text: str) -> list[str]:
        """What of a conversation its rendered text does not show: contents, and fields of `more`.

        Raises CritiqueRMError if that is a critique.
        """
        unseen = []
        shown = self.probe(shape_of(messages)).shown
        for message, is_shown in zip(messages, shown):
            is_said = message.role != "tools" and message.content.strip()
            if is_said and not self._shows(message, text if is_shown else ""):
                unseen.append(f"a message of role {message.role!r}")
        for n, message in enumerate(messages):
            names = ["tools"] if message.role == "tools" else json.loads(message.more or "{}")
            for name in names:
                without = [] if name == "tools" else [message.without(name)]
                with suppress(CritiqueRMError):  # without it, the template refuses them
                    changed = [*messages[:n], *without, *messages[n + 1 :]]
                    if self.apply(changed, self.control.hide) == text:
                        unseen.append(repr(name))
        return list(dict.fromkeys(unseen))

    def _shows(self, message: Message, text: str) -> bool:
        """Whether a text holds the whole content, or as JSON, but for marks and white space."""
        content = self._hide_content(message, self.control.hide)
        for mark in itertools.chain(*self.reasoning_marks):
            content = content.replace(mark, MARK)
        parts = [part.strip() for part in content.split(MARK)]
        whole = all(part in text or to_json(part)[1:-1] in text for part in parts)
        critique = content.rpartition(SEPARATOR)[2].strip()
        if not whole and SEPARATOR in content and critique not in text:
            raise CritiqueRMError("the chat template does not show the whole critique")
        return whole


class Probe(NamedTuple):
    """What a template does with messages of some shape."""

    n_control: int  # tokens that it writes
    shown: list[bool]  # for each message, whether its content is written


def shape_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages without their contents."""
    return tuple(m if m.role == "tools" else m._replace(content="") for m in messages)


PROTOCOL = {*MESSAGE_FIELDS, "arguments", "description", "enum", "function", "id", "items"}
PROTOCOL |= {"parameters", "properties", "required", "role", "content", "type"}


def map_texts(value: object, change: Callable[[str], str]) -> Any:
    """A JSON value with all its texts changed, and the names of fields that data chose."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        changed = {}
        for name, item in value.items():
            changed[name if name in PROTOCOL else change(name)] = map_texts(item, change)
        return changed
    return value


class Encoder:
    """Turns text into token ids: the only place where it happens, for training and scoring.

    A sequence ends with exactly one end token (the template's own end of turn, else the eos token)
    and begins with at most one bos token (the template's). `keep_tail` leaves what a template
    writes after its end token, for models of others that were trained on it; `pad_id` is then the
    token that their class takes for padding, wherever it stands: it reads the last other token.

    Raises CritiqueRMError when the tokenizer is not a fast one or has no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length_tokens: int,
        use_critiques: bool,
        keep_tail: bool = False,
        pad_id: int | None = None,
        n_embeddings: int | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise CritiqueRMError("the tokenizer has no tokenizer.json; save it as a fast one")
        self.tokenizer = tokenizer
        self.max_length_tokens = max_length_tokens
        self.use_critiques = use_critiques
        self.keep_tail = keep_tail
        self.pad_id = pad_id
        self.n_embeddings = n_embeddings  # the ids that the model has; None: all
        self.control = ControlTokens(tokenizer)
        self.template = ChatTemplate(tokenizer, self.control)
        # the token for unknown characters may come of any text
        self._control_ids = {*self.control.ids.values()} - {tokenizer.unk_token_id}
        self.counts: Counter[str] = Counter()
        self.refusals: list[str] = []

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation that ends with the assistant's message, as it is encoded."""
        text = self.template.render(messages)
        return text if self.keep_tail else self.template.cut_tail(text)

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """Token ids (T,) int32 of a conversation that ends with the assistant's message.

        Raises CritiqueRMError for a text that holds a token which the model does not know, or that
        the tokenizer would still turn into control tokens.
        """
        text = self.render(messages)
        with errors_as("the tokenizer cannot encode it", Exception):
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids = encoded["input_ids"]
        n_control = sum(token_id in self._control_ids for token_id in ids)
        if n_control > self.control.count(
            text
        ):  # e.g. its normalizer makes them of other characters
            raise CritiqueRMError("the tokenizer makes control tokens of its text; leave it out")
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        ids = np.array(ids, np.int32)
        if self.n_embeddings is not None and ids.max() >= self.n_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise CritiqueRMError(
                f"the token {token!r} is {ids.max()}, the model has {self.n_embeddings}; take the "
                "model's own tokenizer, or leave out what holds that token"
            )
        if self.keep_tail and self.pad_id is not None:
            others = np.flatnonzero(ids != self.pad_id)
            ids = ids[: others[-1] + 1 if len(others) else 1]
        return ids

    @cached_property
    def end_id(self) -> int:
        """The token every sequence ends with: the reward is read there."""
        return int(self.encode((Message("user", "a"), Message("assistant", "b")))[-1])

    def encode_answers(
        self, answers: Sequence[Answer], n_pairs: int = 1
    ) -> list[list[np.ndarray]] | None:
        """Encodes answers to one prompt: for each answer one sequence per critique.

            Within `max_length_tokens` each critique and the end token are kept whole; the responses
            keep their beginning, the prompt its end, cut at the same place for all answers. None if
            even that does not fit. What is cut, dropped or left out by the template is counted, as
        `n_pairs`.
        """
        prompt, responses = answers[0].prompt, [a.response for a in answers]
        encoded, excess = self._encode_as(prompt, answers, responses)
        for what in self._unseen(answers):
            self.counts[f"with {what} that the chat template does not show whole"] += n_pairs
        if excess <= 0:
            return encoded
        encoded = self._encode_cut(answers)
        self.counts["truncated" if encoded else "dropped as too long"] += n_pairs
        return encoded

    def _encode_cut(self, answers: Sequence[Answer]) -> list[list[np.ndarray]] | None:
        """Encodes answers with prompt and responses cut; None where critiques leave no room.

        With room_k for what template, end token and critiques leave of the limit to answer k, and
        |r_k| for the tokens of its response, the prompt gets min_k max(room_k − |r_k|, room_k / 2),
        and each response what is then left to it.
        """
        prompt = answers[0].prompt
        blank = [m if m.role == "tools" else m._replace(content="") for m in prompt]
        fixed, _ = self._encode_as(blank, answers, [""] * len(answers))
        room = [self.max_length_tokens - max(map(len, sequences)) for sequences in fixed]
        offsets = [self._offsets(answer.response) for answer in answers]
        while min(room) >= MIN_TEXT_TOKENS:
            n_prompt = min(max(r - len(o), r // 2) for r, o in zip(room, offsets))
            cut, n_used = self._cut_to(prompt, n_prompt)
            responses = []
            for answer, r, o in zip(answers, room, offsets):
                n_left = r - n_used
                is_whole = len(o) <= n_left
                responses.append(answer.response if is_whole else answer.response[: o[n_left][0]])
            encoded, excess = self._encode_as(cut, answers, responses)
            if excess <= 0:
                return encoded
            room = [r - excess for r in room]  # tokens that merge across a cut
        return None

    def _cut_to(self, prompt: Sequence[Message], n_tokens: int) -> tuple[list[Message], int]:
        """The end of a prompt in at most so many tokens, and in how many."""
        n_kept = n_tokens
        while True:
            cut = self._cut_prompt(prompt, n_kept)
            n_used = sum(len(self._offsets(m.content)) for m in cut if m.role != "tools")
            if n_used <= n_tokens:
                return cut, n_used
            n_kept -= 1  # a piece of a word can be more tokens alone

    def _unseen(self, answers: Sequence[Answer]) -> list[str]:
        """What the template does not show of the answers, each with its first critique."""
        unseen = {}
        for answer in answers:
            message = self._messages(answer, answer.response)[0]
            messages = [*answer.prompt, message]
            text = self.template.apply(messages, self.template.control.hide)
            unseen |= dict.fromkeys(self.template.unseen(messages, text))
        return list(unseen)

    def _messages(self, answer: Answer, response: str) -> list[Message]:
        """The assistant's message with each critique, or without any."""
        critiques = answer.critiques if self.use_critiques else ()
        texts = [response + SEPARATOR + critique for critique in critiques] or [response]
        return [Message("assistant", text, answer.more) for text in texts]

    def _encode_as(
        self, prompt: Sequence[Message], answers: Sequence[Answer], responses: list[str]
    ) -> tuple[list[list[np.ndarray]], int]:
        """The sequences of answers with this prompt and responses; the tokens above the limit."""
        encoded = []
        for answer, response in zip(answers, responses):
            messages = self._messages(answer, response)
            encoded.append([self.encode((*prompt, message)) for message in messages])
        return encoded, max(map(len, itertools.chain(*encoded))) - self.max_length_tokens

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        return self.tokenizer(text, **options)["offset_mapping"]

    def _cut_prompt(self, prompt: Sequence[Message], n_tokens: int) -> list[Message]:
        """Keeps the last tokens: what is asked stands at the end of a conversation."""
        kept = []
        for message in reversed(prompt):
            if message.role == "tools":  # a function is kept whole
                kept.append(message)
                continue
            offsets, content = self._offsets(message.content), message.content
            if len(offsets) > n_tokens:
                content = content[offsets[-n_tokens][0] :] if n_tokens else ""
            n_tokens -= min(n_tokens, len(offsets))
            kept.append(message._replace(content=content))
        return kept[::-1]

    def encode_pairs(
        self,
        pairs: Sequence[Pair],
        source: str,
        keep_equal: bool = False,
        skip_bad: bool = False,
    ) -> list[EncodedPair]:
        """Encodes pairs; says how many were cut or left out, and why (never invents a critique).

        Those whose two sides read the same teach nothing; with `keep_equal` they are kept, as ties.
        Raises CritiqueRMError that names the place of a pair which the template or the tokenizer
        refuses, unless `skip_bad`, and one if no pair is left.
        """
        self._clear()
        encoded = []
        for group in group_pairs(pairs):
            encoded += self._encode_group(group, skip_bad)
        if not keep_equal:
            different = [e for e in encoded if not e.is_tie]
            self.counts["with equal token sequences"] += len(encoded) - len(different)
            encoded = different
        changes = self.describe_counts() or "none cut or left out"
        log(f"{source}: {len(encoded)} of {len(pairs)} pairs used; {changes}")
        if not encoded:
            hint = f"; {CRITIQUES_MISSING}" if self.counts["without critique"] else ""
            raise CritiqueRMError(f"{source}: no pair is left to use ({changes}){hint}")
        return encoded

    def _clear(self) -> None:
        self.counts.clear()
        self.refusals.clear()

    def describe_counts(self) -> str:
        """What was cut or left out since the last call, and why; empty if nothing was."""
        counted = [f"{n} {what}" for what, n in self.counts.items() if n]
        if self.refusals:
            counted.append(f"{len(self.refusals)} refused, the first: {self.refusals[0]}")
        return ", ".join(counted)

    def _encode_group(self, pairs: list[Pair], skip_bad: bool) -> list[EncodedPair]:
        """Encodes the pairs of one record, each distinct response once."""
        usable = pairs
        if self.use_critiques:
            usable = [pair for pair in pairs if all(a.critiques for a in pair.answers)]
            self.counts["without critique"] += len(pairs) - len(usable)
        if not usable:
            return []
        answers = list(dict.fromkeys(answer for pair in usable for answer in pair.answers))
        place = pairs[0].where or pairs[0].id
        sequences = self._encode_or_refuse(answers, place, skip_bad, len(usable))
        if sequences is None:
            return []
        encoded = dict(zip(answers, sequences))
        return [EncodedPair(pair, *(encoded[answer] for answer in pair.answers)) for pair in usable]

    def encode_singles(
        self, answers: Sequence[Answer], skip_bad: bool = False
    ) -> list[list[np.ndarray] | None]:
        """Encodes answers each on its own: its sequences, or None where it cannot be read.

        Raises CritiqueRMError as `encode_pairs` does.
        """
        self._clear()
        encoded = []
        for answer in answers:
            if self.use_critiques and not answer.critiques:
                self.counts["without critique"] += 1
                encoded.append(None)
                continue
            sequences = self._encode_or_refuse([answer], answer.where or answer.id, skip_bad)
            encoded.append(sequences[0] if sequences else None)
        return encoded

    def _encode_or_refuse(
        self, answers: Sequence[Answer], place: str, skip_bad: bool, n_pairs: int = 1
    ) -> list[list[np.ndarray]] | None:
        """Encodes answers to one prompt; names the place of those that are refused, or skips them."""
        try:
            return self.encode_answers(answers, n_pairs)
        except CritiqueRMError as error:
            refusal = f"{place}: {error}"
            if not skip_bad:
                raise CritiqueRMError(refusal) from error
            self.refusals += [refusal] * n_pairs
            return None


# --------------------------------------------------------------------------------------------------
# 4. Packing


@dataclass(frozen=True)
class Trie:
    """Sequences that share beginnings, each shared token once, in depth-first order.

    The sequences "a b c d" and "a b e":

        index      0  1  2  3  4
        ids        a  b  c  d  e      what each sees:  a
        positions  0  1  2  3  2                       a b
        ends       5  5  4  4  5                       a b c
                                                       a b c d
        last: 3 and 4                                  a b . . e

    Token k is the same as or an ancestor of token q exactly if k <= q < ends[k]: the attention mask
    of a trie is two comparisons. Positions are depths, so they continue along each path.
    """

    ids: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32, depth in the trie
    ends: np.ndarray  # (T,) int32, end of the subtree below each token
    last: np.ndarray  # (S,) int32, index of each sequence's last token
    owners: np.ndarray  # (S,) int32, for each sequence the caller's number for what it belongs to

    def __len__(self) -> int:
        return len(self.ids)


def build_trie(sequences: Sequence[np.ndarray], owners: Sequence[int]) -> Trie:
    """Builds the prefix trie of token sequences, found on ids alone."""
    most = sum(map(len, sequences))
    ids, positions, ends = np.empty((3, most), np.int32)
    last = np.empty(len(sequences), np.int32)
    path = np.empty(0, np.int32)  # where each token of the current sequence stands
    previous = np.empty(0, np.int32)  # the sequence before it
    n = 0
    in_order = sorted(range(len(sequences)), key=lambda s: sequences[s].tolist())
    for s in in_order:
        sequence = sequences[s]
        shared = _common_prefix(previous, sequence)
        n_new = len(sequence) - shared
        new = np.arange(n, n + n_new, dtype=np.int32)
        ends[path[shared:]] = n  # the branches left behind end here
        ids[new] = sequence[shared:]
        positions[new] = np.arange(shared, len(sequence))
        path = np.concatenate([path[:shared], new])
        last[s] = path[-1]
        previous = sequence
        n += n_new
    ends[path] = n
    return Trie(ids[:n], positions[:n], ends[:n], last, np.array(owners, np.int32))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def build_tries(
    sequences: Sequence[np.ndarray], owners: Sequence[int], share_prefixes: bool
) -> list[Trie]:
    """One trie of all sequences, or one of each where a model cannot share prefixes."""
    if share_prefixes:
        return [build_trie(sequences, owners)]
    return [build_trie([sequence], [owner]) for sequence, owner in zip(sequences, owners)]


class MicroBatches(NamedTuple):
    charge_tokens: int  # what one more micro-batch costs, in tokens computed in that time
    largest_tokens: int  # beyond this size a token gets no cheaper


MICRO_BATCHES = {  # by device and dtype, measured by tests/bench_speed.py --charge: docs/results.md
    ("cpu", "float32"): MicroBatches(64, 2048),
    ("cpu", "bfloat16"): MicroBatches(256, 2048),
    ("cuda", "float32"): MicroBatches(2048, 16384),
    ("cuda", "bfloat16"): MicroBatches(2048, 16384),
}


def pack(
    units: Sequence[list[Trie]],
    budget_tokens: int,
    charge_tokens: int,
    share_prefixes: bool,
    rank: int = 0,
    n_ranks: int = 1,
) -> list[list[list[Trie]]]:
    """This rank's micro-batches, as rows of tries; the tries of a unit stay together.

        unit A: ########      row 1: AAAAAAAA    width: that of the longest unit, A
        unit B: #####         row 2: BBBBBCCC    filled with the longest units that fit
        unit C: ###           row 3: DDDD....    the dots are computed in vain
        unit D: ####

    A row is never wider than its longest unit, so attention, quadratic in the row, costs what it
    would without packing. A row holds one unit where a model cannot share prefixes. Computing a
    micro-batch is a collective call: all ranks get equally many, of one shape, so that none waits
    for another; some may be empty at the end.

    Within the budget the number of rows is that with the least to compute for each token of data,
    where a micro-batch counts for `charge_tokens` more: for launching its kernels, and for adding
    up its gradients.
    """
    waiting = sorted(units, key=_longest_first)
    batches = []
    while waiting:
        width = unit_tokens(waiting[0])
        max_rows = n_ranks * max(1, budget_tokens // width)
        rows = []
        costs = []
        n_data = 0
        while waiting and len(rows) < max_rows:
            row = _fill_row(waiting, width, share_prefixes)
            rows.append(row)
            n_data += sum(map(unit_tokens, row))
            if len(rows) % n_ranks == 0 or not waiting:
                n_computed = math.ceil(len(rows) / n_ranks) * width  # by each rank
                costs.append(((n_computed + charge_tokens) / n_data, len(rows)))
        _, n_rows = min(costs)
        for row in rows[n_rows:]:
            for unit in row:  # it waits for the next micro-batch
                insort(waiting, unit, key=_longest_first)
        own_rows = rows[:n_rows][rank::n_ranks]
        own_tries = [list(itertools.chain(*row)) for row in own_rows]
        if not share_prefixes:  # the tries of a unit each take a row
            own_tries = [[trie] for row in own_tries for trie in row]
        batches.append(own_tries)
    return batches


def _fill_row(waiting: list[list[Trie]], width: int, share_prefixes: bool) -> list[list[Trie]]:
    """Takes units from those that wait, longest first: the longest that fits, until none does."""
    row = []
    space = width
    while True:
        n = bisect_left(waiting, -space, key=_longest_first)  # the first that is not too long
        if n == len(waiting):
            return row
        unit = waiting.pop(n)
        row.append(unit)
        space -= unit_tokens(unit)
        if not share_prefixes:
            space = 0  # the row holds one unit


def unit_tokens(unit: list[Trie]) -> int:
    """The tokens that a unit takes, each of its tries padded to the longest."""
    return len(unit) * max(map(len, unit))


def _longest_first(unit: list[Trie]) -> int:
    return -unit_tokens(unit)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows of tries, padded to one length, and where to read the rewards."""

    ids: Tensor  # (R, T) int64
    positions: Tensor  # (R, T) int64
    ends: Tensor  # (R, T) int64
    last: Tensor  # (2, S) int64, row and column of each sequence's last token
    owners: np.ndarray  # (S,) int32, as in Trie; the host knows them, the device does not
    n_tokens: int  # without padding


def collate(rows: Sequence[Sequence[Trie]], device: torch.device) -> Batch:
    """Lays out rows of tries as tensors; without rows, one padding token and no sequence."""
    lengths = [sum(map(len, row)) for row in rows]
    n_rows, n_columns = max(1, len(rows)), max(lengths, default=1)
    ids = np.zeros((n_rows, n_columns), np.int64)
    positions = np.zeros((n_rows, n_columns), np.int64)
    ends = np.tile(np.arange(1, n_columns + 1), (n_rows, 1))  # padding sees only itself
    last = [np.empty((2, 0), np.int64)]
    owners = [np.empty(0, np.int32)]
    for r, row in enumerate(rows):
        start = 0
        for trie in row:
            end = start + len(trie)
            ids[r, start:end] = trie.ids
            positions[r, start:end] = trie.positions
            ends[r, start:end] = trie.ends + start
            last.append(np.stack([np.full(len(trie.last), r), trie.last + start]))
            owners.append(trie.owners)
            start = end
    return Batch(
        ids=to_device(ids, device),
        positions=to_device(positions, device),
        ends=to_device(ends, device),
        last=to_device(np.concatenate(last, axis=1), device),
        owners=np.concatenate(owners),
        n_tokens=sum(lengths),
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to the device without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from other memory would wait
    return tensor.to(device, non_blocking=True)


LOWEST = -3.3895313892515355e38  # the lowest number of bf16, which fp32 has as well


def attention_masks(batch: Batch, config: PreTrainedConfig) -> Tensor | dict[str, Tensor]:
    """The additive masks (R, 1, T, T): 0 where a token may look, the lowest number elsewhere.

    A token sees itself and its ancestors in the trie. Sliding-window layers see of those the last
    `sliding_window` positions; models with both kinds of layer take one mask per kind. Never
    boolean: eager attention would add it. FSDP casts the masks to the compute dtype.
    """
    index = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    query = index[None, :, None]
    key = index[None, None, :]
    key_end = batch.ends[:, None, :]
    seen = (key <= query) & (query < key_end)  # (R, T, T)
    near = seen
    window = getattr(config, "sliding_window", None)
    if window:
        distance = batch.positions[:, :, None] - batch.positions[:, None, :]
        near = seen & (distance < window)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return _additive(near)
    masks = {"full_attention": seen, "sliding_attention": near}
    return {kind: _additive(masks[kind]) for kind in sorted(set(kinds))}


def _additive(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, LOWEST)[:, None]


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
        if dist.get_world_size() == 1:
            atexit.register(_leave_group)
    n = dist.get_world_size()
    if not shard_group:
        return device, dist.init_device_mesh(device.type, (n,))
    if n % shard_group:
        raise CritiqueRMError(
            f"{n} processes are not groups of {shard_group}; change --shard-group"
        )
    shape, names = (n // shard_group, shard_group), ("replicate", "shard")
    return device, dist.init_device_mesh(device.type, shape, mesh_dim_names=names)


def _leave_group() -> None:
    """Ends the process group of a process alone while Python still runs.

    A thread of the group that is left with the last reference to a tensor aborts the program
    otherwise, now and then (pytorch/pytorch#190489), and NCCL warns.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def release_memory(device: torch.device) -> None:
    """Gives what was freed on a CPU back to the system, where the C library is glibc.

    Small tensors of many sizes leave holes in its heap, which it hardly fills: over 150 steps of
    SmolLM2-135M in bf16 a process grew from 5 to 7.5 GB.
    """
    if device.type == "cpu" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def barrier(place: str, minutes: float = 30) -> None:
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


DTYPES = ("auto", "float32", "bfloat16")
BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")  # names of torch.cpu.get_capabilities; Arm's last
NARROW = 256  # of a smaller hidden size, products are no longer most of the work


def choose_dtype(wanted: str, device: torch.device, hidden_size: int) -> torch.dtype:
    """The dtype to compute in: the wanted one, or for "auto" bf16 where there are units for it.

    What the device is decides, never a timing, so that one command gives one result. A CPU without
    such units is 100 times slower in bf16, and one with them no faster for a narrow model, which
    stays in fp32. All ranks compute in the same. A collective call.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_units = any(capabilities.get(name) for name in BF16_UNITS)
        is_fast = has_units and hidden_size >= NARROW
    all_fast = torch.tensor(is_fast, dtype=torch.int32)
    dist.all_reduce(all_fast, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if all_fast else torch.float32


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def charge_tokens(model: PreTrainedModel) -> int:
    """The tokens that one more micro-batch of the model costs where it is."""
    device = next(model.parameters()).device.type
    return MICRO_BATCHES[device, name_of(model.compute_dtype)].charge_tokens


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
# 5. Model


def find_model(name: str) -> str:
    """A model's folder: itself, or the snapshot of a Hub model's safetensors and text files."""
    if os.path.isdir(name):
        return name
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    with errors_as(f"{name}: neither a folder nor a Hub model", Exception):  # of many kinds
        # it locks each file, so that one rank downloads it and the others wait
        return hub.snapshot_download(name, allow_patterns=patterns)


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    with errors_as(f"{folder}: no usable tokenizer", Exception):  # of many kinds
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_config(folder: str) -> PreTrainedConfig:
    """Reads and checks config.json; the result describes a reward model: one label, no dropout.

    Of a model that also sees images, it is the part that reads text.
    """
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise CritiqueRMError(
            f"{folder}: a PEFT adapter, not a whole model; merge it first: PeftModel."
            "from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
        )
    with errors_as(f"{folder}: no usable config.json", Exception):  # of many kinds
        whole = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = whole.get_text_config(decoder=True)
    if getattr(whole, "is_encoder_decoder", False):
        raise CritiqueRMError(
            f"{folder}: a {whole.model_type} model, an encoder with a decoder; "
            f"take a decoder alone, such as {FAMILIES}"
        )
    for part in (whole, config):
        if getattr(part, "auto_map", None):
            raise CritiqueRMError(f"{folder}: it asks to run its own code; that is never done")
        for name in ("quantization_config", "compression_config"):
            if getattr(part, name, None):
                raise CritiqueRMError(f"{folder}: its config.json has a {name}; {DEQUANTISE}")
    if config is not whole:
        if config.model_type in TEXT_SIBLINGS:
            advice = f"take a text-only one, such as {TEXT_SIBLINGS[config.model_type]}"
            raise CritiqueRMError(f"{folder}: {whole.model_type} models also see images; {advice}")
        log(f"{folder}: a {whole.model_type} model; the part that reads text is used")
        config.critique_rm = getattr(whole, "critique_rm", None)
        if config.pad_token_id is None:
            config.pad_token_id = getattr(whole, "pad_token_id", None)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # both sides of a pair must see the same network
    config.dtype = torch.float32  # of the master weights, whatever the file holds
    config.num_labels = 1
    config.use_cache = False
    return config


RESAVE = (
    "if Transformers reads it, as with experts in single tensors or weights that are shared, "
    "save it anew: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, "
    "save_original_format=False)"
)
DEQUANTISE = (
    "quantised weights are not read: take the original ones, or load it in Transformers, call "
    "model.dequantize() and save_pretrained() it"
)
TEXT_SIBLINGS = {  # text parts without a class that has a reward head: what to take instead
    "qwen2_vl_text": "Qwen/Qwen2-7B-Instruct",
    "qwen2_5_vl_text": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3_vl_text": "Qwen/Qwen3-8B",
    "mllama_text_model": "meta-llama/Llama-3.1-8B-Instruct",
    "llama4_text": "meta-llama/Llama-3.3-70B-Instruct",
}


def check_fits(config: PreTrainedConfig, encoder: Encoder) -> None:
    """Raises CritiqueRMError if there are positions that the model has no embedding for.

    Ids that it has none for may stand in the tokenizer (Gemma 3's mark for images), not in a text.
    """
    encoder.n_embeddings = config.vocab_size
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    if encoder.max_length_tokens > longest:
        raise CritiqueRMError(f"the model reads only {longest} tokens; lower --max-length-tokens")


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the config with new weights. Raises CritiqueRMError if it has no `score` head."""
    advice = f"take one of another family, such as {FAMILIES}"
    try:
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            problem = f"Transformers has no classifier for {config.model_type!r} models; {advice}"
            raise CritiqueRMError(problem) from error
        problem = f"no {config.model_type!r} model can be made of its config.json"
        raise CritiqueRMError(f"{problem} ({_first_line(error)})") from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        name = type(model).__name__
        raise CritiqueRMError(f"{name} has no linear head named 'score'; {advice}")
    model.config.architectures = [type(model).__name__]  # servers choose the class by it
    return model


FAMILIES = "Llama, Qwen 3 or Gemma 3"


def set_mode(model: PreTrainedModel, checkpointing: bool) -> None:
    """Puts a model in evaluation mode, so that training computes what scoring does, without noise.

    Transformers' checkpointing of activations asks for training mode, but of the layers alone.
    """
    model.eval()
    if checkpointing:
        model.activation_checkpointing_enable()
        for module in model.modules():
            module.training = getattr(module, "gradient_checkpointing", False)


def trunk_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    return getattr(model, model.base_model_prefix), model.score


def find_blocks(trunk: nn.Module) -> nn.ModuleList:
    """The layers of a trunk. Raises CritiqueRMError if they do not stand in one list."""
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return module
    raise CritiqueRMError(f"{type(trunk).__name__} has no list of layers; use a decoder model")


def build_model(
    config: PreTrainedConfig,
    compute_dtype: torch.dtype,
    mesh: dist.DeviceMesh,
    empty: bool = True,
    change: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """Builds a sharded model, without weights, which `read_weights` fills, or with new ones.

    The parameters are fp32 and sharded (FSDP2) block by block, then the rest of the trunk, then the
    head, so that the trunk computes in `compute_dtype` and the head in fp32. An empty one allocates
    nothing before it is sharded: no rank holds the whole model. `change` is called before that:
    `freeze`, or what adds to the model.
    """
    with torch.device("meta" if empty else "cpu"):
        model = make_model(config)
    trunk, head = trunk_and_head(model)
    model.compute_dtype = compute_dtype
    log(f"computing in {name_of(compute_dtype)}")
    if change:
        change(model)
    n_shards = mesh.shape[-1]
    # FSDP computes with a copy of its shards, even if there is one. Weights that are frozen can be
    # computed with as they are: without FSDP a process that has them all holds them once.
    unmanaged = set()
    if n_shards == 1:
        unmanaged = {p for p in trunk.parameters() if not p.requires_grad}
    policy = fsdp.MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": policy, "ignored_params": unmanaged}
    for block in find_blocks(trunk):
        fsdp.fully_shard(block, reshard_after_forward=n_shards > 1, **options)
    fsdp.fully_shard(trunk, **options)
    fsdp.fully_shard(
        head, mesh=mesh, mp_policy=fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
    )
    return model


def freeze(model: PreTrainedModel) -> None:
    """Makes the trunk's weights constants, held in the dtype they are computed in: bf16 is half."""
    trunk, _ = trunk_and_head(model)
    for parameter in trunk.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(model.compute_dtype)


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles each block when it is first called: one code for all, for rows of any length.

    The block's own computation alone: gathering weights and checkpointing stay outside of it.
    """
    trunk, _ = trunk_and_head(model)
    for block in find_blocks(trunk):
        block.forward = torch.compile(block.forward, dynamic=True)


def warm_up(model: PreTrainedModel, share_prefixes: bool, budget_tokens: int) -> None:
    """Compiles for training now, on shapes that do not follow the data.

    What is generated depends on the first shapes that come: for small ones it keeps to one core. A
    run that goes on begins with others than one that starts, and must compute the same to the bit.
    A collective call.

    Raises CritiqueRMError where it cannot be compiled, as without a C++ compiler.
    """
    device = next(model.parameters()).device
    n_tokens = min(1024, max(64, budget_tokens // 2))
    ids = np.arange(n_tokens, dtype=np.int32) % model.config.vocab_size
    row = [build_trie([ids], [0])]
    advice = "--compile needs a model that torch can compile, and a C++ compiler; leave it out"
    with errors_as(advice, Exception):  # of many kinds
        for n_rows in (1, 2):  # one row is compiled apart
            batch = collate([row] * n_rows, device)
            compute_rewards(model, batch, share_prefixes).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def keep_gathered(model: PreTrainedModel, keep: bool) -> None:
    """Sets whether weights stay gathered, and gradients unreduced, after the next backward pass.

    A process that holds a whole replica can do both once a step: fewer copies, and less to send
    between replicas. Where a replica is sharded, no rank is to hold the whole.
    """
    for module in trunk_and_head(model):
        module.set_requires_gradient_sync(not keep)
        module.set_reshard_after_backward(not keep)


def read_weights(
    model: PreTrainedModel,
    folder: str,
    device: torch.device,
    head_seed: int | None = None,
    new_head: bool = False,
) -> None:
    """Fills a model without weights from a folder's safetensors, each rank reading its part.

    A head that is not there, or with `new_head`, is drawn by `head_seed`; without a seed it must
    be there. Keys may have any prefix, as in a model that also sees images.

    Raises CritiqueRMError for pickled or quantised weights, for keys that are missing, for shapes
    that do not match, and for weights of the trunk or the head that the model has no place for.
    """
    paths = find_weights(folder)
    others = {path.name for path in Path(folder).glob("*.safetensors")} - {p.name for p in paths}
    if others:
        log(f"{folder}: not read, as Transformers would not: {', '.join(sorted(others))}")
    stored = read_headers(paths)
    model.to_empty(device=device)
    fill_buffers(model)
    prefix, wanted = match_keys(model, stored)
    keeps_head = "score.weight" in stored and not new_head
    if keeps_head or head_seed is None:
        wanted["score.weight"] = "score.weight"
        if head_seed is not None:
            log(f"{folder}: a reward model; its head is kept (--new-head draws a new one)")
    else:
        init_head(model, head_seed)
        log(f"{folder}: a new reward head is drawn")
    _check_stored(model, folder, wanted, stored, prefix, new_head)
    weights = model.state_dict()
    for key, name in wanted.items():
        found, expected = list(stored[key].shape), list(weights[name].shape)
        if found != expected:
            hint = ""
            if name == "score.weight":
                can_draw = head_seed is not None
                hint = (
                    "; --new-head draws another" if can_draw else ": a reward head has one output"
                )
            raise CritiqueRMError(f"{folder}: {key} is {found}, expected {expected}{hint}")
    with tempfile.TemporaryDirectory() as links:  # the reader takes every file of a folder
        for path in paths:
            os.symlink(path.resolve(), Path(links) / path.name)
        reader = dcp.HuggingFaceStorageReader(links)
        with errors_as(f"{folder}: damaged safetensors", safetensors.SafetensorError):
            dcp.load({key: weights[name] for key, name in wanted.items()}, storage_reader=reader)


def has_reward_head(folder: str) -> bool:
    return "score.weight" in read_headers(find_weights(folder))


def find_weights(folder: str) -> list[Path]:
    """The files that Transformers would read: model.safetensors, else what the index names."""
    whole, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        with errors_as(f"{index}: damaged", Exception):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            if Path(name).name != name or not (Path(folder) / name).is_file():
                raise CritiqueRMError(f"{index} names {_shorten(name)}, which is not in the folder")
        return [Path(folder) / name for name in names]
    if others := sorted(path.name for path in Path(folder).glob("*.safetensors")):
        raise CritiqueRMError(
            f"{folder}: {', '.join(others[:3])}, but neither model.safetensors nor its index; name "
            "the one that is meant model.safetensors, or add the index of its parts"
        )
    raise CritiqueRMError(
        f"{folder}: no *.safetensors file; convert pickled weights elsewhere with "
        "model.save_pretrained(folder)"
    )


class Header(NamedTuple):
    """What a safetensors file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(paths: Sequence[Path]) -> dict[str, Header]:
    """Shape and dtype of each tensor, by its key. Raises CritiqueRMError for quantised ones."""
    headers = {}
    for path in paths:
        with (
            errors_as(f"{path}: damaged safetensors", Exception),
            safetensors.safe_open(path, "pt") as file,
        ):
            for key in file.keys():
                stored = file.get_slice(key)
                shape, dtype = stored.get_shape(), stored.get_dtype()
                if key.endswith("weight") and dtype not in ("F64", "F32", "F16", "BF16"):
                    raise CritiqueRMError(f"{path}: {key} is {dtype}; {DEQUANTISE}")
                headers[key] = Header(tuple(shape), dtype)
    return headers


ADAPTERS = (".lora_a", ".lora_b")  # what train.py adds to linear layers, and no file holds


def match_keys(model: PreTrainedModel, stored: dict[str, Header]) -> tuple[str, dict[str, str]]:
    """The prefix that the trunk's weights have in a file, and their names in the model by key."""
    own_prefix = model.base_model_prefix + "."
    names = {}  # in the model, by those within the trunk
    for name in model.state_dict():
        if not name.startswith("score.") and not name.endswith(ADAPTERS):
            names[name.removeprefix(own_prefix)] = name
    prefix = _find_prefix(own_prefix, list(names), stored)
    return prefix, {prefix + inner: name for inner, name in names.items()}


def _find_prefix(own_prefix: str, names: list[str], stored: dict[str, Header]) -> str:
    """What stands before the names of the trunk's weights in a file: "model.", nothing, or more."""
    prefixes = {own_prefix}
    for key in stored:
        if key == names[0] or key.endswith("." + names[0]):
            prefixes.add(key.removesuffix(names[0]))

    def n_found(prefix: str) -> int:
        return sum(prefix + name in stored for name in names)

    return max(sorted(prefixes), key=n_found)


def _check_stored(
    model: PreTrainedModel,
    folder: str,
    wanted: dict[str, str],
    stored: dict[str, Header],
    prefix: str,
    new_head: bool,
) -> None:
    """Compares the keys of a file with those that are wanted: none missing, none left unsaid."""
    if missing := [key for key in wanted if key not in stored]:
        lacks_head = missing == ["score.weight"]
        raise CritiqueRMError(
            f"{folder}: {len(missing)} weights are not in its safetensors, such as "
            f"{', '.join(missing[:3])}; "
            + ("it has no reward head" if lacks_head else f"its keys do not match; {RESAVE}")
        )
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), *KNOWN_UNUSED_KEYS]
    known += ["^score\\."] if new_head else []
    misread, others = [], []
    for key in stored:
        if key in wanted or any(re.search(pattern, key) for pattern in known):
            continue
        (misread if key.startswith((prefix, "score.")) else others).append(key)
    if misread:
        some = ", ".join(misread[:3])
        raise CritiqueRMError(
            f"{folder}: {len(misread)} of its weights have no place in {type(model).__name__}, such "
            f"as {some}; is config.json that of another model? If they are scales, {DEQUANTISE}"
        )
    if others:
        some = ", ".join(others[:3])
        log(f"{folder}: {len(others)} tensors do not belong to a reward model, not read: {some}")


# The head of a language model, and buffers that older versions of Transformers saved.
KNOWN_UNUSED_KEYS = (
    r"^lm_head\.",
    r"rotary_emb\.inv_freq$",
    r"\.(attn|attention)\.(masked_)?bias$",
)


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
        weight.copy_(dtensor.distribute_tensor(values, weight.device_mesh, weight.placements))


FILE_BYTES = 2**32  # in a file of the final weights


def save_model(
    model: PreTrainedModel,
    encoder: Encoder,
    folder: Path,
    card: str,
    write_weights: Callable[[Path], None] | None = None,
) -> None:
    """Writes a plain Hugging Face folder, its weights shard by shard. A collective call.

    Everything is written beside its final place first and moved at the end. `write_weights` fills
    a new folder with safetensors, if they are not to be those of the model as it is.
    """
    draft = folder / "draft"
    if write_weights:
        write_weights(draft)
    else:
        write_tensors(draft, model.state_dict(), FILE_BYTES, consolidate=True)

    def complete() -> None:
        shutil.rmtree(draft / "sharded", ignore_errors=True)  # what the writer leaves behind
        if (single := draft / "model-00001-of-00001.safetensors").exists():
            single.replace(draft / "model.safetensors")  # as everyone expects
            (draft / "model.safetensors.index.json").unlink()
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
    numbers = {}
    number = 1
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > n_bytes:
            number += 1
            used = 0
        numbers[name] = number
        used += size
    return numbers


def shares_prefixes(model: PreTrainedModel, longest: int) -> bool:
    """Whether rewards of tries equal those of each sequence alone, up to `longest` tokens.

    Found by trying, not by names: the hidden states of a short sequence, and of one as long as the
    longest that may come, are computed alone, as the model's own class does, then as two branches
    of one trie beside another. Recurrent models, those that count positions (ALiBi) or make masks
    of their own differ; they read one sequence per row. A collective call, once for a length.

    Raises CritiqueRMError for a model in which the other rows of a batch change a reward as well:
    one that scales all positions by the longest, or picks keys or experts across sequences.
    """
    known = {n: shared for n, shared in _layouts(model).items() if n >= longest}
    if known:  # what holds up to n tokens holds for fewer
        return known[min(known)]
    share_prefixes = _find_layout(model, longest)
    if share_prefixes is None:
        is_long = _find_layout(model, 16) is not None
        advice = "lower --max-length-tokens" if is_long else "take another model"
        raise CritiqueRMError(
            f"in this {model.config.model_type} model, of up to {longest} tokens, a reward depends "
            f"on what else is computed with it; {advice}"
        )
    if not share_prefixes:
        log(
            f"this {model.config.model_type} model reads one sequence a row, without shared prefixes"
        )
    _layouts(model)[longest] = share_prefixes
    return share_prefixes


def _layouts(model: PreTrainedModel) -> dict[int, bool]:
    """What was found for a model: by the longest sequence, whether it can share prefixes."""
    return model.__dict__.setdefault("critique_rm_layouts", {})


def without_gradients(function: Callable) -> Callable:
    """torch.no_grad as a decorator that does not import torch."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with torch.no_grad():
            return function(*args, **options)

    return call


@without_gradients
def _find_layout(model: PreTrainedModel, longest: int) -> bool | None:
    """Whether tries are computed as their sequences are alone, or else sequences in rows.

    None if neither is. In bf16 rounding alone makes a real model's states differ by 0.05 between
    two shapes; then tries are right if they differ no more than rows do.
    """
    sequences, alone = _compute_alone(model, max(longest, 8))
    is_exact = alone[0].dtype == torch.float32
    rounding, most = (1e-4, 1e-4) if is_exact else (0.06, 0.2)
    of_tries = _difference(model, sequences, alone, share_prefixes=True)
    of_rows = 0.0
    if not of_tries < rounding:  # it may be NaN
        of_rows = _difference(model, sequences, alone, share_prefixes=False)
    reshard(model)
    if not of_rows < most:
        return None
    return of_tries < max(rounding, 2 * of_rows)


def _compute_alone(model: PreTrainedModel, longest: int) -> tuple[list[np.ndarray], list[Tensor]]:
    """A short and a long sequence that begin alike, and another; the states (T, H) of each alone."""
    trunk, head = trunk_and_head(model)
    last_id = model.config.vocab_size - 1
    rng = np.random.default_rng(0)
    start = rng.integers(3, last_id, 10)
    filler = rng.choice(start, longest - 5)  # text repeats its tokens
    short = np.concatenate([start[:4], [last_id], start[4:6]])
    long = np.concatenate([start[:4], [3], filler])  # its branch comes before that of the short one
    other = np.concatenate([start[6:], filler[: len(filler) // 2]])
    sequences = [sequence.astype(np.int32) for sequence in (short, long, other)]
    alone = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.astype(np.int64))[None].to(head.weight.device)
        with errors_as(f"this {model.config.model_type} model cannot be computed", Exception):
            outputs = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        alone.append(outputs.last_hidden_state[0])
        if not alone[-1].isfinite().all():
            raise CritiqueRMError("what the model computes is not finite; are its weights whole?")
    return sequences, alone


def _difference(
    model: PreTrainedModel, sequences: list[np.ndarray], alone: list[Tensor], share_prefixes: bool
) -> float:
    """How far states of sequences computed together are from those alone: the largest mean of one.

    The other trie comes first, so that a model that takes a token's position from its column is
    found out. A mean, as rounding of 1e-6 can grow to 1e-3 at a token, while a model that reads
    other sequences differs by tenths.
    """
    device = alone[0].device
    short, long, other = sequences
    tries = [build_trie([other], [2]), *build_tries([short, long], [0, 1], share_prefixes)]
    batch = collate([tries] if share_prefixes else [[trie] for trie in tries], device)
    largest = torch.zeros((), device=device)
    try:
        together = hidden_states(model, batch, share_prefixes).float()
    except Exception:  # a model that takes no such masks
        largest += math.inf
    else:
        columns = torch.arange(batch.ids.shape[1], device=device)
        for row, last, number in zip(*batch.last.tolist(), batch.owners.tolist()):
            path = (columns <= last) & (last < batch.ends[row])  # the tokens of the sequence
            expected = alone[number].float()
            difference = (together[row, path] - expected).norm(dim=1) / expected.norm(dim=1)
            largest = torch.maximum(largest, difference.mean())
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def hidden_states(model: PreTrainedModel, batch: Batch, share_prefixes: bool) -> Tensor:
    """The last hidden states (R, T, H) of a micro-batch, whose rows hold tries or one sequence."""
    trunk, _ = trunk_and_head(model)
    if share_prefixes:
        masks = attention_masks(batch, model.config)
    else:  # the model makes its own masks from what is not padding
        columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        masks = (batch.positions == columns).long()
    return trunk(
        input_ids=batch.ids, attention_mask=masks, position_ids=batch.positions, use_cache=False
    ).last_hidden_state


def compute_rewards(model: PreTrainedModel, batch: Batch, share_prefixes: bool) -> Tensor:
    """Rewards (S,) fp32 of the sequences of a micro-batch, read at each one's last token.

    With `share_prefixes` rows hold tries (see the function of that name), else one sequence each.
    """
    _, head = trunk_and_head(model)
    hidden = hidden_states(model, batch, share_prefixes)[batch.last[0], batch.last[1]]  # (S, H)
    return head(hidden.float()).squeeze(-1)  # (S,)


def reshard(model: PreTrainedModel) -> None:
    """Frees the weights that a forward pass without a backward pass leaves gathered."""
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def choose_pad_token(config: PreTrainedConfig, encoder: Encoder) -> None:
    """Makes the pad token differ from the end token, in the config and in the tokenizer.

    Hugging Face's classifiers read the last token that is not padding: with pad = end they read the
    token before the end and give another reward than ours. None if no token is left: they then
    score one sequence at a time.
    """
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = "right"
    if encoder.keep_tail:  # and it reads where its own class does
        return
    wanted = [tokenizer.pad_token_id, tokenizer.unk_token_id, *encoder.control.ids.values()]
    pad = next((i for i in wanted if i not in (None, encoder.end_id)), None)
    config.pad_token_id = pad
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)


# --------------------------------------------------------------------------------------------------
# 6. Loss


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
    folder: str,
    use_critiques: bool | None = None,
    max_length_tokens: int | None = None,
    dtype: str = "auto",
    compiled: bool = False,
) -> tuple[PreTrainedModel, Encoder]:
    """Loads a reward model to score with: one of train.py's folders, or any like it.

    What the arguments leave open comes from the folder; a model of others is read with critiques,
    up to its longest input or 4,096 tokens, where its own class reads: at the last token its
    template writes, or before it, if that is the one it takes for padding. `dtype` is one of
    DTYPES; `compiled` pays for thousands of pairs.
    """
    device, mesh = start_processes()
    folder = find_model(folder)
    config = load_config(folder)
    ours = read_settings(config, folder)
    reads_critiques = ours.get("critiques", True)
    longest = min(getattr(config, "max_position_embeddings", None) or 4096, 4096)
    encoder = Encoder(
        load_tokenizer(folder),
        max_length_tokens or ours.get("max_length_tokens", longest),
        reads_critiques if use_critiques is None else use_critiques,
        keep_tail=ours.get("keep_tail", not ours),
        pad_id=config.pad_token_id,
    )
    if ours and encoder.use_critiques != reads_critiques:
        how = "with" if reads_critiques else "without"
        log(f"{folder}: trained {how} critiques; this tests it the other way")
    check_fits(config, encoder)
    if not ours:
        log_where_read(folder, encoder)
    compute_dtype = choose_dtype(dtype, device, config.hidden_size)
    model = build_model(config, compute_dtype, mesh, change=freeze)
    read_weights(model, folder, device)
    if compiled:
        compile_blocks(model)
    return model.eval(), encoder


SETTINGS = {"critiques": bool, "max_length_tokens": int, "keep_tail": bool}


def read_settings(config: PreTrainedConfig, folder: str) -> dict[str, Any]:
    """What train.py wrote into the config of a run; nothing of another's model."""
    settings = getattr(config, "critique_rm", None)
    if settings is None:
        return {}
    is_object = isinstance(settings, dict)
    for name, value in settings.items() if is_object else ():
        is_object = is_object and type(value) is SETTINGS.get(name)
    if not is_object or settings.get("max_length_tokens", 1) < 1:
        found = _shorten(settings)
        raise CritiqueRMError(
            f"{folder}: critique_rm in its config.json is {found}; train.py wrote another"
        )
    return settings


def log_where_read(folder: str, encoder: Encoder) -> None:
    """Says at which token another's reward model is read, if that is not the end of its text."""
    tokenizer = encoder.tokenizer
    messages = (Message("user", "a"), Message("assistant", "b"))
    written = encoder.render(messages)
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    n_read = len(encoder.encode(messages))
    if n_read < len(ids):
        last, read = tokenizer.convert_ids_to_tokens([ids[-1], encoder.end_id])
        log(f"{folder}: read at {read!r}, as its class does: {last!r} is its padding")


def score_answers(
    model: PreTrainedModel,
    encoder: Encoder,
    answers: Sequence[Answer],
    budget_tokens: int = 4096,
    skip_bad: bool = False,
) -> list[float | None]:
    """One reward per answer, the mean over its critiques; None where it cannot be scored.

    That is: without a critique where the model reads critiques, or with one that leaves no room.
    Long prompts and responses are cut, and counted in `encoder.counts`. A collective call.

    Raises CritiqueRMError that names an answer which the template refuses (None with `skip_bad`,
    and counted), or whose reward is not finite.
    """
    encoded = encoder.encode_singles(answers, skip_bad)
    rewards = iter(score_groups(model, [e for e in encoded if e], budget_tokens))
    scores: list[float | None] = []
    for number, (answer, sequences) in enumerate(zip(answers, encoded), 1):
        score = None
        if sequences:
            place = answer.where or answer.id or f"answer {number}"
            score = check_finite(float(np.mean(next(rewards))), place)
        scores.append(score)
    return scores


def make_reward_function(
    folder: str, critic: Callable[[str | list, str], str] | None = None
) -> Callable[..., list[float | None]]:
    """A reward function as TRL's GRPOTrainer and verl call it, of the model in a folder.

    It takes prompts and completions (texts, or lists of messages) and columns by name, of which it
    reads `critique`, one a completion; `critic` writes those that are not there, from the prompt as
    it came and the response, as generate.py's `write_critique` does with an endpoint. Rewards come in
    the given order, None where a model that reads critiques has none.

    The critic is asked for one critique after another, and what it raises is raised.

    Raises CritiqueRMError in a process group of several: each process would ask about others.
    """
    model, encoder = load_reward_model(folder)
    if dist.get_world_size() > 1:
        raise CritiqueRMError("the reward function is for one process; serve the model to several")

    def reward(prompts: list, completions: list, **columns: list) -> list[float | None]:
        critiques = columns.get("critique") or [None] * len(prompts)
        answers = []
        for prompt, completion, critique in zip(prompts, completions, critiques, strict=True):
            asked = check_messages(prompt, "prompt", "user")
            last = check_messages(completion, "completion", "assistant")[-1]
            if critique is None and critic and encoder.use_critiques:
                critique = critic(prompt, last.content)
            given = check_critiques(critique, "critique")
            answers.append(Answer(asked, last.content, given, more=last.more))
        return score_answers(model, encoder, answers)

    return reward


def check_finite(reward: float, place: str) -> float:
    if not math.isfinite(reward):
        raise CritiqueRMError(f"{place}: the reward is {reward}; are the model's weights whole?")
    return reward


@without_gradients
def score_groups(
    model: PreTrainedModel, groups: Sequence[Sequence[np.ndarray]], budget_tokens: int
) -> list[list[float]]:
    """Rewards of groups of sequences (a group shares a prompt), each distinct sequence once.

    A collective call: every rank scores its share and all of them get all the rewards.
    """
    longest = max((len(s) for group in groups for s in group), default=0)
    share_prefixes = shares_prefixes(model, longest)
    # A block has about 12 H² weights: in a row of 2 H tokens attention, which is slower for each
    # operation, takes as long as they do. Longer rows share more, but not enough to pay for it.
    row_tokens = min(budget_tokens, 2 * model.config.hidden_size)
    numbers: dict[bytes, int] = {}  # of each distinct sequence
    units: list[list[Trie]] = []
    for group in groups:
        new = {s.tobytes(): s for s in group if s.tobytes() not in numbers}
        in_order = sorted(new.values(), key=lambda s: s.tolist())
        for part in _split_group(in_order, row_tokens):
            owners = []
            for sequence in part:
                owners.append(len(numbers))
                numbers[sequence.tobytes()] = len(numbers)
            units += [[trie] for trie in build_tries(part, owners, share_prefixes)]
    device = next(model.parameters()).device
    ranks = (dist.get_rank(), dist.get_world_size())
    scored = [np.empty(0, np.int32)]  # numbers of sequences
    rewards = [torch.empty(0, device=device)]  # theirs, in the same order
    for rows in pack(units, budget_tokens, charge_tokens(model), share_prefixes, *ranks):
        batch = collate(rows, device)
        scored.append(batch.owners)
        rewards.append(compute_rewards(model, batch, share_prefixes))
    reshard(model)
    of_all_ranks = torch.zeros(len(numbers), dtype=torch.float64, device=device)
    own = torch.from_numpy(np.concatenate(scored)).to(device)
    of_all_ranks[own] = torch.cat(rewards).double()
    dist.all_reduce(of_all_ranks)
    values = of_all_ranks.tolist()
    return [[values[numbers[s.tobytes()]] for s in group] for group in groups]


def _split_group(sequences: list[np.ndarray], row_tokens: int) -> Iterator[list[np.ndarray]]:
    """Splits sorted sequences so that the trie of each part fits a row."""
    part = []
    n_tokens = 0
    previous = np.empty(0, np.int32)
    for sequence in sequences:
        n_new = len(sequence) - _common_prefix(previous, sequence)
        if part and n_tokens + n_new > row_tokens:
            yield part
            part = []
            n_tokens = 0
            n_new = len(sequence)
        part.append(sequence)
        n_tokens += n_new
        previous = sequence
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
    group: str = ""  # of pairs of one record that lists several responses
    chosen_index: int = 0  # in those lists
    rejected_index: int = 0
    chosen_rewards: list[float] = field(default_factory=list)  # of each critique
    rejected_rewards: list[float] = field(default_factory=list)


def score_pairs(
    model: PreTrainedModel, encoded: Sequence[EncodedPair], budget_tokens: int
) -> list[PairScore]:
    """Scores pairs; a reward is the mean over the answer's critiques. A collective call.

    Raises CritiqueRMError that names a pair whose reward is not finite.
    """
    by_prompt: dict[tuple[Message, ...], list[np.ndarray]] = {}
    for e in encoded:
        by_prompt.setdefault(e.pair.prompt, []).extend([*e.chosen, *e.rejected])
    rewards = score_groups(model, list(by_prompt.values()), budget_tokens)
    # the order below is that in which the sequences were collected, so each gets its own reward
    streams = dict(zip(by_prompt, map(iter, rewards)))
    scores = []
    for e in encoded:
        pair, stream = e.pair, streams[e.pair.prompt]
        chosen = [next(stream) for _ in e.chosen]
        rejected = [next(stream) for _ in e.rejected]
        place = f"{pair.where}, pair {pair.id}" if pair.where else f"pair {pair.id}"
        scores.append(
            PairScore(
                id=pair.id,
                prompt_id=digest_prompt(pair.prompt),
                subset=pair.subset,
                chosen_reward=check_finite(sum(chosen) / len(chosen), place),
                rejected_reward=check_finite(sum(rejected) / len(rejected), place),
                chosen_words=len(pair.chosen.split()),
                rejected_words=len(pair.rejected.split()),
                chosen_critique_words=_mean_words(pair.chosen_critiques),
                rejected_critique_words=_mean_words(pair.rejected_critiques),
                group=pair.group,
                chosen_index=pair.chosen_index,
                rejected_index=pair.rejected_index,
                chosen_rewards=chosen,
                rejected_rewards=rejected,
            )
        )
    return scores


def _mean_words(texts: Sequence[str]) -> float | None:
    return sum(len(text.split()) for text in texts) / len(texts) if texts else None


def write_scores(path: Path, scores: Sequence[PairScore]) -> None:
    """Writes one JSON line a pair."""
    replace_file(path, "".join(to_json(asdict(score)) + "\n" for score in scores))
