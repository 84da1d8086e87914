"""The DPO objective and its pairs: each test a line of mathematics (Rafailov et al. 2023)."""
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

import cli
import data
import dpo
import tinygrad_lite.functional as F
from sft import completion_logps
from tinygrad_lite import Tensor, gradcheck
from transformer import Config, Transformer

logp = st.floats(-50, 0, width=32)
pairs = st.lists(st.tuples(*[logp] * 4), min_size=1, max_size=6)
betas = st.floats(0.05, 3)


def columns(rows):
    """Four float64 arrays (pairs,): policy chosen and rejected, reference chosen and rejected."""
    return list(np.array(rows, dtype=np.float64).T)


def loss_and_slopes(arrays, beta):
    chosen, rejected = (Tensor(a.copy(), requires_grad=True) for a in arrays[:2])
    loss = dpo.dpo_loss(chosen, rejected, *arrays[2:], beta)
    loss.backward()
    return loss.item(), chosen.grad, rejected.grad


def margin(arrays):
    return (arrays[0] - arrays[1]) - (arrays[2] - arrays[3])


@given(pairs, betas)
def test_policy_equal_to_reference_gives_ln_2_and_slopes_of_half_beta(rows, beta):
    chosen, rejected, *_ = columns(rows)
    loss, d_chosen, d_rejected = loss_and_slopes([chosen, rejected, chosen, rejected], beta)
    assert loss == pytest.approx(math.log(2))
    np.testing.assert_allclose(d_chosen, -beta / 2 / len(rows))
    np.testing.assert_allclose(d_rejected, beta / 2 / len(rows))


@given(pairs, betas)
def test_loss_and_slopes_are_those_of_the_paper(rows, beta):
    arrays = columns(rows)
    h = margin(arrays)
    loss, d_chosen, d_rejected = loss_and_slopes(arrays, beta)
    assert loss == pytest.approx(np.mean(np.logaddexp(0, -beta * h)))  # log(1 + e^(-beta h))
    slope = -beta * np.exp(-np.logaddexp(0, beta * h)) / len(rows)
    np.testing.assert_allclose(d_chosen, slope, atol=1e-15)
    np.testing.assert_array_equal(d_chosen, -d_rejected)


@given(st.tuples(*[logp] * 4), betas)
def test_swapping_chosen_and_rejected_changes_the_loss_by_beta_h(row, beta):
    c, r, ref_c, ref_r = columns([row])
    forward, backward = (dpo.dpo_loss(Tensor(a), Tensor(b), x, y, beta).item()
                         for a, b, x, y in [(c, r, ref_c, ref_r), (r, c, ref_r, ref_c)])
    assert forward - backward == pytest.approx(-beta * margin([c, r, ref_c, ref_r])[0], abs=1e-9)


@given(pairs, betas, st.floats(-20, 20), st.floats(-20, 20))
def test_constants_added_to_both_policy_or_both_reference_terms_change_nothing(rows, beta, a, b):
    c, r, ref_c, ref_r = columns(rows)
    plain = loss_and_slopes([c, r, ref_c, ref_r], beta)
    moved = loss_and_slopes([c + a, r + a, ref_c + b, ref_r + b], beta)
    for before, after in zip(plain, moved):
        np.testing.assert_allclose(before, after, rtol=1e-9, atol=1e-12)


@given(pairs, betas)
def test_beta_only_scales_the_margin(rows, beta):
    arrays = columns(rows)
    scaled = [beta * a for a in arrays]
    assert loss_and_slopes(arrays, beta)[0] == pytest.approx(loss_and_slopes(scaled, 1.0)[0])


@given(pairs, betas)
def test_equal_chosen_and_rejected_cancel(rows, beta):
    logps, _, reference, _ = columns(rows)
    shared = Tensor(logps, requires_grad=True)
    dpo.dpo_loss(shared, shared, reference, reference, beta).backward()
    np.testing.assert_array_equal(shared.grad, 0)


@pytest.mark.parametrize("h", [1e4, -1e4, 3e38, -3e38])
def test_extreme_margins_stay_finite_in_float32(h):
    chosen, zero = Tensor(np.array([h], np.float32), requires_grad=True), np.zeros(1, np.float32)
    loss = dpo.dpo_loss(chosen, Tensor(zero), zero, zero, 1.0)
    loss.backward()
    assert loss.dtype == np.float32
    assert loss.item() == pytest.approx(max(-h, 0))
    np.testing.assert_allclose(chosen.grad, -1.0 if h < 0 else 0.0)


