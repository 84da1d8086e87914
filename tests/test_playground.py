"""The playground: how its page is built, and what it does in a real browser (slow)."""

import contextlib
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest

from helpers import ROOT, save_model, weights

sys.path.insert(0, str(ROOT / "playground"))
import build
import cli
import data
import dpo
import eval as evaluation
from tinygrad_lite import Tensor, no_grad

FACTS = build.read_page(build.PAGE)
MODELS = build.models_of(FACTS)
RUNS = FACTS["runs"]
EVERY_MOMENT = [(run, moment) for run in RUNS for moment in range(len(RUNS[run]))]
SEED = 7
N_SAMPLED = 2000  # answers of a model in the page and in Python


def model_at(run, moment):
    """The model of the page at a moment of a run, with the weights that the page holds."""
    return MODELS[RUNS[run][moment]["model"]]


# The page as a file.


def test_the_page_is_up_to_date_with_its_sources():
    page = build.PAGE.read_text(encoding="utf-8")
    assert build.join(FACTS) == page, "run python playground/build.py --from-page"


def test_the_page_has_at_most_three_megabytes():
    assert build.PAGE.stat().st_size <= 3e6


def test_the_page_asks_for_no_other_file():
    page = build.MODELS.sub("", build.PAGE.read_text(encoding="utf-8"))
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://|fetch\(""", page)


def test_the_page_holds_a_start_and_some_eight_moments_of_each_run():
    assert [row["round"] for row in RUNS["sft"]] == [0]
    for source in "rule", "once", "online":
        rounds = [row["round"] for row in RUNS[source]]
        assert rounds == sorted({*rounds}) and rounds[0] == 0
        assert rounds[-1] == dpo.parse_arguments([]).rounds
        assert 8 <= len(rounds) <= 10
        assert RUNS[source][0]["model"] == "sft"
    # All of them are different models.
    assert len({text for text in FACTS["models"].values()}) == 1 + sum(
        len(rows) - 1 for rows in RUNS.values()
    )


# build.py.


@pytest.fixture
def folder(tmp_path):
    """A folder with the SFT checkpoint of a tiny untrained model."""
    save_model(tmp_path / "sft.npz")
    return tmp_path


def flags(folder, rounds=6):
    places = ["--sft", folder / "sft.npz", "--folder", folder, "--out", folder / "page.html"]
    return [str(flag) for flag in [*places, "--rounds", rounds, "--processes", 1]]


