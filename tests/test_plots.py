"""The pictures show the numbers they are given, whatever Matplotlib's settings are."""

import contextlib
import math

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import data
import plots

# What the pictures are drawn from.

ROWS = [
    {
        "checkpoint": "$5_vs_$10.npz",  # TeX would read it as mathematics
        "mode": mode,
        "targets": "held-out",
        "n": 200,
        "exact": 0.5,
        "preferred": 0.25,
        "counts": {"2": 20, "3": 50, "4": 100, "5": 30},
    }
    for mode in ("greedy", "sampled", "sampled")
]
SHARES = dict(zip(data.OUTCOMES, (0.4, 0.3, 0.2, 0.1)))
NAMES = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]


def log(number, prefix=""):
    """Numbers that tell names and rounds apart."""
    return {f"{prefix}{name}": number + 10 * i for i, name in enumerate(NAMES)}


def row_of(number, pairs):
    """A row of a run's history that was measured."""
    return {"round": number, "pairs": pairs, "shares": SHARES} | log(-number, "eval_")


START = row_of(0, pairs=0)
EMPTY = {"round": 2, "pairs": 0}
STEPS = [row_of(number, pairs=9 - number) | log(number) for number in (1, 3, 4)]
HISTORY = [START, STEPS[0], EMPTY, STEPS[1], STEPS[2]]
CREDIT = [
    {
        "line": "10=4+6",
        "policy_logp": -1.0,
        "reference_logp": -2.0,
        "reward": -1.5,
        "tokens": [("4", 0.5), ("+", -2.0)],
    },
    {
        "line": "10=9",
        "policy_logp": -1.0,
        "reference_logp": -2.0,
        "reward": 1.0,
        "tokens": [("9", 1.0)],
    },
]
PICTURES = [
    (plots.distribution, ROWS),
    (plots.dpo_training, HISTORY),
    (plots.dpo_training, [START, EMPTY]),  # no round had a pair
    (plots.credit, CREDIT),
    (plots.credit, CREDIT[:1]),
]
every_picture = pytest.mark.parametrize("draw, numbers", PICTURES)


