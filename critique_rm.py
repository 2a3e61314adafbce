"""What generating, training and scoring must agree on.

The path of one preference pair, top to bottom: a record is read (`read_pairs`), each of its answers
becomes token ids (`Encoder`), answers that share a beginning become one trie (`build_trie`), tries
become micro-batches (`pack`), the model reads them (`RewardModel`), and two rewards become a loss
(`pairwise_loss`). train.py, generate.py and evaluate.py import from here and never from each other.

Method: Ye et al., "Improving Reward Models with Synthetic Critiques", arXiv 2405.20850.

Shapes: B pairs, S sequences, R rows, T tokens in a row, H hidden size.
"""

import gzip
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# Errors and messages


class CritiqueRMError(Exception):
    """A mistake in the input or the surroundings; its text says where, what was found, what to do."""


def say(message: str) -> None:
    """Writes one line to stderr, on rank 0 only (torchrun sets RANK)."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


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


ROLES = ("system", "developer", "user", "assistant", "tool")  # templates print them: no free text
MAX_LINE_BYTES = 16 * 2**20
MAX_ARRAY_BYTES = 2**30
CRITIQUES_MISSING = "run generate.py on it first, or pass --no-critiques"


def read_pairs(source: str) -> list[Pair]:
    """Reads preference pairs from a file, or from a Hub data set `NAME` or `NAME:SPLIT`.

    Files are JSON lines or one JSON array, plain or gzipped, told apart by content. Each record is
    recognised by its fields: ours, TRL's preference formats, UltraFeedback-binarized, HH-RLHF
    transcripts, RewardBench, PandaLM's test set (majority of three annotators, ties dropped) and
    LLMBar. Records without an id get one from their content.

    Raises CritiqueRMError naming file, line, field, what was found and what to do.
    """
    records = [(where, _parse_pair(row, where)) for where, row in _read_rows(source)]
    pairs = [(where, pair) for where, pair in records if pair]
    n_ties = len(records) - len(pairs)
    if n_ties:
        say(f"{source}: {n_ties} pairs without a majority for one side dropped")
    if not pairs:
        raise CritiqueRMError(f"{source}: no preference pair in it; expected one JSON object a line")
    return _with_unique_ids(pairs, source)


def read_answers(source: str) -> list[Answer]:
    """Reads single records {prompt, response, critique?, id?}, to be scored on their own."""
    return [
        Answer(
            _prompt(row, where),
            _text(row, "response", where),
            _critiques(row, "critique", where),
            str(row.get("id", "")),
        )
        for where, row in _read_rows(source)
    ]


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
        if not pair.id:
            content = digest(asdict(pair))
            names = (f"{content}-{n}" if n > 1 else content for n in itertools.count(1))
            pair = replace(pair, id=next(name for name in names if name not in seen))
            n_repeats += pair.id != content
        seen[pair.id] = where
        pairs.append(pair)
    if n_repeats:
        say(f"{source}: {n_repeats} pairs repeat an earlier one to the letter (kept, ids numbered)")
    return pairs


def _read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """Yields (where, object) from a file or a Hub data set; `where` is for messages."""
    if not os.path.exists(source):
        yield from _read_hub(source)
        return
    try:
        with open(source, "rb") as raw:
            stream = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            is_array = stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
            yield from (_read_array if is_array else _read_lines)(source, stream)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise CritiqueRMError(f"{source}: cannot be read ({error}); is the file complete?") from None


def _read_lines(source: str, stream) -> Iterator[tuple[str, dict]]:
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise CritiqueRMError(f"{source}:{number}: line longer than 16 MB; shorten or remove it")
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            yield _parse_json(line, f"{source}:{number}", dict)


def _read_array(source: str, stream) -> Iterator[tuple[str, dict]]:
    data = stream.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise CritiqueRMError(f"{source}: JSON array over 1 GB; write one object a line instead")
    for number, row in enumerate(_parse_json(data, source, list), 1):
        where = f"{source}: item {number}"
        if not isinstance(row, dict):
            raise CritiqueRMError(f"{where}: expected an object, found {_shorten(row)}")
        yield where, row


def _parse_json(data: bytes, where: str, kind: type):
    """Parses one JSON value of the given kind; returns (where, value) for objects."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CritiqueRMError(f"{where}: not UTF-8 text; expected JSON lines or a JSON array") from None
    except (ValueError, RecursionError) as error:
        problem = str(error).split(";")[0]
        raise CritiqueRMError(f"{where}: not valid JSON ({problem}); mend or remove it") from None
    if not isinstance(value, kind):
        raise CritiqueRMError(f"{where}: expected a JSON object, found {_shorten(value)}")
    return (where, value) if kind is dict else value


