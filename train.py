"""Trains a reward model that reads critiques, and tests it.

    torchrun train.py                                   # the embedded data and a tiny model
    torchrun --nproc-per-node 8 train.py --model NAME_OR_DIR --train A.jsonl --test B.jsonl

Reads preference pairs (see `read_pairs` in critique_rm.py). Leaves in RUN a plain Hugging Face
sequence-classification folder, run.json (what ran, and its results), metrics.jsonl (one line a
step) and scores-TEST.jsonl (one line a test pair). Progress goes to stderr; the last line of stdout
is one JSON object.

Minimises −log σ(r(x, y⁺, c⁺) − r(x, y⁻, c⁻)), the Bradley-Terry loss of arXiv 2405.20850.
Hyper-parameters are ours: the paper's are not known to us.

Sections, one with its step in README.md's journey of a pair:
    Arguments
    Run folder
    Model
    Low-rank adapters
    Checkpoints
    7. Training
    Results
    Memory, before anything is loaded
    The run
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import gc
import itertools
import json
import math
import os
import platform
import resource
import secrets
import shutil
import signal
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from tqdm import tqdm

import critique_rm as rm
from critique_rm import CritiqueRMError, EncodedPair, Encoder, Pair, PairScore
from critique_rm import dcp, dtensor, transformers  # imported when they are first used
from critique_rm import log, nonnegative_int, positive_int

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

TestSets = dict[str, list[EncodedPair]]  # by file

DATA = Path(__file__).parent / "data"
# Arguments; of "dtype" what it came to is compared instead.
MAY_CHANGE_ON_RESUME = tuple(
    "out resume overwrite micro_batch_tokens activation_checkpointing save_every_steps "
    "eval_every_steps shard_group plan nproc device_gb tensorboard dtype".split()
)
SAVE_EVERY_SECONDS = 600  # whatever --save-every-steps says
CHECKPOINT_FILE_BYTES = 2**26  # in a file of a checkpoint, of each rank
FLAT_STEPS = 20  # with which the loss is called flat

# --------------------------------------------------------------------------------------------------
# Arguments


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=rm.HelpFormatter
    )
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_computing_arguments(parser)
    add_run_arguments(parser)
    add_plan_arguments(parser)
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add(
        "--model",
        metavar="NAME",
        default="tiny",
        help="model to start from: a folder, a name on the Hugging Face Hub, or 'tiny', a two-layer "
        "model made from scratch",
    )
    add("--new-head", action="store_true", help="draw a new reward head even if the model has one")
    add(
        "--train",
        metavar="FILE",
        help="pairs to train on: a file or a Hub data set (default: data/train.jsonl of this "
        "repository)",
    )
    add(
        "--test",
        metavar="FILE",
        action="append",
        help="pairs to test on after training; may be given several times (default: "
        "data/test.jsonl of this repository; none with --train)",
    )
    either = group.add_mutually_exclusive_group().add_argument
    either(
        "--valid",
        metavar="FILE",
        help="held-back pairs: the run ends with the weights that have the least log loss on them",
    )
    either(
        "--valid-share",
        metavar="SHARE",
        type=fraction,
        help="hold back the training pairs of this share of the prompts, from 0 to below 1, and "
        "use them like --valid",
    )
    add(
        "--no-critiques",
        action="store_true",
        help="train the baseline r(x, y): leave critiques out of the input",
    )
    add(
        "--critiques",
        metavar="FILE",
        help="take the critiques from this file instead; it is searched for the same pair, then "
        "for the same prompt and response",
    )
    add(
        "--max-pairs",
        metavar="N",
        type=positive_int,
        help="train on N pairs, the first in the order that --seed gives (default: all pairs)",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out bad records and count them, instead of stopping at the first",
    )
    add(
        "--max-length-tokens",
        metavar="N",
        type=positive_int,
        default=2048,
        help="longest input in tokens, critique included; prompts and responses are cut to fit",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs",
        metavar="N",
        type=positive_int,
        help="passes over the training pairs (default: 1; 3 for the tiny model)",
    )
    add(
        "--batch-pairs",
        metavar="N",
        type=positive_int,
        default=16,
        help="pairs in a step, over all processes together",
    )
    add(
        "--lr",
        metavar="X",
        type=positive_float,
        help="learning rate at its peak (default: 1e-5; 1e-4 with --lora-rank; 1e-3 for the tiny "
        "model)",
    )
    add(
        "--warmup-share",
        metavar="SHARE",
        type=fraction,
        default=0.1,
        help="share of the steps in which the learning rate rises, from 0 to below 1; then it "
        "falls to zero along a cosine",
    )
    add(
        "--weight-decay",
        metavar="X",
        type=fraction,
        default=0.0,
        help="AdamW's weight decay, from 0 to below 1, on all weights that are trained",
    )
    add(
        "--centering",
        metavar="X",
        type=float,
        default=0.0,
        help="weight of (r⁺ + r⁻)² in the loss, which keeps rewards near zero",
    )
    add(
        "--lora-rank",
        metavar="R",
        type=positive_int,
        help="train low-rank adapters of this rank and the head, and keep all other weights fixed",
    )
    add(
        "--lora-alpha",
        metavar="A",
        type=positive_float,
        help="scale of the adapters: their output is multiplied by A / R (default: A = 2 R)",
    )
    add(
        "--average-critiques",
        action="store_true",
        help="of several critiques of a response use all and average the rewards, instead of "
        "drawing one critique each epoch",
    )
    add(
        "--seed",
        metavar="N",
        type=nonnegative_int,
        default=0,
        help="seed of the data order, of a new head and of the tiny model",
    )


def add_computing_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("computing").add_argument
    add(
        "--dtype",
        choices=rm.DTYPES,
        default="auto",
        help="number format to compute in; auto takes bfloat16 where the hardware has units for "
        "it, else float32; trained weights and the loss are always float32",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the model's blocks: a minute at the start and a C++ compiler, then faster "
        "steps",
    )
    add(
        "--micro-batch-tokens",
        metavar="N",
        type=auto_or_positive,
        default="auto",
        help="tokens that a process computes at once; auto takes what saves time and fits the "
        "memory",
    )
    add(
        "--activation-checkpointing",
        action="store_true",
        help="compute activations twice instead of keeping them: less memory, a third more time "
        "(half more with --lora-rank)",
    )
    add(
        "--shard-group",
        metavar="N",
        type=positive_int,
        help="processes that share one copy of the weights (default: all processes)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run folder").add_argument
    add("--out", metavar="RUN", help="folder to write (default: the next free runs/NNN)")
    add(
        "--resume",
        action="store_true",
        help="continue the run in --out, or begin it if there is none",
    )
    add("--overwrite", action="store_true", help="replace the run in --out")
    add(
        "--eval-every-steps",
        metavar="N",
        type=positive_int,
        help="steps from one look at the --valid and --test pairs to the next (default: ten looks "
        "a run at --valid, none at --test)",
    )
    add(
        "--save-every-steps",
        metavar="N",
        type=positive_int,
        default=500,
        help="steps from one checkpoint to the next, for --resume; one is also written every 10 "
        "minutes",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write the metrics for TensorBoard as well, into the run folder",
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("plan").add_argument
    add(
        "--plan",
        action="store_true",
        help="print the memory that each process needs, part by part, and exit",
    )
    add(
        "--nproc", metavar="N", type=positive_int, default=1, help="number of processes to plan for"
    )
    add(
        "--device-gb",
        metavar="GB",
        type=positive_float,
        help="memory of each GPU to plan for, in gigabytes (default: that of this machine)",
    )


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.new_head and args.model == "tiny":
        parser.error("--new-head needs a pretrained --model, not 'tiny'")
    if args.lora_rank and args.model == "tiny":
        parser.error("--lora-rank needs a pretrained --model, not 'tiny'")
    if args.lora_alpha and not args.lora_rank:
        parser.error("--lora-alpha goes with --lora-rank")
    if args.resume and (args.overwrite or not args.out):
        parser.error("--resume needs --out, and does not go with --overwrite")
    tiny = args.model == "tiny"
    args.epochs = args.epochs or (3 if tiny else 1)
    args.lr = args.lr or (1e-3 if tiny else 1e-4 if args.lora_rank else 1e-5)
    if args.lora_rank and not args.lora_alpha:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.test is None:
        args.test = [] if args.train else [str(DATA / "test.jsonl")]
    args.train = args.train or str(DATA / "train.jsonl")
    return args


def auto_or_positive(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)


def positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return float(text)


# --------------------------------------------------------------------------------------------------
# Run folder


def claim_folder(args: Namespace) -> Path:
    """Names the run folder and creates it; a finished run is never written to."""
    if not args.out:
        for number in itertools.count(1):
            folder = Path("runs") / f"{number:03d}"
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise CritiqueRMError(f"{folder} is a file; choose another --out")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if names - {".lock"} and not (args.resume or args.overwrite and not is_restart):
        advice = "choose another --out, or add --resume or --overwrite"
        raise CritiqueRMError(f"{folder} exists; {advice}")
    if names and not names & {".lock", "run.json"}:
        raise CritiqueRMError(f"{folder} holds something else than a run; choose another --out")
    if args.overwrite and folder.resolve() == Path(args.model).resolve():
        raise CritiqueRMError(f"{folder} is --model too; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lock_folder(folder: Path):
    """Keeps a second process tree out of the folder until the last of ours is gone.

    Every rank holds the lock, shared, since workers can outlive a killed torchrun; rank 0 first
    takes it alone. Returns the open file: closing it unlocks.

    Raises CritiqueRMError if the folder is in use, or is not the same for all machines.
    """
    elsewhere = CritiqueRMError(
        f"{folder} on {platform.node()} is not the folder of rank 0; --out must be on a disk that "
        "all machines share"
    )
    if not folder.is_dir():
        raise elsewhere
    lock = open(folder / ".lock", "a+")  # a shared lock on NFS needs read access

    def take_alone() -> str:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CritiqueRMError(
                f"{folder} is in use by another run; wait for it, or end its train.py processes"
            ) from None
        except OSError as error:
            raise CritiqueRMError(
                f"{folder} cannot be locked ({error.strerror}); choose --out on another file system"
            ) from None
        mark = secrets.token_hex(8)
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_SH)
        return mark

    mark = rm.on_rank_zero(take_alone)
    fcntl.flock(lock, fcntl.LOCK_SH)
    lock.seek(0)
    if lock.read() != mark:
        raise elsewhere
    rm.barrier("the start")
    return lock


def check_disk(folder: Path, model: PreTrainedModel, keeps_best: bool) -> None:
    """Raises CritiqueRMError unless the disk has room for the checkpoints and the result.

    Two checkpoints are kept, the best weights as of each, and one is being written.
    """
    n_frozen, n_trained = count_parameters(model)
    n_checkpoints = 5 if keeps_best else 3
    of_checkpoint = 12 * n_trained  # a weight and AdamW's two means, in float32
    needed = n_checkpoints * of_checkpoint + 4 * n_frozen
    here = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*"))
    free = shutil.disk_usage(folder).free + here
    if free < needed:
        raise CritiqueRMError(
            f"{folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed for "
            "checkpoints; free some, or choose another --out"
        )


def describe(
    args: Namespace, data: dict[str, list[Pair]], model: PreTrainedModel, encoder: Encoder
) -> dict:
    """What identifies a run, which is compared on resume, and the versions and device it ran on.

    With adapters it includes the checksums of the base's weights, which checkpoints do not hold.
    A collective call.
    """
    base = checksums(Path(model.base_folder)) if args.lora_rank else None
    return {
        "arguments": vars(args),
        "data": digest_data(data),
        "base": base,
        "template": rm.digest(encoder.tokenizer.chat_template, rm.SEPARATOR),
        "dtype": rm.name_of(model.compute_dtype),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "processes": dist.get_world_size(),
    }


def digest_data(data: dict[str, list[Pair]]) -> dict[str, str]:
    return {name: rm.digest(*map(rm.digest_pair, pairs)) for name, pairs in data.items()}


def check_same_run(old: dict, new: dict) -> None:
    """Refuses to resume a run that was started with something else."""

    def settings(run: dict) -> dict[str, object]:
        named = {"template": run["template"], "--dtype": run.get("dtype")}
        for name, value in run["arguments"].items():
            if name not in MAY_CHANGE_ON_RESUME:
                named[f"arguments {name!r}"] = value
        for name, value in run["data"].items():
            named[f"data {name!r}"] = value
        for name, value in (run.get("base") or {}).items():
            named[f"the checksum of the model's {name}"] = value
        return named

    before, now = settings(old), settings(new)
    for name in before | now:
        if before.get(name) != now.get(name):
            raise CritiqueRMError(
                f"cannot resume: {name} was {before.get(name)!r} and is now {now.get(name)!r}; "
                "give the same, or start a new run"
            )


# --------------------------------------------------------------------------------------------------
# Model


def train_tokenizer(pairs: list[Pair], args: Namespace) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens trained on the text the tiny model will read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for pair in pairs:
        texts += [message.content for message in pair.prompt]
        for answer in pair.answers:
            texts += [answer.response, *(() if args.no_critiques else answer.critiques)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=(
            "{% for message in messages %}<|start|>{{ message.role }}\n"
            "{{ message.content }}<|end|>\n{% endfor %}"
        ),
    )


def tiny_config(args: Namespace) -> LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=args.max_length_tokens,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=1,
        use_cache=False,
    )


def prepare_model(
    args: Namespace, folder: Path, pairs: list[Pair]
) -> tuple[PreTrainedModel, Encoder]:
    """The tokenizer and the sharded model with its first weights."""
    device, mesh = rm.start_processes(args.shard_group)
    is_tiny = args.model == "tiny"
    goes_on = False  # with a reward model: then it is read where it was read so far
    if is_tiny:
        source, config = str(folder / "tokenizer"), tiny_config(args)
        rm.on_rank_zero(lambda: train_tokenizer(pairs, args).save_pretrained(source))
    else:
        source = rm.find_model(args.model)
        config = rm.load_config(source)
        goes_on = not args.new_head and rm.has_reward_head(source)
    longest = getattr(config, "max_position_embeddings", None) or args.max_length_tokens
    if longest < args.max_length_tokens:
        log(f"{args.model} reads at most {longest} tokens: --max-length-tokens is set to that")
    n_tokens = min(longest, args.max_length_tokens)
    before = rm.read_settings(config, args.model) or {"keep_tail": True}
    encoder = Encoder(
        rm.load_tokenizer(source),
        n_tokens,
        use_critiques=not args.no_critiques,
        keep_tail=goes_on and before.get("keep_tail", False),
        pad_id=config.pad_token_id,
    )
    rm.check_fits(config, encoder)
    rm.choose_pad_token(config, encoder)
    config.problem_type = "regression"  # the text-classification pipeline then adds no sigmoid
    config.critique_rm = {"critiques": encoder.use_critiques, "max_length_tokens": n_tokens}
    if encoder.keep_tail:
        config.critique_rm["keep_tail"] = True
        rm.log_where_read(args.model, encoder)
    torch.manual_seed(args.seed)  # a tiny model is small enough for every rank to draw the whole
    dtype = rm.choose_dtype(args.dtype, device, config.hidden_size)
    if args.micro_batch_tokens == "auto":
        args.micro_batch_tokens = choose_micro_batch(args, config, dtype, dist.get_world_size())
    change = partial(add_adapters, args=args) if args.lora_rank else None
    model = rm.build_model(config, dtype, mesh, empty=not is_tiny, change=change)
    model.base_folder = source
    if is_tiny:
        rm.init_head(model, args.seed)
    else:
        rm.read_weights(model, source, device, args.seed, args.new_head)
        init_adapters(model, args.seed)
    if args.lora_rank:
        log_unadapted(model)
    rm.set_mode(model, args.activation_checkpointing)
    return model, encoder


# --------------------------------------------------------------------------------------------------
# Low-rank adapters


class AdaptedLinear(nn.Module):
    """A linear layer and its adapter: y = W x + (α/R) B A x (Hu et al. 2021, arXiv 2106.09685).

    W (H_out, H_in) is frozen. A (R, H_in) and B (H_out, R) are trained, and far smaller: a layer of
    4,096 x 4,096 has 16.8 million weights, its adapter of rank 16 has 131,072. Their product changes
    W by any matrix of rank R. α/R keeps the size of the change, and with it the learning rate to
    choose, about the same for any rank.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        n_outputs, n_inputs = linear.weight.shape
        empty = partial(torch.empty, dtype=torch.float32, device=linear.weight.device)
        self.lora_a = nn.Parameter(empty(rank, n_inputs))
        self.lora_b = nn.Parameter(empty(n_outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.lora_a)  # (..., R)
        change = nn.functional.linear(self.scale * low, self.lora_b)  # (..., H_out)
        return nn.functional.linear(x, self.weight, self.bias) + change


def add_adapters(model: PreTrainedModel, args: Namespace) -> None:
    """Freezes the trunk and gives each linear layer of its blocks an adapter, not yet filled."""
    rm.freeze(model)
    trunk, _ = rm.trunk_and_head(model)
    trunk.get_input_embeddings().register_forward_hook(_require_gradient)
    for block in rm.find_blocks(trunk):
        for path, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                adapted = AdaptedLinear(module, args.lora_rank, args.lora_alpha)
                block.set_submodule(path, adapted)
    if not adapted_layers(model):
        raise CritiqueRMError(
            f"the blocks of a {model.config.model_type} model have no layer of torch.nn.Linear for "
            "--lora-rank to adapt; train all weights, or take another model"
        )


def _require_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    """Makes the first block, which reads frozen embeddings, like the others: compiled once for all."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def log_unadapted(model: PreTrainedModel) -> None:
    """Says how many weights of the blocks get no adapter: experts stacked in one tensor, mostly."""
    n = 0
    for module in rm.find_blocks(rm.trunk_and_head(model)[0]).modules():
        if not isinstance(module, AdaptedLinear):
            n += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
    if n:
        log(f"{n:,} frozen weights of the blocks are in no torch.nn.Linear, and get no adapter")


def adapted_layers(model: PreTrainedModel) -> dict[str, AdaptedLinear]:
    """The layers with an adapter, by name; none where all weights are trained."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


@torch.no_grad()
def init_adapters(model: PreTrainedModel, seed: int) -> None:
    """Draws A from U(−1/√H_in, 1/√H_in) and sets B to zero: training starts at the model itself.

    The paper's A is normal, its code's is this; others' learning rates are made for it. If both
    were zero no gradient would reach either. The same for any number of ranks. A collective call.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        bound = layer.lora_a.shape[1] ** -0.5
        values = torch.empty(layer.lora_a.shape).uniform_(-bound, bound, generator=generator)
        sharded = dtensor.distribute_tensor(
            values, layer.lora_a.device_mesh, layer.lora_a.placements
        )
        layer.lora_a.copy_(sharded)
        layer.lora_b.zero_()


def trained_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """How many parameters are frozen, and how many are trained."""
    n_trained = sum(p.numel() for p in trained_parameters(model).values())
    n_all = sum(p.numel() for p in model.parameters())
    return n_all - n_trained, n_trained


@torch.no_grad()
def write_merged(model: PreTrainedModel, draft: Path) -> None:
    """Writes the weights of the base, W + (α/R) B A where there is an adapter, and the head.

    From the base's files to files like them, one at a time, each tensor in the dtype it had there:
    no device holds the model twice, and W is that of the file, not rounded to compute with. The
    head, which was trained in fp32, stays in fp32. A collective call.
    """
    changes = {}
    for name, layer in adapted_layers(model).items():
        a, b = (p.full_tensor().cpu() for p in (layer.lora_a, layer.lora_b))
        changes[f"{name}.weight"] = (layer.scale * b, a)
    head = model.score.weight.full_tensor().cpu()

    def write() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        paths = rm.find_weights(model.base_folder)
        _, names = rm.match_keys(model, rm.read_headers(paths))
        files = {}
        for path in paths:
            tensors = merge_file(path, names, changes)
            for name in changes.keys() & tensors.keys():
                model.config.dtype = tensors[name].dtype  # Transformers then loads it as it is
            if path == paths[-1]:
                tensors["score.weight"] = head
            with rm.errors_as(f"{draft} was not written", safetensors.SafetensorError):
                safetensors.torch.save_file(tensors, draft / path.name, metadata={"format": "pt"})
            shutil.copymode(path, draft / path.name)  # it would be for its owner alone
            files |= dict.fromkeys(tensors, path.name)
        if len(paths) > 1:
            index = {"metadata": {}, "weight_map": files}
            (draft / "model.safetensors.index.json").write_text(rm.to_json(index, indent=2))

    rm.on_rank_zero(write)


def merge_file(
    path: Path, names: dict[str, str], changes: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of a file under their names in the model, with what adapters add, in fp32."""
    tensors = {}
    with safetensors.safe_open(path, "pt") as file:
        for key in file.keys():
            name = names.get(key)  # None: such as the head of a language model
            if name is None:
                continue
            weight = file.get_tensor(key)
            if name in changes:
                b, a = changes[name]
                weight = torch.addmm(weight.float(), b, a).to(weight.dtype)
            tensors[name] = weight
    return tensors


# --------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_tensors(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything a step changes, by name; the optimizer's state is created if it is not there."""
    tensors = {}
    for name, p in trained_parameters(model).items():
        if p not in optimizer.state:
            zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        tensors[f"model.{name}"] = p
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return tensors


Evaluations = dict[int, dict[str, float]]  # by step, what `validate` found


def best_step(evaluations: Evaluations, last: int) -> int | None:
    """The step up to `last` with the least log loss on held-back pairs; the first of equal ones."""
    losses = [(e["valid_log_loss"], step) for step, e in evaluations.items() if step <= last]
    return min(losses)[1] if losses else None


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: Optimizer,
    evaluations: Evaluations | None = None,
) -> None:
    """Each rank writes its part; one rename makes it visible.

    The newest two are kept, and of each the best one up to it: if the newest is damaged and the
    run goes on from the one before, the best weights until then are still there.
    """
    rm.barrier(f"the checkpoint after step {step}")
    draft, final = folder / "checkpoints" / "draft", checkpoint_path(folder, step)
    tensors = checkpoint_tensors(model, optimizer)
    rm.write_tensors(draft, tensors, CHECKPOINT_FILE_BYTES * dist.get_world_size())
    sums = checksums(draft)

    def publish() -> None:
        rm.replace_file(draft / "checksums.json", json.dumps(sums))
        shutil.rmtree(final, ignore_errors=True)
        draft.replace(final)
        steps = sorted(int(path.name[5:]) for path in final.parent.glob("step-*"))
        newest = steps[-2:]
        best = [best_step(evaluations or {}, last) for last in newest]
        for old in set(steps) - {*newest, *best}:
            shutil.rmtree(checkpoint_path(folder, old))

    rm.on_rank_zero(publish)


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: Optimizer) -> int:
    """Restores the newest whole checkpoint, if there is one; returns the number of steps done."""
    found = rm.on_rank_zero(lambda: sorted(map(str, (folder / "checkpoints").glob("step-*"))))
    for path in map(Path, reversed(found)):
        if is_whole(path):
            reader = dcp.HuggingFaceStorageReader(str(path))
            dcp.load(checkpoint_tensors(model, optimizer), storage_reader=reader)
            for damaged in found[found.index(str(path)) + 1 :]:  # or they would count as the newest
                rm.on_rank_zero(lambda: shutil.rmtree(damaged, ignore_errors=True))
            return int(path.name.removeprefix("step-"))
        log(f"warning: {path} is damaged; trying the one before it")
    if found:
        raise CritiqueRMError(f"{folder}: no checkpoint is whole; start anew with --overwrite")
    return 0


