"""Build playground/index.html: the page and, in it, the models of three DPO runs.

The runs start from an SFT model. Each is made once and kept in --folder; a run that is there is
read. Everything that the page needs is joined into one file, which opens without a server.
"""

import base64
import copy
import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the core lies one folder up
from tinygrad_lite import launch, no_grad  # noqa: E402
import numpy as np  # noqa: E402

import cli  # noqa: E402
import data  # noqa: E402
import dpo  # noqa: E402
import eval as evaluation  # noqa: E402
from transformer import Config, Transformer, parameter_shapes  # noqa: E402

HERE = Path(__file__).resolve().parent
PAGE = HERE / "index.html"
SOURCES = ("rule", "once", "online")  # where pairs come from, dpo.py's --pairs: a run for each
MOMENTS = (5, 10, 20, 50, 100, 300, 700)  # rounds whose policy is kept, beside the first and last
MODELS = re.compile('(<script id="models" type="application/json">\n)(.*?)(\n</script>)', re.DOTALL)
N_LINES = 200  # to measure what float16 costs


# Runs, made once and kept.


class Snapshots:
    """A `report` for dpo.train that saves the policy at some rounds, and shows the progress."""

    def __init__(self, folder, source, rounds, moments):
        self.folder, self.source, self.rounds, self.moments = folder, source, rounds, moments
        self.progress = cli.Progress("round", rounds)

    def __call__(self, row, policy, pairs):
        number = row["round"]
        if number in self.moments:
            policy.save(snapshot(self.folder, self.source, number))
        if number > 0:
            self.progress.show(number, number / self.rounds, f"pairs {row['pairs']}")


def snapshot(folder, source, number):
    """Where the policy of a run lies, as it was after a round."""
    return folder / f"{source}-{number}.npz"


def moments_of(rounds):
    """The rounds whose policy is kept. Round 0 is the SFT model, so it needs no file."""
    return [moment for moment in MOMENTS if moment < rounds] + [rounds]


def run(options, source):
    """The history of a run: dpo.py's defaults and --pairs `source`. It is made unless it is there.

    Raises UserError if a run is there that was made with other settings.
    """
    arguments = dpo.parse_arguments(["--pairs", source, "--rounds", str(options.rounds)])
    settings = vars(arguments).copy()
    for name in ("out", "sft", "processes"):  # where files lie, and who does the work
        del settings[name]
    settings["sft_sha256"] = hashlib.sha256(options.sft.read_bytes()).hexdigest()
    rounds, moments = arguments.rounds, moments_of(arguments.rounds)

    facts = options.folder / f"{source}.json"  # written last
    if facts.exists():
        made = json.loads(facts.read_text(encoding="utf-8"))
        if made["settings"] != settings:
            names = [name for name in settings if made["settings"].get(name) != settings[name]]
            raise cli.UserError(
                f"{facts} is of a run with other settings ({', '.join(names)}); "
                "remove it, or name another --folder"
            )
        if all(snapshot(options.folder, source, moment).exists() for moment in moments):
            return made["history"]

    print(f"{source}: {rounds:,} rounds", flush=True)
    reference = evaluation.load(options.sft)
    policy = copy.deepcopy(reference)
    starts = dpo.round_starts(rounds, arguments.prompts)
    make_pairs = dpo.pairs_maker(source, starts, arguments.answers, arguments.prefer)
    report = Snapshots(options.folder, source, rounds, moments)
    constants = (rounds, arguments.beta, arguments.lr, arguments.seed)
    history = launch(
        options.processes, dpo.train, policy, reference, make_pairs, report, *constants
    )
    report.progress.end()
    for moment in moments:
        if moment > history[-1]["round"]:  # no pairs were left, so the run ended before it
            policy.save(snapshot(options.folder, source, moment))
    cli.write_json(facts, {"settings": settings, "history": history})
    return history


# Models as text.


def pack(model):
    """All weights of a model, in a checkpoint's order, as float16 in base64."""
    weights = np.concatenate([parameter.data.ravel() for parameter in model.parameters()])
    return base64.b64encode(weights.astype("<f2").tobytes()).decode("ascii")


def unpack(text, config):
    """The model that `pack` made into text; its weights have been rounded to float16."""
    weights = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    model = Transformer(config)
    start = 0
    for (_, shape), parameter in zip(parameter_shapes(config).items(), model.parameters()):
        end = start + int(np.prod(shape))
        parameter.data = weights[start:end].reshape(shape)
        start = end
    if start != len(weights):
        raise ValueError(f"{len(weights)} weights, but the model has {start}")
    return model