def _read_hub(source: str) -> Iterator[tuple[str, dict]]:
    name, _, split = source.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or re.search(r"\.jsonl?(\.gz)?$", name):
        raise CritiqueRMError(f"{source}: no such file")
    try:
        from datasets import load_dataset
    except ImportError:
        raise CritiqueRMError(
            f"{source}: no such file; to read it as a Hub data set run: pip install datasets"
        ) from None
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises many kinds, of several packages
        problem = str(error).splitlines()[0]
        raise CritiqueRMError(f"{source}: neither a file nor a Hub data set ({problem})") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


def _parse_pair(row: dict, where: str) -> Pair | None:
    """Recognises the format by its fields; None is a tie."""
    if "annotator1" in row:
        return _parse_pandalm(row, where)
    if "output_1" in row:
        return _parse_llmbar(row, where)
    if "prompt" not in row and str(row.get("chosen")).lstrip().startswith("Human:"):
        return _parse_transcripts(row, where)
    return _parse_preference(row, where)


def _parse_preference(row: dict, where: str) -> Pair:
    """Ours, TRL (explicit or implicit prompt, plain or chat), UltraFeedback and RewardBench."""
    (start_c, chosen), (start_r, rejected) = (_turns(row, side, where) for side in SIDES)
    if start_c != start_r:
        raise CritiqueRMError(
            f"{where}: 'chosen' and 'rejected' differ before their last message; "
            "a pair needs one prompt"
        )
    if "prompt" not in row and not start_c:  # TRL's implicit prompt in plain text
        n = len(os.path.commonprefix([chosen, rejected]))
        n = chosen.rfind(" ", 0, n) + 1 if n < max(len(chosen), len(rejected)) else n
        row = {**row, "prompt": chosen[:n]}
        chosen, rejected = chosen[n:], rejected[n:]
    # UltraFeedback repeats the prompt inside the messages; TRL's explicit prompt stands before them
    whole = bool(start_c) and ("prompt" not in row or start_c[0].role != "assistant")
    prompt = start_c if whole else _prompt(row, where) + start_c
    for side, response in zip(SIDES, (chosen, rejected)):
        _text({side: response}, side, where)
    try:
        margin = float(row.get("margin") or 0.0)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise CritiqueRMError(f"{where}: 'margin' is {_shorten(row['margin'])}; expected a number")
    return Pair(
        id=_id(row, "id", where),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_critiques=_critiques(row, "chosen_critique", where),
        rejected_critiques=_critiques(row, "rejected_critique", where),
        subset=_text({"subset": row.get("subset") or ""}, "subset", where, may_be_empty=True),
        margin=margin,
    )


SIDES = ("chosen", "rejected")


def _parse_transcripts(row: dict, where: str) -> Pair:
    """HH-RLHF: two transcripts with the same beginning up to the last "Assistant:"."""
    turns = {}
    for side in SIDES:
        text = _text(row, side, where)
        parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip())[1:]
        roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
        turns[side] = [
            {"role": role, "content": content} for role, content in zip(roles, parts[1::2])
        ]
    return _parse_preference({**row, **turns}, where)