@given(st.integers(1, 4), betas, st.integers(0, 2 ** 32 - 1))
def test_finite_differences_of_the_loss(n, beta, seed):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(2, n))
    policy = rng.normal(size=(2, n))
    assert gradcheck(lambda c, r: dpo.dpo_loss(c, r, *reference, beta), *policy) < 1e-7


# Through the model.

def double_model(seed=0):
    model = Transformer(Config(len(data.VOCAB), 8, 2, 2, 12), seed)
    for p in model.parameters():
        p.data = p.data.astype(np.float64)
    return model


def model_loss(model, reference, chosen, rejected, beta=0.8):
    return dpo.dpo_loss(*dpo.pair_logps(model, chosen, rejected),
                        *[t.detach() for t in dpo.pair_logps(reference, chosen, rejected)], beta)


def grads_of(model, loss):
    for p in model.parameters():
        p.grad = None
    loss.backward()
    return [p.grad for p in model.parameters()]


def lines(*texts):
    return data.pad([data.encode(text) + [data.END] for text in texts])


BOTH = lines("12=3+4+5", "100=10+70+20", "12=6+6", "100=99+2+1+1")
CHOSEN, REJECTED = BOTH[:2], BOTH[2:]


def test_finite_differences_through_the_whole_model():
    model, reference = double_model(0), double_model(1)
    grads = grads_of(model, model_loss(model, reference, CHOSEN, REJECTED))
    rng = np.random.default_rng(0)
    for p, grad in zip(model.parameters(), grads):
        for flat in rng.choice(p.size, min(4, p.size), replace=False):
            index, before = np.unravel_index(flat, p.shape), p.data.flat[flat]
            values = []
            for step in (1e-6, -1e-6):
                p.data[index] = before + step
                values.append(model_loss(model, reference, CHOSEN, REJECTED).item())
            p.data[index] = before
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(grad[index], abs=1e-8, rel=1e-5)


def test_prompt_and_padding_positions_get_exactly_no_gradient():
    ids = np.pad(BOTH, ((0, 0), (0, 4)), constant_values=data.PAD)
    shape = 4, ids.shape[1] - 1, len(data.VOCAB)
    logits = Tensor(np.random.default_rng(0).normal(size=shape), requires_grad=True)
    logps = completion_logps(lambda _: logits, ids)
    dpo.dpo_loss(logps[:2], logps[2:], np.zeros(2), np.zeros(2), 0.8).backward()
    for line, grad in zip(ids, logits.grad):
        text = data.decode(line)
        first, last = text.index("="), len(text)  # these predict the first digit, the end token
        assert (np.abs(grad[first:last]).sum(axis=-1) > 0).all()
        assert not grad[:first].any() and not grad[last:].any()


def test_shared_prefix_cancels_from_loss_and_gradient():
    model, reference = double_model(0), double_model(1)
    both = lines("52=10+20+22", "52=10+20+1+21")
    chosen, rejected = both[:1], both[1:]
    shared = len("52=10+20+")

    def suffix_logps(m, ids):
        token_logps = F.token_log_probs(m(ids[:, :-1]), ids[:, 1:])
        mask = data.completion_mask(ids)
        mask[:, :shared] = False
        return (token_logps * mask[:, 1:]).sum(axis=1)

    whole = model_loss(model, reference, chosen, rejected)
    short = dpo.dpo_loss(*[suffix_logps(model, ids) for ids in (chosen, rejected)],
                         *[suffix_logps(reference, ids).detach() for ids in (chosen, rejected)],
                         0.8)
    assert whole.item() == pytest.approx(short.item())
    for a, b in zip(grads_of(model, whole), grads_of(model, short)):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_padding_order_and_number_of_forwards_change_nothing():
    model, reference = double_model(0), double_model(1)
    expected = model_loss(model, reference, CHOSEN, REJECTED)
    padded = [np.pad(ids, ((0, 0), (0, 4)), constant_values=data.PAD) for ids in (CHOSEN, REJECTED)]
    both = CHOSEN, REJECTED
    apart = dpo.dpo_loss(*[completion_logps(model, ids) for ids in both],
                         *[completion_logps(reference, ids).detach() for ids in both], 0.8)
    variants = [model_loss(model, reference, *padded), apart,
                model_loss(model, reference, CHOSEN[::-1], REJECTED[::-1])]
    expected_grads = grads_of(model, expected)
    for variant in variants:
        assert variant.item() == pytest.approx(expected.item(), abs=1e-12)
        for a, b in zip(grads_of(model, variant), expected_grads):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_small_step_raises_the_margin_of_its_pair_and_leaves_the_reference_alone():
    model, reference = (Transformer(Config(len(data.VOCAB), 8, 2, 2, 12)) for _ in range(2))
    before = [p.data.tobytes() for p in reference.parameters()]
    rows = list(dpo.train(model, reference, lambda: (CHOSEN, REJECTED), 3, 0.8, 1e-3, map))
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[2]["rewards/margins"] > rows[1]["rewards/margins"] > rows[0]["rewards/margins"]
    assert [p.data.tobytes() for p in reference.parameters()] == before


