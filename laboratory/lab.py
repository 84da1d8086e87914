"""What the experiments share: flags, SFT models, runs of DPO that are kept, numbers of a run.

A run has a name and a seed. It leaves a checkpoint and its facts, as JSON, in runs/laboratory/. A
finished run is read, not made again, so a program that was stopped resumes where it left off.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up
from tinygrad_lite import launch, no_grad  # noqa: E402
import numpy as np  # noqa: E402

import cli  # noqa: E402
import data  # noqa: E402
import dpo  # noqa: E402
import eval as evaluation  # noqa: E402
import sft  # noqa: E402

SAMPLES = 200  # answers to each held-out target, sampled after a run
MANY_SAMPLES = 1200  # to count distinct ones
SFT_PY = Path("runs/sft.npz")  # what sft.py writes by default
LARGE = [target for target in data.HELD_OUT if target > 50]  # those with many right sums


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run of DPO as dpo.py makes it, with flags of dpo.py and changes that have no flag.

    name: of its files. Two different experiments need two names.
    flags: those of dpo.py; what they leave out is dpo.py's default.
    change: in words, for the tables.
    train: the training loop, dpo.train or a functools.partial of loop.train.
    pairs(starts, answers, prefer): returns the loop's make_pairs. None: as the flag --pairs says.
    starts(rounds, prompts): where the rounds of a run begin, see dpo.round_starts.
    report: a class such as dpo.Report or Report, which measures and prints.
    """

    name: str
    flags: str = ""
    change: str = ""
    train: Callable = dpo.train
    pairs: Callable | None = None
    starts: Callable = dpo.round_starts
    report: Callable = dpo.Report

    @property
    def title(self):
        """How tables call it."""
        flags = self.flags or "(defaults)"
        return f"{flags}, {self.change}" if self.change else flags


def rounds_of_one_size(rounds, prompts):
    """As dpo.round_starts, but every round has `prompts` targets."""
    return prompts * np.arange(rounds + 1)


# The runs that several programs show.
ONLINE = Experiment("online")
ONCE = Experiment("once", "--pairs once")
RULE = Experiment("rule", "--pairs rule")
SHORT_ONLINE = Experiment("online-300", "--rounds 300")
SHORT_ONCE = Experiment("once-300", "--pairs once --rounds 300")
SHORT_RULE = Experiment("rule-300", "--pairs rule --rounds 300")


# Flags.


def parser(description, seeds):
    """A parser with the flags of all programs here. A program may add its own.

    --rounds, --prompts and --sft-steps make runs small, to see that a program works. The numbers of
    such runs mean nothing.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    program = f"laboratory/{Path(sys.argv[0]).name}"
    parser = cli.Parser(prog=program, description=description, formatter_class=formatter)
    add = parser.add_argument
    steps = sft.parse_arguments([]).steps
    folder = Path("runs/laboratory")
    add("--seeds", type=cli.whole(1), default=seeds, help=f"how many seeds (default: {seeds})")
    add("--processes", type=cli.whole(1, 64), default=2, help="that share a run (default: 2)")
    add("--folder", type=Path, default=folder, help=f"for all runs (default: {folder})")
    add("--rounds", type=cli.whole(1), help="at most so many in a run, to try a program")
    add("--prompts", type=cli.whole(1), help="at most so many in a round, to try a program")
    add("--sft-steps", type=cli.whole(1), default=steps, help=f"of SFT (default: {steps})")
    return parser


def add_pictures(parser, name):
    """The flag of a program that draws."""
    parser.add_argument("--pictures", type=Path, default=Path("assets"), metavar="FOLDER",
                        help=f"where to draw {name} (default: assets)")  # fmt: skip


def dpo_arguments(options, experiment, seed):
    """dpo.py's arguments for a run, with its rounds and prompts reduced as `options` say."""
    arguments = dpo.parse_arguments(experiment.flags.split())
    arguments.seed = seed
    if options.rounds is not None:
        arguments.rounds = min(arguments.rounds, options.rounds)
    if options.prompts is not None:
        arguments.prompts = min(arguments.prompts, options.prompts)
    return arguments


