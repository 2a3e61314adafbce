"""Kills train.py at random moments, lets it finish, and compares with an undisturbed run.

    python tests/kill_train.py [--kills 10] [--seed 0] [--processes 1] [-- TRAIN.PY ARGUMENTS]

Every other time torchrun alone is killed: its workers live on and hold the run folder, and the
same command must refuse until they are gone. At the end torchrun restarts a killed worker itself
(--max-restarts). Exits with 1 unless all weights are equal to the bit and metrics.jsonl has each
step once.
"""

import argparse
import json
import os
import random
import signal
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
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("arguments", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, restarted = (Path(folder) / name for name in ("whole", "killed", "restarted"))
        finish(start(args, whole))
        n_steps = len(read_metrics(whole))
        for n in range(args.kills):
            kill(args, killed, dice.uniform(n, n + 1) * n_steps / (args.kills + 1), dice, n % 2 == 1)
        finish(start(args, killed))
        process = start(args, restarted, "--max-restarts", "1")
        wait_for_step(restarted, n_steps // 2, process)
        os.kill(dice.choice(workers_of(process)), signal.SIGKILL)
        finish(process)
        results = {path.name: compare(whole, path) for path in (killed, restarted)}
    for name, (is_same, is_whole) in results.items():
        weights = "identical" if is_same else "DIFFERENT"
        print(f"{name}: weights {weights}, metrics {'identical' if is_whole else 'DIFFERENT'}")
    return 0 if all(map(all, results.values())) else 1


def start(args: argparse.Namespace, out: Path, *flags: str) -> subprocess.Popen:
    command = ["torchrun", "--standalone", "--nproc-per-node", str(args.processes), *flags]
    command += [ROOT / "train.py", "--out", out, "--resume", "--save-every-steps", "3"]
    log = open(f"{out}.log", "ab")
    return subprocess.Popen([*command, *args.arguments], stdout=log, stderr=log)


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
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split() if "train.py" in command_of(int(child))]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def kill(args: argparse.Namespace, out: Path, step: float, dice: random.Random, orphan: bool) -> None:
    """Kills the run somewhere behind a step: all of it, or torchrun first and then its workers."""
    process = start(args, out)
    wait_for_step(out, step, process)
    time.sleep(dice.uniform(0, 1))  # also into the writing of a checkpoint
    workers = workers_of(process)
    process.kill()
    process.wait()
    if orphan:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # or they would be done before the other has started
        second = start(args, out)
        assert second.wait(), "a second run was let into the folder"
        assert b"is in use by another run" in Path(f"{out}.log").read_bytes()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.02)
    print(f"killed after {len(read_metrics(out))} steps{', torchrun first' * orphan}", flush=True)


def compare(one: Path, other: Path) -> tuple[bool, bool]:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    same = all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    return same, read_metrics(one) == read_metrics(other)


if __name__ == "__main__":
    sys.exit(main())
