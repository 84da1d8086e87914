"""The task: text and ids, the strict parser, the judge, random lines, masks, random streams."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

import data
from helpers import answer, random_batch, read, seeds, sums, text_of

texts = st.text(alphabet="0123456789+=")
written_by_a_model = st.lists(st.integers(0, data.PAD), max_size=8)  # any tokens, pads among them


def assert_uniform(counts):
    """Chi-square below its mean plus five standard deviations."""
    expected = np.mean(counts)
    assert expected > 20
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    degrees_of_freedom = len(counts) - 1
    assert chi_square <= degrees_of_freedom + 5 * math.sqrt(2 * degrees_of_freedom)


# Text and ids.


@given(texts)
def test_decoding_undoes_encoding(text):
    assert data.decode(data.encode(text)) == text


@given(texts)
def test_every_character_is_one_token(text):
    assert len(data.encode(text)) == len(text)


@given(texts, st.lists(st.sampled_from([data.END, data.PAD]), max_size=4))
def test_decoding_leaves_out_end_and_pad_tokens(text, rest):
    ids = np.array(data.encode(text) + rest, int)
    assert data.decode(ids) == text


@given(texts, st.characters().filter(lambda character: character not in "0123456789+="))
@example("", "\u0663")  # a digit to str.isdigit() and int(), but not to this task
def test_unknown_characters_are_refused_by_name(text, unknown):
    with pytest.raises(ValueError) as error:
        data.encode(text + unknown + text)
    assert repr(unknown) in str(error.value)


@given(st.lists(written_by_a_model, min_size=1), st.integers(8, 12))
def test_padding_fills_every_line_on_the_right(lines, length):
    expected = [line + [data.PAD] * (length - len(line)) for line in lines]
    assert data.pad(lines, length).tolist() == expected


@given(st.lists(written_by_a_model, min_size=1))
def test_padding_goes_up_to_the_longest_line_unless_a_length_is_given(lines):
    longest = max(len(line) for line in lines)
    assert np.array_equal(data.pad(lines), data.pad(lines, longest))


# The parser and the judge.


@given(sums)
def test_a_sum_is_parsed_as_its_target_and_terms(line):
    target, terms = line
    assert data.parse(text_of(target, terms)) == (target, terms)


NO_LINES = """
    1 = 1=1= 1==1 =1 1= +1=1 1=+1 1=1+ 1=1++1 -1=1 1=-1 1=1,1 1=1.0 1=1_0 1=0x1
    1=0 1=01 1=1+0 100=100 10=3+69111 1000=1 1=\u0661 \u0661=1 1=\u00b2