def load_best(folder: Path, step: int, model: PreTrainedModel) -> None:
    """Gives the model the weights, without the optimizer's state, that it had after a step."""
    path = checkpoint_path(folder, step)
    if not is_whole(path):
        raise CritiqueRMError(f"{path}, the best weights, is damaged; start anew with --overwrite")
    weights = {f"model.{name}": p for name, p in trained_parameters(model).items()}
    dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(str(path)))


def is_whole(path: Path) -> bool:
    return checksums(path) == rm.on_rank_zero(lambda: read_object(path / "checksums.json"))


def checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of each file of a checkpoint; each rank reads some of them."""
    names = rm.on_rank_zero(lambda: sorted(p.name for p in folder.glob("*.safetensors")))
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        mine[name] = 0
        try:
            with open(folder / name, "rb") as file:
                while block := file.read(2**24):
                    mine[name] = zlib.crc32(block, mine[name])
        except OSError:
            mine[name] = -1  # alone with an error, a rank would leave the others waiting
    parts = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: crc for part in parts for name, crc in part.items()}


def read_object(path: Path) -> dict | None:
    """The JSON object in a file of ours, None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------
# 7. Training


def learning_rate(step: int, n_steps: int, n_warmup: int, peak: float) -> float:
    """Linear warm-up over the first steps, then a cosine to zero."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    share_done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * share_done))


def pairs_of_step(pairs: list[EncodedPair], step: int, args: Namespace) -> list[EncodedPair]:
    """The pairs of a step: their order is a function of (seed, epoch) alone."""
    n_per_epoch = math.ceil(len(pairs) / args.batch_pairs)
    epoch, step_of_epoch = divmod(step, n_per_epoch)
    rng = np.random.default_rng([args.seed, epoch])
    order = rng.permutation(len(pairs))
    start = step_of_epoch * args.batch_pairs
    of_step = order[start : start + args.batch_pairs]
    return [pairs[n] for n in of_step]


def choose_sequences(encoded: EncodedPair, epoch: int, args: Namespace) -> list[list[np.ndarray]]:
    """Chosen and rejected sequences to train on: of one critique, drawn anew each epoch, or all."""
    sides = [encoded.chosen, encoded.rejected]
    if args.average_critiques:
        return sides
    rng = np.random.default_rng([args.seed, epoch, int(rm.digest(encoded.pair.id), 16)])
    return [[side[rng.integers(len(side))]] for side in sides]


def longest_sequence(pairs: list[EncodedPair]) -> int:
    """The tokens of the longest sequence."""
    return max(len(sequence) for e in pairs for sequence in (*e.chosen, *e.rejected))


def train_step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    pairs: list[EncodedPair],
    epoch: int,
    args: Namespace,
) -> dict[str, float]:
    """One optimizer update over the pairs of all ranks; returns the metrics of the whole step."""
    device = next(model.parameters()).device
    share_prefixes = rm.shares_prefixes(model, longest_sequence(pairs))
    batches = pack_step(model, pairs, epoch, share_prefixes, args)
    margins = np.array([encoded.pair.margin for encoded in pairs], np.float32)
    has_replica = model.score.weight.device_mesh.shape[-1] == 1
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, margin, reward
    extremes = torch.full((2,), -math.inf, device=device)  # of −r and of r
    n_tokens = 0
    n_computed = 0
    # From here to the gradient norm nothing asks the device for a value: it is never waited for.
    for n, rows in enumerate(batches, 1):
        rm.keep_gathered(model, has_replica and n < len(batches))
        batch = rm.collate(rows, device)
        rewards = rm.compute_rewards(model, batch, share_prefixes)
        chosen, rejected, pair_ids = mean_per_side(rewards, batch.owners)
        targets = rm.to_device(margins[pair_ids], device)
        loss = rm.pairwise_loss(chosen, rejected, targets, args.centering)
        # FSDP averages gradients over ranks; the loss is a mean over the pairs of all of them
        (loss * dist.get_world_size() / len(pairs)).backward()
        sums += sum_rewards(loss, chosen, rejected)
        if len(pair_ids):  # a rank may have no pair in a micro-batch
            extremes = torch.maximum(extremes, range_of_rewards(chosen, rejected))
        n_tokens += batch.n_tokens
        n_computed += batch.ids.numel()
    counts = torch.tensor([n_tokens, n_computed], dtype=torch.float64, device=device)
    sums = torch.cat([sums, counts])
    dist.all_reduce(sums)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    loss, correct, margin, reward, n_tokens, n_computed = sums.tolist()
    negative_min, max_reward = extremes.tolist()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise CritiqueRMError(
            f"loss {loss / len(pairs)} and gradient norm {norm} are not both finite; nothing was "
            "updated; lower --lr, or look at the pairs of this step"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    rm.release_memory(device)
    return {
        "loss": loss / len(pairs),
        "accuracy": correct / len(pairs),
        "margin": margin / len(pairs),
        "min_reward": -negative_min,
        "mean_reward": reward / len(pairs),
        "max_reward": max_reward,
        "grad_norm": norm,
        "lr": optimizer.param_groups[0]["lr"],
        "n_pairs": len(pairs),
        "n_tokens": int(n_tokens),
        "padding_share": 1 - n_tokens / n_computed,
    }


def pack_step(
    model: PreTrainedModel,
    pairs: list[EncodedPair],
    epoch: int,
    share_prefixes: bool,
    args: Namespace,
) -> list[list[list[rm.Trie]]]:
    """This rank's micro-batches of a step. Sequences of chosen n have owner 2n, of rejected 2n + 1."""
    units = []
    for n, encoded in enumerate(pairs):
        chosen, rejected = choose_sequences(encoded, epoch, args)
        owners = [2 * n] * len(chosen) + [2 * n + 1] * len(rejected)
        units.append(rm.build_tries([*chosen, *rejected], owners, share_prefixes))
    ranks = dist.get_rank(), dist.get_world_size()
    return rm.pack(units, args.micro_batch_tokens, rm.charge_tokens(model), share_prefixes, *ranks)