# Runs, made once and kept.


def sft_checkpoint(options, seed):
    """Where the SFT model of a seed lies once sft_facts was called."""
    return options.folder / f"sft-seed{seed}.npz"


def dpo_checkpoint(options, experiment, seed):
    """Where the policy of a run lies once run() was called."""
    return options.folder / f"{experiment.name}-seed{seed}.npz"


def sft_facts(options, seed):
    """The facts of an SFT model, a dict: the log that sft.py writes, and `measure` of the model.

    If there is no model of this seed, it is the one that sft.py has written, if that has the same
    settings. Otherwise sft.py's own main trains it.
    """
    checkpoint = sft_checkpoint(options, seed)
    if not is_complete(checkpoint):
        flags = ["--seed", seed, "--steps", options.sft_steps, "--processes", options.processes]
        flags = [*map(str, flags), "--out", str(checkpoint)]
        if is_run_of_sft_py(vars(sft.parse_arguments(flags))):
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SFT_PY, checkpoint)
            cli.write_json(checkpoint.with_suffix(".json"), read_facts(SFT_PY))
        else:
            print(f"SFT, seed {seed}", flush=True)
            sft.main(flags)
    facts = read_facts(checkpoint)
    if facts["settings"]["steps"] != options.sft_steps:
        raise made_otherwise(checkpoint, ["--sft-steps"])
    if "sampled" not in facts:  # sft.py measures with fewer answers
        model = evaluation.load(checkpoint)
        facts |= measure(model) | {"distinct": distinct(model)}
        cli.write_json(checkpoint.with_suffix(".json"), facts)
    return facts


def is_run_of_sft_py(settings):
    """Whether SFT_PY was trained with these settings, wherever it was written to and by however
    many processes."""
    if not is_complete(SFT_PY):
        return False
    written = read_facts(SFT_PY)["settings"]
    names = [name for name in settings if name not in ("out", "processes")]
    return all(written.get(name) == settings[name] for name in names)


def run(options, experiment, seed):
    """The facts of an experiment with one seed: a dict, read if the run is there, else made.

    settings: all that decides what the run does;
    seconds: of training; history: the rows of the training loop;
    sampled, greedy: see `measure`; divergence, distinct: see the functions of these names.

    Raises UserError if a run of this name and seed is there, but with other settings.
    """
    arguments = dpo_arguments(options, experiment, seed)
    settings = settings_of(options, experiment, arguments)
    checkpoint = dpo_checkpoint(options, experiment, seed)
    sft_facts(options, seed)  # trains the SFT model if it is missing
    if is_complete(checkpoint):
        facts = read_facts(checkpoint)
        if facts["settings"] != settings:
            names = [name for name in settings if facts["settings"].get(name) != settings[name]]
            raise made_otherwise(checkpoint, names)
        return facts

    print(f"{experiment.name}: dpo.py {experiment.title}, seed {seed}", flush=True)
    cli.output_files(checkpoint)
    policy, history, seconds = train(options, experiment, arguments)
    sft_model = evaluation.load(sft_checkpoint(options, seed))
    facts = {"settings": settings, "seconds": seconds} | measure(policy, arguments.prefer)
    facts |= {"divergence": divergence(policy, sft_model)}
    facts |= {"distinct": distinct(policy, arguments.prefer), "history": history}
    policy.save(checkpoint)
    cli.write_json(checkpoint.with_suffix(".json"), facts)
    return facts


def train(options, experiment, arguments):
    """Train a policy, as dpo.py's main does: the policy, its history and the seconds it took."""
    reference = evaluation.load(sft_checkpoint(options, arguments.seed))
    policy = copy.deepcopy(reference)
    pairs = experiment.pairs or functools.partial(dpo.pairs_maker, arguments.pairs)
    starts = experiment.starts(arguments.rounds, arguments.prompts)
    make_pairs = pairs(starts, arguments.answers, arguments.prefer)
    report = experiment.report(reference, arguments.rounds, arguments.beta, arguments.prefer)
    settings = (arguments.rounds, arguments.beta, arguments.lr, arguments.seed)
    started = time.perf_counter()
    history = launch(
        options.processes, experiment.train, policy, reference, make_pairs, report, *settings
    )
    report.progress.end()
    return policy, history, time.perf_counter() - started