def _parse_pandalm(row: dict, where: str) -> Pair | None:
    """PandaLM's testset-v1: annotators say 0 (tie), 1 or 2; some responses are JSON booleans."""
    votes = [row.get(f"annotator{n}") for n in (1, 2, 3)]
    if any(vote not in (0, 1, 2) for vote in votes):
        raise CritiqueRMError(f"{where}: annotators are {votes}; expected 0, 1 or 2 each")
    best = next((side for side in (1, 2) if votes.count(side) >= 2), None)
    if best is None:
        return None
    parts = [_text(row, name, where, may_be_empty=True) for name in ("instruction", "input")]
    prompt = _text({"instruction": "\n\n".join(filter(None, parts))}, "instruction", where)
    responses = [
        str(row[name])
        if isinstance(row.get(name), bool)
        else _text(row, name, where, may_be_empty=True)
        for name in ("response1", "response2")
    ]
    return Pair(
        id=f"pandalm-{_id(row, 'idx', where)}",
        prompt=(Message("user", prompt),),
        chosen=responses[best - 1],
        rejected=responses[2 - best],
        subset="pandalm",
    )


def _parse_llmbar(row: dict, where: str) -> Pair:
    if row.get("label") not in (1, 2):
        raise CritiqueRMError(f"{where}: 'label' is {_shorten(row.get('label'))}; expected 1 or 2")
    prompt = (Message("user", _text(row, "input", where)),)
    outputs = [_text(row, name, where) for name in ("output_1", "output_2")]
    return Pair(_id(row, "id", where), prompt, outputs[row["label"] - 1], outputs[2 - row["label"]])


def _turns(row: dict, side: str, where: str) -> tuple[tuple[Message, ...], str]:
    """The messages before the response (none for plain text), and the response."""
    if not isinstance(row.get(side), list):
        return (), _text(row, side, where)
    messages = _messages(row[side], side, where)
    if not messages or messages[-1].role != "assistant":
        raise CritiqueRMError(f"{where}: the last message of {side!r} is not the assistant's")
    return messages[:-1], messages[-1].content


def _prompt(row: dict, where: str) -> tuple[Message, ...]:
    value = row.get("prompt")
    if isinstance(value, list) and value:
        return _messages(value, "prompt", where)
    return (Message("user", _text(row, "prompt", where)),)


def _messages(value: list, field: str, where: str) -> tuple[Message, ...]:
    messages = []
    for n, item in enumerate(value, 1):
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            raise CritiqueRMError(
                f"{where}: message {n} of {field!r} is {_shorten(item)}; expected "
                f'{{"role": one of {", ".join(ROLES)}, "content": text}}'
            )
        messages.append(Message(item["role"], _text(item, "content", where, may_be_empty=True)))
    return tuple(messages)


def _critiques(row: dict, field: str, where: str) -> tuple[str, ...]:
    value = row.get(field)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_text({field: item}, field, where) for item in values)


def _id(row: dict, field: str, where: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise CritiqueRMError(f"{where}: {field!r} is {_shorten(value)}; expected text or a number")
    return _text({field: str(value)}, field, where)


def _text(row: dict, field: str, where: str, may_be_empty: bool = False) -> str:
    if field not in row:
        found = ", ".join(map(_shorten, row)) or "no field at all"
        raise CritiqueRMError(f"{where}: no field {field!r}; found {found}")
    value = row[field]
    if not isinstance(value, str):
        raise CritiqueRMError(f"{where}: {field!r} is {_shorten(value)}; expected text")
    if not may_be_empty and not value.strip():
        raise CritiqueRMError(f"{where}: {field!r} is empty; remove the line or fill it in")
    if re.search("[\ud800-\udfff]", value):
        raise CritiqueRMError(f"{where}: {field!r} holds half a surrogate pair; mend the encoding")
    return value


def _shorten(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
