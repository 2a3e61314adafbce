"""What several files of tests share: tokenizers, records, tiny models, runs, and servers."""

import contextlib
import copy
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # most tests compare fp32, and several processes

import critique_rm as rm  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
from chat_server import KEY, Server, echo  # noqa: E402
from critique_rm import CritiqueRMError, Message, Pair, read_pairs  # noqa: E402

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# Tokenizers

SENTENCES = [
    "The user asks how many minutes are left; the assistant answers.",
    "Critique: the answer is right, but the system says nothing of the second train.",
    "A reward model reads the prompt, the response and the critique.\n\nThen it gives a number.",
]
TURNS = "{% for m in messages %}"
LLAMA3 = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
    "{% else %}{% set day = '26 Jul 2024' %}{% endif %}<|start_header_id|>system<|end_header_id|>"
    "\n\nToday Date: {{ day }}\n\n<|eot_id|>" + TURNS + "<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + TURNS + "<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + TURNS + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


class Style(NamedTuple):
    """The tokenizer of a family of models."""

    vocabulary: str  # "bytes", or like SentencePiece's: "spaces", "words"
    bos: str | None
    end: str
    pad: str | None
    control: list[str]
    others: list[AddedToken]
    template: str | None


STYLES = {
    "chatml": Style(
        vocabulary="bytes",
        bos=None,
        end="<|im_end|>",
        pad="<|im_end|>",
        control=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        others=[AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)],
        template=TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    ),
    "llama3": Style(
        vocabulary="bytes",
        bos="<|begin_of_text|>",
        end="<|eot_id|>",
        pad=None,
        control=["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        others=[],
        template=LLAMA3,
    ),
    "gemma": Style(
        vocabulary="spaces",
        bos="<bos>",
        end="<eos>",
        pad="<pad>",
        control=["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        others=[AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False)],
        template=GEMMA,
    ),
    "mistral": Style(
        vocabulary="words",
        bos="<s>",
        end="</s>",
        pad=None,
        control=["<s>", "</s>", "[INST]", "[/INST]"],
        others=[],
        template=MISTRAL,
    ),
    "phi3": Style(
        vocabulary="words",
        bos="<s>",
        end="<|end|>",
        pad="<|end|>",
        control=["<s>"],
        others=[AddedToken(f"<|{name}|>", rstrip=True) for name in ("user", "assistant", "end")],
        template=TURNS + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}",
    ),
    "plain": Style(
        vocabulary="words",
        bos="<s>",
        end="</s>",
        pad="<unk>",
        control=["<unk>", "<s>", "</s>"],
        others=[],
        template=None,
    ),
    "gpt2": Style(
        vocabulary="bytes",
        bos="<|endoftext|>",
        end="<|endoftext|>",
        pad=None,
        control=["<|endoftext|>"],
        others=[],
        template=None,
    ),
}


@cache
def train_vocabulary(kind: str, *control: str) -> str:
    """A BPE, as JSON: of bytes, or like SentencePiece's with "▁" before words or for spaces."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "words":
            steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence(steps)
        alphabet = list("<>|[]/_abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind == "bytes":
        return tokenizer.to_str()
    spec = json.loads(tokenizer.to_str())
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *spec["model"]["vocab"]]
    spec["model"] |= {"vocab": {t: i for i, t in enumerate(tokens)}, "byte_fallback": True}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if kind == "spaces":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer.to_str()


def make_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer in the style of a family of models; adds a bos token unless told not to."""
    family = STYLES[style]
    backend = Tokenizer.from_str(train_vocabulary(family.vocabulary, *family.control))
    backend.add_special_tokens([AddedToken(token, special=True) for token in family.control])
    backend.add_tokens(family.others)
    if family.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.end,
        pad_token=family.pad,
        unk_token="<unk>" if family.pad == "<unk>" else None,
        chat_template=family.template,
    )


