"""The task: text to ids and back, the strict parser, uniform lines, masks and shards."""
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

import data
from helpers import seeds

texts = st.text(alphabet=data.CHARACTERS)
digits = st.text(alphabet="0123456789", min_size=1, max_size=4)
answers = st.lists(st.integers(1, 100), min_size=1, max_size=5)
lines = st.builds(lambda target, terms: (target, terms), st.integers(0, 100), answers)


def text_of(target, terms):
    return f"{target}={'+'.join(map(str, terms))}"


def padded(terms):
    """A list of up to five terms as `encode_lines` takes it, filled up with zeros."""
    return terms + [0] * (data.MAX_TERMS - len(terms))


def random_batch(seed, n=40):
    return data.random_lines(n, np.random.default_rng(seed))


def chi_square_bound(n_bins):
    """Mean plus eight standard deviations of a chi-square with n_bins - 1 degrees of freedom."""
    return n_bins - 1 + 8 * math.sqrt(2 * (n_bins - 1))


def assert_uniform(counts):
    counts = np.asarray(counts)
    expected = counts.sum() / len(counts)
    assert expected > 20
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(len(counts))


# The vocabulary.

def test_every_token_has_an_id_of_its_own():
    assert len(set(data.VOCAB)) == len(data.VOCAB) == len(data.CHARACTERS) + 2
    ids = [*data.encode("0123456789+="), data.END, data.PAD]
    assert sorted(ids) == list(range(len(data.VOCAB)))
    assert [data.VOCAB[i] for i in data.encode(data.CHARACTERS)] == list(data.CHARACTERS)


@given(texts)
def test_decoding_undoes_encoding(text):
    ids = data.encode(text)
    assert len(ids) == len(text)
    assert data.decode(ids) == text
    assert data.decode(np.array(ids, dtype=int)) == text


@given(texts, st.lists(st.sampled_from([data.END, data.PAD]), max_size=4))
def test_decoding_drops_end_and_pad(text, rest):
    assert data.decode(data.encode(text) + rest) == text


@given(texts, st.characters().filter(lambda c: c not in data.CHARACTERS), texts)
@example("1", " ", "2")
@example("", "\u0663", "")  # a digit to str.isdigit and to int(), but not to this task
def test_unknown_characters_are_refused_by_name(before, unknown, after):
    with pytest.raises(ValueError) as error:
        data.encode(before + unknown + after)
    assert repr(unknown) in str(error.value)


@given(st.integers(0, 10 ** 6))
def test_a_prompt_is_a_target_and_an_equals_sign(target):
    assert data.decode(data.prompt(target)) == f"{target}="


# The parser.

def grammatical(line):
    """target '=' term ('+' term)*, all of ASCII digits: by splitting, where parse has a regex."""
    target, equals, completion = line.partition("=")
    numbers = [target, *completion.split("+")]
    return equals == "=" and all(number and set(number) <= set("0123456789") for number in numbers)


@given(lines)
def test_the_parser_undoes_writing(line):
    assert data.parse(text_of(*line)) == line


almost_lines = st.builds(  # a line with one character replaced, inserted or left out
    lambda line, at, new, cut: text_of(*line)[:at] + new + text_of(*line)[at + cut:],
    lines, st.integers(0, 12),
    st.sampled_from(["", "+", "=", "0", "-", " ", "\n", ".", "_", "\u0663"]), st.integers(0, 1))
any_text = (st.text() | st.text(alphabet="0123456789+= \n-") | st.text(alphabet="12+=")
            | almost_lines)


@given(any_text)
@example("1=1\n")
@example("1=1+")
@example("1=+1")
@example("1=1++1")
@example("=1")
@example("1=")
@example("1=1=1")
@example("+1=1")
@example("1= 1")
@example("1=1_0")
@example("1=\u0661")
@example("\u0661=1")
@example("1=\u00b2")
@example("007=00+7")
@example("\x001=1")
def test_the_parser_takes_what_the_grammar_says_and_nothing_else(line):
    parsed = data.parse(line)
    assert (parsed is not None) == grammatical(line)
    if parsed is not None:
        target, completion = line.split("=")
        assert parsed == (int(target), [int(term) for term in completion.split("+")])


@given(st.integers(1, 10 ** 5), st.sampled_from(["1=", "1=1+", ""]))
def test_the_parser_never_raises_however_long_the_number(length, start):
    """int() refuses numbers of more than 4,300 digits; the parser answers None before that."""
    line = start + "9" * length
    assert data.parse(line) is None or len(line) <= 1000


@given(lines)
def test_an_answer_is_read_to_its_end_token(line):
    ids = data.encode(text_of(*line))
    assert data.read([*ids, data.END]) == line
    assert data.read(ids) is None  # it never ended
    for at in range(len(ids) + 1):
        assert data.read([*ids[:at], data.PAD, *ids[at:], data.END]) is None


