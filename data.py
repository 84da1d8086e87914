"""The task: lines such as `100=10+70+20`, as text and as token ids, and the judge of answers."""

import itertools
import random
import re
from dataclasses import dataclass

import tinygrad_lite  # noqa: F401  before NumPy, see there
import numpy as np

VOCAB = [*"0123456789+=", "<end>", "<pad>"]  # id -> token
IDS = {token: i for i, token in enumerate(VOCAB)}  # token -> id
EQUALS, END, PAD = IDS["="], IDS["<end>"], IDS["<pad>"]

TARGETS = range(5, 101)
COUNTS = range(2, 6)  # the numbers of terms in SFT's lines
MAX_LEN = 24  # tokens: the longest right line and its end token take 19; the rest is for mistakes

# A fixed fifth of the targets, of every size, that no training ever asks for.
HELD_OUT = [8, 13, 16, 21, 26, 29, 34, 39, 42, 47, 52, 55, 60, 65, 73, 78, 86, 91, 96, 99]
TRAINING = [target for target in TARGETS if target not in HELD_OUT]

# What an answer can turn out to be. The judge accepts the first and rejects the other three.
ACCEPTED = "right, preferred"
NOT_PREFERRED = "right, not preferred"
WRONG_SUM = "wrong sum"
UNREADABLE = "does not parse"
OUTCOMES = [ACCEPTED, NOT_PREFERRED, WRONG_SUM, UNREADABLE]


@dataclass(frozen=True)
class Judgement:
    """What the judge says of an answer."""

    outcome: str  # one of OUTCOMES
    exact: bool = False  # the sum is the target
    preferred: bool = False  # the terms are as preferred
    target: int | None = None  # this and the rest are None for an answer that does not parse
    terms: list | None = None
    total: int | None = None  # the sum of the terms


def prefers(terms, prefer):
    """Whether an answer with these terms is preferred: by default, if there are `prefer` of them.

    To teach another preference, change the return line, for example to
    `terms[0] == max(terms)`: the first term is the largest. Then --prefer has no effect, and
    --pairs rule still goes by the number of terms.
    """
    return len(terms) == prefer


def judge(line, prefer=3):
    """The Judgement of an answer: the ids of prompt, completion and end token, without padding."""
    text = "".join(VOCAB[i] for i in line)  # an end or pad token in the middle does not parse
    if not text.endswith("<end>"):
        return Judgement(UNREADABLE)
    parsed = parse(text.removesuffix("<end>"))
    if parsed is None:
        return Judgement(UNREADABLE)
    target, terms = parsed
    exact = sum(terms) == target
    preferred = prefers(terms, prefer)
    if not exact:
        outcome = WRONG_SUM
    elif not preferred:
        outcome = NOT_PREFERRED
    else:
        outcome = ACCEPTED
    return Judgement(outcome, exact, preferred, target, terms, sum(terms))


def is_accepted(line, prefer=3):
    """Whether the judge accepts an answer: its sum is right and its terms are as preferred."""
    return judge(line, prefer).outcome == ACCEPTED


def parse(text):
    """(target, terms) of a line such as `100=10+70+20`; None for any other text.

    Terms have one or two digits without a leading zero, and are joined by single plus signs.
    """
    number = "[1-9][0-9]?"
    match = re.fullmatch(rf"([0-9]{{1,3}})=({number}(?:\+{number})*)", text)
    if match is None:
        return None
    return int(match[1]), [int(term) for term in match[2].split("+")]


def encode(text):
    """The ids of a text's characters, without an end token. ValueError for unknown characters."""
    try:
        return [IDS[character] for character in text]
    except KeyError as error:
        raise ValueError(f"{error} is not in the vocabulary") from None


def decode(ids):
    """The text of ids, leaving out end and pad tokens."""
    return "".join(VOCAB[i] for i in ids if i not in (END, PAD))


def line_of(target, terms):
    """The line of an answer, as ids with the end token: 10, [4, 6] -> those of 10=4+6<end>."""
    return encode(f"{target}={'+'.join(map(str, terms))}") + [END]


def pad(lines, length=None):
    """Lists of ids as one array (N, T), padded on the right: to `length`, or to the longest."""
    if length is None:
        length = max(len(line) for line in lines)
    ids = np.full((len(lines), length), PAD)
    for row, line in zip(ids, lines):
        row[: len(line)] = line
    return ids


# What the random numbers of a seed are used for; each use has a stream of its own. (A further one
# is for the initial weights: Transformer uses the seed alone.)
STREAMS = ["SFT lines", "DPO pairs", "held-out pairs", "answers", "excess"]


def random_stream(seed, use, rank=0):
    """A NumPy Generator for one of STREAMS; each process has its own."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS.index(use), rank)))


def python_random(rng):
    """A random.Random seeded by a NumPy Generator: several times faster for single numbers."""
    return random.Random(int(rng.integers(2**63)))


def random_line(target, count, rng):
    """`target` split into `count` terms, every way equally likely: ids with their end token.

    rng: a random.Random.
    """
    # To split n into k ordered terms is to choose k - 1 different places to cut among 1 ... n - 1.
    cuts = [0, *sorted(rng.sample(range(1, target), count - 1)), target]
    return line_of(target, [end - start for start, end in itertools.pairwise(cuts)])


def random_lines(n, rng, targets=TRAINING):
    """n lines for SFT, ids (n, T): target, number of terms and split are uniformly random.

    rng: a NumPy Generator.
    """
    rng = python_random(rng)
    chosen = zip(rng.choices(targets, k=n), rng.choices(COUNTS, k=n))
    return pad([random_line(target, count, rng) for target, count in chosen])


def lengths(ids):
    """The number of tokens of each line, without trailing padding: (..., T) -> (...).

    A pad token before the last other token, which only a model can have written, counts.
    """
    positions = np.arange(1, ids.shape[-1] + 1)  # (T,)
    return (positions * (ids != PAD)).max(axis=-1)


def completion_mask(ids):
    """True at the tokens the model has to produce, after `=` up to the end token: (N, T) bool."""
    is_equals = ids == EQUALS
    after_equals = (np.cumsum(is_equals, axis=1) - is_equals) > 0
    positions = np.arange(ids.shape[1])
    return after_equals & (positions < lengths(ids)[:, None])


def by_length(ids, n_parts):
    """Lines (N, T) in n_parts with about as many tokens each, so that no process has to wait.

    They are sorted by length, and each part is without the padding that all its lines share, which
    saves a fifth of a training step. Empty parts are left out.
    """
    order = np.argsort(-lengths(ids), kind="stable")
    tokens = np.cumsum(lengths(ids)[order])
    cuts = np.searchsorted(tokens, tokens[-1] * np.arange(1, n_parts) / n_parts)
    parts = np.split(ids[order], cuts)
    return [part[:, : lengths(part).max()] for part in parts if len(part)]