def test_shards_give_the_loss_of_the_whole_batch():
    rng = np.random.default_rng(0)
    chosen, rejected = dpo.rule_pairs(70, 3, rng)
    model, reference = (Transformer(Config(len(data.VOCAB), 8, 1, 2, 12), seed) for seed in (0, 1))
    expected = model_loss(model, reference, chosen, rejected).item()
    (row,) = dpo.train(model, reference, lambda: (chosen, rejected), 1, 0.8, 1e-3, map)
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert row["pairs"] == 70


def test_logged_names_mean_what_the_field_means():
    reference = np.array([-2.0, -2])
    row = dpo.rewards(np.array([-1.0, -2]), np.array([-3.0, -1]), reference, reference, 0.5)
    assert row == {"rewards/chosen": 0.25, "rewards/rejected": 0.0, "rewards/margins": 0.25,
                   "rewards/accuracies": 0.5, "logps/chosen": -1.5, "logps/rejected": -2.0}


@given(pairs, betas)
def test_margins_and_accuracies_are_those_of_the_rewards(rows, beta):
    """margin = reward of chosen - reward of rejected = beta h; a tie is no success."""
    arrays = columns(rows)
    log = dpo.rewards(*arrays, beta)
    chosen, rejected = beta * (arrays[0] - arrays[2]), beta * (arrays[1] - arrays[3])
    assert log["rewards/margins"] == pytest.approx(np.mean(beta * margin(arrays)), abs=1e-9)
    assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"],
                                                   abs=1e-9)
    assert log["rewards/accuracies"] == sum(map(float.__gt__, chosen, rejected)) / len(rows)
    tied = dpo.rewards(arrays[0], arrays[0], arrays[2], arrays[2], beta)
    assert tied["rewards/accuracies"] == tied["rewards/margins"] == 0


# Pairs.

def read(line):
    return data.parse(data.decode(line))


@given(st.integers(1, 30), st.integers(2, 5), st.integers(0, 2 ** 32 - 1))
def test_rule_pairs_are_right_sums_that_differ_in_their_count(n, prefer, seed):
    chosen, rejected = dpo.rule_pairs(n, prefer, np.random.default_rng(seed))
    assert len(chosen) == len(rejected) == n
    for c, r in zip(map(read, chosen), map(read, rejected)):
        assert sum(c[1]) == c[0] == r[0] == sum(r[1])
        assert c[0] not in data.HELD_OUT
        assert len(c[1]) == prefer != len(r[1]) and 2 <= len(r[1]) <= 5


@pytest.mark.parametrize("prefer", [2, 3, 4, 5])
def test_every_other_count_is_rejected_now_and_then(prefer):
    _, rejected = dpo.rule_pairs(200, prefer, np.random.default_rng(0))
    assert {len(read(line)[1]) for line in rejected} == {2, 3, 4, 5} - {prefer}


class Scripted:
    """Stands in for a model: its answers go round a fixed list, each made from the target."""

    def __init__(self, *answers):
        self.answers = itertools.cycle(answers)

    def generate(self, prompts, max_new_tokens, temperature, rng):
        targets = [int(data.decode(prompt)[:-1]) for prompt in prompts]
        return [data.encode(next(self.answers)(t)) + [data.END] for t in targets]


RIGHT, OTHER, WRONG, BROKEN = (lambda t: f"1+1+{t - 2}", lambda t: f"1+{t - 1}",
                               lambda t: f"1+1+{t}", lambda t: "1++1=")