@torch.no_grad()
def sum_rewards(loss: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The sums (4,) over pairs of what a step reports, with rewards (B,) of their sides."""
    n_correct = (chosen > rejected).sum()
    margin = (chosen - rejected).sum()
    reward = (chosen + rejected).sum() / 2
    return torch.stack([loss, n_correct, margin, reward])


@torch.no_grad()
def range_of_rewards(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The largest −r and the largest r (2,): both can then be reduced by a maximum."""
    rewards = torch.cat([chosen, rejected])
    return torch.stack([-rewards.min(), rewards.max()])


def mean_per_side(rewards: Tensor, owners: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """The mean rewards (B,) of chosen and of rejected, and the indices (B,) of their pairs.

    Sequence s, with rewards[s], is of side owners[s]: 2n is the chosen side of pair n, 2n + 1 the
    rejected one. Both sides of a pair are here, as `pack` keeps a unit together; so the sorted
    sides alternate between chosen and rejected.
    """
    sides, index, n_each = np.unique(owners, return_inverse=True, return_counts=True)
    index = rm.to_device(index, rewards.device)
    n_each = rm.to_device(n_each, rewards.device)
    sums = torch.zeros(len(sides), device=rewards.device)
    means = sums.index_add(0, index, rewards) / n_each
    chosen, rejected = means.view(-1, 2).unbind(1)
    pair_ids = sides[::2] // 2
    return chosen, rejected, pair_ids


def make_optimizer(model: PreTrainedModel, args: Namespace) -> Optimizer:
    return torch.optim.AdamW(
        trained_parameters(model).values(),
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )


def train(
    model: PreTrainedModel,
    pairs: list[EncodedPair],
    valid: list[EncodedPair],
    tests: TestSets,
    folder: Path,
    args: Namespace,
) -> dict[str, float] | None:
    """The training loop: from the last checkpoint, if there is one, to the last step.

    With held-back pairs the model then has its best weights; returns their step and figures.
    """
    optimizer = make_optimizer(model, args)
    n_per_epoch = math.ceil(len(pairs) / args.batch_pairs)
    n_steps = n_per_epoch * args.epochs
    n_warmup = max(1, int(args.warmup_share * n_steps))
    valid_every = args.eval_every_steps or math.ceil(n_steps / 10)
    first = load_checkpoint(folder, model, optimizer)
    if first == 0:
        rm.on_rank_zero(lambda: check_disk(folder, model, keeps_best=bool(valid)))
        save_checkpoint(folder, 0, model, optimizer)  # a save that fails should fail now
    evaluations = rm.on_rank_zero(lambda: read_evaluations(folder, first))
    is_main = dist.get_rank() == 0
    write_row = open_metrics(folder, first, args.tensorboard) if is_main else None
    check = LearningCheck()
    saved_at = time.monotonic()
    bar = tqdm(total=n_steps, initial=first, unit="step", mininterval=1, disable=not is_main)
    with note_signals() as stopped, bar:
        for step in range(first, n_steps):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps, n_warmup, args.lr)
            epoch = step // n_per_epoch
            row = train_step(model, optimizer, pairs_of_step(pairs, step, args), epoch, args)
            seconds = time.perf_counter() - started
            n_done = step + 1
            last = n_done == n_steps
            row = {"step": n_done, "epoch": epoch, **row, "seconds": round(seconds, 4)}
            if valid and (last or n_done % valid_every == 0):
                evaluations[n_done] = validate(model, valid, args)
                row |= evaluations[n_done]
            if write_row:
                write_row(row)
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.2f}, "
                f"{row['n_pairs'] / seconds:.2f} pairs/s",
                refresh=False,
            )
            bar.update()
            check.look_at(row, is_warm=step >= n_warmup)
            if args.eval_every_steps and n_done % args.eval_every_steps == 0 and not last:
                for name, test in tests.items():
                    scores = rm.score_pairs(model, test, args.micro_batch_tokens)
                    log(f"step {n_done}: {name}: accuracy {accuracy(scores):.4f}")
            is_late = is_main and time.monotonic() - saved_at > SAVE_EVERY_SECONDS
            # a signal may reach one rank only, or one before another
            interrupted, is_late = on_any_rank(bool(stopped), is_late)
            is_due = is_late or last or n_done % args.save_every_steps == 0
            if interrupted or is_due or best_step(evaluations, n_done) == n_done:
                save_checkpoint(folder, n_done, model, optimizer, evaluations)
                saved_at = time.monotonic()
            if interrupted and not last:
                raise CritiqueRMError(
                    f"interrupted after step {n_done} of {n_steps}, which is saved; "
                    f"continue with the same command and --out {folder} --resume"
                )
    best = best_step(evaluations, n_steps)
    if best is None:
        return None
    load_best(folder, best, model)
    return {"step": best, **evaluations[best], "valid_pairs": len(valid)}