def settings_of(options, experiment, arguments):
    """All that decides what a run does, as JSON can hold it; not where its files lie."""
    settings = vars(arguments) | {"sft_steps": options.sft_steps}
    for name in ("out", "sft", "processes"):
        del settings[name]
    settings["train"] = described(experiment.train)
    settings["starts"] = described(experiment.starts)
    settings["report"] = described(experiment.report)
    if experiment.pairs is not None:
        settings["pairs"] = described(experiment.pairs)
    return settings


def described(value):
    """A function by its name, a partial or a dataclass by its name and arguments: for JSON."""
    if hasattr(value, "__name__"):
        return value.__name__
    if isinstance(value, functools.partial):
        arguments = {str(i): argument for i, argument in enumerate(value.args)} | value.keywords
        return {described(value.func): described(arguments)}
    if dataclasses.is_dataclass(value):
        return {type(value).__name__: described(vars(value))}
    if isinstance(value, dict):
        return {name: described(part) for name, part in value.items()}
    return value


def kept(options, name, settings, make):
    """A dict of facts that `make` returns, for work that leaves no checkpoint: read if a file of
    this name is there, else made and written."""
    path = options.folder / f"{name}.json"
    if path.exists():
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["settings"] != settings:
            names = [name for name in settings if facts["settings"].get(name) != settings[name]]
            raise made_otherwise(path, names)
        return facts
    facts = {"settings": settings} | make()
    cli.write_json(path, facts)
    return facts


def is_complete(checkpoint):
    """Whether a run is there. Its facts are written last."""
    return checkpoint.exists() and checkpoint.with_suffix(".json").exists()


def read_facts(checkpoint):
    return json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))


def made_otherwise(checkpoint, names):
    return cli.UserError(
        f"{os.fspath(checkpoint)} was made with other settings ({', '.join(names)}); "
        "remove it, or name another --folder"
    )


# Numbers of a run.


def measure(model, prefer=3):
    """Metrics of a model's answers: `sampled`, 200 to each held-out target; `greedy`, one to each
    of all targets. They are the numbers of `eval.py --samples 200`."""
    rng = data.random_stream(0, "answers")
    sampled = evaluation.sample(model, np.repeat(data.HELD_OUT, SAMPLES), 1.0, rng)
    greedy = evaluation.sample(model, data.TARGETS, 0.0, rng)
    endless = np.mean([line[-1] != data.END for line in sampled])  # they fill data.MAX_LEN
    return {
        "sampled": evaluation.metrics(sampled, prefer) | {"endless": float(endless)},
        "greedy": evaluation.metrics(greedy, prefer),
    }


def divergence(policy, reference, samples=50):
    """KL(policy || reference) in nats an answer, from `samples` answers to each held-out target."""
    rng = data.random_stream(0, "answers")
    lines = evaluation.sample(policy, np.repeat(data.HELD_OUT, samples), 1.0, rng)
    return divergence_of(lines, policy, reference)


def divergence_of(lines, policy, reference):
    """The mean of log(policy / reference) over answers of the policy, which estimates
    KL(policy || reference)."""
    return float((logps(policy, lines) - logps(reference, lines)).mean())


def logps(model, lines):
    """log p(completion | prompt) of each line, an array (N,)."""
    with no_grad():
        return sft.completion_logps(model, data.pad(lines)).numpy()


def distinct(policy, prefer=3, n_accepted=150):
    """How many different ones are among a policy's first 150 accepted answers to a target.

    The mean over the ten largest held-out targets, of MANY_SAMPLES answers to each. Targets with
    fewer accepted answers are left out; None if all are.
    """
    numbers = []
    for target in LARGE:
        rng = data.random_stream(0, "answers")
        lines = evaluation.sample(policy, [target] * MANY_SAMPLES, 1.0, rng)
        accepted = [tuple(line) for line in lines if data.is_accepted(line, prefer)]
        if len(accepted) >= n_accepted:
            numbers.append(len(set(accepted[:n_accepted])))
    return float(np.mean(numbers)) if numbers else None