def read_runs(options):
    """The facts of the page, a dict for JSON, and {name: Transformer} before rounding."""
    models = {"sft": evaluation.load(options.sft)}
    start = {"round": 0, "model": "sft", "pairs": 0}
    runs = {"sft": [start]}
    for source in SOURCES:
        history = run(options, source)
        runs[source] = [start]
        for moment in moments_of(options.rounds):
            path = snapshot(options.folder, source, moment)
            models[path.stem] = evaluation.load(path)
            row = history[min(moment, len(history) - 1)]  # the log of the round, if it took place
            runs[source].append(
                {
                    "round": moment,
                    "model": path.stem,
                    "pairs": row["pairs"],
                    "loss": row.get("loss"),
                    "accuracy": row.get("rewards/accuracies"),
                }
            )
    defaults = dpo.parse_arguments([])
    facts = {
        "config": dataclasses.asdict(models["sft"].config),
        "vocab": data.VOCAB,
        "max_len": data.MAX_LEN,
        "held_out": data.HELD_OUT,
        "outcomes": data.OUTCOMES,
        "beta": defaults.beta,
        "prefer": defaults.prefer,
        "runs": runs,
        "models": {name: pack(model) for name, model in models.items()},
    }
    return facts, models


def read_page(page):
    """The facts that a page holds, as `read_runs` returns them. UserError if it holds none."""
    match = MODELS.search(page.read_text(encoding="utf-8"))
    if match is None:
        raise cli.UserError(f"{page} holds no models; build it without --from-page")
    return json.loads(match[2])


def models_of(facts):
    """{name: Transformer} of the facts of a page."""
    config = Config(**facts["config"])
    return {name: unpack(text, config) for name, text in facts["models"].items()}


def cost_of_rounding(models, rounded):
    """What float16 costs: the largest and the mean change of a logit, on 200 lines of the task."""
    ids = data.random_lines(N_LINES, np.random.default_rng(0), data.TARGETS)
    changes = []
    with no_grad():
        for name, model in models.items():
            change = np.abs(rounded[name](ids).data - model(ids).data)  # (V, B T)
            changes.append(change[:, (ids != data.PAD).ravel()])
    changes = np.concatenate(changes)
    return float(changes.max()), float(changes.mean())


# The page.


def join(facts):
    """The whole page: page.html, with each file that it names, and the models, in their places."""
    page = (HERE / "page.html").read_text(encoding="utf-8")

    def style(match):
        return f"<style>\n{(HERE / match[1]).read_text(encoding='utf-8')}</style>"

    def script(match):
        return f"<script>\n{(HERE / match[1]).read_text(encoding='utf-8')}</script>"

    page = re.sub('<link rel="stylesheet" href="(.+?)">', style, page)
    page = re.sub('<script src="(.+?)"></script>', script, page)
    # A line for each model, so that a change of one is a change of one line.
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    return MODELS.sub(lambda match: match[1] + text + match[3], page)


def parse_arguments(argv):
    parser = cli.Parser(prog="playground/build.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    rounds = dpo.parse_arguments([]).rounds
    folder = Path("runs/playground")
    add("--sft", type=Path, default=Path("runs/sft.npz"), help="default: runs/sft.npz")
    add("--folder", type=Path, default=folder, help=f"keeps the runs (default: {folder})")
    add("--processes", type=cli.whole(1, 64), default=2, help="that share a run (default: 2)")
    rounds_help = f"of a run (default: {rounds:,}); fewer to see that the program works"
    add("--rounds", type=cli.whole(1), default=rounds, help=rounds_help)
    page_help = "take the models from the page that is there; only join the sources again"
    add("--from-page", action="store_true", help=page_help)
    add("--out", type=Path, default=PAGE, help="default: playground/index.html")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".html" or arguments.out.is_dir():
        parser.error(f"argument --out: must be an .html file, not {str(arguments.out)!r}")
    return arguments


def main(argv=None):
    options = parse_arguments(argv)
    cli.output_files(options.out)
    if options.from_page:
        facts = read_page(PAGE)
    else:
        # Mistakes show before minutes of training.
        config = evaluation.load(options.sft).config
        if config.d_model % 4 or config.d_hidden % 4:
            raise cli.UserError("the page needs a d_model and d_hidden that are multiples of 4")
        cli.output_files(options.folder / "rule.json")
        facts, models = read_runs(options)
        largest, mean = cost_of_rounding(models, models_of(facts))
        print(
            f"float16 changes a logit by {mean:.1g} on average and by {largest:.1g} at most "
            f"({len(models)} models, {N_LINES} lines)"
        )
    page = join(facts).encode()
    with cli.atomic_write(options.out) as file:
        file.write(page)
    print(f"wrote {options.out}, {len(page) / 1e6:.2f} MB")


if __name__ == "__main__":
    cli.run(main)