""".split()


@pytest.mark.parametrize("text", [*NO_LINES, "", "1= 1", "1=1 ", " 1=1", "1=1\n"])
def test_what_is_no_line_does_not_parse(text):
    assert data.parse(text) is None


def test_an_endless_number_does_not_parse():
    assert data.parse("1=" + 5000 * "9") is None


@given(sums, st.integers(2, 5))
@example((9, [1, 2, 3]), 3)
def test_an_answer_is_exact_if_its_sum_is_the_target(line, prefer):
    target, terms = line
    judgement = data.judge(answer(target, terms), prefer)
    assert judgement.exact == (sum(terms) == target)


@given(sums, st.integers(2, 5))
@example((9, [1, 2, 3]), 3)
def test_an_answer_is_preferred_if_it_has_that_many_terms(line, prefer):
    target, terms = line
    judgement = data.judge(answer(target, terms), prefer)
    assert judgement.preferred == (len(terms) == prefer)


@given(sums)
def test_a_judgement_names_target_terms_and_total(line):
    target, terms = line
    judgement = data.judge(answer(target, terms))
    assert (judgement.target, judgement.terms) == (target, terms)
    assert judgement.total == sum(terms)


@pytest.mark.parametrize(
    "terms, prefer, outcome",
    [
        ([1, 2, 4], 3, "right, preferred"),
        ([3, 4], 2, "right, preferred"),
        ([3, 4], 3, "right, not preferred"),
        ([1, 2, 5], 3, "wrong sum"),
        ([3, 5], 3, "wrong sum"),
    ],
)
def test_the_outcome_of_an_answer_to_7(terms, prefer, outcome):
    assert data.judge(answer(7, terms), prefer).outcome == outcome


@given(sums, st.integers(2, 5))
@example((9, [1, 3, 5]), 3)
def test_only_right_and_preferred_answers_are_accepted(line, prefer):
    target, terms = line
    is_right_and_preferred = sum(terms) == target and len(terms) == prefer
    assert data.is_accepted(answer(target, terms), prefer) == is_right_and_preferred


def test_three_terms_are_preferred_unless_another_number_is_named():
    assert data.is_accepted(answer(7, [1, 2, 4]))
    assert not data.is_accepted(answer(7, [3, 4]))


RIGHT = answer(7, [3, 4])


@pytest.mark.parametrize(
    "ids",
    [
        [],
        RIGHT[:-1],
        RIGHT + [data.END],
        RIGHT + [data.PAD],
        [data.PAD] + RIGHT,
        RIGHT[:3] + [data.END] + RIGHT[3:],
        RIGHT[:3] + [data.PAD] + RIGHT[3:],
    ],
    ids=["empty", "no end", "two ends", "pad last", "pad first", "end inside", "pad inside"],
)
def test_an_answer_parses_only_if_it_ends_once_and_last(ids):
    assert data.judge(ids, 2) == data.Judgement("does not parse")


# The lines of SFT.


@pytest.mark.parametrize("target, count", [(5, 2), (6, 3), (7, 4), (7, 5), (5, 5), (9, 3), (20, 2)])
def test_a_random_line_is_any_split_of_its_target_equally_often(target, count):
    candidates = itertools.product(range(1, target), repeat=count)
    ways = [tuple(answer(target, terms)) for terms in candidates if sum(terms) == target]
    rng = random.Random(target)
    lines = [tuple(data.random_line(target, count, rng)) for _ in range(200 * len(ways))]
    assert set(lines) == set(ways)
    assert_uniform([lines.count(way) for way in ways])


@given(st.integers(1, 50), seeds)
def test_random_lines_are_right_sums_of_two_to_five_terms(n, seed):
    ids = random_batch(seed, n)
    assert len(ids) == n
    for target, terms in map(read, ids):
        assert sum(terms) == target
        assert len(terms) in (2, 3, 4, 5)


@given(st.integers(1, 50), seeds)
def test_random_lines_end_once_are_padded_and_fit(n, seed):
    for row in random_batch(seed, n).tolist():
        line = answer(*read(row))
        assert row == line + [data.PAD] * (len(row) - len(line))
        assert len(row) <= data.MAX_LEN


@given(st.integers(1, 50), seeds)
def test_random_lines_repeat_with_their_seed(n, seed):
    assert np.array_equal(random_batch(seed, n), random_batch(seed, n))


def test_two_calls_with_one_generator_make_other_lines():
    rng = np.random.default_rng(0)
    first, second = data.random_lines(50, rng), data.random_lines(50, rng)
    assert list(map(read, first)) != list(map(read, second))


def test_the_targets_of_random_lines_are_uniform_and_never_held_out():
    targets = [target for target, _ in map(read, random_batch(0, 8000))]
    assert set(targets) == set(data.TRAINING)
    assert_uniform([targets.count(target) for target in data.TRAINING])


def test_the_number_of_terms_is_uniform_and_independent_of_the_target():
    lines = [read(row) for row in random_batch(1, 8000)]
    small = [len(terms) for target, terms in lines if target < 50]
    large = [len(terms) for target, terms in lines if target >= 50]
    for counts in small, large:
        assert_uniform([counts.count(count) for count in (2, 3, 4, 5)])


def test_random_lines_have_the_targets_that_are_asked_for():
    targets = {target for target, _ in map(read, random_batch(0, 50, [7, 9]))}
    assert targets == {7, 9}


def test_every_target_is_either_held_out_or_trained_on():
    assert sorted(data.HELD_OUT + data.TRAINING) == list(range(5, 101))
    assert len(data.HELD_OUT) == 20


def test_held_out_targets_are_of_every_size():
    assert min(data.HELD_OUT) < 10 and max(data.HELD_OUT) > 90
    assert max(np.diff(data.HELD_OUT)) < 15


# Lengths, masks and parts of about as many tokens.


@given(st.lists(written_by_a_model, min_size=1))
def test_a_length_counts_up_to_the_last_token_that_is_no_padding(completions):
    lines = [completion + [data.END] for completion in completions]
    assert data.lengths(data.pad(lines, 12)).tolist() == [len(line) for line in lines]


def test_lengths_of_pairs_are_those_of_their_lines():
    pairs = data.pad([answer(12, [3, 4, 5]), answer(12, [6, 6])]).reshape(1, 2, -1)
    assert data.lengths(pairs).tolist() == [[len("12=3+4+5") + 1, len("12=6+6") + 1]]


@given(st.lists(st.tuples(st.integers(0, 999), written_by_a_model), min_size=1))
def test_the_mask_covers_what_the_model_has_to_produce(answers):
    """From the token after the first `=` to the end token. A pad token that the model itself has
    written counts: otherwise DPO could never teach it to stop doing so."""
    lines = [data.encode(f"{target}=") + written + [data.END] for target, written in answers]
    mask = data.completion_mask(data.pad(lines, 14))
    for (target, _), line, row in zip(answers, lines, mask):
        first = len(f"{target}=")
        assert np.flatnonzero(row).tolist() == list(range(first, len(line)))


lines_that_end = st.lists(written_by_a_model.map(lambda line: line + [data.END]), min_size=1)


@given(lines_that_end, st.integers(1, 20))
def test_the_parts_of_a_batch_hold_every_line_once(lines, n_parts):
    parts = data.by_length(data.pad(lines, 10), n_parts)
    found = []
    for part in parts:
        for row, length in zip(part, data.lengths(part)):
            found.append(row[:length].tolist())
    assert sorted(found) == sorted(lines)


@given(lines_that_end, st.integers(1, 20))
def test_a_part_of_a_batch_has_its_share_of_the_tokens_save_for_one_line(lines, n_parts):
    lines = 5 * lines
    parts = data.by_length(data.pad(lines, 10), n_parts)
    tokens = [data.lengths(part).sum() for part in parts]
    share, longest = sum(map(len, lines)) / n_parts, max(map(len, lines))
    assert max(tokens) <= share + longest
    if share >= longest:  # then no part is empty, and none is much smaller
        assert len(parts) == n_parts and min(tokens) >= share - longest


@given(lines_that_end, st.integers(1, 20))
def test_a_batch_has_no_more_parts_than_asked_for_and_no_empty_one(lines, n_parts):
    sizes = [len(part) for part in data.by_length(data.pad(lines, 10), n_parts)]
    assert 1 <= len(sizes) <= n_parts and min(sizes) >= 1


def test_short_lines_make_a_larger_part_than_long_ones():
    short, long = [data.END], [1, 2, 3, 4, 5, data.END]
    parts = data.by_length(data.pad(10 * [long] + 61 * [short]), 2)
    assert [len(part) for part in parts] == [10, 61]


@given(lines_that_end, st.integers(1, 20))
def test_the_parts_of_a_batch_go_from_long_to_short_without_padding_that_all_share(lines, n_parts):
    parts = data.by_length(data.pad(lines, 10), n_parts)
    longest = [max(data.lengths(part)) for part in parts]
    assert [part.shape[1] for part in parts] == longest
    shortest = [min(data.lengths(part)) for part in parts]
    assert all(long >= short for long, short in zip(shortest, longest[1:]))


# Random numbers.


def test_every_use_every_process_and_every_seed_has_a_stream_of_its_own():
    first_numbers = [
        data.random_stream(seed, use, rank).random()
        for seed in range(5)
        for use in data.STREAMS
        for rank in range(4)
    ]
    assert len(set(first_numbers)) == len(first_numbers)


@pytest.mark.parametrize("use", data.STREAMS)
def test_no_stream_is_the_one_that_makes_the_initial_weights(use):
    """A model's first weights are drawn from default_rng(seed): what it is trained on should not be
    made from the same numbers."""
    for seed in range(5):
        assert data.random_stream(seed, use).random() != np.random.default_rng(seed).random()


def test_a_stream_repeats():
    first, second = (data.random_stream(3, "answers", 1) for _ in range(2))
    assert np.array_equal(first.random(10), second.random(10))


def test_a_python_generator_follows_the_numpy_generator_that_seeds_it():
    rng = np.random.default_rng(0)
    first, second = data.python_random(rng), data.python_random(rng)
    again = data.python_random(np.random.default_rng(0))
    number = first.random()
    assert number == again.random() and number != second.random()
