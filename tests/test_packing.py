"""critique_rm.py, packing: tries and the rows of micro-batches."""

import itertools

import numpy as np
import pytest

import critique_rm as rm
from conftest import CPU
from critique_rm import build_trie


def test_a_small_trie_by_hand():
    #  5 ─ 6 ─ 7 ─ 8
    #       └─ 9
    sequences = [np.array(s, np.int32) for s in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7], [5, 6, 9])]
    trie = build_trie(sequences, [10, 20, 30, 40])
    assert trie.ids.tolist() == [5, 6, 7, 8, 9]
    assert trie.positions.tolist() == [0, 1, 2, 3, 2]
    assert trie.ends.tolist() == [5, 5, 4, 4, 5]
    assert trie.last.tolist() == [3, 4, 2, 4] and trie.owners.tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize("seed", range(8))
def test_each_sequence_of_a_trie_is_the_ancestors_of_its_last_token(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 4 * seed + 1)
    sequences = [rng.integers(0, 2, n).astype(np.int32) for n in lengths]
    trie = build_trie(sequences, range(len(sequences)))
    for sequence, q in zip(sequences, trie.last):
        path = [k for k in range(q + 1) if k <= q < trie.ends[k]]
        assert trie.ids[path].tolist() == sequence.tolist()
        assert trie.positions[path].tolist() == list(range(len(sequence)))
    assert len(trie) == len({tuple(s[: k + 1]) for s in sequences for k in range(len(s))})


def chain(length: int, number: int = 0) -> rm.Trie:
    return build_trie([np.arange(length, dtype=np.int32)], [number])


@pytest.mark.parametrize(
    "share_prefixes, expected",
    [(True, [[[5], [3, 2]], [[2], [2]]]), (False, [[[5]], [[3]], [[2], [2], [2]]])],
)
def test_packing_a_few_tries_by_hand(share_prefixes, expected):
    packed = rm.pack([[chain(n)] for n in (2, 5, 3, 2, 2)], 10, 1, share_prefixes)
    assert [[[len(trie) for trie in row] for row in rows] for rows in packed] == expected


@pytest.mark.parametrize("charge_tokens, n_rows", [(62, [1, 10]), (2048, [11])])
def test_where_micro_batches_cost_much_padding_is_cheaper(charge_tokens, n_rows):
    """By hand: a row of 100 and ten of 60 are (100 + 62) / 100 = 1.62 a token for the first alone
    and (1,100 + 62) / 700 = 1.66 together; with 2,048 for each, 21 and 4.5."""
    packed = rm.pack([[chain(n)] for n in (100, *[60] * 10)], 2000, charge_tokens, share_prefixes=False)
    assert [len(rows) for rows in packed] == n_rows


@pytest.mark.parametrize("share_prefixes, n_tries, most_wasted", [(True, 1, 0.08), (False, 2, 0.28)])
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_every_unit_is_packed_once_within_the_budget(n_ranks, share_prefixes, n_tries, most_wasted):
    rng, number = np.random.default_rng(0), itertools.count()
    units = [[chain(n, next(number)) for n in rng.integers(20, 200, n_tries)] for _ in range(200)]
    ranks = [rm.pack(units, 2048, 64, share_prefixes, rank, n_ranks) for rank in range(n_ranks)]
    batches = [[rm.collate(rows, CPU) for rows in packed] for packed in ranks]
    packed = sum(batches, [])
    found = [set(batch.owners.tolist()) for batch in packed]
    wholes = [{int(trie.owners[0]) for trie in unit} for unit in units]
    assert all(sum(whole <= numbers for numbers in found) == 1 for whole in wholes)
    assert sum(map(len, found)) == next(number)
    n_tokens, largest = sum(b.n_tokens for b in packed), [
        max(b.ids.numel() for b in same_time) for same_time in zip(*batches, strict=True)
    ]
    assert n_tokens == sum(len(trie) for unit in units for trie in unit)
    assert max(largest) <= 2048
    assert 1 - n_tokens / (n_ranks * sum(largest)) < most_wasted  # padding, and waiting for others


@pytest.mark.parametrize("rank, expected", [(0, [[[5]], [[4]]]), (1, [[[4]], []]), (2, [[[4]], []])])
def test_a_rank_with_fewer_units_gets_empty_micro_batches(rank, expected):
    packed = rm.pack([[chain(n)] for n in (4, 4, 4, 5)], 1, 0, True, rank, n_ranks=3)
    assert [[[len(trie) for trie in row] for row in rows] for rows in packed] == expected
