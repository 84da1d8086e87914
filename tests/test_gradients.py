"""The two checks that this project promises: the gradient of the DPO loss, and that of attention.

What is a gradient check? backward() computes derivatives from formulas that were worked out by
hand, and such a formula can be wrong. But a derivative can also be measured. Move one input x up
and down by a tiny step h, and see how much the result changes:

    df/dx  is about  (f(x + h) - f(x - h)) / 2h

`gradcheck` measures this for every element of every input, and returns the largest difference
between what it has measured and what backward() has computed. For a correct gradient that is about
1e-9, which is the rounding error of the measurement. With a wrong sign, a wrong factor or a
forgotten term it is many orders of magnitude larger. Hypothesis draws the shapes and the numbers,
so that a wrong formula cannot pass because one example happened to suit it.
"""

import numpy as np
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import dpo
import tinygrad_lite.functional as F
from helpers import TOLERANCE, normal, seeds
from tinygrad_lite import gradcheck

# Log-probabilities of whole answers for 1 to 5 pairs: four rows, one for each argument of dpo_loss.
four_rows_of_logps = st.integers(1, 5).flatmap(
    lambda n_pairs: hnp.arrays(np.float64, (4, n_pairs), elements=st.floats(-30, 0))
)


@given(logps=four_rows_of_logps, beta=st.floats(0.05, 2))
def test_dpo_loss_gradient(logps, beta):
    """For the policy's log-probabilities. The reference is frozen, so it needs no gradient."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = logps

    def loss(chosen, rejected):
        return dpo.dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)

    assert gradcheck(loss, policy_chosen, policy_rejected) < TOLERANCE


@given(
    n_lines=st.integers(1, 2),
    length=st.integers(1, 5),
    n_heads=st.integers(1, 2),
    head_size=st.sampled_from([2, 4]),
    spread=st.floats(0.1, 3),  # from nearly equal attention weights to almost a single key
    seed=seeds,
)
def test_attention_gradient(n_lines, length, n_heads, head_size, spread, seed):
    """For queries, keys and values, through the softmax, the causal mask and the rotation."""
    qkv = spread * normal(seed, 3 * n_heads * head_size, n_lines * length)

    def attention(qkv):
        return F.causal_attention(qkv, n_heads, batch=n_lines)

    assert gradcheck(attention, qkv) < TOLERANCE