@given(st.integers(1, 8), st.integers(2, 8), st.sampled_from([2, 3]), st.integers(0, 2 ** 32 - 1))
def test_sampled_pairs_are_one_targets_preferred_and_other_answers(prompts, answers, prefer, seed):
    model = Scripted(RIGHT, OTHER, WRONG, BROKEN, RIGHT)
    chosen, rejected = dpo.sampled_pairs(model, prompts, answers, prefer,
                                         np.random.default_rng(seed), map)
    for c, r in zip(chosen, rejected):
        target, terms = read(c)
        assert sum(terms) == target and len(terms) == prefer
        assert target not in data.HELD_OUT
        parsed = read(r)
        assert parsed is None or sum(parsed[1]) != target or len(parsed[1]) != prefer
        assert data.decode(r).split("=")[0] == str(target)


def test_an_earlier_right_answer_stands_in_for_a_target_that_is_lost():
    """One pair for each prompt; one of the targets has never been answered well, and gets none."""
    def ask(model, earlier):
        return dpo.sampled_pairs(model, 40, 3, 3, np.random.default_rng(0), map, earlier)
    earlier = {}
    assert ask(Scripted(WRONG), earlier) is None and not any(earlier.values())
    chosen, _ = ask(Scripted(RIGHT, RIGHT, BROKEN), earlier)
    targets = [read(line)[0] for line in chosen]
    assert {target: list(map(data.decode, lines)) for target, lines in earlier.items()} == {
        target: [f"{target}={RIGHT(target)}"] for target in targets}
    del earlier[targets[0]]
    kept = [target for target in targets if target != targets[0]]
    chosen, rejected = ask(Scripted(WRONG, BROKEN), earlier)
    assert [data.decode(line) for line in chosen] == [f"{t}={RIGHT(t)}" for t in kept]
    assert [data.decode(line).split("=")[0] for line in rejected] == list(map(str, kept))
    assert ask(Scripted(OTHER, RIGHT), earlier) is not None
    assert data.decode(earlier[targets[0]][0]) == f"{targets[0]}={RIGHT(targets[0])}"


def test_pairs_are_sampled_at_temperature_1_on_the_pool_that_is_given(monkeypatch):
    """The probabilities that the loss compares are those of temperature 1."""
    asked, drawn = [], []

    def sample(model, targets, temperature, rng, map_fn):
        asked.append((len(targets), temperature, map_fn))
        drawn.append(rng.random())
        return [data.prompt(t) + data.encode(RIGHT(t)) + [data.END] for t in targets]
    monkeypatch.setattr(dpo.evaluation, "sample", sample)
    pool = object()
    dpo.sampled_pairs(None, 3, 4, 3, np.random.default_rng(0), pool)
    dpo.masses(None, 3, pool)
    dpo.masses(None, 3, pool)
    assert asked == [(12, 1.0, pool), *2 * [(20 * len(data.HELD_OUT), 1.0, pool)]]
    assert drawn[1] == drawn[2]  # only the model changes from one measurement to the next


def test_masses_are_the_shares_of_the_four_kinds_of_answers():
    scripted = Scripted(RIGHT, OTHER, WRONG, BROKEN, OTHER)
    shares = dpo.masses(scripted, 3, answers=5)
    assert shares == {"right, preferred": 0.2, "right, other": 0.4, "wrong sum": 0.2,
                      "does not parse": 0.2}
    shares = dpo.masses(scripted, 2, answers=5)
    assert (shares["right, preferred"], shares["right, other"]) == (0.4, 0.2)


def test_no_pair_is_none_and_a_run_without_pairs_stops_with_one_line():
    assert dpo.sampled_pairs(Scripted(OTHER, WRONG), 4, 4, 3, np.random.default_rng(0), map) is None
    assert dpo.sampled_pairs(Scripted(RIGHT), 4, 4, 3, np.random.default_rng(0), map) is None
    model = Transformer(Config(len(data.VOCAB), 8, 1, 2, 12))
    run = dpo.train(model, model, lambda: None, 50, 0.8, 1e-3, map)
    assert next(run) == {"round": 1, "pairs": 0}
    with pytest.raises(cli.UserError, match="no target had both"):
        list(run)


def test_an_infinite_loss_stops_the_run():
    model = Transformer(Config(len(data.VOCAB), 8, 1, 2, 12))
    model.named_parameters()["head"].data[:] = np.nan
    with pytest.raises(cli.UserError, match="loss became nan in round 1"):
        list(dpo.train(model, model, lambda: (CHOSEN, REJECTED), 3, 0.8, 1e-3, map))
