"""The task: lines such as `100=10+70+20`, as text and as token ids."""
import re

import numpy as np

CHARACTERS = "0123456789+="
END, PAD = len(CHARACTERS), len(CHARACTERS) + 1
VOCAB = [*CHARACTERS, "<end>", "<pad>"]  # id -> token
IDS = {character: i for i, character in enumerate(CHARACTERS)}
PLUS, EQUALS = IDS["+"], IDS["="]

TARGETS = range(5, 101)
MIN_TERMS, MAX_TERMS = 2, 5
MAX_LEN = 24  # tokens: the longest line and its end token take 19, the rest is room for mistakes
# A fixed fifth of the targets, scattered because 37 and 96 have no common divisor. Never trained on.
HELD_OUT = [target for target in TARGETS if 37 * target % len(TARGETS) < 20]
TRAINING = [target for target in TARGETS if target not in HELD_OUT]


def encode(text):
    """The ids of text's characters, without the end token. Raises ValueError for any other character."""
    unknown = set(text) - set(CHARACTERS)
    if unknown:
        raise ValueError(f"not in the vocabulary: {' '.join(sorted(map(repr, unknown)))}")
    return [IDS[character] for character in text]


def decode(ids):
    """The text of `ids`, without end and pad tokens."""
    return "".join(CHARACTERS[i] for i in ids if i not in (END, PAD))


def prompt(target):
    """`100=` as ids."""
    return encode(f"{target}=")


def parse(line):
    """(target, terms) of a line such as `100=10+70+20`, or None if it is anything else.

    Strict: one `=`, decimal numbers joined by single `+` signs, and no other character, space or sign.
    """
    match = re.fullmatch(r"([0-9]+)=([0-9]+(?:\+[0-9]+)*)", line)
    if not match or len(line) > 1000:  # int() refuses numbers of some thousand digits, and so do we
        return None
    target, completion = match.groups()
    return int(target), [int(term) for term in completion.split("+")]


def read(line):
    """`parse` of a whole answer in ids: None, too, if it does not end with its end token or holds padding."""
    return parse(decode(line)) if line[-1] == END and PAD not in line else None


def random_terms(targets, counts, rng):
    """Split each target into `count` terms of at least 1, uniformly among the ways: (N,), (N,) -> (N, 5) int.

    Rows are filled up with zeros. A way to split n into k ordered terms is a choice of k - 1 distinct cuts
    among 1 ... n - 1, so draw those: each draw is a rank among the cuts that are still free.
    """
    targets, counts = np.asarray(targets), np.asarray(counts)
    cuts = np.tile(targets[:, None], MAX_TERMS)  # (N, 5): a cut at the target itself adds a term of 0
    for i in range(MAX_TERMS - 1):
        free = np.maximum(targets - 1 - i, 1)
        cut = 1 + rng.integers(0, free)  # a rank: the cut-th free place
        for taken in np.sort(cuts[:, :i], axis=1).T:
            cut += cut >= taken
        cuts[:, i] = np.where(i < counts - 1, cut, targets)
    cuts.sort(axis=1)
    return np.diff(cuts, axis=1, prepend=0)


def random_lines(n, rng, targets=TRAINING):
    """n lines as ids (n, T), padded on the right: a uniform target, a uniform count of 2 to 5, a uniform split."""
    chosen = rng.choice(targets, n)
    counts = rng.integers(MIN_TERMS, MAX_TERMS + 1, n)
    return encode_lines(chosen, random_terms(chosen, counts, rng))


# The ids of every number from 0 to 100, right-aligned in three columns; -1 is a hole.
_NUMBERS = np.array([[-1] * (3 - len(str(n))) + encode(str(n)) for n in range(101)])


def encode_lines(targets, terms):
    """Targets (N,) and terms (N, 5), zeros where there is none, as lines of ids (N, T) with end token and padding."""
    targets, terms = np.asarray(targets), np.asarray(terms)
    n = len(targets)
    slots = np.full((n, 4 + 4 * terms.shape[1] + 1), -1)  # three digits and a sign for each number, then end
    slots[:, :3], slots[:, 3], slots[:, -1] = _NUMBERS[targets], EQUALS, END
    present = (terms > 0)[:, :, None]  # (N, 5, 1)
    body = slots[:, 4:-1].reshape(n, -1, 4)  # a copy: sign and digits of each term
    body[:, 1:, :1] = np.where(present[:, 1:], PLUS, -1)
    body[:, :, 1:] = np.where(present, _NUMBERS[terms], -1)
    slots[:, 4:-1] = body.reshape(n, -1)
    filled = slots >= 0
    rows, _ = np.nonzero(filled)
    ids = np.full((n, filled.sum(axis=1).max()), PAD)
    ids[rows, (filled.cumsum(axis=1) - 1)[filled]] = slots[filled]  # move left over the holes
    return ids


def pad(lines):
    """Lists of ids of unlike length as one array (N, T), padded on the right."""
    ids = np.full((len(lines), max(map(len, lines))), PAD)
    for row, line in zip(ids, lines):
        row[:len(line)] = line
    return ids


def completion_mask(ids):
    """True at the tokens that are the model's to write, all after `=` up to the end token: (N, T) -> (N, T) bool."""
    after_equals = np.cumsum(ids == EQUALS, axis=1) - (ids == EQUALS) > 0
    return after_equals & (ids != PAD)


def by_length(*arrays, size):
    """Cut arrays of lines, ids (N, T) each, into shards of `size` rows of like length, longest first.

    Row i of every array stays with row i of the others, and each shard is cut to its longest line: without
    this a third of all positions would be padding. Returns a list of tuples with one array for each given.
    """
    lengths = np.max([(ids != PAD).sum(axis=1) for ids in arrays], axis=0)  # (N,)
    order = np.argsort(-lengths, kind="stable")
    return [tuple(ids[rows, :lengths[rows[0]]] for ids in arrays)
            for rows in np.split(order, range(size, len(order), size))]
