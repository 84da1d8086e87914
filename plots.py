"""Every picture. Drawn on white, so that they read the same on light and on dark pages."""

import contextlib
import os

# A notebook names a backend to every program that it starts, and Matplotlib refuses to load where
# that one is not installed. Pictures go to files here, which needs none.
backend = os.environ.pop("MPLBACKEND", None)
import matplotlib.style  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
import numpy as np  # noqa: E402

import data  # noqa: E402
from cli import atomic_write  # noqa: E402

if backend is not None:
    os.environ["MPLBACKEND"] = backend

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
LARGE = {"font.size": 13, "axes.titlesize": 15}  # so that pictures can be read at half size
# Under the axes, a legend cannot hide data.
BELOW = dict(frameon=False, fontsize=12, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
REWARDS = {"rewards/chosen": (GREEN, "chosen, "), "rewards/rejected": (RED, "rejected, ")}


@contextlib.contextmanager
def picture(path, rows, columns, size, **options):
    """A flat list of axes to draw into, of a figure that is then written to `path`.

    Under Matplotlib's own settings, whatever the user's are: a picture looks the same for everyone.
    """
    with matplotlib.style.context(["default", LARGE]):
        figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False, **options).ravel()
        for ax in grid:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="#e5e5e5", linewidth=0.8)
            ax.set_axisbelow(True)
        yield grid
        with atomic_write(path) as file:
            figure.savefig(file, format="png")


def distribution(rows, path):
    """Number of terms of sampled answers to held-out targets: a panel for each checkpoint."""
    rows = [row for row in rows if (row["mode"], row["targets"]) == ("sampled", "held-out")]
    with picture(path, 1, len(rows), size=(5 * len(rows), 3.6), sharey=True) as grid:
        for ax, row, name in zip(grid, rows, ("SFT", "DPO")):
            bars = ax.bar(
                [f"{k} terms" for k in data.COUNTS],
                [100 * row["counts"][str(k)] / row["n"] for k in data.COUNTS],
                color=BLUE,
            )
            ax.bar_label(bars, fmt="%.0f%%")
            ax.set(
                ylim=(0, 108),
                title="after {}: {exact:.0%} right sums, {preferred:.0%} preferred".format(
                    name, **row
                ),
            )
        grid[0].set_ylabel("answers to held-out targets (%)")


def curves(ax, history, names, **labels):
    """A log's numbers over its rounds, {name: (colour, label)}: means of 25 over pale raw values,
    dashed for the held-out pairs."""
    trained = [row for row in history if row["pairs"]]
    held_out = [row for row in history if "eval_loss" in row]
    for name, (colour, label) in names.items():
        x, y = [row["round"] for row in trained], [row[name] for row in trained]
        means = [np.mean(y[max(0, i - 12) : i + 13]) for i in range(len(y))]
        ax.plot(x, y, color=colour, alpha=0.2, linewidth=0.6)
        ax.plot(x, means, color=colour, label=f"{label}training pairs")
        ax.plot(
            [row["round"] for row in held_out],
            [row[f"eval_{name}"] for row in held_out],
            "--",
            color="black" if len(names) == 1 else colour,
            label=f"{label}held-out pairs",
        )
    ax.set(xlabel="round", **labels)
    ax.legend(**BELOW)


def stacked_outcomes(ax, history, title="what the policy answers to held-out targets"):
    """Shares of the outcomes of answers, stacked, over the rounds of a DPO run."""
    rows = [row for row in history if "shares" in row]
    shares = [[100 * row["shares"][outcome] for row in rows] for outcome in data.OUTCOMES]
    ax.stackplot(
        [row["round"] for row in rows],
        shares,
        labels=data.OUTCOMES,
        colors=[GREEN, BLUE, RED, GREY],
    )
    ax.set(title=title, xlabel="round", ylabel="share of answers (%)", ylim=(0, 100))
    ax.legend(**BELOW)


