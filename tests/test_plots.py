"""The pictures show the numbers they are given."""
import numpy as np
import pytest

import plots
from benchmarks import experiments

ROWS = [{"checkpoint": name, "mode": "sampled", "targets": "held-out", "n": 200, "format": 1.0,
         "mean_abs_error": error, "exact": 0.5, "preferred": 0.25,
         "counts": {"2": 20, "3": 50, "4": 100, "5": 30}}
        for name, error in (("SFT", 1.234), ("DPO", None))]
HISTORY = [{"round": 0, "pairs": 0, "masses": dict.fromkeys(plots.KINDS, 0.25)}] + [
    {"round": i, "pairs": 4 - i, "loss": 0.7 - i / 10, "rewards/chosen": i, "rewards/rejected": -i,
     "rewards/margins": 2 * i, "rewards/accuracies": 0.5, "logps/chosen": -8 + i,
     "logps/rejected": -9 - i, "masses": dict.fromkeys(plots.KINDS, 0.25)} for i in (1, 2, 3)]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the picture drawn last; nothing is written."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return lambda: figures[-1].axes


def test_the_distribution_in_percent_of_all_answers(drawn):
    plots.distribution(ROWS, None)
    for ax, row in zip(drawn(), ROWS, strict=True):
        assert [bar.get_height() for bar in ax.patches] == [10, 25, 50, 15]
        assert [bar.get_facecolor() == ax.patches[1].get_facecolor() for bar in ax.patches] == [
            False, True, False, False]
        assert row["checkpoint"] in ax.get_title() and "exact 50.0 %" in ax.get_title()
    assert "error 1.23," in drawn()[0].get_title() and "error -," in drawn()[1].get_title()


@pytest.mark.parametrize("steps", [1, 7, 200, 1000])
def test_the_sft_loss_in_means_over_a_two_hundredth(drawn, steps):
    losses = list(np.linspace(3, 1, steps))
    plots.sft_loss(losses, None)
    (line,) = drawn()[0].lines
    assert len(line.get_ydata()) == min(steps, 200)
    assert np.isclose(np.mean(line.get_ydata()), np.mean(losses))


def test_the_training_curves_leave_out_rounds_without_pairs(drawn):
    plots.dpo_training(HISTORY, None)
    by_title = {ax.get_title(): ax for ax in drawn()}
    (loss,) = by_title["loss"].lines
    assert list(loss.get_xdata()) == [1, 2, 3] and np.allclose(loss.get_ydata(), [0.6, 0.5, 0.4])
    labels = {line.get_label(): list(line.get_ydata()) for line in by_title["rewards"].lines}
    assert labels["rewards/chosen"] == [1, 2, 3] and labels["rewards/rejected"] == [-1, -2, -3]
    assert len(by_title["answers to held-out targets"].collections) == 4


def test_the_lesson_sets_two_runs_side_by_side(drawn):
    experiments.draw_lesson({"rule pairs": HISTORY, "sampled pairs": HISTORY[:3]}, None)
    assert [ax.get_title() for ax in drawn()[:2]] == ["rule pairs", "sampled pairs"]
    chosen, rejected = drawn()[2].lines
    assert list(chosen.get_ydata()) == [-7, -6, -5]
    assert list(rejected.get_ydata()) == [-10, -11, -12]
    assert len(drawn()[3].lines[0].get_xdata()) == 2


def test_an_error_of_any_size_is_short():
    assert [plots.shortened(error) for error in (None, 0.0, 1.234, 999.99, 123456.0)] == [
        "-", "0.00", "1.23", "999.99", "1e+05"]
    assert plots.shortened(1.234, 0) == "1"


def test_credit_writes_every_token_with_its_value(drawn):
    plots.credit([("10=4+6", [("4", 0.5), ("+", -2.0)]), ("10=9", [("9", 1.0)])], 0.8, None)
    first, second, bar = drawn()
    assert [text.get_text() for text in first.texts] == ["4\n+0.5", "+\n-2.0"]
    assert "10=4+6   reward -1.5" in first.get_title(loc="left")
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-2, 2)
    assert bar.get_ylabel() == "0.8 (log pi - log pi_ref)"


def test_the_beta_sweep_by_divergence(drawn):
    points = [{"beta": 0.8, "divergence": 3.0, "preferred": 0.9, "exact": 0.95},
              {"beta": 3.0, "divergence": 1.0, "preferred": 0.6, "exact": 0.9}]
    experiments.draw_sweep(points, None)
    preferred, exact = drawn()[0].lines
    assert list(preferred.get_xdata()) == [1, 3] and list(preferred.get_ydata()) == [0.6, 0.9]
    assert list(exact.get_ydata()) == [0.9, 0.95]
    assert [text.get_text() for text in drawn()[0].texts] == ["3", "0.8"]
