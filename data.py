"""The task: lines such as `100=10+70+20`, as text and as token ids."""
import re

import numpy as np

CHARACTERS = "0123456789+="
END, PAD = len(CHARACTERS), len(CHARACTERS) + 1
VOCAB = [*CHARACTERS, "<end>", "<pad>"]  # id -> token
IDS = {character: i for i, character in enumerate(CHARACTERS)}
PLUS, EQUALS = IDS["+"], IDS["="]

TARGETS = range(5, 101)
COUNTS = range(2, 6)  # of terms
MAX_TERMS = COUNTS[-1]
MAX_LEN = 24  # tokens: the longest line and its end token take 19, the rest is room for mistakes
# A fixed fifth of the targets, never trained on; scattered, as 37 and 96 have no common divisor.
HELD_OUT = [target for target in TARGETS if 37 * target % len(TARGETS) < 20]
TRAINING = [target for target in TARGETS if target not in HELD_OUT]


# Text and ids.

def encode(text):
    """The ids of text's characters, without an end token. Raises ValueError for any other."""
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

    Strict: one `=`, decimal numbers joined by single `+` signs, no other character, space or sign.
    """
    match = re.fullmatch(r"([0-9]+)=([0-9]+(?:\+[0-9]+)*)", line)
    if not match or len(line) > 1000:  # int() refuses numbers of thousands of digits; so do we
        return None
    target, completion = match.groups()
    return int(target), [int(term) for term in completion.split("+")]


def read(ids):
    """`parse` of an answer, as ids: also None unless its one end token comes last."""
    whole = END in ids and ids.index(END) == len(ids) - 1 and PAD not in ids
    return parse(decode(ids)) if whole else None


def prefers(terms, prefer):
    """The preference that DPO teaches and `preferred` counts: a list of exactly `prefer` terms.

    To teach another one, change this function: terms in rising order would be
    `len(terms) > 1 and terms == sorted(set(terms))`.
    """
    return len(terms) == prefer


# Lines made by rule.

def random_terms(targets, counts, rng):
    """Split targets (N,) into counts (N,) terms of at least 1, uniformly among the ways: (N, 5).

    Rows are filled up with zeros. A way to split n into k ordered terms is a choice of k - 1
    distinct cuts among 1 ... n - 1. So draw those, each as a rank among the cuts still free.
    """
    targets, counts = np.asarray(targets), np.asarray(counts)
    cuts = np.tile(targets[:, None], MAX_TERMS)  # (N, 5): a cut at the target adds a term of 0
    for i in range(MAX_TERMS - 1):
        cut = 1 + rng.integers(0, np.maximum(targets - 1 - i, 1))
        for taken in np.sort(cuts[:, :i], axis=1).T:
            cut += cut >= taken
        cuts[:, i] = np.where(i < counts - 1, cut, targets)
    cuts.sort(axis=1)
    return np.diff(cuts, axis=1, prepend=0)


def random_lines(n, rng, targets=TRAINING):
    """n lines as ids (n, T), padded on the right: target, count 2 to 5 and split all uniform."""
    chosen = rng.choice(targets, n)
    counts = rng.integers(COUNTS.start, COUNTS.stop, n)
    return encode_lines(chosen, random_terms(chosen, counts, rng))


# The ids of every number from 0 to 100, right-aligned in three columns; -1 is a hole.
_NUMBERS = np.array([[-1] * (3 - len(str(n))) + encode(str(n)) for n in range(101)])


def encode_lines(targets, terms):
    """Targets (N,) and terms (N, 5), 0 where there is none, as lines of ids (N, T) with their end.

    Whole columns at once: line by line in Python this would cost as much as the training step.
    """
    targets, terms = np.asarray(targets), np.asarray(terms)
    present = (terms > 0)[:, :, None]  # (N, 5, 1)
    signs = np.where(present, PLUS, -1)
    signs[:, 0] = EQUALS
    body = np.concatenate([signs, np.where(present, _NUMBERS[terms], -1)], axis=2)  # (N, 5, 4)
    slots = np.concatenate([_NUMBERS[targets], body.reshape(len(terms), -1),
                            np.full((len(terms), 1), END)], axis=1)  # (N, 24), with holes
    filled = slots >= 0
    ids = np.full((len(terms), filled.sum(axis=1).max()), PAD)
    ids[np.nonzero(filled)[0], filled.cumsum(axis=1)[filled] - 1] = slots[filled]  # close the holes
    return ids


# Batches.

def pad(lines):
    """Lists of ids of unlike length as one array (N, T), padded on the right."""
    ids = np.full((len(lines), max(map(len, lines))), PAD)
    for row, line in zip(ids, lines):
        row[:len(line)] = line
    return ids


def completion_mask(ids):
    """True at the tokens that are the model's to write, from after `=` to the end: (N, T) bool."""
    after_equals = np.cumsum(ids == EQUALS, axis=1) - (ids == EQUALS) > 0
    return after_equals & (np.arange(ids.shape[1]) < lengths(ids)[:, None])


def lengths(ids):
    """Tokens of each line up to its last that is not padding; a pad token before that, which only
    a model can have written, counts."""
    return ids.shape[1] - (ids != PAD)[:, ::-1].argmax(axis=1)


def by_length(*arrays, size):
    """Cut arrays of lines, ids (N, T) each, into shards of about `size` rows of like length.

    Row i of every array stays with row i of the others. The longest lines come first, and each
    shard is cut to its longest: otherwise a third of all positions would be padding. Shards of long
    lines get fewer rows, so that all have about as many tokens and no process waits for another.
    Returns a list of tuples with one array for each given.
    """
    longest = np.max([lengths(ids) for ids in arrays], axis=0)  # (N,)
    order = np.argsort(-longest, kind="stable")
    n_shards = -(-len(order) // size)
    tokens = np.cumsum(longest[order])
    starts = np.searchsorted(tokens, tokens[-1] * np.arange(1, n_shards) / n_shards)
    return [tuple(ids[rows, :longest[rows[0]]] for ids in arrays)
            for rows in np.split(order, starts) if len(rows)]
