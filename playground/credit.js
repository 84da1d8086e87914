// Part 2: where the reward of an answer sits, token by token, and what the loss makes of a pair.
"use strict";

// The two answers of the pair, ids or null, and the token that is looked at.
const pair = { chosen: null, rejected: null };
const looked = { side: "rejected", index: 0 };
const SIDES = ["chosen", "rejected"];
let credits = {}; // of the answers that are not null, under the policy that is shown

// Read the answer that a side's box holds. A text that is no answer leaves that side empty.
function readLine(side) {
  pair[side] = lineOfText(byId(`${side}-line`).value.replace(/\s/g, ""));
  byId(`${side}-error`).textContent = pair[side]
    ? ""
    : "Type a target from 5 to 100 and numbers of one or two digits, such as 52=18+29+5.";
}

function setLine(side, text) {
  byId(`${side}-line`).value = text;
  readLine(side);
}

// Look at the token of a side whose reward is largest, up or down.
function lookAtLargest(side) {
  const sizes = credits[side].tokens.map(({ reward }) => Math.abs(reward));
  looked.side = side;
  looked.index = sizes.indexOf(Math.max(...sizes));
}

function setPair(chosenText, rejectedText) {
  setLine("chosen", chosenText);
  setLine("rejected", rejectedText);
  showCredit();
  lookAtLargest("rejected");
  showCredit();
}

// An answer of part 1. The judge decides on which side it stands.
function showAnswerInPart2(line, outcome) {
  const side = outcome === ACCEPTED ? "chosen" : "rejected";
  setLine(side, decode(line));
  showCredit();
  lookAtLargest(side);
  showCredit();
  byId("credit").scrollIntoView({ block: "start" });
  byId(`${side}-tokens`).querySelector("[aria-pressed=true]").focus({ preventScroll: true });
}

function showCredit() {
  const model = policy();
  credits = {};
  for (const side of SIDES) {
    if (pair[side]) {
      credits[side] = credit(model, reference, pair[side], BETA);
      showSide(side);
    } else {
      clearSide(side);
    }
  }
  showPair();
  showNextTokens();
}

function clearSide(side) {
  byId(`${side}-tokens`).replaceChildren();
  for (const name of ["outcome", "reward", "policy", "reference"]) {
    byId(`${side}-${name}`).textContent = "";
  }
}

function showSide(side) {
  const { line, tokens, reward, policyLogp, referenceLogp } = credits[side];
  const judgement = judge(line);
  byId(`${side}-outcome`).replaceChildren(sign(judgement.outcome), outcomeText(judgement));
  // The buttons stay, if their number does, so that the keyboard's focus is not lost.
  const row = byId(`${side}-tokens`);
  while (row.children.length > tokens.length) {
    row.lastChild.remove();
  }
  while (row.children.length < tokens.length) {
    row.append(tokenButton(side, row.children.length));
  }
  tokens.forEach(({ token, reward: own }, i) => {
    const button = row.children[i];
    button.replaceChildren(
      element("span", { className: "token-text" }, token === "<end>" ? "end" : token),
      element("span", { className: "token-reward" }, signed(own)),
    );
    button.style.setProperty("--strength", Math.min(Math.abs(own) / 10, 1));
    button.classList.toggle("up", own > 0);
    button.classList.toggle("down", own < 0);
    button.setAttribute("aria-label", `${token}, reward ${signed(own)}`);
  });
  byId(`${side}-reward`).textContent = signed(reward);
  const logpText = (logp) => `${signed(logp, 2)} (p = ${probability(logp)})`;
  byId(`${side}-policy`).textContent = logpText(policyLogp);
  byId(`${side}-reference`).textContent = logpText(referenceLogp);
}

function tokenButton(side, index) {
  const button = element("button", { type: "button", className: "token" });
  function look() {
    if (looked.side !== side || looked.index !== index) {
      looked.side = side;
      looked.index = index;
      showNextTokens();
    }
  }
  button.addEventListener("focus", look);
  button.addEventListener("click", look);
  button.addEventListener("mousemove", (event) => {
    // When the page scrolls below a mouse at rest, browsers report a move of 0.
    if (event.movementX !== 0 || event.movementY !== 0) {
      look();
    }
  });
  return button;
}

// Why the two answers are no pair, in words; "" if they are one.
function whyNoPair() {
  if (!pair.chosen || !pair.rejected) {
    return "A pair needs two answers.";
  }
  const [chosen, rejected] = SIDES.map((side) => decode(pair[side]).split("=")[0]);
  if (chosen !== rejected) {
    const targets = `the chosen answer is to ${chosen} and the rejected one to ${rejected}`;
    return `No pair: ${targets}, but a pair has one prompt.`;
  }
  return "";
}

