"""The pictures show the numbers they are given, and nothing hides them."""

import contextlib
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import data
import plots

ROWS = [
    {
        "checkpoint": "$5_vs_$10.npz",
        "mode": mode,
        "targets": "held-out",
        "n": 200,
        "exact": 0.5,
        "preferred": 0.25,
        "counts": {"2": 20, "3": 50, "4": 100, "5": 30},
    }
    for mode in ("greedy", "sampled", "sampled")
]
NAMES = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]
SHARES = {"shares": dict(zip(data.OUTCOMES, (0.4, 0.3, 0.2, 0.1)))}


def log(prefix, i):
    """Numbers that tell rounds and names apart; before the first step all rewards are 0: ties."""
    numbers = {prefix + name: i + 10 * k for k, name in enumerate(NAMES)}
    return numbers | {prefix + "rewards/accuracies": 0} if i in (0, 1) else numbers


START, EMPTY = {"round": 0, "pairs": 0} | SHARES | log("eval_", 0), {"round": 2, "pairs": 0}
STEPS = [{"round": i, "pairs": 9 - i} | SHARES | log("", i) | log("eval_", -i) for i in (1, 3, 4)]
HISTORY = [START, STEPS[0], EMPTY, *STEPS[1:]]
CREDIT = [
    {"line": line, "policy_logp": -1.0, "reference_logp": -2.0, "reward": reward, "tokens": tokens}
    for line, reward, tokens in (
        ("10=4+6", -1.5, [("4", 0.5), ("+", -2.0)]),
        ("10=9", 1.0, [("9", 1.0)]),
    )
]


def draw(name, numbers):
    """The axes of a picture."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "atomic_write", contextlib.nullcontext)
        patch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        getattr(plots, name)(numbers, None)
    return figures[0].axes


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, numbers",
    [
        ("distribution", ROWS),
        ("credit", CREDIT),
        ("credit", CREDIT[:1]),
        ("dpo_training", HISTORY),
        ("dpo_training", [START, EMPTY]),
    ],
)
def test_no_picture_has_text_of_a_file_name_or_a_legend_over_data(tmp_path, name, numbers):
    figure = draw(name, numbers)[0].figure
    getattr(plots, name)(numbers, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not [text for text in figure.findobj(Text) if "npz" in text.get_text()]
    renderer = FigureCanvasAgg(figure).get_renderer()
    for ax in figure.axes:
        if legend := ax.get_legend():
            assert legend.get_window_extent(renderer).y1 < ax.get_window_extent(renderer).y0


def test_the_distribution_in_percent():
    for ax, name in zip(draw("distribution", ROWS), ("SFT", "DPO"), strict=True):
        assert [bar.get_height() for bar in ax.patches] == [10, 25, 50, 15]
        assert ax.get_title() == f"after {name}: 50% right sums, 25% preferred"


def drawn(ax, held_out=False):
    """The pale curves of training pairs, or the dashed ones of held-out pairs: lists of (x, y)."""
    return [
        list(zip(*map(list, line.get_data())))
        for line in ax.lines
        if (line.get_linestyle() == "--" if held_out else line.get_alpha() == 0.2)
    ]


def test_the_training_curves_leave_out_rounds_without_pairs_and_accuracies_of_ties():
    *curves, outcomes, pairs = draw("dpo_training", HISTORY)
    for i, name in enumerate(NAMES):
        ax, k, rows = curves[min(i, 3)], i == 4, STEPS[i == 1 :]
        assert drawn(ax)[k] == [(row["round"], row[name]) for row in rows]
        held_out = [(row["round"], row["eval_" + name]) for row in rows]
        assert drawn(ax, True)[k][-len(rows) :] == held_out
    assert 0 not in [y for _, y in drawn(curves[1], True)[0]]
    assert math.log(2) in [line.get_ydata()[0] for line in curves[0].lines]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in outcomes.collections]
    assert np.allclose(tops, [40, 70, 90, 100]) and list(pairs.lines[0].get_ydata()) == [8, 0, 6, 5]
    late = [START, {**EMPTY, "round": 1}, {**STEPS[0], "round": 2}, *STEPS[1:]]
    assert drawn(draw("dpo_training", late)[1]) == drawn(curves[1])


def test_rounds_are_smoothed_by_those_around_them():
    rows = [STEPS[0] | {"round": i, "loss": math.sin(i)} for i in range(1, 101)]
    raw, smooth = (line.get_ydata() for line in draw("dpo_training", [START, *rows])[0].lines[:2])
    assert list(raw) == [row["loss"] for row in rows]
    assert smooth[50] == pytest.approx(np.mean(raw[38:63])) and smooth[0] == np.mean(raw[:13])


def test_credit_writes_every_token_with_its_value():
    first, second, _ = draw("credit", CREDIT)
    assert [text.get_text() for text in first.texts] == ["4\n+0.5", "+\n-2.0"]
    assert all(text in first.get_title(loc="left") for text in ("10=4+6", "0.14", "0.37", "-1.5"))
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-2, 2)
    assert "margin of -2.5" in first.figure.get_suptitle()
    assert "margin" not in draw("credit", CREDIT[:1])[0].figure.get_suptitle()  # takes two lines