def axes_of(draw, numbers):
    """The axes of a picture, which is drawn but not written."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "atomic_write", contextlib.nullcontext)
        patch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        draw(numbers, None)
    return figures[0].axes


def written(draw, numbers, folder):
    """The bytes of a picture."""
    path = folder / "picture.png"
    draw(numbers, path)
    return path.read_bytes()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw, numbers", [PICTURES[2], PICTURES[4]])
def test_a_picture_of_few_numbers_is_written_without_a_warning(tmp_path, draw, numbers):
    assert written(draw, numbers, tmp_path).startswith(b"\x89PNG")


@every_picture
def test_no_picture_has_text_of_a_file_name(draw, numbers):
    figure = axes_of(draw, numbers)[0].figure
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert not [text for text in texts if "npz" in text]


@every_picture
def test_no_legend_hides_data(draw, numbers):
    axes = axes_of(draw, numbers)
    renderer = FigureCanvasAgg(axes[0].figure).get_renderer()
    for ax in axes:
        legend = ax.get_legend()
        if legend is not None:
            top_of_legend = legend.get_window_extent(renderer).y1
            bottom_of_axes = ax.get_window_extent(renderer).y0
            assert top_of_legend < bottom_of_axes


# A user's matplotlibrc, that is, the settings that are in force when a picture is drawn. LaTeX need
# not be installed.

OF_A_USER = matplotlib.style.library["dark_background"] | {
    "text.usetex": True,
    "font.size": 30,
    "savefig.dpi": 50,
    "savefig.bbox": "tight",
}
full_pictures = pytest.mark.parametrize("draw, numbers", [PICTURES[0], PICTURES[1], PICTURES[3]])


@pytest.mark.filterwarnings("error")
@full_pictures
def test_the_settings_of_the_user_do_not_show(tmp_path, draw, numbers):
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        default = written(draw, numbers, tmp_path)
        matplotlib.rcParams.update(OF_A_USER)
        assert written(draw, numbers, tmp_path) == default
    assert default.startswith(b"\x89PNG")


@full_pictures
def test_drawing_leaves_the_settings_of_the_user_as_they_were(draw, numbers):
    with matplotlib.rc_context(OF_A_USER):
        before = dict(matplotlib.rcParams)
        axes_of(draw, numbers)
        assert dict(matplotlib.rcParams) == before


# What each picture shows.


def test_the_distribution_is_drawn_in_percent_of_sampled_answers():
    axes = axes_of(plots.distribution, ROWS)
    assert len(axes) == 2  # one for each sampled row
    for ax in axes:
        assert [bar.get_height() for bar in ax.patches] == [10, 25, 50, 15]


def test_the_distribution_says_whose_answers_they_are():
    sft, dpo = axes_of(plots.distribution, ROWS)
    assert sft.get_title() == "after SFT: 50% right sums, 25% preferred"
    assert dpo.get_title() == "after DPO: 50% right sums, 25% preferred"


def training_axes(history):
    names = ("outcomes", "pairs", "loss", "rewards")
    return dict(zip(names, axes_of(plots.dpo_training, history), strict=True))


def points(line):
    """[(x, y), ...] of a curve."""
    return [(float(x), float(y)) for x, y in zip(*line.get_data())]


def pale_curves(ax):
    """The raw values of training pairs."""
    return [points(line) for line in ax.lines if line.get_alpha() == 0.2]


def dashed_curves(ax):
    """The values of held-out pairs."""
    return [points(line) for line in ax.lines if line.get_linestyle() == "--"]


PANELS = [
    ("loss", ["loss"]),
    ("rewards", ["rewards/chosen", "rewards/rejected"]),
]


@pytest.mark.parametrize("panel, names", PANELS)
def test_curves_of_training_pairs_leave_out_rounds_without_pairs(panel, names):
    expected = [[(row["round"], row[name]) for row in STEPS] for name in names]
    assert pale_curves(training_axes(HISTORY)[panel]) == expected


@pytest.mark.parametrize("panel, names", PANELS)
def test_curves_of_held_out_pairs_show_every_measurement(panel, names):
    measured = [START, *STEPS]
    expected = [[(row["round"], row[f"eval_{name}"]) for row in measured] for name in names]
    assert dashed_curves(training_axes(HISTORY)[panel]) == expected


def test_a_line_marks_the_loss_of_the_start():
    levels = [line.get_ydata()[0] for line in training_axes(HISTORY)["loss"].lines]
    assert math.log(2) in levels


def test_the_loss_says_when_its_axis_is_cut():
    calm = [STEPS[0] | {"round": number, "loss": 0.5} for number in range(1, 301)]
    spike = [*calm, STEPS[0] | {"round": 301, "loss": 9.0}]
    for history, is_cut in ((calm, False), (spike, True)):
        loss = training_axes([START, *history])["loss"]
        assert ("cut off" in loss.get_ylabel()) == is_cut
        assert (loss.get_ylim()[1] < 9.0) or not is_cut


def test_the_outcomes_are_stacked_up_to_100_percent():
    outcomes = training_axes(HISTORY)["outcomes"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in outcomes.collections]
    np.testing.assert_allclose(tops, [40, 70, 90, 100])
    labels = [text.get_text() for text in outcomes.get_legend().get_texts()]
    assert labels == data.OUTCOMES


def test_the_number_of_pairs_shows_rounds_without_any():
    curve = training_axes(HISTORY)["pairs"].lines[0]
    assert points(curve) == [(1, 8), (2, 0), (3, 6), (4, 5)]


def test_a_round_is_smoothed_by_the_twelve_on_either_side():
    rows = [STEPS[0] | {"round": number, "loss": math.sin(number)} for number in range(1, 101)]
    raw, smooth = training_axes([START, *rows])["loss"].lines[:2]
    losses = [row["loss"] for row in rows]
    assert list(raw.get_ydata()) == losses
    assert smooth.get_ydata()[50] == pytest.approx(np.mean(losses[38:63]))
    assert smooth.get_ydata()[0] == pytest.approx(np.mean(losses[:13]))


def test_credit_writes_every_token_with_its_reward():
    first, second, _ = axes_of(plots.credit, CREDIT)
    assert [text.get_text() for text in first.texts] == ["4\n+0.5", "+\n-2.0"]
    assert [text.get_text() for text in second.texts] == ["9\n+1.0"]


def test_credit_names_the_line_its_probabilities_and_its_reward():
    first = axes_of(plots.credit, CREDIT)[0]
    assert first.get_title(loc="left") == "10=4+6:  p_ref 0.14, p_policy 0.37,  reward -1.5"


def test_credit_has_one_scale_of_colours_for_all_lines():
    first, second, _ = axes_of(plots.credit, CREDIT)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-2, 2)


def test_only_two_lines_have_a_margin():
    assert "margin of -2.5" in axes_of(plots.credit, CREDIT)[0].figure.get_suptitle()
    assert axes_of(plots.credit, CREDIT[:1])[0].figure.get_suptitle() == ""


# The animation.

ROUNDS = [0, 7, 15]


def animated_history(factor):
    """Answers that tell rounds, numbers of terms and runs apart."""
    rows = []
    for number in ROUNDS:
        answers = {
            str(count): {"right": factor * count * (number + 1) / 1000, "wrong": count / 100}
            for count in data.COUNTS
        }
        rows.append({"round": number, "answers": answers})
    return [*rows, {"round": 20}]  # a round in which nothing was measured


def test_the_animation_shows_right_and_wrong_answers_of_every_measured_round(monkeypatch, tmp_path):
    heights, titles = [], []

    class Film:
        """Draws every frame, as FuncAnimation does, and looks at it."""

        def __init__(self, figure, draw, frames, **options):
            for frame in range(frames):
                draw(frame)
                titles.append(figure.get_suptitle())
                heights.append([[bar.get_height() for bar in ax.patches] for ax in figure.axes])

        def save(self, path, writer):
            pass

    monkeypatch.setattr(plots, "FuncAnimation", Film)
    plots.animation({"a": animated_history(1), "b": animated_history(2)}, tmp_path / "film.gif")
    assert [title.rpartition(" ")[2] for title in titles[: len(ROUNDS)]] == ["0", "7", "15"]
    for number, (first, second) in zip(ROUNDS, heights):
        for factor, bars in (1, first), (2, second):
            right = [factor * count * (number + 1) / 10 for count in data.COUNTS]
            assert bars == pytest.approx([*right, *data.COUNTS])
    assert all(frame == heights[len(ROUNDS) - 1] for frame in heights[len(ROUNDS) :])


def test_the_animation_is_a_film(tmp_path):
    path = tmp_path / "film.gif"
    plots.animation({"a": animated_history(1)}, path)
    assert path.read_bytes().startswith(b"GIF89a")