# Random terms.

def splits(n, k):
    """All ways to write n as k ordered terms of at least 1."""
    return [terms for terms in itertools.product(range(1, n + 1), repeat=k) if sum(terms) == n]


@given(st.lists(st.tuples(st.integers(5, 100), st.integers(2, 5)), min_size=1, max_size=30), seeds)
def test_random_terms_sum_up(rows, seed):
    targets, counts = np.array(rows).T
    terms = data.random_terms(targets, counts, np.random.default_rng(seed))
    assert terms.shape == (len(rows), data.MAX_TERMS)
    assert np.array_equal(terms.sum(axis=1), targets)
    for row, count in zip(terms, counts):
        assert (row[:count] >= 1).all() and (row[count:] == 0).all()


@pytest.mark.parametrize("target, count", [(5, 2), (6, 3), (7, 4), (7, 5), (9, 3), (20, 2)])
def test_random_terms_are_uniform_among_all_splits(target, count):
    ways = splits(target, count)
    rng = np.random.default_rng(target * 10 + count)
    n = 300 * len(ways)
    terms = data.random_terms(np.full(n, target), np.full(n, count), rng)
    drawn = [tuple(row[:count]) for row in terms.tolist()]
    assert set(drawn) == set(ways)
    assert_uniform([drawn.count(way) for way in ways])


def test_only_one_way_to_split_into_ones():
    terms = data.random_terms([5] * 10, [5] * 10, np.random.default_rng(0))
    assert (terms == 1).all()


# Random lines.

def test_twenty_of_the_targets_5_to_100_are_held_out():
    assert sorted([*data.HELD_OUT, *data.TRAINING]) == list(range(5, 101))
    assert len(data.HELD_OUT) == 20
    assert max(np.diff(data.HELD_OUT)) < 15  # scattered: every part of the range is tested


@given(st.integers(1, 50), seeds)
def test_random_lines_are_right_and_of_training_targets(n, seed):
    ids = random_batch(seed, n)
    assert len(ids) == n
    for row in ids.tolist():
        line = row[:row.index(data.END) + 1]
        assert set(row[len(line):]) <= {data.PAD}
        target, terms = data.read(line)
        assert target in data.TRAINING and target not in data.HELD_OUT
        assert sum(terms) == target and 2 <= len(terms) <= 5 and min(terms) >= 1
        assert data.decode(line) == text_of(target, terms)  # no leading zeros
        assert len(line) <= data.MAX_LEN


def test_targets_and_counts_of_terms_are_uniform():
    parsed = [data.parse(data.decode(row)) for row in random_batch(0, 8000).tolist()]
    targets = [target for target, _ in parsed]
    counts = [len(terms) for _, terms in parsed]
    assert_uniform([targets.count(target) for target in data.TRAINING])
    assert_uniform([counts.count(count) for count in (2, 3, 4, 5)])


def test_counts_do_not_depend_on_the_target():
    """Were small targets given fewer terms, the mean count would grow with the target."""
    parsed = [data.parse(data.decode(row)) for row in random_batch(0, 8000).tolist()]
    small, large = ([len(terms) for target, terms in parsed if (target < 50) == below]
                    for below in (True, False))
    assert abs(np.mean(small) - np.mean(large)) < 0.2  # eight standard deviations


@given(st.sets(st.integers(5, 100), min_size=1, max_size=5).map(sorted), seeds)
def test_random_lines_of_given_targets(targets, seed):
    ids = data.random_lines(20, np.random.default_rng(seed), targets)
    assert {data.parse(data.decode(row))[0] for row in ids} <= set(targets)


@given(seeds)
def test_one_seed_gives_the_same_lines(seed):
    assert np.array_equal(random_batch(seed), random_batch(seed))


@given(st.lists(lines, min_size=1, max_size=10))
def test_encode_lines_is_encode_of_the_text(rows):
    targets, terms = zip(*rows)
    ids = data.encode_lines(targets, [padded(row) for row in terms])
    expected = [[*data.encode(text_of(*row)), data.END] for row in rows]
    assert np.array_equal(ids, data.pad(expected))


@given(st.lists(st.lists(st.integers(0, data.END), min_size=1, max_size=9), min_size=1, max_size=9))
def test_padding_goes_to_the_right_and_no_further(rows):
    ids = data.pad(rows)
    assert ids.shape == (len(rows), max(map(len, rows)))
    assert ids.dtype.kind == "i"
    for row, padded_row in zip(rows, ids.tolist()):
        assert padded_row == row + [data.PAD] * (len(padded_row) - len(row))


# Masks and shards.

