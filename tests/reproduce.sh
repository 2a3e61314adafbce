#!/usr/bin/env bash
# Makes what the README says of accuracy. Run again after a stop, it goes on where it was.
#
#   tests/reproduce.sh OUT                           the embedded data, the tiny model: an hour
#   tests/reproduce.sh OUT MODEL TRAIN TEST...       a real model on other pairs: many hours
#
# SEEDS="0 1 2", SIZES="32 64 128 256 512" and TRAIN_FLAGS="--lr 2e-5" may be set. Tables go to OUT.
set -Eeuo pipefail
out=$(realpath -m "$1") && shift
here=$(dirname "$(realpath "$0")")/..
data=$here/data
model=tiny train=$data/train.jsonl tests=("$data/test.jsonl") sizes="32 64 128 256"
if (($#)); then model=$1 train=$2 tests=("${@:3}") sizes="32 64 128 256 512"; fi
seeds=${SEEDS:-0 1 2} sizes=${SIZES:-$sizes}
mkdir -p "$out"
trap 'echo "stopped; $out/log says why; the same command goes on" >&2' ERR

train() { # NAME ARGUMENTS...: a finished run answers at once
    torchrun "$here/train.py" --out "$out/$1" --resume --model "$model" --train "$train" \
        "${tests[@]/#/--test=}" ${TRAIN_FLAGS:-} "${@:2}" 2>> "$out/log" | tee -a "$out/summaries"
}

evaluate() { # TABLE ARGUMENTS...
    python "$here/evaluate.py" "${@:2}" 2>> "$out/log" | tee "$out/$1.md"
}

shuffle() { # the critiques of a share of the responses exchanged, in training and test alike
    PYTHONPATH=$here python - "$out" "$1" "$train" "${tests[@]}" <<'PYTHON'
import json, sys
from pathlib import Path
from critique_rm import read_pairs, replace_file
from evaluate import shuffle_critiques

out, percent, *sources = sys.argv[1:]
rows = []
for source in sources:
    for pair in shuffle_critiques(read_pairs(source), seed=0, share=int(percent) / 100):
        row = {"id": pair.id, "prompt": [message._asdict() for message in pair.prompt]}
        for side, answer in zip(("chosen", "rejected"), pair.answers):
            row |= {side: answer.response, f"{side}_critique": answer.critiques}
        rows.append(json.dumps(row) + "\n")
replace_file(Path(out) / f"shuffled_{percent}.jsonl", "".join(rows))
PYTHON
}

critics=()
if [[ $model == tiny && -f $data/weak_critiques.jsonl ]]; then critics+=("$data/weak_critiques.jsonl"); fi
for percent in 25 50 75 100; do
    shuffle $percent
    critics+=("$out/shuffled_$percent.jsonl")
done
for seed in $seeds; do
    train "critiques-$seed" --seed "$seed"
    train "none-$seed" --seed "$seed" --no-critiques
    for size in $sizes; do
        train "critiques-$seed-$size" --seed "$seed" --max-pairs "$size"
        train "none-$seed-$size" --seed "$seed" --max-pairs "$size" --no-critiques
    done
    for critic in "${critics[@]}"; do
        train "$(basename "$critic" .jsonl)-$seed" --seed "$seed" --critiques "$critic"
    done
done
probes=(--probe={shuffled,swapped,empty,critique-only,response-only})
for test in "${tests[@]}"; do
    name=$(basename "$test" .jsonl)
    for seed in $seeds; do
        evaluate "compare-$name-$seed" --compare "$out"/{critiques,none}-"$seed/scores-$name.jsonl"
        evaluate "probes-$name-$seed" "$out/critiques-$seed" --data "$test" "${probes[@]}"
    done
done
plot=()
if python -c "import matplotlib" 2> /dev/null; then plot=(--plot "$out/curve.png"); fi
evaluate curve --curve "$out"/*-*/ "${plot[@]}"
