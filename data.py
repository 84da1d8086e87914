"""The task: lines such as `100=10+70+20`, as text and as token ids, and what an answer is worth."""
import itertools
import random
import re
from collections import namedtuple

import numpy as np

VOCAB = [*"0123456789+=", "<end>", "<pad>"]  # id -> token
IDS = {token: i for i, token in enumerate(VOCAB)}
EQUALS, END, PAD = IDS["="], IDS["<end>"], IDS["<pad>"]

TARGETS = range(5, 101)
COUNTS = range(2, 6)  # of terms
MAX_LEN = 24  # tokens: the longest line and its end token take 19, the rest is room for mistakes
# A fixed fifth of the targets, never trained on; scattered, as 37 and 96 have no common divisor.
HELD_OUT = [target for target in TARGETS if 37 * target % len(TARGETS) < 20]
TRAINING = [target for target in TARGETS if target not in HELD_OUT]

OUTCOMES = ["right, preferred", "right, not preferred", "wrong sum", "does not parse"]
# What an answer is worth; `terms` and `total`, their sum, are None where it does not parse.
Judgement = namedtuple("Judgement", "target terms total exact preferred outcome")


def encode(text):
    """The ids of text's characters, without an end token. Raises ValueError for any other."""
    try:
        return [IDS[character] for character in text]
    except KeyError as error:
        raise ValueError(f"{error} is not in the vocabulary") from None


def decode(ids):
    """The text of `ids`, without end and pad tokens."""
    return "".join(VOCAB[i] for i in ids if i not in (END, PAD))


def pad(lines, length=None):
    """Lists of ids as one array (N, T), padded on the right, to the longest or to `length`."""
    ids = np.full((len(lines), length or max(map(len, lines))), PAD)
    for row, line in zip(ids, lines):
        row[:len(line)] = line
    return ids


def prefers(terms, prefer):
    """The preference that DPO teaches and `preferred` counts: as it stands, exactly `prefer` terms.
    To teach another one, change the return line: `terms[0] == max(terms)`, say, for "the first term
    is the largest". --prefer then does nothing, and --pairs rule still goes by number of terms."""
    return len(terms) == prefer


def judge(line, prefer=3):
    """The Judgement of an answer, a line as ids: prompt, completion and end token."""
    text = "".join(VOCAB[i] for i in line)  # an end or pad token within it does not parse
    if not text.endswith("<end>") or not (parsed := parse(text.removesuffix("<end>"))):
        return Judgement(None, None, None, False, False, OUTCOMES[3])
    target, terms = parsed
    exact, preferred = sum(terms) == target, prefers(terms, prefer)
    outcome = OUTCOMES[2] if not exact else OUTCOMES[0] if preferred else OUTCOMES[1]
    return Judgement(target, terms, sum(terms), exact, preferred, outcome)


def parse(text):
    """(target, terms) of a line such as `100=10+70+20`, or None if it is anything else: one `=`,
    terms of one or two digits without a leading zero, joined by single `+` signs."""
    match = re.fullmatch(r"([0-9]{1,3})=([1-9][0-9]?(?:\+[1-9][0-9]?)*)", text)
    return match and (int(match[1]), [int(term) for term in match[2].split("+")])


def random_line(target, count, rng):
    """A line as ids: `target` split into `count` terms, every way as likely as any other. `rng` is
    a random.Random: for single numbers NumPy's Generator is several times slower."""
    # A way to split n into k ordered terms is a choice of k - 1 distinct cuts among 1 ... n - 1.
    cuts = [0, *sorted(rng.sample(range(1, target), count - 1)), target]
    terms = [str(end - start) for start, end in itertools.pairwise(cuts)]
    return encode(f"{target}={'+'.join(terms)}") + [END]


def random_lines(n, rng, targets=TRAINING):
    """n lines as ids (n, T): target, count and split all uniform. `rng` is a NumPy Generator."""
    rng = random.Random(int(rng.integers(2 ** 63)))
    return pad([random_line(target, count, rng) for target, count in
                zip(rng.choices(targets, k=n), rng.choices(COUNTS, k=n))])


def lengths(ids):
    """Tokens of each line (..., T) up to its last that is not padding -> (...). A pad token before
    that, which only a model can have written, counts."""
    return ids.shape[-1] - (ids != PAD)[..., ::-1].argmax(axis=-1)


def completion_mask(ids):
    """True at the tokens that are the model's to write, from after `=` to the end: (N, T) bool."""
    after_equals = np.cumsum(ids == EQUALS, axis=1) - (ids == EQUALS) > 0
    return after_equals & (np.arange(ids.shape[1]) < lengths(ids)[:, None])


def by_length(ids, size):
    """Cut lines (N, T), or pairs of lines (N, 2, T), into shards of about `size` rows. Rows of like
    length come together, the longest first, without the padding that all share, else a third of all
    positions. Shards have about as many tokens each, so that no process waits for another."""
    longest = lengths(ids).max(axis=tuple(range(1, ids.ndim - 1)))  # (N,)
    order = np.argsort(-longest, kind="stable")
    n_shards = -(-len(ids) // size)
    tokens = np.cumsum(longest[order])
    starts = np.searchsorted(tokens, tokens[-1:] * np.arange(1, n_shards) / n_shards)
    return [ids[rows][..., :longest[rows[0]]] for rows in np.split(order, starts) if len(rows)]