@given(st.lists(st.tuples(digits, st.lists(digits, min_size=1, max_size=5)), min_size=1))
@example([("100", ["50", "50"]), ("100", ["10", "70", "20"])])  # its zeros count, too
@example([("0", ["0", "0"])])
def test_the_mask_covers_the_completion_with_its_end_and_nothing_else(rows):
    texts = [text_of(*row) for row in rows]
    ids = data.pad([[*data.encode(text), data.END] for text in texts])
    for text, ids_row, mask in zip(texts, ids, data.completion_mask(ids)):
        assert mask.dtype == bool and mask.shape == ids_row.shape
        start, end = text.index("=") + 1, len(text)
        assert np.flatnonzero(mask).tolist() == list(range(start, end + 1))
        assert data.decode(ids_row[mask]) == text.split("=")[1]
        assert ids_row[mask][-1] == data.END


def without_padding(row):
    """A line as text, with its end token: short to look at when a test fails."""
    return "".join(data.VOCAB[token] for token in row if token != data.PAD)


def token_count(row):
    return int((row != data.PAD).sum())


@given(st.integers(1, 20), st.integers(1, 6), seeds)
def test_shards_hold_every_line_once_and_whole(n, size, seed):
    ids = random_batch(seed, n)
    shards = [shard for shard, in data.by_length(ids, size=size)]
    assert (sorted(without_padding(row) for shard in shards for row in shard)
            == sorted(without_padding(row) for row in ids))
    assert 1 <= len(shards) <= math.ceil(n / size)


@given(st.integers(50, 200), seeds)
def test_shards_hold_about_as_many_tokens_each(n, seed):
    """Up to one line, at the cut: otherwise one process would wait for another."""
    shards = [shard for shard, in data.by_length(random_batch(seed, n), size=n // 4)]
    assert len(shards) == math.ceil(n / (n // 4))
    tokens = [(shard != data.PAD).sum() for shard in shards]
    assert max(tokens) - min(tokens) <= 2 * max(shard.shape[1] for shard in shards)


@given(st.integers(1, 20), st.integers(1, 6), seeds)
def test_shards_are_of_like_length_longest_first_and_cut(n, size, seed):
    shards = [shard for shard, in data.by_length(random_batch(seed, n), size=size)]
    lengths = [token_count(row) for shard in shards for row in shard]
    assert lengths == sorted(lengths, reverse=True)
    for shard in shards:
        assert shard.shape[1] == max(map(token_count, shard))


@given(st.integers(1, 20), st.integers(1, 6), seeds)
def test_rows_of_several_arrays_stay_together(n, size, seed):
    """A pair is cut to the longer of its two lines, so neither loses a token."""
    both = random_batch(seed, 2 * n)
    a, b = both[:n], both[n:]
    pairs = [(without_padding(x), without_padding(y)) for x, y in zip(a, b)]
    shards = data.by_length(a, b, size=size)
    assert sorted((without_padding(x), without_padding(y))
                  for shard in shards for x, y in zip(*shard)) == sorted(pairs)
    assert all(x.shape == y.shape for x, y in shards)
    for x, y in shards:
        assert x.shape[1] == max(map(token_count, [*x, *y]))


@given(st.integers(10, 300), st.integers(5, 100))
def test_lines_of_one_length_are_cut_evenly(n, size):
    """As many shards as it takes for about `size` rows each, alike up to a row at either end."""
    rows = [len(shard) for shard, in data.by_length(np.ones((n, 3), int), size=size)]
    assert sum(rows) == n and len(rows) == math.ceil(n / size)
    assert max(rows) - min(rows) <= 2


@given(st.lists(st.integers(1, 3), min_size=1, max_size=200), st.integers(1, 300))
def test_lines_of_equal_length_keep_their_order(lengths, size):
    """Many lines, since NumPy's other ways to sort keep the order of a few, too."""
    ids = np.full((len(lengths), 3), data.PAD)
    for i, length in enumerate(lengths):
        ids[i, :length] = 100 + i  # tells the rows apart
    found = [row[0] - 100 for shard, in data.by_length(ids, size=size) for row in shard]
    assert found == sorted(range(len(lengths)), key=lambda i: -lengths[i])


def test_padding_that_a_model_wrote_itself_counts_as_written():
    """Else DPO could never reject an answer for it, and the model would learn to write it."""
    line = [*data.encode("7=3"), data.PAD, data.IDS["4"], data.END]
    ids = data.pad([line, data.prompt(100) + data.encode("50+50") + [data.END]])
    assert data.completion_mask(ids)[0].tolist() == [False] * 2 + [True] * 4 + [False] * 4
    assert data.lengths(ids).tolist() == [6, 10]


def test_an_answer_is_read_only_if_it_ends_once_and_last():
    right = [*data.encode("7=3+4"), data.END]
    assert data.read(right) == (7, [3, 4])
    for wrong in ([], right[:-1], right + [data.END], right + [data.PAD],
                  [*data.encode("7=3"), data.END, *right[3:]], [data.PAD, *right]):
        assert data.read(wrong) is None
