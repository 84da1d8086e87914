"""The task: text to ids and back, the strict parser, judging, uniform lines, masks and shards."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

import data
from helpers import answer, random_batch, read, seeds, sums, text_of

texts = st.text(alphabet="0123456789+=")


def assert_uniform(counts):
    """Chi-square below its mean plus five standard deviations."""
    counts, free = np.asarray(counts), len(counts) - 1
    assert (expected := counts.mean()) > 20
    assert ((counts - expected) ** 2 / expected).sum() <= free + 5 * math.sqrt(2 * free)


@given(texts, st.lists(st.sampled_from([data.END, data.PAD]), max_size=4))
def test_decoding_undoes_encoding_and_drops_end_and_pad(text, rest):
    ids = data.encode(text)
    assert len(ids) == len(text) and not {data.END, data.PAD} & set(ids)
    assert data.decode(np.array(ids + rest, int)) == text


@given(texts, st.characters().filter(lambda c: c not in "0123456789+="))
@example("", "\u0663")  # a digit to str.isdigit and to int(), but not to this task
def test_unknown_characters_are_refused_by_name(text, unknown):
    with pytest.raises(ValueError) as error:
        data.encode(text + unknown + text)
    assert repr(unknown) in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "1=1\n",
        "1=1+",
        "1=+1",
        "1=1++1",
        "=1",
        "1=",
        "1=1=1",
        "+1=1",
        "1= 1",
        "1=1_0",
        "1=\u0661",
        "\u0661=1",
        "1=\u00b2",
        "1=01",
        "1=0",
        "1=1+0",
        "10=3+69111",
        "100=100",
        "1000=1",
        "-1=1",
        "1",
        "1=-1",
        "1=1,1",
        "1=1.0",
        "1==1",
        "",
        "=",
        "1=1 ",
        " 1=1",
        "1=0x1",
        "1=" + 5000 * "9",
    ],
)
def test_what_is_no_line_does_not_parse(line):
    assert data.parse(line) is None


@given(sums, st.integers(2, 5))
@example((9, [1, 2, 3]), 3)
def test_an_answer_is_judged_by_its_sum_and_its_number_of_terms(line, prefer):
    target, terms = line
    assert data.parse(text_of(*line)) == line
    exact, preferred = sum(terms) == target, len(terms) == prefer
    assert data.judge(answer(*line), prefer) == (
        target,
        terms,
        sum(terms),
        exact,
        preferred,
        "wrong sum" if not exact else "right, preferred" if preferred else "right, not preferred",
    )
    assert data.judge(answer(7, [1, 2, 4])).preferred  # three, unless another number is named


def test_an_answer_parses_only_if_it_ends_once_and_last():
    right = answer(7, [3, 4])
    for wrong in (
        [],
        right[:-1],
        right + [data.END],
        right + [data.PAD],
        [data.PAD, *right],
        [*right[:3], data.END, *right[3:]],
        [*right[:3], data.PAD, *right[3:]],
    ):
        assert data.judge(wrong, 2) == (None, None, None, False, False, "does not parse")


@pytest.mark.parametrize("target, count", [(5, 2), (6, 3), (7, 4), (7, 5), (5, 5), (9, 3), (20, 2)])
def test_a_random_line_is_any_split_of_its_target_equally_often(target, count):
    ways = {
        tuple(answer(target, way))
        for way in itertools.product(range(1, target), repeat=count)
        if sum(way) == target
    }
    rng = random.Random(target)
    drawn = [tuple(data.random_line(target, count, rng)) for _ in range(200 * len(ways))]
    assert set(drawn) == ways
    assert_uniform([drawn.count(way) for way in ways])


@given(st.integers(1, 50), seeds)
def test_random_lines_are_right_and_never_of_held_out_targets(n, seed):
    ids = random_batch(seed, n)
    assert len(ids) == n and np.array_equal(ids, random_batch(seed, n))
    for row in ids.tolist():
        target, terms = read(row)
        assert target in data.TRAINING and target not in data.HELD_OUT
        assert sum(terms) == target and len(terms) in (2, 3, 4, 5)
        line = answer(target, terms)
        assert row == line + [data.PAD] * (len(row) - len(line)) and len(row) <= data.MAX_LEN


def test_targets_and_counts_of_random_lines_are_uniform_and_independent():
    assert sorted([*data.HELD_OUT, *data.TRAINING]) == list(range(5, 101))
    assert len(data.HELD_OUT) == 20 and max(np.diff(data.HELD_OUT)) < 15  # of every size
    rng = np.random.default_rng(0)
    lines = [read(row) for row in [*data.random_lines(4000, rng), *data.random_lines(4000, rng)]]
    assert lines[:4000] != lines[4000:]  # the generator moves on
    assert_uniform([sum(target == other for other, _ in lines) for target in data.TRAINING])
    for part in lines, [line for line in lines if line[0] < 50]:
        assert_uniform([sum(len(terms) == k for _, terms in part) for k in (2, 3, 4, 5)])
    assert {read(row)[0] for row in random_batch(0, 50, [7, 9])} == {7, 9}


@given(
    st.lists(
        st.tuples(st.integers(0, 999), st.lists(st.integers(0, data.PAD), max_size=8)), min_size=1
    )
)
def test_the_mask_covers_what_the_model_is_to_write_and_no_padding_but_its_own(answers):
    """Padding that it wrote itself counts: else DPO could never reject an answer for it."""
    lines = [data.encode(f"{target}=") + rest + [data.END] for target, rest in answers]
    ids = data.pad(lines, 14)
    assert ids.tolist() == [line + [data.PAD] * (14 - len(line)) for line in lines]
    assert np.array_equal(data.pad(lines), ids[:, : max(map(len, lines))])
    assert data.lengths(ids[None]).tolist() == [list(map(len, lines))]
    for (target, _), line, row in zip(answers, lines, data.completion_mask(ids)):
        assert np.flatnonzero(row).tolist() == list(range(len(str(target)) + 1, len(line)))


@given(
    st.lists(
        st.lists(st.integers(0, data.PAD), max_size=8).map(lambda row: [*row, 1]), max_size=60
    ),
    st.integers(1, 20),
    st.booleans(),
)
def test_shards_hold_every_row_once_and_whole_longest_first(rows, size, paired):
    """Lines (N, T), or pairs (P, 2, T), which are cut to the longer of the two; of none, too."""
    ids = data.pad(rows, 10)
    ids = ids[: len(ids) // 2 * 2].reshape(-1, 2, 10) if paired else ids
    shards = data.by_length(ids, size)
    assert len(shards) <= math.ceil(len(ids) / size) and all(len(shard) for shard in shards)
    whole = np.concatenate(
        [
            ids[:0],
            *(
                np.pad(
                    shard,
                    [(0, 0)] * (ids.ndim - 1) + [(0, 10 - shard.shape[-1])],
                    constant_values=data.PAD,
                )
                for shard in shards
            ),
        ]
    )
    assert sorted(whole.tolist()) == sorted(ids.tolist())
    assert [shard.shape[-1] for shard in shards] == [data.lengths(s).max() for s in shards]
    assert (np.diff([data.lengths(row).max() for row in whole]) <= 0).all()
    order = np.random.default_rng(size).permutation(len(ids))
    assert [s.shape for s in data.by_length(ids[order], size)] == [s.shape for s in shards]


@given(st.integers(50, 200), seeds)
def test_shards_hold_about_as_many_tokens_each(n, seed):
    """Up to one line at either cut: otherwise one process would wait for another."""
    shards = data.by_length(random_batch(seed, n), n // 4)
    assert len(shards) == math.ceil(n / (n // 4))
    tokens = [(shard != data.PAD).sum() for shard in shards]
    assert max(tokens) - min(tokens) <= 2 * data.MAX_LEN