def dpo_training(history, path):
    """A DPO run in the order of looking: answers, pairs of a round, loss and rewards of pairs."""
    with picture(path, 2, 2, size=(12, 9.4)) as (answers, pairs, loss, rewards):
        stacked_outcomes(answers, history, "1. what the policy answers")
        numbers = [row["pairs"] for row in history[1:]]
        pairs.plot(range(1, len(history)), numbers, color=BLUE, linewidth=0.8)
        pairs.set(
            title="2. pairs found: mistakes get rare",
            xlabel="round",
            ylabel="pairs in a round",
            ylim=(0, None),
        )
        losses = [row["loss"] for row in history if row["pairs"]] or [np.log(2)]
        top = max(0.8, 1.2 * np.quantile(losses, 0.99))  # a round of one pair may stand out
        curves(
            loss,
            history,
            {"loss": (BLUE, "")},
            title="3. loss: down from ln 2 (grey line)",
            ylabel="nats per pair" + (" (spikes cut off)" if max(losses) > top else ""),
            ylim=(0, top),
        )
        loss.axhline(np.log(2), color=GREY, linewidth=1)
        curves(
            rewards,
            history,
            REWARDS,
            title="4. rewards: their gap, the margin, grows",
            ylabel="beta log(policy / reference)",
        )
        rewards.axhline(0, color=GREY, linewidth=1)


def animation(histories, path, seconds=8):
    """{title: history of a DPO run}: answers by number of terms, right and wrong, round by round.

    One panel for each run, all at the same rounds: those in which the first was measured.
    """
    measured = [
        {row["round"]: row["answers"] for row in history if "answers" in row}
        for history in histories.values()
    ]
    rounds = sorted(set.intersection(*(set(rows) for rows in measured)))
    titles = [f"{count} terms" for count in data.COUNTS]
    with matplotlib.style.context(["default", LARGE]):
        figure = Figure(figsize=(9, 3.8), dpi=90, facecolor="white")
        figure.subplots_adjust(left=0.09, right=0.99, bottom=0.08, top=0.8, wspace=0.08)
        grid = figure.subplots(1, len(histories), sharey=True, squeeze=False)[0]

        def draw(frame):
            number = rounds[min(frame, len(rounds) - 1)]  # the last round is held
            for ax, title, rows in zip(grid, histories, measured):
                ax.clear()
                answers = [rows[number][str(count)] for count in data.COUNTS]
                right = [100 * answer["right"] for answer in answers]
                wrong = [100 * answer["wrong"] for answer in answers]
                ax.bar(titles, right, color=BLUE)
                ax.bar(titles, wrong, bottom=right, color=ORANGE)
                ax.set(ylim=(0, 100), title=title)
                ax.spines[["top", "right"]].set_visible(False)
            grid[0].set_ylabel("answers (%)")
            figure.suptitle(
                f"answers to held-out targets, round {number:,}", x=0.09, ha="left", fontsize=15
            )

        kinds = [Patch(color=BLUE, label="right sums"), Patch(color=ORANGE, label="wrong sums")]
        figure.legend(handles=kinds, frameon=False, ncols=2, loc="upper right")
        frames = len(rounds) + len(rounds) // 4
        FigureCanvasAgg(figure)  # draws without a screen
        film = FuncAnimation(figure, draw, frames, cache_frame_data=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        film.save(path, PillowWriter(fps=frames / seconds))


def token_strip(ax, tokens, scale):
    """An answer token by token, [(token, reward), ...], coloured from -scale to scale: an image."""
    image = ax.imshow(
        [[value for _, value in tokens]], cmap="PuOr_r", vmin=-scale, vmax=scale, aspect="auto"
    )
    for i, (token, value) in enumerate(tokens):
        colour = "white" if abs(value) > 0.7 * scale else "black"
        ax.text(i, 0, f"{token}\n{value:+.1f}", ha="center", va="center", fontsize=11, color=colour)
    ax.set(xticks=[], yticks=[])
    return image


def credit(rows, path):
    """Dicts of `eval.credit`: each completion by token, coloured by its share of the reward."""
    with picture(path, len(rows), 1, size=(9, 1.7 * len(rows) + 0.5)) as grid:
        scale = max(abs(value) for row in rows for _, value in row["tokens"]) or 1.0
        for ax, row in zip(grid, rows):
            image = token_strip(ax, row["tokens"], scale)
            ax.set_title(
                "{line}:  p_ref {:.2g}, p_policy {:.2g},  reward {reward:+.1f}".format(
                    np.exp(row["reference_logp"]), np.exp(row["policy_logp"]), **row
                ),
                loc="left",
            )
        grid[0].figure.colorbar(image, ax=list(grid), label="reward of a token")
        if len(rows) > 1:
            grid[0].figure.suptitle(
                f"where DPO put its credit: a margin of {rows[0]['reward'] - rows[1]['reward']:.1f}"
            )
