// Part 3: the reader marks answers as chosen and rejected; which of the pairs still pull?
"use strict";

const N_TO_JUDGE = 12;
const SETTLED = 0.1; // below this share of its largest weight, beta, a pair counts as settled
let toJudge = []; // of each answer its ids and its mark: "chosen", "rejected" or ""
let judgeSeed = 100;

// Different answers of a model, sampled.
function sampleToJudge(model) {
  judgeSeed += 1;
  const lines = sample(model, state.target, 60, uniformNumbers(judgeSeed, 60));
  const different = new Map(lines.map((line) => [line.join(), line]));
  toJudge = [...different.values()].slice(0, N_TO_JUDGE).map((line) => ({ line, mark: "" }));
  showToJudge();
}

function showToJudge() {
  const items = toJudge.map((answer) => {
    const judgement = judge(answer.line);
    const buttons = SIDES.map((side) => {
      const button = element(
        "button",
        { type: "button", className: `mark ${side}`, "aria-pressed": answer.mark === side },
        `${side === "chosen" ? "▲" : "▼"} ${side}`,
      );
      button.setAttribute("aria-label", `${decode(answer.line)}: ${side}`);
      button.addEventListener("click", () => {
        answer.mark = answer.mark === side ? "" : side;
        for (const other of buttons) {
          other.setAttribute("aria-pressed", other === button && answer.mark === side);
        }
        showPairs();
      });
      return button;
    });
    return element(
      "li",
      {},
      sign(judgement.outcome),
      element("code", {}, decode(answer.line)),
      element("span", { className: "marks" }, ...buttons),
    );
  });
  byId("to-judge").replaceChildren(...items);
  showPairs();
}

function marked(mark) {
  return toJudge.filter((answer) => answer.mark === mark).map(({ line }) => line);
}

function showPairs() {
  const pairs = pairUp(marked("chosen"), marked("rejected"));
  const model = policy();
  let pulling = 0;
  let sumOfLosses = 0;
  const rows = pairs.map(([chosen, rejected]) => {
    const { h, loss, weight } = dpoLoss(
      credit(model, reference, chosen, BETA),
      credit(model, reference, rejected, BETA),
      BETA,
    );
    const pulls = weight >= SETTLED * BETA;
    pulling += pulls;
    sumOfLosses += loss;
    const answers = [element("code", {}, decode(chosen)), element("code", {}, decode(rejected))];
    return element(
      "tr",
      {},
      element("td", {}, "▲ ", answers[0], element("br"), "▼ ", answers[1]),
      element("td", {}, signed(h, 2)),
      element("td", {}, loss.toFixed(3)),
      element(
        "td",
        {},
        element(
          "span",
          { className: "track small", "aria-hidden": "true" },
          element("span", { className: "bar weight", style: `width: ${(100 * weight) / BETA}%` }),
        ),
        ` ${weight.toFixed(3)} `,
        element("b", {}, pulls ? "pulls" : "settled"),
      ),
    );
  });
  byId("pairs").replaceChildren(...rows);
  byId("pairs-table").hidden = pairs.length === 0;
  byId("pairs-words").textContent =
    pairs.length === 0
      ? "Mark at least one answer as chosen and one as rejected."
      : `${pulling} of ${pairs.length} pairs still pull; mean loss ` +
        `${(sumOfLosses / pairs.length).toFixed(3)}. Move the round and watch.`;
}

byId("sample-reference").addEventListener("click", () => sampleToJudge(reference));
byId("sample-policy").addEventListener("click", () => sampleToJudge(policy()));
byId("mark-by-rule").addEventListener("click", () => {
  for (const answer of toJudge) {
    answer.mark = judge(answer.line).outcome === ACCEPTED ? "chosen" : "rejected";
  }
  showToJudge();
});
byId("clear-marks").addEventListener("click", () => {
  for (const answer of toJudge) {
    answer.mark = "";
  }
  showToJudge();
});

// At the start of a run the policy is the SFT model, and one button is enough.
function showSampleButtons() {
  byId("sample-policy").hidden = policy() === reference;
}

updates.push(showPairs, showSampleButtons);
