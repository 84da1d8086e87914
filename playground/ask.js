// Part 1: sampled answers, how many terms they have, and the greedy answer.
"use strict";

const N_LISTED = 20;
const N_COUNTED = 300;
const CHUNK = 40; // answers decoded together, so that the page stays responsive in between
let listed = []; // the answers in the list, as text
let asked = 0; // how often the model was asked; an older question is dropped

function ask() {
  const question = ++asked;
  const model = policy();
  const { target, seed } = state;
  // The same random numbers for every policy, so that only the policy makes a difference.
  const uniforms = uniformNumbers(seed, N_COUNTED);
  const lines = sample(model, target, N_LISTED, uniforms.subarray(0, N_LISTED * MAX_LEN));
  showAnswers(lines);
  const [greedy] = sample(model, target, 1, null);
  byId("greedy").replaceChildren(answerButton(greedy));
  showChart(lines);

  function askMore() {
    if (question !== asked) {
      return;
    }
    const start = lines.length;
    const end = Math.min(start + CHUNK, N_COUNTED);
    const own = uniforms.subarray(start * MAX_LEN, end * MAX_LEN);
    lines.push(...sample(model, target, end - start, own));
    showChart(lines);
    if (end < N_COUNTED) {
      setTimeout(askMore);
    }
  }
  requestAnimationFrame(() => setTimeout(askMore)); // once the list is on the screen
}

// A button with an answer and its outcome; a click shows where its reward sits.
function answerButton(line) {
  const judgement = judge(line);
  const text = decode(line);
  const button = element(
    "button",
    { type: "button", className: "answer", title: "show where its reward sits" },
    sign(judgement.outcome),
    element("code", {}, text),
    element("span", { className: "visually-hidden" }, judgement.outcome),
  );
  if (judgement.outcome === WRONG_SUM) {
    button.append(element("small", {}, `sum ${judgement.total}`));
  }
  button.addEventListener("click", () => showAnswerInPart2(line, judgement.outcome));
  return button;
}

function showAnswers(lines) {
  const items = lines.map((line, i) => {
    const isNew = listed.length > 0 && listed[i] !== decode(line);
    return element("li", { className: isNew ? "new" : "" }, answerButton(line));
  });
  listed = lines.map(decode);
  byId("answers").replaceChildren(...items);
}

// Bars by number of terms, right and wrong.
function showChart(lines) {
  const judged = lines.map((line) => judge(line));
  const countOf = ({ terms }) => Math.min(terms.length, 6);
  const rows = [1, 2, 3, 4, 5, 6].map((count) => {
    const own = judged.filter((judgement) => judgement.terms && countOf(judgement) === count);
    const wrong = own.filter(({ outcome }) => outcome === WRONG_SUM).length;
    const name = count === 1 ? "1 term" : count === 6 ? "6 or more" : `${count} terms`;
    const right = own.length - wrong;
    const kind = count === FACTS.prefer ? "accepted" : "right";
    return chartRow(name, [[kind, right, "right"], ["wrong", wrong, "wrong"]], lines.length);
  });
  const unparsed = judged.filter(({ outcome }) => outcome === DOES_NOT_PARSE).length;
  rows.push(chartRow("does not parse", [["unparsed", unparsed, ""]], lines.length));
  byId("chart").replaceChildren(...rows);

  const n = (outcome) => judged.filter((judgement) => judgement.outcome === outcome).length;
  const shares = FACTS.outcomes.map((name) => `${percent(n(name) / lines.length)} ${name}`);
  byId("counted").textContent = `${lines.length} answers: ${shares.join("; ")}`;
}

// A row of a bar chart. parts: [class, number, word] of each part of the bar.
function chartRow(name, parts, total) {
  const bars = parts.map(([kind, n]) =>
    element("span", { className: `bar ${kind}`, style: `width: ${(100 * n) / total}%` }),
  );
  const numbers = parts.filter(([, n]) => n > 0).map(([, n, word]) => `${n} ${word}`.trim());
  return element(
    "div",
    { className: "chart-row" },
    element("span", { className: "chart-name" }, name),
    element("span", { className: "track", "aria-hidden": "true" }, ...bars),
    element("span", { className: "chart-number" }, numbers.join(", ") || "0"),
  );
}

function setTarget(target) {
  state.target = target;
  byId("target").value = target;
  byId("target-slider").value = target;
  const isHeldOut = FACTS.held_out.includes(target);
  byId("target-kind").textContent = isHeldOut
    ? `${target} is held out: no training ever asked for it.`
    : `Training asked for ${target}.`;
  ask();
}

for (const input of [byId("target"), byId("target-slider")]) {
  input.addEventListener("input", () => {
    const target = Number(input.value);
    if (Number.isInteger(target) && target >= LOWEST_TARGET && target <= HIGHEST_TARGET) {
      setTarget(target);
    }
  });
}
// A number that is no target gives way to the last one that was.
byId("target").addEventListener("change", () => (byId("target").value = state.target));

byId("other-numbers").addEventListener("click", () => {
  state.seed += 1;
  ask();
});

updates.push(ask);