def accepted_probabilities(model):
    """The probability that a model's answer to each held-out target is accepted (right, three
    terms), exactly: the sum over all such answers, (20,)."""
    probabilities = []
    for target in data.HELD_OUT:
        accepted = right_sums(target, [3])
        probabilities.append(np.exp(logps(model, accepted).astype(np.float64)).sum())
    return np.array(probabilities)


def floor(p, share):
    """The least divergence, in nats, of a policy that gives this share of accepted answers, both
    as means over targets.

    p: the reference's accepted_probabilities.

    For one target, let a be the policy's P(accepted). Of all policies with this a, the one with the
    smallest KL(policy || reference) scales the reference's accepted answers by a / p and all others
    by (1 - a) / (1 - p). Its divergence is that of two coins, a log(a / p) + (1 - a) log((1 - a) /
    (1 - p)), whose derivative by a is logit(a) - logit(p). Where the mean divergence is least for a
    given mean of a, no shift from one target to another helps, so this derivative is the same
    number for all of them; bisection finds it.
    """
    if share == 1:
        return float(-np.log(p).mean())
    low, high = -30.0, 30.0  # of logit(a) - logit(p)
    for _ in range(100):
        middle = (low + high) / 2
        a = 1 / (1 + np.exp(-middle) * (1 - p) / p)
        low, high = (middle, high) if a.mean() < share else (low, middle)
    return float((a * np.log(a / p) + (1 - a) * np.log((1 - a) / (1 - p))).mean())


def right_sums(target, counts=data.COUNTS, total=None):
    """All sums of the given numbers of terms, as lines of ids: right, or with another total."""
    total = target if total is None else total
    lines = []
    for count in counts:
        for cuts in itertools.combinations(range(1, total), count - 1):
            lines.append(data.line_of(target, np.diff([0, *cuts, total])))
    return lines


class Report:
    """What dpo.Report does for pairs, for any run: it measures a policy's answers to held-out
    targets, and its divergence, `times` times on the way, and prints the loss."""

    def __init__(self, reference, rounds, beta, prefer, times=40):
        self.reference, self.rounds, self.prefer, self.times = reference, rounds, prefer, times
        self.progress = cli.Progress("round", rounds)

    def __call__(self, row, policy, pairs):
        number = row["round"]
        if number == 0 or cli.is_due(number, self.rounds, self.times):
            rng = data.random_stream(0, "answers")
            lines = evaluation.sample(policy, data.HELD_OUT * 20, 1.0, rng)
            metrics = evaluation.metrics(lines, self.prefer)
            row |= {name: metrics[name] for name in ("shares", "answers")}
            row["divergence"] = divergence_of(lines, policy, self.reference)
        if number > 0:
            text = f"loss {row['loss']:.3f}" if "loss" in row else "no pairs"
            self.progress.show(number, number / self.rounds, text)


def logged(facts, name):
    """A number of a run's log, for each round that had pairs."""
    return np.array([row[name] for row in facts["history"] if row["pairs"] > 0])


def means(facts, name, window=50):
    """A number of a run's log, averaged over each `window` rounds in a row (all, if it has fewer).

    The last of these is the mean of the last rounds.
    """
    values = logged(facts, name)
    if len(values) == 0:
        return np.array([np.nan])
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, "valid")


def measured(facts):
    """The rows of the history in which the policy's answers to held-out targets were measured."""
    return [row for row in facts["history"] if "shares" in row]


def held_out(facts, name):
    """A number of the held-out pairs at the end of a run; NaN if there were no such pairs."""
    return measured(facts)[-1].get(f"eval_{name}", np.nan)


def spread(values, digits=3):
    """Mean, lowest and highest as text."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def whole_spread(values):
    """Mean, lowest and highest in whole numbers as text; once, if all are the same."""
    low, mean, high = (f"{value:.0f}" for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def distinct_spread(of_seeds):
    """The `distinct` of the facts of several seeds, as text."""
    numbers = [facts["distinct"] for facts in of_seeds if facts["distinct"] is not None]
    return whole_spread(numbers) if numbers else "-"