def on_any_rank(*events: bool) -> list[bool]:
    """For each event whether it has happened on any rank. A collective call."""
    counts = torch.tensor(events, dtype=torch.int32)
    dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def validate(model: PreTrainedModel, valid: list[EncodedPair], args: Namespace) -> dict[str, float]:
    """Log loss, the mean of −log σ(r⁺ − r⁻), and accuracy on held-back pairs. A collective call."""
    scores = rm.score_pairs(model, valid, args.micro_batch_tokens)
    margins = np.array([score.chosen_reward - score.rejected_reward for score in scores])
    log_losses = np.logaddexp(0, -margins)
    return {"valid_log_loss": log_losses.mean().item(), "valid_accuracy": accuracy(scores)}


@dataclass
class LearningCheck:
    """Notices a model that does not learn: says that the loss is flat, ends the run if r⁺ = r⁻."""

    n_flat: int = 0
    n_equal: int = 0

    def look_at(self, row: dict[str, float], is_warm: bool) -> None:
        self.n_flat = self.n_flat + 1 if abs(row["loss"] - math.log(2)) < 1e-3 else 0
        if self.n_flat == FLAT_STEPS:
            log("the loss stays at log 2: the model does not tell chosen from rejected")
        is_equal = row["accuracy"] == row["margin"] == 0 and is_warm
        self.n_equal = self.n_equal + 1 if is_equal else 0
        if self.n_equal == FLAT_STEPS:
            raise CritiqueRMError(
                f"all rewards were equal for {FLAT_STEPS} steps; lower --lr, or look at whether "
                "the model reads what differs"
            )