function showPair() {
  const why = whyNoPair();
  byId("loss-point").toggleAttribute("hidden", why !== "");
  if (why) {
    for (const name of ["h", "margin", "loss", "slope"]) {
      byId(`pair-${name}`).textContent = "";
    }
    byId("loss-beyond").textContent = "";
    byId("pair-words").textContent = why;
    return;
  }
  const { h, margin, loss, weight } = dpoLoss(credits.chosen, credits.rejected, BETA);
  byId("pair-h").textContent = signed(h, 2);
  byId("pair-margin").textContent = signed(margin, 2);
  byId("pair-loss").textContent = loss.toFixed(3);
  byId("pair-slope").textContent = `${signed(-weight, 3)}, ${signed(weight, 3)}`;
  byId("pair-words").textContent = pairWords(margin, weight / BETA);
  drawLoss(h);
}

// share: the weight of the pair in the gradient, as a share of the largest, beta.
function pairWords(margin, share) {
  if (share < SETTLED) {
    return "This pair is settled and contributes almost no gradient.";
  }
  if (Math.abs(margin) < 1e-9) {
    return "Policy and reference agree on this pair: h = 0, and the loss is ln 2 = 0.693.";
  }
  const order =
    margin > 0
      ? "The chosen reward is above the rejected one, but the pair is not settled."
      : "By reward, the policy ranks the rejected answer above the chosen one.";
  let pull = "harder than pairs do at the start";
  if (share < 0.4) {
    pull = "less than pairs do at the start";
  } else if (share < 0.6) {
    pull = "about as hard as pairs do at the start";
  } else if (share > 0.9) {
    pull = "almost as hard as a pair can";
  }
  return `${order} Shown in training now, it would pull ${pull}.`;
}

// The curve of the loss over h, and the pair's place on it.
function drawLoss(h) {
  const [width, height, lowest, highest] = [300, 120, -10, 10];
  const lossAt = (value) => -logSigmoid(BETA * value);
  const x = (value) => ((value - lowest) / (highest - lowest)) * width;
  const y = (loss) => height - (loss / lossAt(lowest)) * (height - 12) - 4;
  const points = [];
  for (let value = lowest; value <= highest; value += 0.5) {
    points.push(`${x(value)},${y(lossAt(value))}`);
  }
  byId("loss-curve").setAttribute("points", points.join(" "));
  // Beyond the picture the point is drawn at its edge, beside an arrow.
  const shown = Math.max(lowest, Math.min(highest, h));
  byId("loss-point").setAttribute("cx", x(shown));
  byId("loss-point").setAttribute("cy", y(lossAt(shown)));
  const beyond = byId("loss-beyond");
  beyond.textContent = "";
  if (h < lowest) {
    beyond.textContent = `← h = ${signed(h)}`;
  } else if (h > highest) {
    beyond.textContent = `h = ${signed(h)} →`;
  }
  beyond.setAttribute("text-anchor", h < 0 ? "start" : "end");
  beyond.setAttribute("x", h < 0 ? 14 : 304);
  beyond.setAttribute("y", y(lossAt(shown)) + (h < 0 ? 2 : -12));
}

// What both models expected at the token that is looked at.
function showNextTokens() {
  if (!credits[looked.side]) {
    byId("next-before").textContent = "";
    byId("next-tokens").replaceChildren();
    return;
  }
  const tokens = credits[looked.side].tokens;
  looked.index = Math.min(looked.index, tokens.length - 1);
  const { token, before, policyProbs, referenceProbs } = tokens[looked.index];
  for (const side of SIDES) {
    [...byId(`${side}-tokens`).children].forEach((button, i) => {
      button.setAttribute("aria-pressed", side === looked.side && i === looked.index);
    });
  }
  byId("next-before").textContent = before;
  const rows = VOCAB.map((name, id) => {
    const bar = (kind, p) =>
      element(
        "span",
        { className: `next-${kind}` },
        element("span", { className: p < 0.001 ? "next-number hint" : "next-number" }, percent(p)),
        element("span", { className: `bar ${kind}`, style: `width: ${70 * p}%` }),
      );
    return element(
      "div",
      { className: name === token ? "next-row written" : "next-row" },
      bar("reference", referenceProbs[id]),
      element("code", {}, name === "<end>" || name === "<pad>" ? name.slice(1, -1) : name),
      bar("policy", policyProbs[id]),
    );
  });
  byId("next-tokens").replaceChildren(...rows);
}

for (const side of SIDES) {
  byId(`${side}-line`).addEventListener("input", () => {
    readLine(side);
    showCredit();
  });
}

byId("swap").addEventListener("click", () => {
  const [chosen, rejected] = SIDES.map((side) => byId(`${side}-line`).value);
  setLine("chosen", rejected);
  setLine("rejected", chosen);
  showCredit();
});

// Buttons that set a pair and, if they name one, the policy to look at it with.
for (const button of document.querySelectorAll("button[data-chosen]")) {
  button.addEventListener("click", () => {
    const { chosen, rejected, run, round } = button.dataset;
    pause();
    const moment = FACTS.runs[run].findIndex((row) => row.round >= Number(round));
    setPolicy(run, moment < 0 ? FACTS.runs[run].length - 1 : moment);
    setPair(chosen, rejected);
  });
}

setLine("chosen", "52=18+29+5");
setLine("rejected", "52=18+29+4+1");
updates.push(showCredit);
