"""Speed and memory of training and scoring beside TRL and transformers, on the machine at hand, in
the dtype that train.py chooses there.

    python tests/bench_speed.py --model DIR --pairs A --plain-pairs B --test C [--trl PYTHON]
    python tests/bench_speed.py --model DIR --charge   # what one more micro-batch costs
    python tests/bench_speed.py            # the tiny model on some embedded pairs: does it all run?

A and C have critiques, B is read without. PYTHON is the interpreter of an
environment with trl, datasets and accelerate. Prints a Markdown table.

Machines are noisy, so what is compared alternates: a file is split in two by prompts, all sides work
on the first part, then all on the second (the tiny model: on the first alone), each in a process of
its own. Seconds are those of the loop: without loading, tokenizing for training, compiling, and
saving. With --compile a side also runs compiled; TRL, which compiles in its first steps, then has its
second epoch measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import critique_rm as rm  # noqa: E402

BATCH_PAIRS, PIPELINE_BATCH, N_CRITIQUES = 8, 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="tiny", help="of decoder type, to train from")
    parser.add_argument("--pairs", default=ROOT / "data/test.jsonl", help="to train on")
    parser.add_argument("--plain-pairs", default=ROOT / "data/test.jsonl", help="without critiques")
    parser.add_argument("--test", default=ROOT / "data/test.jsonl", help="to score")
    parser.add_argument("--trl", metavar="PYTHON", help="left out: without TRL")
    parser.add_argument("--compile", choices=("ours", "both"), help="compiled, too")
    parser.add_argument("--charge", action="store_true", help="of a micro-batch, alone")
    parser.add_argument("--micro-pairs", type=int, default=4, help="of TRL's")
    parser.add_argument("--halves", type=int, default=2, choices=(1, 2), help="of each file to use")
    parser.add_argument("--run", help="a finished run: its scoring alone is measured")
    args = parser.parse_args()
    args.n_parts = 1 if args.model == "tiny" else args.halves
    if args.charge:
        return measure_charge(args.model)
    with tempfile.TemporaryDirectory() as folder:
        print("| what | ours | beside | ratio |\n|---|---|---|---|", flush=True)
        if not args.run:
            compare_training(args, Path(folder))
        compare_scoring(args, Path(folder))


def compare_training(args: argparse.Namespace, folder: Path) -> None:
    for name, file, how in (
        ("with critiques", args.pairs, []),
        ("without", args.plain_pairs, ["--no-critiques"]),
    ):

        def train_here(part: Path, n_processes: int = 1, *more: str) -> dict:
            out = part.with_suffix(f".{n_processes}{''.join(more)}")
            return train(args.model, part, [*how, *more], out, n_processes)

        def train_there(part: Path, more: str = "") -> dict:
            dtype = rm_dtype(args.model)
            return call(args.trl, "train_with_trl", args.model, part, args.micro_pairs, dtype, more)

        sides = {"ours": train_here}
        if args.trl:
            sides["trl"] = train_there
        if args.compile:
            sides["ours compiled"] = lambda part: train_here(part, 1, "--compile")
        if args.compile == "both" and args.trl:
            sides["trl compiled"] = lambda part: train_there(part, "compiled")
        if not how and device().type == "cpu":
            sides["two"] = lambda part: train_here(part, 2)
        found = alternate(sides, split(file, folder, name.partition(" ")[0])[: args.n_parts])
        ours, two = found["ours"], found.get("two")
        report(f"padding, {name}", f"{1 - ours['tokens'] / ours['computed']:.1%}")
        report(
            f"useful arithmetic / matrix products, {name}",
            f"{ours['flop'] / ours['seconds'] / 1e9:.0f} GFLOP/s",
            f"{ours['possible_flop'] / ours['seconds'] / 1e9:.0f} GFLOP/s",
            ours["flop"] / ours["possible_flop"],
        )
        for own_side in ("ours", "ours compiled"):
            for side in ("trl", "trl compiled"):
                if own_side in found and side in found:
                    own, other = found[own_side], found[side]
                    what = f"training, {name}: {own_side} against {side}"
                    report_rates(f"{what}, pairs/s", own, other)
                    report(
                        f"{what}, peak memory",
                        f"{own['peak_gb']:.1f} GB",
                        f"{other['peak_gb']:.1f} GB",
                        own["peak_gb"] / other["peak_gb"],
                    )
        if two:
            report_rates("training: pairs/s, 2 processes of one thread against 1 of two", two, ours)


def compare_scoring(args: argparse.Namespace, folder: Path) -> None:
    run = args.run or str(folder / "with-0.1")  # what the first training left
    sides = {
        "ours": lambda part: call(sys.executable, "score", run, part, "shared"),
        "pipeline": lambda part: call(sys.executable, "score_with_pipeline", run, part),
    }
    found = alternate(sides, split(args.test, folder, "test")[: args.n_parts])
    ours, pipeline = found.values()
    report_rates(f"scoring: pairs/s against the pipeline, batch {PIPELINE_BATCH}", ours, pipeline)
    difference = abs(ours["rewards"] - pipeline["rewards"]) / (2 * ours["pairs"])
    report("scoring: mean rewards, difference", f"{difference:.1e}")
    sides = {
        "shared": lambda part: call(sys.executable, "score", run, part, "shared"),
        "alone": lambda part: call(sys.executable, "score", run, part, "alone"),
    }
    found = alternate(sides, split(args.pairs, folder, "many", N_CRITIQUES)[: args.n_parts])
    report_rates(f"scoring {N_CRITIQUES} critiques: pairs/s against each alone", *found.values())


def alternate(sides: dict[str, Callable[[Path], dict]], parts: list[Path]) -> dict[str, Counter]:
    """Runs each side on each part in turn; sums what they measure, but takes the highest memory."""
    found = {name: Counter() for name in sides}
    for part in parts:
        for name, side in sides.items():
            result = side(part)
            print(name, part.name, result, file=sys.stderr, flush=True)
            peak = max(found[name]["peak_gb"], result.pop("peak_gb", 0))
            found[name].update(result)
            found[name]["peak_gb"] = peak
    return found


def report(what: str, ours: str, beside: str = "", ratio: float | None = None) -> None:
    print(f"| {what} | {ours} | {beside} | {'' if ratio is None else f'{ratio:.2f}'} |", flush=True)


def report_rates(what: str, *sides: Counter) -> None:
    ours, beside = (side["pairs"] / side["seconds"] for side in sides)
    report(what, f"{ours:.3f}", f"{beside:.3f}", ours / beside)


def split(file: Path, folder: Path, name: str, n_critiques: int = 1) -> list[Path]:
    """Two halves of a file, each prompt in one of them; critiques of neighbours fill up to K."""
    rows = [json.loads(line) for line in open(file)]
    if n_critiques > 1:
        rows = rows[: len(rows) // 2]
        for side in "chosen_critique", "rejected_critique":
            texts = [row[side] for row in rows]
            for n, row in enumerate(rows):
                row[side] = [texts[(n + k) % len(rows)] for k in range(n_critiques)]
    prompts = list(dict.fromkeys(json.dumps(row["prompt"]) for row in rows))
    half, parts = set(prompts[: len(prompts) // 2]), []
    for n in range(2):
        parts.append(folder / f"{name}-{n}.jsonl")
        kept = [row for row in rows if (json.dumps(row["prompt"]) in half) == (n == 0)]
        parts[-1].write_text("".join(json.dumps(row) + "\n" for row in kept))
    return parts


# --------------------------------------------------------------------------------------------------
# The sides


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(model: str, part: Path, flags: list, out: Path, n_processes: int) -> dict:
    """train.py as its users call it, between two measurements of what the machine can do."""
    launcher = [sys.executable]
    if n_processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={n_processes}",
        ]
    command = [*launcher, "train.py", "--model", model, "--train", part, "--out", out, *flags]
    command += ["--batch-pairs", BATCH_PAIRS, "--epochs", 1]
    before = matrix_product_rate(model)
    done = subprocess.run(list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE)
    after = matrix_product_rate(model)
    if done.returncode:
        raise SystemExit(done.returncode)
    summary = json.loads(done.stdout.splitlines()[-1])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = [step["n_tokens"] for step in steps]
    return {
        "pairs": summary["pairs"],
        "seconds": sum(step["seconds"] for step in steps),
        "peak_gb": summary["peak_memory_gb"],
        "tokens": sum(tokens),
        "computed": sum(n / (1 - step["padding_share"]) for n, step in zip(tokens, steps)),
        "flop": useful_flop(out, part),
        "possible_flop": (before + after) / 2 * sum(step["seconds"] for step in steps),
    }


def matrix_product_rate(model: str, n_rows: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of the largest matrix product of a block, for a micro-batch."""
    n_in, n_out = 128, 384
    if model != "tiny":
        config = rm.load_config(model)
        n_in, n_out = config.hidden_size, config.intermediate_size
    kind = {"device": device(), "dtype": getattr(torch, rm_dtype(model))}
    x, weight, n = torch.randn(n_rows, n_in, **kind), torch.randn(n_out, n_in, **kind), 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        for _ in range(20):
            product = torch.nn.functional.linear(x, weight)
        product[0, 0].item()  # waits for all of them
        n += 20
    return 2 * n_rows * n_in * n_out * n / passed