@pytest.fixture(params=STYLES)
def style(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(style: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(style)


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


ASKED = [user("p")]
PLAIN = {"id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}


def pair(prompt: str | list = "p", chosen: str = "c", rejected: str = "r", **fields) -> Pair:
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    return Pair(**{"id": "a"} | fields, prompt=talk(prompt), chosen=chosen, rejected=rejected)


def complaint(source: str) -> str:
    with pytest.raises(CritiqueRMError) as caught:
        read_pairs(source)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    return str(caught.value)


CRITIQUES = {"chosen_critiques": ("right, c",), "rejected_critiques": ("wrong, r",)}


def words(letter: str, n: int) -> str:
    return " ".join(f"{letter}{k}☃" for k in range(n))


def sized(n_prompt: int, n_chosen: int, n_rejected: int, **fields) -> Pair:
    texts = words("p", n_prompt), words("c", n_chosen), words("r", n_rejected)
    return replace(pair(*texts, **CRITIQUES), **fields)


# --------------------------------------------------------------------------------------------------
# Models

@pytest.fixture(scope="session")
def mesh():
    """The device mesh of one process, which keeps to one core."""
    torch.set_num_threads(1)
    return rm.start_processes()[1]


TINY = {
    "vocab_size": 768,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large: rewards then differ by about 1
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def make_config() -> Callable:
    def make(architecture: str, **changes):
        return getattr(transformers, architecture + "Config")(**(TINY | changes))

    return make


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
OTHERS = {  # positions that are learned, or not taken from mask and position_ids
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2},
    "Bloom": {},
    "Falcon": {"alibi": True},
    "Mpt": {},
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
    share_prefixes = rm.shares_prefixes(model, longest)
    units = [rm.build_tries(group, [next(number) for _ in group], share_prefixes) for group in groups]
    rows = [units[0] + units[1], *units[2:]] if share_prefixes else [[t] for unit in units for t in unit]
    batch = rm.collate(rows, CPU)
    return rm.compute_rewards(model, batch, share_prefixes)[batch.owners.argsort()]


def rewards_alone(model, groups: list[list[np.ndarray]]) -> torch.Tensor:
    """Rewards from Hugging Face's own classifier, sequence by sequence."""
    ids = [torch.from_numpy(s.astype(np.int64))[None] for group in groups for s in group]
    return torch.cat([model(input_ids=i).logits[:, 0] for i in ids])


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


@pytest.fixture
def reward_folder(tmp_path, make_config):
    """A reward model of others, whose template writes nothing behind its end token."""
    save_tiny(make_config, "Llama", tmp_path)
    make_tokenizer("llama3").save_pretrained(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Runs

def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start_script(name: str, *arguments: object, processes: int = 1) -> subprocess.Popen:
    """Starts a script as its users do, with one thread a process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, str(ROOT / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


class Ended(NamedTuple):
    """What a script left."""

    code: int
    stdout: str
    stderr: str


def run_script(name: str, *arguments: object, processes: int = 1) -> Ended:
    process = start_script(name, *arguments, processes=processes)
    stdout, stderr = process.communicate()
    return Ended(process.returncode, stdout, stderr)


def run_here(*arguments: object) -> dict:
    return train.run(train.parse_arguments([str(argument) for argument in arguments]))


@contextlib.contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """train.py, in this process, is told to end while it computes that step of those to come."""
    compute_step = train.train_step
    steps = itertools.count(1)

    def train_step(*args) -> dict[str, float]:
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return compute_step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        yield


@pytest.fixture(scope="session")
def test_file(tmp_path_factory) -> Path:
    """The first 12 embedded test pairs."""
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    lines = (ROOT / "data" / "test.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]))
    return path


@pytest.fixture(scope="session")
def small(test_file) -> list[object]:
    """Arguments of a short run: 6 steps, two epochs of 4 + 4 + 2 pairs."""
    size = ["--max-pairs", 10, "--batch-pairs", 4, "--epochs", 2]
    return [*size, "--train", ROOT / "data" / "train.jsonl", "--test", test_file]


class Finished(NamedTuple):
    """A run that has ended."""

    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small) -> Finished:
    """A short run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    code, stdout, stderr = run_script("train.py", *small, "--out", folder)
    assert code == 0, stderr
    return Finished(folder, stdout, stderr)


ADAPTERS = ["--lora-rank", 4, "--lr", 1e-3]


@pytest.fixture(scope="session")
def by_two(finished, small, test_file, tmp_path_factory) -> Path:
    """What two processes leave that start once: a run, one of adapters, and scores of `finished`.

    run, adapted: the folders; table.json, scores.jsonl, table.md: what evaluate.py writes.
    """
    folder = tmp_path_factory.mktemp("by_two")
    adapted = ["--model", finished.folder, *ADAPTERS, "--out", folder / "adapted"]
    written = ["--json", folder / "table.json", "--save-scores", folder / "scores.jsonl"]
    commands = [
        ["train", *small, "--out", folder / "run"],
        ["train", *small, *adapted],
        ["evaluate", finished.folder, "--data", test_file, *written],
    ]
    code, stdout, stderr = run_script("tests/in_turn.py", json.dumps(commands, default=str), processes=2)
    assert code == 0, stderr
    (folder / "table.md").write_text(stdout[stdout.index("| ") :])
    return folder


@pytest.fixture(scope="session")
def untouched(mesh, tmp_path_factory):
    """The tiny model in this process, and 8 encoded pairs."""
    args = train.parse_arguments(["--batch-pairs", "8", "--micro-batch-tokens", "512"])
    pairs = rm.read_pairs(args.train)[:8]
    model, encoder = train.prepare_model(args, tmp_path_factory.mktemp("tiny"), pairs)
    return args, model, encoder.encode_pairs(pairs, "pairs")


@pytest.fixture
def model_and_pairs(untouched):
    """The same for one test, which may change arguments and weights."""
    args, model, pairs = untouched
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield copy.copy(args), model, pairs
    model.load_state_dict(before)
    model.zero_grad()


# --------------------------------------------------------------------------------------------------
# generate.py

@pytest.fixture
def clean_process(monkeypatch, tmp_path):
    """No endpoint from outside, quick retries, and the signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(generate, "BACKOFF_SECONDS", 0.005)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def serve(clean_process):
    """Starts servers: `serve(reply)`."""
    servers = []

    def start(reply=echo) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class Run(NamedTuple):
    code: int
    counts: dict
    stdout: str
    stderr: str


@pytest.fixture
def run(clean_process, capsys):
    """Runs generate.py in this process: `run(server, *flags)` on pairs.jsonl, into out.jsonl."""

    def start(server: Server | None, *flags: str, pairs="pairs.jsonl", output="out.jsonl") -> Run:
        url = ["--base-url", server.url] if server else []
        code = generate.main([pairs, "--output", output, "--model", "m", *url, *flags])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        counts = json.loads(lines[-1]) if lines else {}
        return Run(code, counts, captured.out, captured.err)

    return start