def test_the_runs_are_those_of_dpo_py(folder, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", ("rule",))  # the others need a model that is trained
    build.main(flags(folder))
    made = build.models_of(build.read_page(folder / "page.html"))
    assert list(made) == ["sft", "rule-5", "rule-6"]
    places = ["--sft", str(folder / "sft.npz"), "--out", str(folder / "dpo.npz")]
    dpo.main([*places, "--pairs", "rule", "--rounds", "6", "--processes", "1"])
    for name, path in ("sft", "sft.npz"), ("rule-6", "dpo.npz"):
        expected = weights(evaluation.load(folder / path))
        np.testing.assert_array_equal(weights(made[name]), expected.astype(np.float16))
    assert not np.array_equal(weights(made["rule-5"]), weights(made["rule-6"]))


def test_a_run_that_is_there_is_read_and_not_made_again(folder, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", ("rule",))
    build.main(flags(folder))
    page = (folder / "page.html").read_bytes()

    def no_training(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(build, "launch", no_training)
    build.main(flags(folder))
    assert (folder / "page.html").read_bytes() == page
    # A run of another SFT model, or with another number of rounds, is not taken for this one.
    with pytest.raises(cli.UserError, match=r"rule.json is of a run with other settings \(rounds"):
        build.main(flags(folder, rounds=7))
    save_model(folder / "sft.npz", seed=1)
    with pytest.raises(cli.UserError, match="other settings .sft_sha256.; remove it, or name"):
        build.main(flags(folder))


def test_a_moment_after_the_end_of_a_run_shows_its_last_policy(folder, monkeypatch):
    # The untrained model writes no accepted answer, so there are no pairs.
    monkeypatch.setattr(build, "SOURCES", ("online",))
    monkeypatch.setattr(dpo, "PATIENCE", 2)
    build.main(flags(folder))
    facts = build.read_page(folder / "page.html")
    assert [row["round"] for row in facts["runs"]["online"]] == [0, 5, 6]
    assert [row["pairs"] for row in facts["runs"]["online"]] == [0, 0, 0]
    assert len(set(facts["models"].values())) == 1


def test_models_as_text_are_rounded_to_float16_and_whole(tmp_path):
    model = evaluation.load(save_model(tmp_path / "sft.npz"))
    rounded = build.unpack(build.pack(model), model.config)
    np.testing.assert_array_equal(weights(rounded), weights(model).astype(np.float16))
    with pytest.raises(ValueError, match="but the model has"):
        build.unpack(build.pack(model) + "AAAA" * 2, model.config)


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--sft", "missing.npz"], "no checkpoint at missing.npz"),
        (["--rounds", "0"], "--rounds: must be a whole number from 1"),
        (["--out", "page.txt"], "--out: must be an .html file, not 'page.txt'"),
        (["--processes", "many"], "--processes: must be a whole number from 1 to 64"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_with_exit_code_2(bad, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["playground/build.py", *bad])
    with pytest.raises(SystemExit) as exit:
        cli.run(build.main)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_page_without_models_is_named(tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    page.write_text("<html></html>", encoding="utf-8")
    monkeypatch.setattr(build, "PAGE", page)
    with pytest.raises(cli.UserError, match="holds no models; build it without --from-page"):
        build.main(["--from-page", "--out", str(tmp_path / "new.html")])


# The page in a browser.

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync
--force-prefers-reduced-motion --window-size=1200,1000""".split()


@contextlib.contextmanager
def on_one_core():
    """Processes that are started meanwhile run on one core, where the system can see to that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser on one core. Where there is none, the tests say so and are skipped."""
    reason = "needs selenium (pip install selenium)"
    webdriver = pytest.importorskip("selenium.webdriver", reason=reason)
    from selenium.webdriver.chrome.service import Service

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs Chromium (on Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with on_one_core():
        driver = webdriver.Chrome(options, Service(programs[1]))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium):
    """The page, just opened. Whatever a test does, nothing may be written to the console."""
    chromium.get(build.PAGE.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


def find(page, selector):
    return page.find_element("css selector", selector)


def find_all(page, selector):
    return page.find_elements("css selector", selector)


def click(page, element):
    """With the mouse, away from the bar that stays on top."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def text(page, selector):
    return find(page, selector).text


def texts(page, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
    return page.execute_script(script, selector)


def wait_for(condition, seconds=20):
    """Ask until condition() is true; return how long it took."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds, "it did not happen"
        time.sleep(0.02)
    return time.perf_counter() - started


def show(page, run, moment):
    """Set the bar at the top."""
    page.execute_script("setPolicy(...arguments)", run, moment)


def number(text):
    """The number of a text such as "−1.20 (p = 0.301)"."""
    return float(text.split()[0].replace("−", "-"))


# The model.


@pytest.mark.slow
def test_what_the_page_offers_to_tests(page):
    assert page.execute_script("return playground.runs") == ["sft", "rule", "once", "online"]
    for run, rows in RUNS.items():
        moments = page.execute_script("return playground.moments(arguments[0])", run)
        assert moments == [row["round"] for row in rows]


@pytest.mark.slow
def test_logits_agree_with_the_transformer_on_200_lines(page):
    """After every token of 200 lines of the task and 50 of random tokens, at every moment."""
    rng = np.random.default_rng(SEED)
    lines = [line[line != data.PAD] for line in data.random_lines(200, rng, data.TARGETS)]
    lines += list(rng.integers(len(data.VOCAB), size=(50, data.MAX_LEN)))
    largest = 0.0
    for i, line in enumerate(lines):
        run, moment = EVERY_MOMENT[i % len(EVERY_MOMENT)]
        found = page.execute_script(
            """const [run, moment, ids] = arguments;
            return ids.map((_, t) => playground.logits(run, moment, ids.slice(0, t + 1)));""",
            *(run, moment, line.tolist()),
        )
        with no_grad():
            expected = model_at(run, moment)(line[None]).data.T  # (T, V)
        largest = max(largest, np.abs(np.array(found) - expected).max())
    assert largest < 1e-3


@pytest.mark.slow
def test_greedy_answers_agree_for_all_targets_at_every_moment(page):
    for run, moment in EVERY_MOMENT:
        found = page.execute_script(
            """const [run, moment, targets] = arguments;
            return targets.map((target) => playground.greedy(run, moment, target));""",
            *(run, moment, list(data.TARGETS)),
        )
        expected = evaluation.sample(model_at(run, moment), data.TARGETS, 0.0, rng=None)
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_outcomes_of_sampled_answers_are_as_frequent_as_in_python(page, run):
    moment = len(RUNS[run]) - 1
    each = N_SAMPLED // len(data.HELD_OUT)
    lines = page.execute_script(
        """const [run, moment, targets, each, seed] = arguments;
        return targets.flatMap((target, i) =>
            playground.sample(run, moment, target, each, seed + i));""",
        *(run, moment, data.HELD_OUT, each, SEED),
    )
    rng = data.random_stream(SEED, "answers")
    targets = np.repeat(data.HELD_OUT, each)
    expected = evaluation.sample(model_at(run, moment), targets, 1.0, rng)
    assert len(lines) == len(expected) == N_SAMPLED
    assert {len(line) for line in lines if line[-1] != data.END} <= {data.MAX_LEN}
    shares = [evaluation.metrics(sampled)["shares"] for sampled in (lines, expected)]
    for outcome in data.OUTCOMES:
        ours, theirs = (share[outcome] for share in shares)
        variance = (ours * (1 - ours) + theirs * (1 - theirs)) / N_SAMPLED
        assert abs(ours - theirs) <= 3 * variance**0.5, (outcome, shares)
    # The judge of the page says what data.judge says.
    judged = page.execute_script("return arguments[0].map((line) => judge(line).outcome)", lines)
    assert judged == [data.judge(line).outcome for line in lines]


@pytest.mark.slow
def test_the_judge_of_the_page_reads_any_line_as_python_does(page):
    rng = np.random.default_rng(SEED)
    lines = [data.encode(f"52={end}") + [data.END] for end in ("52", "5+47", "05+47", "+52", "100")]
    lines += [line[:-1] for line in lines]  # without an end token
    lines += [data.encode("52=18+") + [data.END] * 2, data.encode("=5+5") + [data.END], [data.END]]
    # Right and wrong sums of which up to two tokens are exchanged for any others.
    for line in data.random_lines(500, rng, data.TARGETS):
        line = line[line != data.PAD]
        for place in rng.integers(len(line), size=rng.integers(3)):
            line[place] = rng.integers(len(data.VOCAB))
        lines.append(line.tolist())
    found = page.execute_script("return arguments[0].map((line) => judge(line))", lines)
    outcomes = set()
    for line, judgement in zip(lines, found):
        expected = data.judge(line)
        outcomes.add(expected.outcome)
        assert judgement["outcome"] == expected.outcome
        for name in "target", "terms", "total":
            assert judgement.get(name) == getattr(expected, name)
    assert outcomes == set(data.OUTCOMES)


# Part 1.


@pytest.mark.slow
def test_answers_change_with_the_policy_alone(page):
    show(page, "online", 3)
    before = texts(page, "#answers code")
    assert len(before) == 20 and all(answer.startswith("52=") for answer in before)
    show(page, "online", 4)
    assert texts(page, "#answers code") != before
    show(page, "online", 3)
    assert texts(page, "#answers code") == before
    # They are what the model writes with those random numbers, and the bars count them all.
    script = "return playground.sample('online', 3, 52, 300, state.seed)"
    lines = page.execute_script(script)
    assert before == [data.decode(line) for line in lines[:20]]
    wait_for(lambda: text(page, "#counted").startswith("300 answers"))
    metrics = evaluation.metrics(lines)
    for count in "2", "3", "4", "5":
        right, wrong = (round(300 * metrics["answers"][count][kind]) for kind in ("right", "wrong"))
        parts = [f"{n} {word}" for n, word in ((right, "right"), (wrong, "wrong")) if n]
        assert f"{count} terms{', '.join(parts) or '0'}" in texts(page, ".chart-row")


@pytest.mark.slow
def test_the_page_opens_in_two_seconds(page):
    page.refresh()
    times = page.execute_script(
        "const [entry] = performance.getEntriesByType('navigation'); return entry.loadEventEnd"
    )
    assert 0 < times < 2000  # milliseconds
    assert len(find_all(page, "#answers li")) == 20
    assert page.execute_script("return performance.getEntriesByType('resource')") == []


@pytest.mark.slow
@pytest.mark.parametrize("run", ["rule", "once", "online"])
def test_a_move_of_the_slider_shows_twenty_answers_in_300_ms_and_300_in_two_seconds(page, run):
    show(page, run, 0)
    times = []  # milliseconds of each move
    for moment in range(1, len(RUNS[run])):  # a model is decoded when it is first shown
        before = texts(page, "#answers code")
        move = page.execute_async_script(
            """const [moment, done] = arguments;
            const slider = document.getElementById("moment");
            const started = performance.now();
            slider.value = moment;
            slider.dispatchEvent(new Event("input"));
            let painted;
            requestAnimationFrame(() => setTimeout(() => (painted = performance.now() - started)));
            const timer = setInterval(() => {
              if (document.getElementById("counted").textContent.startsWith("300 answers")) {
                clearInterval(timer);
                done([painted, performance.now() - started]);
              }
            }, 5);""",
            moment,
        )
        assert texts(page, "#answers code") != before
        times.append(move)
    # The median, because a busy machine may hold up a single move.
    painted, counted = np.median(times, axis=0)
    assert 0 < painted < 300 and 0 < counted < 2000


# Parts 2 to 4: the numbers.


@pytest.mark.slow
@pytest.mark.parametrize("run, moment", [("rule", 4), ("online", 8), ("sft", 0)])
def test_rewards_and_loss_of_a_pair_are_those_of_python(page, run, moment):
    show(page, run, moment)
    pair = {"chosen": "52=18+29+5", "rejected": "52=18+29+4+3"}
    credits, logps = {}, []
    for side, line in pair.items():
        box = find(page, f"#{side}-line")
        box.clear()
        box.send_keys(line)
        ids = evaluation.line_of_text(line)
        credit = evaluation.credit(model_at(run, moment), MODELS["sft"], ids, beta=0.8)
        credits[side] = credit
        assert number(text(page, f"#{side}-reward")) == pytest.approx(credit["reward"], abs=0.051)
        shown = [number(reward) for reward in texts(page, f"#{side}-tokens .token-reward")]
        expected = [reward for _, reward in credit["tokens"]]
        np.testing.assert_allclose(shown, expected, atol=0.051)
        for name in "policy", "reference":
            logp = number(text(page, f"#{side}-{name}"))
            assert logp == pytest.approx(credit[f"{name}_logp"], abs=0.0051)
    for name in "policy", "reference":
        logps += [Tensor([credits[side][f"{name}_logp"]], requires_grad=True) for side in pair]
    loss = dpo.dpo_loss(*logps, beta=0.8)
    loss.backward()
    margin = credits["chosen"]["reward"] - credits["rejected"]["reward"]
    assert number(text(page, "#pair-margin")) == pytest.approx(margin, abs=0.0051)
    assert number(text(page, "#pair-h")) == pytest.approx(margin / 0.8, abs=0.0051)
    assert number(text(page, "#pair-loss")) == pytest.approx(loss.item(), abs=0.00051)
    slopes = [number(slope) for slope in text(page, "#pair-slope").split(", ")]
    np.testing.assert_allclose(slopes, [logps[0].grad[0], logps[1].grad[0]], atol=0.00051)


@pytest.mark.slow
def test_next_tokens_are_those_that_both_models_expect(page):
    show(page, "rule", 4)
    click(page, find_all(page, "#rejected-tokens .token")[9])  # 52=18+29+4+1: the end token
    assert text(page, "#next-before") == "52=18+29+4+1"
    assert text(page, "#next-tokens .written code") == "end"
    for kind, model in ("policy", model_at("rule", 4)), ("reference", MODELS["sft"]):
        with no_grad():
            logits = model(np.array([data.encode("52=18+29+4+1")])).data[:, -1]
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        shown = texts(page, f".next-{kind} .next-number")
        assert len(shown) == len(data.VOCAB)
        for percent, p in zip(shown, probs):
            percent = float(percent.removeprefix("<").removesuffix(" %"))
            assert percent == pytest.approx(100 * p, abs=0.51 if p > 0.1 else 0.11)


@pytest.mark.slow
def test_pairs_that_the_reader_marks_have_the_loss_and_weight_of_python(page):
    click(page, find(page, "#mark-by-rule"))
    accepted, rejected = [], []
    for line in texts(page, "#to-judge code"):
        is_accepted = data.is_accepted(evaluation.line_of_text(line))
        (accepted if is_accepted else rejected).append(line)
    assert min(len(accepted), len(rejected)) > 0
    show(page, "online", 8)
    rows = find_all(page, "#pairs tr")
    assert len(rows) == min(len(accepted), len(rejected))
    pulling = 0
    for row, chosen_line, rejected_line in zip(rows, accepted, rejected):
        cells = [cell.text for cell in row.find_elements("css selector", "td")]
        assert cells[0] == f"▲ {chosen_line}\n▼ {rejected_line}"
        margin = 0.0
        for line, factor in (chosen_line, 1), (rejected_line, -1):
            ids = evaluation.line_of_text(line)
            model = model_at("online", 8)
            margin += factor * evaluation.credit(model, MODELS["sft"], ids, beta=0.8)["reward"]
        weight = 0.8 / (1 + np.exp(margin))
        assert number(cells[1]) == pytest.approx(margin / 0.8, abs=0.0051)
        assert number(cells[2]) == pytest.approx(np.log(1 + np.exp(-margin)), abs=0.00051)
        assert number(cells[3]) == pytest.approx(weight, abs=0.00051)
        assert cells[3].split()[1] == ("pulls" if weight >= 0.08 else "settled")
        pulling += weight >= 0.08
    assert text(page, "#pairs-words").startswith(f"{pulling} of {len(rows)} pairs still pull")


@pytest.mark.slow
def test_answers_to_different_targets_are_no_pair(page):
    show(page, "rule", 4)
    box = find(page, "#rejected-line")
    box.clear()
    box.send_keys("53=18+29+5")
    words = (
        "No pair: the chosen answer is to 52 and the rejected one to 53, but a pair has one prompt."
    )
    assert text(page, "#pair-words") == words
    for name in "h", "margin", "loss", "slope":
        assert text(page, f"#pair-{name}") == ""
    assert not find(page, "#loss-point").is_displayed()
    # Each answer has a reward on its own.
    assert text(page, "#chosen-reward") != "" != text(page, "#rejected-reward")
    box.clear()
    box.send_keys("52=30+22")
    assert text(page, "#pair-words") != words and text(page, "#pair-margin") != ""
    assert find(page, "#loss-point").is_displayed()


@pytest.mark.slow
def test_words_beneath_a_pair_grow_with_its_weight(page):
    script = "return arguments[0].map((h) => pairWords(BETA * h, sigmoid(-BETA * h)))"
    words = page.execute_script(script, [9, 2, 0.1, 0, -0.1, -2, -9])
    ends = ["no gradient", "less than", "about as hard", "0.693", "about as hard", "harder", "can"]
    for line, end in zip(words, ends, strict=True):
        assert end in line
    for line, order in zip(words[1:3] + words[4:], ["is above"] * 2 + ["ranks the rejected"] * 3):
        assert order in line


@pytest.mark.slow
def test_a_loss_beyond_the_picture_is_marked(page):
    marks = page.execute_script(
        """return [-12, 5, 12.34].map((h) => {
          drawLoss(h);
          return document.getElementById("loss-beyond").textContent;
        });"""
    )
    assert marks == ["← h = −12.0", "", "h = +12.3 →"]


@pytest.mark.slow
def test_guided_pairs_show_the_numbers_that_their_text_names(page):
    rule, wrong, online = find_all(page, "button[data-chosen]")

    def tokens():
        names = texts(page, "#rejected-tokens .token-text")
        return list(zip(names, texts(page, "#rejected-tokens .token-reward"), strict=True))

    def next_tokens():
        """What both models give to the tokens after 52=18+29+4+, in percent."""
        assert text(page, "#next-before") == "52=18+29+4+"
        names = texts(page, ".next-row code")
        shares = (texts(page, f".next-{kind} .next-number") for kind in ("reference", "policy"))
        return {name: both for name, *both in zip(names, *shares, strict=True)}

    click(page, rule)
    assert text(page, "#rejected-reward") == "−16.5"
    assert tokens()[-4:] == [("4", "−0.5"), ("+", "0.0"), ("1", "−2.3"), ("end", "−13.8")]
    click(page, wrong)
    assert text(page, "#rejected-outcome").endswith("wrong sum: 53")
    likelier = number(text(page, "#rejected-policy")) - number(text(page, "#rejected-reference"))
    assert np.exp(likelier) == pytest.approx(9, abs=0.5)
    found = next_tokens()
    assert found["1"][0] == "96 %" and found["2"][1] == "94 %" and found["3"][1] == "0.4 %"
    box = find(page, "#rejected-line")
    box.clear()
    box.send_keys("52=18+29+4+3")
    assert text(page, "#rejected-reward") == "+8.9"
    click(page, online)
    found = tokens()
    assert min(found, key=lambda token: number(token[1]))[0] == "4"
    assert [reward for _, reward in found[-3:]] == ["0.0", "0.0", "0.0"]


@pytest.mark.slow
def test_the_best_policy_is_that_of_the_formula(page):
    for value in -1.297, -0.097, 1.003:
        exponent = page.execute_script(
            """const slider = document.getElementById("beta-slider");
            slider.value = arguments[0];
            slider.dispatchEvent(new Event("input"));
            return Number(slider.value);""",
            value,
        )
        assert exponent == pytest.approx(value)
        beta = 10**exponent
        reference = np.array([0.25, 0.4, 0.3, 0.03, 0.02])
        reward = np.array([2.0, 1, 1, 0, -1])
        best = reference * np.exp(reward / beta)
        best /= best.sum()
        divergence = (best * np.log(best / reference)).sum()
        shown = texts(page, "#five tr td:last-child .best-bar:last-child .chart-number")
        for percent, p in zip(shown, best, strict=True):
            percent = float(percent.removeprefix("<").removesuffix(" %"))
            assert percent == pytest.approx(100 * p, abs=0.51 if p > 0.1 else 0.11)
        assert float(text(page, "#beta-value")) == pytest.approx(beta, abs=0.0051)
        assert float(text(page, "#beta-kl")) == pytest.approx(divergence, abs=0.00051)
        assert float(text(page, "#beta-mean")) == pytest.approx(best @ reward, abs=0.00051)
        objective = best @ reward - beta * divergence
        shown = [float(part) for part in text(page, "#beta-objective").split(" = ")]
        np.testing.assert_allclose(shown, [objective, objective], atol=0.0011)


# The page as a reader uses it.


@pytest.mark.slow
def test_play_begins_at_the_start_unless_the_reader_stopped_in_this_run(page):
    from selenium.webdriver import Keys

    assert page.execute_script("return [state.run, state.moment]") == ["online", 0]
    play = find(page, "#play")

    def first_round():
        """Play, and stop at once: the round at which it begins."""
        click(page, play)
        shown = text(page, "#round")
        click(page, play)
        return shown

    # A guided button jumps to its round, and another run keeps the round.
    click(page, find(page, "button[data-run=rule]"))
    assert text(page, "#round") == "round 50"
    click(page, find(page, "input[value=once] + span"))
    assert text(page, "#round") == "round 50"
    assert first_round() == "round 0"
    # The reader moves the slider, plays, and pauses.
    show(page, "once", 0)
    find(page, "#moment").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert first_round() == text(page, "#round") == "round 10"
    assert first_round() == "round 10"
    click(page, find(page, "input[value=rule] + span"))
    assert text(page, "#round") == "round 10" and first_round() == "round 0"


@pytest.mark.slow
def test_every_control_works_once(page):
    page.execute_script(
        """window.used = new Set();
        for (const type of ["click", "input"]) {
          document.addEventListener(type, (event) => {
            used.add(event.target.closest("button, input"));
          }, true);
        }"""
    )
    from selenium.webdriver import ActionChains, Keys

    # The bar at the top.
    for run in "sft", "once", "online", "rule":
        click(page, find(page, f"input[value={run}] + span"))
        assert page.execute_script("return state.run") == run
        assert find(page, "#moment").is_enabled() == find(page, "#play").is_enabled()
        assert find(page, "#play").is_enabled() == (run != "sft")
    show(page, "rule", 0)
    slider = find(page, "#moment")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert text(page, "#round") == f"round {RUNS['rule'][1]['round']}"
    show(page, "rule", len(RUNS["rule"]) - 1)
    click(page, find(page, "#play"))  # from the start again
    assert text(page, "#round") == "round 0" and "Pause" in text(page, "#play")
    wait_for(lambda: text(page, "#round") != "round 0")
    click(page, find(page, "#play"))
    stopped = text(page, "#round")
    time.sleep(1.5)
    assert text(page, "#round") == stopped and "Play" in text(page, "#play")

    # Part 1.
    target = find(page, "#target")
    target.send_keys(Keys.CONTROL, "a")
    target.send_keys("37")
    assert all(answer.startswith("37=") for answer in texts(page, "#answers code"))
    assert "Training asked for 37" in text(page, "#target-kind")
    target.send_keys("0", Keys.TAB)  # 370 is no target
    assert target.get_attribute("value") == "37"
    find(page, "#target-slider").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "39 is held out" in text(page, "#target-kind")
    before = texts(page, "#answers code")
    click(page, find(page, "#other-numbers"))
    assert texts(page, "#answers code") != before
    for selector in "#answers .answer", "#greedy .answer":
        answer = find(page, selector)
        line = answer.find_element("css selector", "code").text
        accepted = data.is_accepted(data.encode(line) + [data.END])
        click(page, answer)
        side = "chosen" if accepted else "rejected"
        assert find(page, f"#{side}-line").get_attribute("value") == line
        # It has the keyboard's focus, at the token with the largest reward.
        assert page.switch_to.active_element.get_attribute("aria-pressed") == "true"

    # Part 2.
    for button in find_all(page, "button[data-chosen]"):
        click(page, button)
        assert page.execute_script("return state.run") == button.get_attribute("data-run")
        for side in "chosen", "rejected":
            shown = find(page, f"#{side}-line").get_attribute("value")
            assert shown == button.get_attribute(f"data-{side}")
    for side in "chosen", "rejected":
        box = find(page, f"#{side}-line")
        tokens = len(find_all(page, f"#{side}-tokens .token"))
        box.send_keys("+")
        assert "Type a target" in text(page, f"#{side}-error")
        # Nothing is left of the answer that stood there.
        assert not find_all(page, f"#{side}-tokens .token")
        assert text(page, f"#{side}-outcome") == text(page, "#pair-margin") == ""
        assert text(page, "#pair-words") == "A pair needs two answers."
        box.send_keys("7")
        assert text(page, f"#{side}-error") == ""
        assert len(find_all(page, f"#{side}-tokens .token")) == tokens + 2
        first, second, third = find_all(page, f"#{side}-tokens .token")[:3]
        click(page, first)
        assert text(page, "#next-before") == "52="
        page.switch_to.active_element.send_keys(Keys.TAB)
        assert text(page, "#next-before") == "52=1"
        ActionChains(page).move_to_element(third).perform()
        assert text(page, "#next-before") == "52=18"
    before = number(text(page, "#pair-margin"))
    click(page, find(page, "#swap"))
    assert number(text(page, "#pair-margin")) == -before != 0

    # Part 3.
    show(page, "sft", 0)  # two buttons would do the same
    assert not find(page, "#sample-policy").is_displayed()
    show(page, "online", 8)
    before = texts(page, "#to-judge code")
    assert len(before) == len(set(before)) == 12
    click(page, find(page, "#sample-reference"))
    assert not set(texts(page, "#to-judge code")) & {*before}  # another target by now
    click(page, find(page, "#sample-policy"))
    assert "Mark at least one" in text(page, "#pairs-words")
    click(page, find_all(page, ".mark.chosen")[0])
    click(page, find_all(page, ".mark.rejected")[1])
    first, second = texts(page, "#to-judge code")[:2]
    assert texts(page, "#pairs code") == [first, second]
    click(page, find_all(page, ".mark.rejected")[0])  # another mark instead
    assert not find(page, "#pairs-table").is_displayed()
    click(page, find(page, "#mark-by-rule"))
    assert len(find_all(page, ".mark[aria-pressed=true]")) == len(texts(page, "#to-judge code"))
    click(page, find(page, "#clear-marks"))
    assert not find_all(page, ".mark[aria-pressed=true]")

    # Part 4.
    before = text(page, "#beta-kl")
    find(page, "#beta-slider").send_keys(Keys.ARROW_RIGHT)
    assert text(page, "#beta-kl") != before
    for reward in find_all(page, "#five input"):
        before = text(page, "#beta-kl")
        reward.send_keys(Keys.ARROW_DOWN)
        assert text(page, "#beta-kl") != before

    # Nothing was left out: controls that are alike count as one.
    unused = page.execute_script(
        """const kind = (node) =>
            node.id || (node.name && node.value) || node.classList[0] || node.type;
        const kinds = new Set([...used].filter(Boolean).map(kind));
        return [...document.querySelectorAll("button, input")].map(kind)
            .filter((name) => !kinds.has(name));"""
    )
    assert unused == []


@pytest.fixture
def sized(page):
    """A function that shows the page in a width of so many pixels."""

    def resize(width):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield resize
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 768, 1200])
def test_no_width_needs_sideways_scrolling(page, sized, width):
    sized(width)
    for button in find_all(page, "button[data-chosen]"):
        page.execute_script("arguments[0].click()", button)
        click(page, find(page, "#mark-by-rule"))
        needed = page.execute_script("return document.documentElement.scrollWidth")
        assert needed <= width
        # Nor do the tables, which could be scrolled on their own.
        assert page.execute_script(
            """return [...document.querySelectorAll(".scroll")]
                .every((node) => node.scrollWidth <= node.clientWidth)"""
        )


@pytest.mark.slow
@pytest.mark.parametrize("width, highest", [(390, 80), (1200, 60)])
def test_the_bar_is_low_and_its_play_button_stays_in_place(page, sized, width, highest):
    sized(width)
    places = page.execute_script(
        """const place = () => {
          const { x, y, width, height } = byId("play").getBoundingClientRect();
          return [x, y, width, height].join();
        };
        const places = [];
        for (const run of playground.runs) {
          for (const moment of playground.moments(run).keys()) {
            setPolicy(run, moment);
            places.push(place());
          }
        }
        setPolicy("online", 0);
        play();
        places.push(place());
        pause();
        return places;"""
    )
    assert len(places) == 1 + len(EVERY_MOMENT) and len(set(places)) == 1
    bar = page.execute_script(
        "return document.querySelector('.policy-bar').getBoundingClientRect().height"
    )
    assert bar <= highest


def luminance(colour):
    """The relative luminance of WCAG 2: colour: red, green and blue from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_strongest_colours_of_tokens_leave_their_text_legible(page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        for kind in "up", "down":
            found = page.execute_script(
                """const token = document.querySelector(".token");
                token.classList.remove("up", "down");
                token.classList.add(arguments[0]);
                token.style.setProperty("--strength", 1);
                const { color, backgroundColor } = getComputedStyle(token);
                return [color, backgroundColor];""",
                kind,
            )
            colours = [[float(x) for x in re.findall(r"[\d.]+", colour)] for colour in found]
            # rgb(28, 31, 35), but color(srgb 0.11 0.12 0.14)
            colours[0] = [c / 255 for c in colours[0]]
            assert found[0].startswith("rgb(") and found[1].startswith("color(srgb")
            darker, lighter = sorted(luminance(colour[:3]) for colour in colours)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (scheme, kind)
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