def rm_dtype(model: str) -> str:
    """The dtype that train.py computes the model in on this machine."""
    rm.start_processes()
    hidden_size = 128 if model == "tiny" else rm.load_config(model).hidden_size
    return rm.name_of(rm.choose_dtype("auto", device(), hidden_size))


def measure_charge(model: str) -> None:
    """What one more micro-batch costs, in tokens: MICRO_BATCHES of critique_rm.py holds it.

    Steps of 4,096 tokens are computed in micro-batches of 256 to 4,096 tokens, in rows of 256. The
    line through their seconds, by the number of micro-batches, says what one more takes.
    """
    import numpy as np

    import train as script

    arguments = ["--model", model, "--max-length-tokens", "512"]
    args = script.parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as folder:
        reward_model, _ = script.prepare_model(args, Path(folder), rm.read_pairs(args.train))
    optimizer = torch.optim.SGD(reward_model.parameters(), lr=0.0)
    rng = np.random.default_rng(0)
    rows = [rm.build_trie([rng.integers(3, 4000, 256).astype(np.int32)], [n]) for n in range(16)]
    numbers = (1, 2, 4, 8, 16)
    seconds = {n: [] for n in numbers}
    for _ in range(4):
        for n in numbers:
            start = time.perf_counter()
            for k in range(n):
                rm.keep_gathered(reward_model, k < n - 1)
                batch = rm.collate([[trie] for trie in rows[k::n]], device())
                rm.compute_rewards(reward_model, batch, True).sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
            norm.full_tensor().item()
            optimizer.zero_grad()
            seconds[n].append(time.perf_counter() - start)
    best = [min(values) for values in seconds.values()]
    each, once = np.polyfit(numbers, best, 1)
    name = rm.name_of(reward_model.compute_dtype)
    print(
        f"| {device().type}, {name} | one more micro-batch costs as much as "
        f"{4096 * each / once:.0f} tokens | {', '.join(f'{s:.2f} s' for s in best)} |"
    )


