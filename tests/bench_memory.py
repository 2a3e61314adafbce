"""Memory of one process against that of each of two, by what train.py is doing.

    python tests/bench_memory.py --model DIR --train PAIRS [more arguments of train.py]

Prints a Markdown table: the bytes of parameters, gradients and optimizer, and the peak resident
memory in loading, in a step and in saving, as measured by Linux; and what --plan foresees.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = {"load": "read_weights", "step": "train_step", "save": "save_checkpoint", "end": "save_model"}


def main() -> None:
    found = {}
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(n), __file__, "--measure", folder, *sys.argv[1:]]
            subprocess.run([*command, "--out", f"{folder}/run"], check=True, stdout=sys.stderr)
            ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*")]
        found[n] = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        plan = [sys.executable, ROOT / "train.py", *sys.argv[1:], "--plan", "--nproc", str(n)]
        planned = subprocess.run(plan, check=True, stdout=subprocess.PIPE).stdout
        found[n]["planned"] = json.loads(planned.splitlines()[-1])["total_gb"] * 1e9
    print("| GB of a process | 1 process | 2 processes | ratio |\n|---|---|---|---|")
    for name, one in found[1].items():
        two = found[2][name]
        print(f"| {name} | {one / 1e9:.3f} | {two / 1e9:.3f} | {two / one:.2f} |")


def measure(folder: Path, arguments: list[str]) -> None:
    """Runs train.py in this process and writes what each phase took at most."""
    sys.path.insert(0, str(ROOT))
    import torch

    import critique_rm as rm
    import train

    peaks, models = dict.fromkeys(PHASES, 0), []

    def watch(phase: str) -> None:
        module = next(module for module in (train, rm) if hasattr(module, PHASES[phase]))
        function = getattr(module, PHASES[phase])

        def watched(*args, **kwargs):
            if phase == "step":
                models[:] = args[:1]
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            try:
                return function(*args, **kwargs)
            finally:
                status = Path("/proc/self/status").read_text()
                peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
                if not (phase == "load" and peaks[phase]):  # the check at the end loads again
                    peaks[phase] = max(peaks[phase], peak)

        setattr(module, PHASES[phase], watched)

    for phase in PHASES:
        watch(phase)
    step, states = torch.optim.AdamW.step, [0]

    def counted(optimizer, *args):
        result = step(optimizer, *args)
        tensors = list(models[0].parameters())
        tensors += [p.grad for p in tensors if p.grad is not None]
        tensors += [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        states[0] = sum(getattr(t, "to_local", lambda: t)().nbytes for t in tensors)
        return result

    torch.optim.AdamW.step = counted
    train.run(train.parse_arguments(arguments))
    sizes = {"parameters, gradients, optimizer": states[0]} | peaks
    (folder / f"rank-{os.environ['RANK']}").write_text(json.dumps(sizes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
