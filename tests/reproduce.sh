#!/usr/bin/env bash
# Makes what the README says of accuracy. Run again after a stop, it goes on where it was.
#
#   tests/reproduce.sh OUT                           the embedded data, the tiny model: an hour
#   tests/reproduce.sh OUT MODEL TRAIN TEST...       another model on other pairs: many hours
#
# SEEDS="0 1 2", SIZES="32 64 128 256 512" and TRAIN_FLAGS="--lr 5e-5 --batch-pairs 4" may be set. OUT
# gets a folder for each run, a file for each table, and `provenance`: commands, commit, machine, times.
set -Eeuo pipefail
here=$(dirname "$(dirname "$(realpath "$0")")")
data=$here/data
if (($# == 1)); then set -- "$1" tiny "$data/train.jsonl" "$data/test.jsonl"; fi
if (($# < 4)); then sed -n '2,8s/^# \?//p' "$0" >&2; exit 2; fi
out=$(realpath -m "$1") model=$2 train=$3 tests=("${@:4}")
seeds=${SEEDS:-0 1 2} sizes=${SIZES:-32 64 128 256 512}
stems=() # as train.py names the scores
for test in "${tests[@]}"; do stem=${test##*/} && stems+=("${stem%%.*}"); done
if [[ -n $(printf '%s\n' "${stems[@]}" | sort | uniq -d) ]]; then
    echo "two tests are named alike: ${stems[*]}" >&2
    exit 2
fi
mkdir -p "$out"
trap 'echo "stopped; $out/log says why; the same command goes on" >&2' ERR
note() { echo "$(date -u +%FT%TZ) $*" >> "$out/provenance"; }
note "$(git -C "$here" describe --always --dirty 2> /dev/null || echo 'no git') on $(nproc) x" \
    "$(lscpu | sed -n 's/^Model name: *//p')"

train() { # NAME ARGUMENTS...: a finished run answers at once, unless its data have changed
    set -- "$1" --model "$model" --train "$train" "${tests[@]/#/--test=}" ${TRAIN_FLAGS:-} "${@:2}"
    note "train.py --out $*"
    torchrun "$here/train.py" --out "$out/$1" --resume "${@:2}" 2>> "$out/log"
}

evaluate() { # NAME ARGUMENTS...
    if [[ ! -s $out/$1.md ]]; then
        note "evaluate.py ${*:2} > $1.md"
        python "$here/evaluate.py" "${@:2}" > "$out/$1.draft" 2>> "$out/log"
        mv "$out/$1.draft" "$out/$1.md"
    fi
    cat "$out/$1.md"
}

compare() { # TEST RUN: with against without critiques, by subset
    evaluate "compare-$1-$2" --compare "$out"/{critiques,none}-"$2/scores-$1.jsonl"
}

shuffle() { # OUT SHARE SEED: the critiques of that share of the responses are exchanged, in all files
    PYTHONPATH=$here python - "$@" "$train" "${tests[@]}" 2>> "$out/log" <<'PYTHON'
import json, sys
from pathlib import Path
from critique_rm import read_pairs, replace_file, write_prompt
from evaluate import shuffle_critiques

path, share, seed, *sources = sys.argv[1:]
rows = []
for source in sources:
    for pair in shuffle_critiques(read_pairs(source), int(seed), float(share)):
        row = {"id": pair.id} | write_prompt(pair.prompt)
        for side, answer in zip(("chosen", "rejected"), pair.answers):
            row |= {side: answer.response, f"{side}_critique": answer.critiques}
        rows.append(json.dumps(row) + "\n")
replace_file(Path(path), "".join(rows))
PYTHON
}

n_pairs=$(PYTHONPATH=$here python -c "import critique_rm as rm; print(len(rm.read_pairs('$train')))")
probes=(--probe={shuffled,swapped,empty,critique-only,response-only})
for seed in $seeds; do
    train "critiques-$seed" --seed "$seed"
    train "none-$seed" --seed "$seed" --no-critiques
    for k in "${!tests[@]}"; do
        name=${stems[k]}
        compare "$name" "$seed"
        evaluate "probes-$name-$seed" "$out/critiques-$seed" --data "${tests[k]}" "${probes[@]}"
        evaluate "plain-$name-$seed" "$out/none-$seed" --data "${tests[k]}"
    done
    for size in $sizes; do
        if ((size >= n_pairs)); then continue; fi
        train "critiques-$seed-$size" --seed "$seed" --max-pairs "$size"
        train "none-$seed-$size" --seed "$seed" --max-pairs "$size" --no-critiques
        for name in "${stems[@]}"; do compare "$name" "$seed-$size"; done
    done
    for share in 0.25 0.50 0.75 1.00; do
        critic=$out/critics/$seed/shuffled_$share.jsonl
        mkdir -p "${critic%/*}"
        shuffle "$critic" $share "$seed"
        train "shuffled_$share-$seed" --seed "$seed" --critiques "$critic"
    done
    if [[ $train -ef $data/train.jsonl && ${#tests[@]} == 1 && ${tests[0]} -ef $data/test.jsonl ]]; then
        train "weak-$seed" --seed "$seed" --critiques "$data/weak_critiques.jsonl"
    fi
done
plot=()
if python -c "import matplotlib" 2> /dev/null; then plot=(--plot "$out/curve.png"); fi
rm -f "$out/curve.md" # runs may have joined
evaluate curve --curve "$out"/*-*/ "${plot[@]}"