def useful_flop(run: Path, part: Path) -> float:
    """What an epoch must compute: 6 for each weight and token of the tries, and exact attention.

    Forward 2 for each weight but the embedding's, and 4 for each head dimension, token and token
    that it sees; backward twice that.
    """
    from transformers import AutoModelForSequenceClassification

    config = rm.load_config(str(run))
    with torch.device("meta"):
        trunk, _ = rm.trunk_and_head(AutoModelForSequenceClassification.from_config(config))
    embedding = trunk.get_input_embeddings().weight.numel()
    n_weights = sum(p.numel() for p in trunk.parameters()) - embedding
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = head * config.num_attention_heads * config.num_hidden_layers
    longest, use_critiques = (
        config.critique_rm["max_length_tokens"],
        config.critique_rm["critiques"],
    )
    encoder = rm.Encoder(rm.load_tokenizer(str(run)), longest, use_critiques)
    flop = 0.0
    for pair in encoder.encode_pairs(rm.read_pairs(str(part)), str(part)):
        trie = rm.build_trie([*pair.chosen, *pair.rejected], [0, 1])
        flop += 3 * (2 * n_weights * len(trie) + 4 * width * int((trie.positions + 1).sum()))
    return flop


def call(python: str, function: str, *arguments: object) -> dict:
    """Runs a function of this file in a process of its own; its result is a line of JSON."""
    command = [python, __file__, function, *map(str, arguments)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def train_with_trl(model: str, file: str, micro_pairs: str, dtype: str, how: str) -> dict:
    """TRL's RewardTrainer on the same pairs in steps of the same size."""
    import resource

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    def conversation(row: dict, side: str) -> list[dict]:
        critique = row.get(f"{side}_critique")
        answer = row[side] + (f"\n\nCritique: {critique}" if critique else "")
        prompt = row["prompt"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*prompt, {"role": "assistant", "content": answer}]

    rows = [json.loads(line) for line in open(file)]
    data = [{side: conversation(row, side) for side in ("chosen", "rejected")} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=int(micro_pairs),
            gradient_accumulation_steps=BATCH_PAIRS // int(micro_pairs),
            num_train_epochs=2 if how == "compiled" else 1,
            torch_compile=how == "compiled",
            learning_rate=1e-5,
            max_length=2048,
            bf16=dtype == "bfloat16",
            use_cpu=device().type == "cpu",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = RewardTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(data),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        started = []

        class Clock(TrainerCallback):
            def on_epoch_begin(self, *_, **__) -> None:
                started.append(time.perf_counter())

        trainer.add_callback(Clock())
        trainer.train()
        seconds = time.perf_counter() - started[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if device().type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    return {"pairs": len(trainer.train_dataset), "seconds": seconds, "peak_gb": peak}


def score(run: str, file: str, how: str) -> dict:
    """Our scoring, tokenizing included; "alone" puts each sequence in a row of its own."""
    if how == "alone":
        rm.shares_prefixes = lambda model, longest: False
    model, encoder = rm.load_reward_model(run)
    pairs = rm.read_pairs(file)
    start = time.perf_counter()
    scores = rm.score_pairs(model, encoder.encode_pairs(pairs, file), 4096)
    seconds = time.perf_counter() - start
    rewards = sum(s.chosen_reward + s.rejected_reward for s in scores)
    return {"pairs": len(scores), "seconds": seconds, "rewards": rewards}


def score_with_pipeline(run: str, file: str) -> dict:
    """The text-classification pipeline of transformers on the same text, in the order of the file."""
    from transformers import pipeline

    encoder = rm.Encoder(rm.load_tokenizer(run), 2048, True)
    pairs, texts = rm.read_pairs(file), []
    for pair in pairs:
        for answer in pair.answers:
            text = answer.response + rm.SEPARATOR + answer.critiques[0]
            texts.append(encoder.render([*pair.prompt, rm.Message("assistant", text)]))
    kind = {"device": device(), "dtype": getattr(torch, rm_dtype(run))}
    scorer = pipeline("text-classification", run, **kind)
    start = time.perf_counter()
    with torch.no_grad():
        results = scorer(texts, batch_size=PIPELINE_BATCH, add_special_tokens=False)
    seconds = time.perf_counter() - start
    rewards = sum(result["score"] for result in results)
    return {"pairs": len(pairs), "seconds": seconds, "rewards": rewards}


if __name__ == "__main__":
    sides = {f.__name__: f for f in (train_with_trl, score, score_with_pipeline)}
    if len(sys.argv) > 1 and sys.argv[1] in sides:
        os.environ["HF_HUB_OFFLINE"] = "1"
        print(json.dumps(sides[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
    rm.leave(0)  # threads of libraries may abort an ordinary exit
