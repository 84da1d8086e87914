"""Every picture. Drawn on white, so that they read the same on light and dark pages."""
from matplotlib.figure import Figure

import data
from transformer import atomic_write

BLUE, ORANGE, GREEN, RED, GREY = "#3b6fb6", "#e08214", "#3a923a", "#c03d3e", "#8c8c8c"
KINDS = {"right, preferred": GREEN, "right, other count": BLUE, "wrong sum": RED, "does not parse": GREY}


def _axes(rows=1, columns=1, size=(6.4, 4.0), **options):
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure, path):
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _smooth(values, window):
    """Means of successive windows, and the place of each."""
    window = max(1, window)
    starts = range(0, len(values) - window + 1, window)
    return [start + window / 2 for start in starts], [sum(values[s:s + window]) / window for s in starts]


def sft_loss(losses, path):
    """The SFT loss over training steps."""
    figure, (ax,) = _axes()
    ax.plot(*_smooth(losses, len(losses) // 200), color=BLUE)
    ax.set(xlabel="step", ylabel="loss (nats per completion token)", title="SFT")
    _save(figure, path)


def _bars(ax, row, prefer):
    """The distribution of the number of terms of one row of metrics, in percent of all answers."""
    terms = list(range(data.MIN_TERMS, data.MAX_TERMS + 1))
    shares = [100 * row["counts"].get(str(k), 0) / row["n"] for k in terms]
    bars = ax.bar([str(k) for k in terms], shares, color=[ORANGE if k == prefer else BLUE for k in terms])
    ax.bar_label(bars, fmt="%.0f %%")
    error = "-" if row["mean_abs_error"] is None else f"{row['mean_abs_error']:.2f}"
    ax.set(xlabel="number of terms", ylim=(0, 110),
           title=f"{row['checkpoint']}: mean error {error}, exact {100 * row['exact']:.1f} %, "
                 f"format {100 * row['format']:.1f} %")
    ax.title.set_fontsize(10)


def _held_out_sampled(rows):
    return [row for row in rows if (row["mode"], row["targets"]) == ("sampled", "held-out")]


def distribution(rows, path, prefer=3):
    """The number of terms in answers to held-out targets at temperature 1, a panel for each checkpoint."""
    rows = _held_out_sampled(rows)
    figure, axes = _axes(1, len(rows), size=(5.6 * len(rows), 3.8), sharey=True)
    for ax, row in zip(axes, rows):
        _bars(ax, row, prefer)
    axes[0].set_ylabel("answers to held-out targets (%)")
    _save(figure, path)


def dpo_training(history, path):
    """Loss, rewards, accuracy, log-probabilities and what the answers are, over the rounds of a DPO run."""
    rows = [row for row in history if row["pairs"]]
    rounds = [row["round"] for row in rows]
    figure, axes = _axes(2, 3, size=(13, 6.5))
    panels = [("loss", {"loss": BLUE}), ("reward", {"rewards/chosen": GREEN, "rewards/rejected": RED,
                                                    "rewards/margins": GREY}),
              ("accuracy", {"rewards/accuracies": BLUE}),
              ("log-probability of a completion", {"logps/chosen": GREEN, "logps/rejected": RED})]
    for ax, (title, names) in zip(axes, panels):
        for name, color in names.items():
            ax.plot(rounds, [row[name] for row in rows], color=color, label=name, linewidth=1)
        ax.set(title=title, xlabel="round")
        if len(names) > 1:
            ax.legend(frameon=False, fontsize=8)
    answer_kinds(axes[4], history)
    axes[5].plot(rounds, [row["pairs"] for row in rows], color=GREY, linewidth=1)
    axes[5].set(title="pairs in the round", xlabel="round")
    _save(figure, path)


def answer_kinds(ax, history):
    """Shares of four kinds of answers to held-out targets, stacked, over the rounds of a DPO run."""
    measured = [row for row in history if "masses" in row]
    ax.stackplot([row["round"] for row in measured], *([row["masses"][kind] for row in measured] for kind in KINDS),
                 labels=KINDS, colors=KINDS.values())
    ax.set(title="answers to held-out targets", xlabel="round", ylim=(0, 1))
    ax.legend(frameon=True, fontsize=8, loc="center right")