@contextmanager
def note_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of ending the process."""
    noted: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(n, lambda number, _: noted.append(number)) for n in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def open_metrics(
    folder: Path, n_steps_done: int, for_tensorboard: bool
) -> Callable[[dict[str, float]], None]:
    """What adds a row to metrics.jsonl, after dropping what was written past the checkpoint."""
    path = folder / "metrics.jsonl"
    rm.replace_file(path, "".join(read_metrics(folder)[:n_steps_done]))
    file = path.open("a", buffering=1)  # a line at once
    board = None
    if for_tensorboard:
        board = import_tensorboard()(str(folder / "tensorboard"), purge_step=n_steps_done + 1)

    def write_row(row: dict[str, float]) -> None:
        file.write(rm.to_json(row) + "\n")
        if board:
            for name, value in row.items():
                board.add_scalar(name, value, row["step"])
            board.flush()

    return write_row


def import_tensorboard() -> type:
    """Its writer. Raises CritiqueRMError where the package is missing."""
    with rm.errors_as("--tensorboard needs a package: pip install tensorboard", ImportError):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


def read_metrics(folder: Path) -> list[str]:
    """The lines of metrics.jsonl, if it is there: of each step one."""
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def read_evaluations(folder: Path, n_steps_done: int) -> Evaluations:
    """What earlier sessions of the run found on held-back pairs, up to a checkpoint."""
    evaluations = {}
    for line in read_metrics(folder)[:n_steps_done]:
        row = json.loads(line)
        if "valid_log_loss" in row:
            evaluations[row["step"]] = {
                name: row[name] for name in row if name.startswith("valid_")
            }
    return evaluations


def accuracy(scores: list[PairScore]) -> float:
    """The share of pairs with the chosen response above the rejected one; a tie is wrong."""
    return sum(s.chosen_reward > s.rejected_reward for s in scores) / len(scores)


# --------------------------------------------------------------------------------------------------
# Results


def save_result(model: PreTrainedModel, encoder: Encoder, folder: Path, args: Namespace) -> None:
    """Writes the trained model as a plain folder, adapters merged. A collective call."""
    write_weights = partial(write_merged, model) if args.lora_rank else None
    rm.save_model(model, encoder, folder, model_card(args, encoder), write_weights)


def score_tests(
    model: PreTrainedModel, tests: TestSets, folder: Path, args: Namespace
) -> dict[str, float]:
    """Writes the scores of each test file; returns the accuracy on it. A collective call."""
    results = {}
    paths: list[Path] = []
    for name, test in tests.items():
        scores = rm.score_pairs(model, test, args.micro_batch_tokens)
        results[name] = accuracy(scores)
        paths.append(name_scores(folder, name, paths))
        rm.on_rank_zero(lambda: rm.write_scores(paths[-1], scores))
        log(f"{name}: accuracy {results[name]:.4f} on {len(test)} pairs")
    return results


def name_scores(folder: Path, test: str, taken: list[Path]) -> Path:
    """scores-TEST.jsonl, or scores-TEST-2.jsonl for another file of that name."""
    stem = Path(test).name.split(".")[0]
    path = folder / f"scores-{stem}.jsonl"
    for number in itertools.count(2):
        if path not in taken:
            return path
        path = folder / f"scores-{stem}-{number}.jsonl"


def check_saved(
    folder: Path,
    sample: list[EncodedPair],
    before: list[PairScore],
    dtype: str,
    args: Namespace,
) -> PreTrainedModel:
    """Loads what was saved and scores a few pairs again: a lost head must be noticed here.

    Rewards are compared relative to 1 + |r|. Merged adapters are rounded with the weight they are
    added to, and each layer's rounding goes through all behind it: in bf16 that moved SmolLM2's
    rewards by 0.029 on average and 0.08 at most (0.026 and 0.07 between two sizes of micro-batch).
    A wrong head moves them by about 0.5. The limit of 0.2 is on the mean, as one pair tells little.
    """
    log("checking the saved model")
    model, _ = rm.load_reward_model(str(folder), dtype=dtype, compiled=args.compile)
    after = rm.score_pairs(model, sample, args.micro_batch_tokens)
    old = np.array([score.chosen_reward for score in before])
    new = np.array([score.chosen_reward for score in after])
    differences = np.abs(old - new) / (1 + np.abs(old))
    stored = rm.read_headers(rm.find_weights(str(folder)))
    is_exact = {dtype, *(header.dtype for header in stored.values())} == {"float32", "F32"}
    if args.lora_rank and not is_exact:
        is_same = differences.mean() < 0.2
    else:
        is_same = differences.max() < 1e-4
    if not is_same:
        n = differences.argmax()
        raise CritiqueRMError(
            f"{folder}: after saving and loading, {before[n].id} scores {new[n]} instead of "
            f"{old[n]}; the checkpoints are kept"
        )
    return model


def model_card(args: Namespace, encoder: Encoder) -> str:
    reads = "prompt, response and critique" if encoder.use_critiques else "prompt and response"
    answer = "response + SEPARATOR + critique" if encoder.use_critiques else "response"
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.end_id)
    data = Path(args.train).name if os.path.exists(args.train) else args.train
    base = Path(args.model).name if os.path.isdir(args.model) else args.model
    written, kept = encoder.template.tail
    trained = f"adapters of rank {args.lora_rank}" if args.lora_rank else "all weights"
    cut = "" if encoder.keep_tail else f"text = text.removesuffix({written!r}) + {kept!r}\n"
    return f"""# Reward model

