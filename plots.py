"""Every picture. Drawn on white, so that they read the same on light and on dark pages."""
from matplotlib.figure import Figure

import data
from transformer import atomic_write

BLUE, ORANGE, GREEN, RED, GREY = "#3b6fb6", "#e08214", "#3a923a", "#c03d3e", "#8c8c8c"
KINDS = {"right, preferred": GREEN, "right, other": BLUE,  # of answers, with their colours
         "wrong sum": RED, "does not parse": GREY}


def axes(rows=1, columns=1, size=(6.4, 4.0), **options):
    """A figure and a flat list of its axes, in the style of all pictures here."""
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in grid:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, grid


def shortened(error, digits=2):
    """A mean error as text, "-" for none: one run-on answer can give it a dozen digits."""
    if error is None:
        return "-"
    return f"{error:.{digits}f}" if error < 1000 else f"{error:.0e}"


def save(figure, path):
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def sft_loss(losses, path):
    """The SFT loss over steps, in means of a two-hundredth of the run each."""
    window = max(1, len(losses) // 200)
    starts = range(0, len(losses) - window + 1, window)
    figure, (ax,) = axes()
    ax.plot([start + window / 2 for start in starts],
            [sum(losses[start:start + window]) / window for start in starts], color=BLUE)
    ax.set(xlabel="step", ylabel="loss (nats per completion token)", title="SFT")
    save(figure, path)


def distribution(rows, path, prefer=3):
    """Number of terms of sampled answers to held-out targets: a panel for each checkpoint."""
    rows = [row for row in rows if (row["mode"], row["targets"]) == ("sampled", "held-out")]
    figure, grid = axes(1, len(rows), size=(5.4 * len(rows), 3.6), sharey=True)
    for ax, row in zip(grid, rows):
        bars = ax.bar([str(k) for k in data.COUNTS],
                      [100 * row["counts"][str(k)] / row["n"] for k in data.COUNTS],
                      color=[ORANGE if k == prefer else BLUE for k in data.COUNTS])
        ax.bar_label(bars, fmt="%.0f %%")
        ax.set(xlabel="number of terms", ylim=(0, 108))
        ax.set_title(f"{row['checkpoint']}: mean error {shortened(row['mean_abs_error'])}, exact "
                     f"{100 * row['exact']:.1f} %, format {100 * row['format']:.1f} %", fontsize=10)
    grid[0].set_ylabel("answers to held-out targets (%)")
    save(figure, path)


def lines(ax, history, names, title):
    """Columns of a DPO run's log over its rounds: names is {column: colour}."""
    rows = [row for row in history if row["pairs"]]
    for name, colour in names.items():
        ax.plot([row["round"] for row in rows], [row[name] for row in rows], color=colour,
                label=name, linewidth=1)
    ax.set(title=title, xlabel="round")
    if len(names) > 1:
        ax.legend(frameon=False, fontsize=8)


def answer_kinds(ax, history, title="answers to held-out targets"):
    """Shares of the four kinds of answers, stacked, over the rounds of a DPO run."""
    measured = [row for row in history if "masses" in row]
    shares = [[row["masses"][kind] for row in measured] for kind in KINDS]
    ax.stackplot([row["round"] for row in measured], shares, labels=KINDS, colors=KINDS.values())
    ax.set(title=title, xlabel="round", ylim=(0, 1))
    ax.legend(fontsize=8, loc="lower right")


def dpo_training(history, path):
    """Loss, rewards, accuracy, log-probabilities, pairs and answers over the rounds of a run."""
    figure, grid = axes(2, 3, size=(13, 6.5))
    lines(grid[0], history, {"loss": BLUE}, "loss")
    lines(grid[1], history, {"rewards/chosen": GREEN, "rewards/rejected": RED,
                             "rewards/margins": GREY}, "rewards")
    lines(grid[2], history, {"rewards/accuracies": BLUE}, "accuracy: chosen reward above rejected")
    lines(grid[3], history, {"logps/chosen": GREEN, "logps/rejected": RED},
          "log-probability of a completion")
    lines(grid[4], history, {"pairs": BLUE}, "pairs")
    answer_kinds(grid[5], history)
    save(figure, path)


def credit(rows, beta, path):
    """[(title, tokens), ...]: completions by token, coloured by beta (log pi - log pi_ref)."""
    figure, grid = axes(len(rows), 1, size=(9, 1.5 * len(rows) + 0.3))
    scale = max(abs(value) for _, tokens in rows for _, value in tokens) or 1.0
    for ax, (title, tokens) in zip(grid, rows):
        values = [[value for _, value in tokens]]
        image = ax.imshow(values, cmap="PiYG", vmin=-scale, vmax=scale, aspect="auto")
        for i, (token, value) in enumerate(tokens):
            ax.text(i, 0, f"{token}\n{value:+.1f}", ha="center", va="center", fontsize=10,
                    color="white" if abs(value) > 0.7 * scale else "black")
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_title(f"{title}   reward {sum(values[0]):+.1f}", fontsize=10, loc="left")
    figure.colorbar(image, ax=list(grid), label=f"{beta:g} (log pi - log pi_ref)")
    save(figure, path)
