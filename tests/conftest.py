"""Tokenizers and tiny models made in code, a process group of one, and a finished run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # most tests compare fp32, and several processes

import critique_rm as rm  # noqa: E402

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
# style: (kind of vocabulary, bos, end, pad, control tokens, other added tokens, chat template)
STYLES = {
    "chatml": (
        *("bytes", None, "<|im_end|>", "<|im_end|>"),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)],
        TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    ),
    "llama3": (
        *("bytes", "<|begin_of_text|>", "<|eot_id|>", None),
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [],
        LLAMA3,
    ),
    "gemma": (
        *("spaces", "<bos>", "<eos>", "<pad>"),
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        [AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False)],
        GEMMA,
    ),
    "mistral": ("words", "<s>", "</s>", None, ["<s>", "</s>", "[INST]", "[/INST]"], [], MISTRAL),
    "phi3": (
        *("words", "<s>", "<|end|>", "<|end|>"),
        ["<s>"],
        [AddedToken(f"<|{name}|>", rstrip=True) for name in ("user", "assistant", "end")],
        TURNS + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}",
    ),
    "plain": ("words", "<s>", "</s>", "<unk>", ["<unk>", "<s>", "</s>"], [], None),
    "gpt2": ("bytes", "<|endoftext|>", "<|endoftext|>", None, ["<|endoftext|>"], [], None),
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
    kind, bos, end, pad, control, others, template = STYLES[style]
    backend = Tokenizer.from_str(train_vocabulary(kind, *control))
    backend.add_special_tokens([AddedToken(t, special=True) for t in control])
    backend.add_tokens(others)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=end,
        pad_token=pad,
        unk_token="<unk>" if pad == "<unk>" else None,
        chat_template=template,
    )


@pytest.fixture(params=STYLES)
def style(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(style: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(style)


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


def run_script(name: str, *arguments: object, processes: int = 1) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script."""
    process = start_script(name, *arguments, processes=processes)
    out, err = process.communicate()
    return process.returncode, out, err


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small) -> tuple[Path, str, str]:
    """The folder, stdout and stderr of a short run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    code, out, err = run_script("train.py", *small, "--out", folder)
    assert code == 0, err
    return folder, out, err