Reads {reads}; gives one number, higher is better. Made by critique-rm, after "Improving Reward
Models with Synthetic Critiques" (arXiv 2405.20850).

- base model: {base}
- training data: {data}, {args.epochs} epochs, seed {args.seed}; trained: {trained}
- separator between response and critique: {rm.SEPARATOR!r}
- the reward is read at {end!r}

```python
from transformers import pipeline
SEPARATOR = {rm.SEPARATOR!r}
score = pipeline("text-classification", "THIS_FOLDER", dtype="float32")
messages = [{{"role": "user", "content": prompt}}, {{"role": "assistant", "content": {answer}}}]
text = score.tokenizer.apply_chat_template(messages, tokenize=False)
{cut}print(score(text, add_special_tokens=False)[0]["score"])
```
"""


def peak_memory_gb() -> float:
    """The largest peak of any rank, in 10⁹ bytes like `--plan`: on CUDA device, else resident memory."""
    n_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":  # macOS counts bytes, Linux units of 1,024
        n_bytes *= 1024
    if torch.cuda.is_available():
        n_bytes = torch.cuda.max_memory_allocated()
    peak = torch.tensor(n_bytes / 1e9, dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return round(peak.item(), 3)


def summarize(folder: Path, results: dict[str, float]) -> dict:
    """The summary line, from what the run left in metrics.jsonl, earlier sessions included."""
    rows = [json.loads(line) for line in read_metrics(folder)]
    seconds = sum(row["seconds"] for row in rows)
    n_pairs = sum(row["n_pairs"] for row in rows)
    return {
        "out": str(folder),
        "steps": len(rows),
        "pairs": n_pairs,
        "seconds": round(seconds, 1),
        "pairs_per_second": round(n_pairs / seconds, 3),
        "tokens_per_second": round(sum(row["n_tokens"] for row in rows) / seconds, 1),
        "peak_memory_gb": peak_memory_gb(),
        "test_accuracy": next(iter(results.values()), None),
    }


# --------------------------------------------------------------------------------------------------
# Memory, before anything is loaded


PROGRAM_BYTES = 0.4e9  # Python, torch and Transformers; a GPU does not hold them


class Part(NamedTuple):
    """Something that takes memory of a process."""

    n_bytes: float
    reason: str


Parts = dict[str, Part]  # by name


def plan(args: Namespace) -> dict[str, float | bool]:
    """The peak memory of a process, in GB, by what takes it; and whether the device has as much.

    Prints a table as well. Nothing is loaded: the activations are those that a forward pass on
    tensors without storage would keep for backward, so they are exact for any model, at
    `--micro-batch-tokens`. A pair that is longer is computed whole all the same.
    """
    device, _ = rm.start_processes()
    config = tiny_config(args) if args.model == "tiny" else rm.load_config(args.model)
    if os.path.isdir(args.model):  # what could not be trained is not planned either
        rm.read_headers(rm.find_weights(args.model))
    of_gpu = args.device_gb and args.dtype == "auto"  # one that may be elsewhere
    wanted = "bfloat16" if of_gpu else args.dtype
    dtype = rm.choose_dtype(wanted, device, config.hidden_size)
    n_tokens = args.micro_batch_tokens
    if n_tokens == "auto":
        n_tokens = choose_micro_batch(args, config, dtype, args.nproc)
    parts = plan_parts(args, config, dtype, n_tokens, args.nproc)
    has_room = fits(parts, args, args.nproc)
    answer = "fits" if has_room else "does not fit"
    room = device_bytes(args, args.nproc)
    parts["total"] = Part(total_bytes(parts), f"{answer}: allocators leave gaps of a tenth")
    parts["device"] = Part(room, "what there is for a process")
    if dist.get_rank() == 0:
        print_plan(parts)
    in_gb = {f"{name}_gb": round(part.n_bytes / 1e9, 3) for name, part in parts.items()}
    return {"micro_batch_tokens": n_tokens} | in_gb | {"fits": has_room}


def print_plan(parts: Parts) -> None:
    print("| GB | of a process | reason |\n|---:|---|---|")
    for name, part in parts.items():
        if part.n_bytes:
            print(f"| {part.n_bytes / 1e9:.3f} | {name} | {part.reason} |")


def choose_micro_batch(
    args: Namespace, config: PreTrainedConfig, dtype: torch.dtype, n_processes: int
) -> int:
    """The tokens of `--micro-batch-tokens auto`: as many as save time, halved until they fit.

    By the memory that the device has, not by what is free, so that the same command computes the
    same. Equal on all ranks. A collective call.
    """
    device_type = "cuda" if plans_for_gpu(args) else "cpu"
    n_tokens = rm.MICRO_BATCHES[device_type, rm.name_of(dtype)].largest_tokens
    try:
        while n_tokens > 256:
            parts = plan_parts(args, config, dtype, n_tokens, n_processes)
            if fits(parts, args, n_processes):
                break
            n_tokens //= 2
    except CritiqueRMError as error:  # a model that can be computed, but not without storage
        log(f"no memory was planned: {error}; --micro-batch-tokens is {n_tokens}")
    of_all = torch.tensor(n_tokens)
    dist.all_reduce(of_all, op=dist.ReduceOp.MIN)
    return of_all.item()


def plans_for_gpu(args: Namespace) -> bool:
    return bool(args.device_gb) or torch.cuda.is_available()


def total_bytes(parts: Parts) -> float:
    return sum(part.n_bytes for part in parts.values())


def fits(parts: Parts, args: Namespace, n_processes: int) -> bool:
    return total_bytes(parts) < 0.9 * device_bytes(args, n_processes)


def plan_parts(
    args: Namespace,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    n_tokens: int,
    n_processes: int,
) -> Parts:
    """What takes memory at the peak of one of the processes, and how much."""
    n_shards = args.shard_group or n_processes
    if n_processes % n_shards:
        raise CritiqueRMError(f"{n_processes} processes are not groups of {n_shards}")
    problem = f"{args.model}: no model can be computed from its config.json"
    with rm.errors_as(problem, Exception), FakeTensorMode(), torch.device("cpu"):
        model = make_fake_model(args, config, dtype)
        blocks = rm.find_blocks(rm.trunk_and_head(model)[0])
        whole = activation_bytes(model, n_tokens, args.max_length_tokens)
        kept = whole
        if args.activation_checkpointing:
            rm.set_mode(model, checkpointing=True)
            kept = activation_bytes(model, n_tokens, args.max_length_tokens)
    n_frozen, n_trained = count_parameters(model)
    frozen_of_block, trained_of_block = count_parameters(blocks[0])
    block = frozen_of_block + trained_of_block
    root = n_frozen + n_trained - block * len(blocks)
    trained_of_root = n_trained - trained_of_block * len(blocks)
    name = rm.name_of(dtype)
    shards = ""
    gathered = Part(
        (dtype.itemsize + 4) * n_trained,
        f"trained weights in {name} to compute with, gradients in float32 before clipping",
    )
    if n_shards > 1:  # a rank computes with a block while it receives the next
        shards = f" / {n_shards} shards"
        gathered = Part(
            2 * dtype.itemsize * (root + block),
            f"{name} weights of embedding and head, of a block and the next, as they are received",
        )
    # one gradient in the dtype as computed, in float32 as sent, and in float32 as received
    reduced = (dtype.itemsize + 8) * max(trained_of_root, trained_of_block)
    activations = kept + whole / len(blocks)
    is_recomputed = args.activation_checkpointing
    means = "each block's input, and one block" if is_recomputed else "all blocks, and one twice"
    return {
        "program": Part(0.0 if plans_for_gpu(args) else PROGRAM_BYTES, "Python and its packages"),
        "frozen": Part(
            dtype.itemsize * n_frozen / n_shards,
            f"{n_frozen:,} weights that are not trained, in {name}{shards}",
        ),
        "parameters": Part(
            4 * n_trained / n_shards, f"{n_trained:,} trained weights in float32{shards}"
        ),
        "gradients": Part(4 * n_trained / n_shards, f"one for each, in float32{shards}"),
        "optimizer": Part(8 * n_trained / n_shards, f"AdamW's two means of each{shards}"),
        "gathered": gathered,
        "reduced": Part(reduced, "gradients of the largest group: computed, sent, received"),
        "activations": Part(activations, f"of {n_tokens:,} tokens at once: {means}"),
    }


def make_fake_model(
    args: Namespace, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model as FSDP lets it compute, for tensors without storage."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    model = rm.make_model(config)
    model.score.weight = nn.Parameter(model.score.weight.float())
    model.compute_dtype = dtype
    if args.lora_rank:
        add_adapters(model, args)
        for layer in adapted_layers(model).values():
            layer.lora_a = nn.Parameter(layer.lora_a.to(dtype))
            layer.lora_b = nn.Parameter(layer.lora_b.to(dtype))
    return model


def activation_bytes(model: PreTrainedModel, n_tokens: int, row_tokens: int) -> int:
    """What a forward pass keeps for backward, without the parameters; works on fake tensors."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    # no forward pass can be compared here
    share_prefixes = kinds <= {"full_attention", "sliding_attention"}
    shape = (max(1, n_tokens // row_tokens), min(n_tokens, row_tokens))
    ids = torch.zeros(shape, dtype=torch.int64)
    last = torch.zeros((2, 2 * shape[0]), dtype=torch.int64)
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)  # kept alive: addresses are used again
        return tensor

    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    batch = rm.Batch(ids, ids, ids, last, last[0], n_tokens)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rm.compute_rewards(model, batch, share_prefixes)
    return sum(size for address, (size, _) in kept.items() if address not in weights)


def device_bytes(args: Namespace, n_processes: int) -> float:
    """The memory of a process's device: as given, a GPU's, or its share of this machine's."""
    if args.device_gb:
        return args.device_gb * 1e9
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / n_processes


# --------------------------------------------------------------------------------------------------
# The run


@dataclass(frozen=True)
class Job:
    """All that training needs: what the arguments named, read, built and encoded."""

    model: PreTrainedModel
    encoder: Encoder
    training: list[EncodedPair]
    valid: list[EncodedPair]  # held back, to choose weights by
    tests: TestSets
    n_selected: int  # pairs to train on, before any was left out
    description: dict  # for run.json


def run(args: Namespace) -> dict:
    """All steps from pairs to summary; returns the summary."""
    rm.start_processes()
    if args.tensorboard:
        import_tensorboard()
    names = dict.fromkeys(filter(None, [args.train, *args.test, args.valid]))
    data = {name: rm.read_pairs(name, args.skip_bad, args.critiques) for name in names}
    folder = Path(rm.on_rank_zero(lambda: str(claim_folder(args))))
    lock = lock_folder(folder)
    # as rank 0 sees it: another machine may see a shared folder late
    old = None if args.overwrite else rm.on_rank_zero(lambda: read_run(folder / "run.json"))
    if old and "summary" in old:  # before a model is built: template and base are not known yet
        check_same_run(old, old | {"arguments": vars(args), "data": digest_data(data)})
        log(f"{folder} is finished")
        return old["summary"]
    try:
        job = prepare(args, folder, data)
    except CritiqueRMError:
        lock.close()
        if not args.resume and not args.overwrite and dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # new: the corrected command may use the name
        raise
    start_record(folder, old, job, args)
    best = train(job.model, job.training, job.valid, job.tests, folder, args)
    save_result(job.model, job.encoder, folder, args)
    sample = job.training[:8]
    before = rm.score_pairs(job.model, sample, args.micro_batch_tokens)
    record = job.description | {"training_pairs": job.n_selected, "best": best}
    tests = job.tests
    del job
    gc.collect()  # or the model would still be there, in cycles, while the saved one is loaded
    model = check_saved(folder, sample, before, record["dtype"], args)
    record["results"] = score_tests(model, tests, folder, args)
    record["summary"] = summarize(folder, record["results"])
    rm.on_rank_zero(lambda: conclude(folder, record))
    lock.close()
    return record["summary"]


def prepare(args: Namespace, folder: Path, data: dict[str, list[Pair]]) -> Job:
    """Builds the model and encodes the pairs: all that can be refused is refused here."""
    selected, held_back = select_pairs(data, args)
    # of the selected pairs alone: a tokenizer that is trained must not see the others
    model, encoder = prepare_model(args, folder, selected)
    encode = partial(encoder.encode_pairs, skip_bad=args.skip_bad)
    training = encode(selected, args.train)
    valid = encode(held_back, args.valid or "held back") if held_back else []
    tests = {name: encode(data[name], name) for name in dict.fromkeys(args.test)}
    # once, of all pairs, before the folder is written to, and before anything is compiled
    share_prefixes = rm.shares_prefixes(model, longest_sequence([*training, *valid]))
    if args.compile:
        rm.compile_blocks(model)
        rm.warm_up(model, share_prefixes, args.micro_batch_tokens)
    description = describe(args, data, model, encoder)
    return Job(model, encoder, training, valid, tests, len(selected), description)


def start_record(folder: Path, old: dict | None, job: Job, args: Namespace) -> None:
    """Writes run.json, or compares it with the `old` one. A collective call.

    Raises CritiqueRMError if a rank, or the run that is resumed, has other data or settings.
    """
    same = [job.description["data"], job.description["template"]]
    if same != rm.on_rank_zero(lambda: same):
        raise CritiqueRMError(f"{platform.node()} reads other data or another model than rank 0")
    if old:
        check_same_run(old, job.description)
        return
    if args.overwrite:
        rm.on_rank_zero(lambda: clear_folder(folder))
    rm.on_rank_zero(lambda: write_record(folder, job.description))


def write_record(folder: Path, record: dict) -> None:
    rm.replace_file(folder / "run.json", rm.to_json(record, indent=2) + "\n")


def conclude(folder: Path, record: dict) -> None:
    """Writes the results of a run, and removes what was there to resume it."""
    write_record(folder, record)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)


