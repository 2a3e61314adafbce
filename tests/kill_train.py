"""Kills train.py at random moments, moves it between processes, and compares with a quiet run.

    python tests/kill_train.py [--kills 10] [--seed 0] [-- TRAIN.PY ARGUMENTS]

killed     SIGKILL to all of a run; every other time to torchrun alone, whose workers live on and hold
           the run folder: the same command must refuse until they are gone
restarted  SIGKILL to a worker, which torchrun starts again (--max-restarts)
moved      SIGTERM, from one process to two and back
two agents two torchruns that find each other, as on two machines

Exits with 1 unless the first two end like the quiet run, the last like a quiet run of one torchrun with
two processes: weights equal to the bit and a metrics.jsonl of the same lines. The one that moved has
to have gradient norms and rewards that are the same to 1e-3 of their size (at a loss near zero
rounding differences grow).
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        names = ("whole", "killed", "restarted", "moved", "one agent", "two agents")
        whole, killed, restarted, moved, agent, agents = (Path(folder) / name for name in names)
        finish(start(args, whole))
        n_steps = len(read_metrics(whole))
        for n in range(args.kills):
            kill(args, killed, dice.uniform(n, n + 1) * n_steps / (args.kills + 1), dice, n % 2 == 1)
        finish(start(args, killed))
        process = start(args, restarted, "--max-restarts=1")
        wait_for_step(restarted, n_steps // 2, process)
        os.kill(dice.choice(workers_of(process)), signal.SIGKILL)
        finish(process)
        for n in (1, 2):
            process = start(args, moved, f"--nproc-per-node={n}")
            wait_for_step(moved, n * n_steps / 3, process)
            process.terminate()
            process.wait()
        finish(start(args, moved))
        finish(start(args, agent, "--nproc-per-node=2"))
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        place = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}")
        for process in [start(args, agents, *place) for _ in range(2)]:
            finish(process)
        results = [
            compare(whole, killed, to_the_bit=True),
            compare(whole, restarted, to_the_bit=True),
            compare(whole, moved, to_the_bit=False),
            compare(agent, agents, to_the_bit=True),
        ]
    return 0 if all(results) else 1


def start(args: argparse.Namespace, out: Path, *flags: str) -> subprocess.Popen:
    """torchrun of one process, unless the flags say otherwise."""
    command = ["torchrun", *(() if "--nnodes=2" in flags else ("--standalone",)), *flags]
    command += [ROOT / "train.py", "--out", out, "--resume", "--save-every-steps", "3"]
    log = open(f"{out}.log", "ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *args.arguments], stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit("train.py failed")


def read_metrics(out: Path) -> list[dict]:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) | {"seconds": 0} for line in lines]
    except (OSError, ValueError):  # not there yet, or half a line
        return []


def wait_for_step(out: Path, step: float, process: subprocess.Popen) -> None:
    while len(read_metrics(out)) < step:
        if process.poll() is not None:
            raise SystemExit(f"ended with {process.returncode} before step {step:.1f}")
        time.sleep(0.02)


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(n) for n in children if "train.py" in Path(f"/proc/{n}/cmdline").read_text()]


def kill(args: argparse.Namespace, out: Path, step: float, dice: random.Random, first: bool) -> None:
    """Kills the run somewhere behind a step: all of it, or torchrun first and then its workers."""
    process = start(args, out)
    wait_for_step(out, step, process)
    time.sleep(dice.uniform(0, 1))  # also into the writing of a checkpoint
    workers = workers_of(process)
    process.kill()
    process.wait()
    if first:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # or they would be done before the other has started
        assert start(args, out).wait(), "a second run was let into the folder"
        assert b"is in use by another run" in Path(f"{out}.log").read_bytes()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.02)
    print(f"killed after {len(read_metrics(out))} steps{', torchrun first' * first}", flush=True)


def compare(one: Path, other: Path, to_the_bit: bool) -> bool:
    rows = [read_metrics(path) for path in (one, other)]
    scores = []
    for path in (one, other):
        lines = next(path.glob("scores-*.jsonl")).read_text().splitlines()
        scores.append([json.loads(line)["chosen_reward"] for line in lines])
    norms = [[row["grad_norm"] for row in those] for those in rows]
    far = max(abs(a - b) / a for a, b in zip(*norms, strict=True))
    farthest = max(abs(a - b) / max(1, abs(a)) for a, b in zip(*scores, strict=True))
    names = sorted(path.name for path in one.glob("*.safetensors"))
    same = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    print(f"{other.name}: weights {'identical' if same else 'differ'}, metrics "
          f"{'identical' if rows[0] == rows[1] else 'differ'}, gradient norms within {far:.1e}, "
          f"rewards within {farthest:.1e}", flush=True)
    return same and rows[0] == rows[1] if to_the_bit else max(far, farthest) < 1e-3


if __name__ == "__main__":
    sys.exit(main())