def select_pairs(pairs: dict[str, list[Pair]], args: Namespace) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on, and those that are held back to choose weights by."""
    selected = pairs[args.train]
    if args.max_pairs:
        order = np.random.default_rng(args.seed).permutation(len(selected))
        selected = [selected[n] for n in order[: args.max_pairs]]
    if args.valid_share:
        return hold_back(selected, args.valid_share, args.seed)
    return selected, pairs[args.valid] if args.valid else []


def hold_back(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs of most prompts, and those of the rest: a share that is drawn by the seed.

    Prompts, not pairs: of several pairs with one prompt some would tell about the others.
    """
    prompts = sorted({rm.digest_prompt(pair.prompt) for pair in pairs})
    n_held_back = max(1, round(share * len(prompts)))
    if n_held_back == len(prompts):
        raise CritiqueRMError(f"{len(prompts)} prompts are too few for --valid-share {share}")
    order = np.random.default_rng(seed).permutation(len(prompts))
    chosen = {prompts[n] for n in order[:n_held_back]}
    parts = [], []
    for pair in pairs:
        parts[rm.digest_prompt(pair.prompt) in chosen].append(pair)
    return parts


def read_run(path: Path) -> dict | None:
    """What an earlier start of the run left in run.json; without it, nothing can be resumed."""
    old = read_object(path)
    if old is None and path.exists():
        raise CritiqueRMError(f"{path} is damaged; start anew with --overwrite")
    return old


def clear_folder(folder: Path) -> None:
    """Empties the folder of --overwrite, once the new run is known to be able to start."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def main() -> int:
    args = parse_arguments()
    try:
        summary = plan(args) if args.plan else run(args)
    except (CritiqueRMError, OSError, dcp.CheckpointException) as error:
        rm.log_error("train.py", error)
        return 1
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        advice = (
            "lower --micro-batch-tokens, add --activation-checkpointing, use more processes, or"
        )
        rm.log_error("train.py", MemoryError(f"out of memory; {advice} train a --lora-rank"))
        return 1
    except KeyboardInterrupt:
        log("train.py: interrupted; continue with --out RUN --resume")
        return 130
    if dist.get_rank() == 0:
        print(rm.to_json(summary), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    rm.leave(main())
