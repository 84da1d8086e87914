// Part 4: the best policy for given rewards, pi* = pi_ref exp(r / beta) / Z.
"use strict";

const FIVE = [
  { answer: "30+20+2", reference: 0.25, reward: 2 },
  { answer: "30+22", reference: 0.4, reward: 1 },
  { answer: "18+29+4+1", reference: 0.3, reward: 1 },
  { answer: "30+20+3", reference: 0.03, reward: 0 },
  { answer: "30+24", reference: 0.02, reward: -1 },
];

// pi* of answers with reference probabilities and rewards; also log Z.
function bestPolicy(referenceProbs, rewards, beta) {
  // Subtracting the largest exponent keeps exp from overflowing. It is added to log Z again.
  const exponents = rewards.map((reward) => reward / beta);
  const largest = Math.max(...exponents);
  const weights = referenceProbs.map((p, i) => p * Math.exp(exponents[i] - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return { best: weights.map((weight) => weight / total), logZ: Math.log(total) + largest };
}

function showBest() {
  const beta = 10 ** Number(byId("beta-slider").value);
  byId("beta-slider").setAttribute("aria-valuetext", beta.toFixed(2));
  byId("beta-value").textContent = beta.toFixed(2);
  const probs = FIVE.map(({ reference }) => reference);
  const rewards = FIVE.map(({ reward }) => reward);
  const { best, logZ } = bestPolicy(probs, rewards, beta);
  best.forEach((p, i) => {
    const [bar, number] = byId(`best-${i}`).children;
    bar.firstChild.style.width = `${100 * p}%`;
    number.textContent = percent(p);
  });
  const mean = best.reduce((sum, p, i) => sum + p * rewards[i], 0);
  const kl = best.reduce((sum, p, i) => sum + (p > 0 ? p * Math.log(p / probs[i]) : 0), 0);
  byId("beta-kl").textContent = kl.toFixed(3);
  byId("beta-mean").textContent = mean.toFixed(3);
  const objective = mean - beta * kl;
  byId("beta-objective").textContent = `${objective.toFixed(3)} = ${(beta * logZ).toFixed(3)}`;
}

function fiveRow({ answer, reference: p, reward }, i) {
  const input = element("input", { type: "number", value: reward, min: -5, max: 5, step: 0.5 });
  input.setAttribute("aria-label", `reward of ${answer}`);
  input.addEventListener("input", () => {
    const value = Number(input.value);
    if (input.value !== "" && Math.abs(value) <= 5) {
      FIVE[i].reward = value;
      showBest();
    }
  });
  const bars = (kind, id, share) =>
    element(
      "div",
      { className: "best-bar", id },
      element(
        "span",
        { className: "track", "aria-hidden": "true" },
        element("span", { className: `bar ${kind}`, style: `width: ${100 * share}%` }),
      ),
      element("span", { className: "chart-number" }, percent(share)),
    );
  return element(
    "tr",
    {},
    element("td", {}, element("code", {}, answer)),
    element("td", {}, input),
    element("td", {}, bars("reference", `five-${i}`, p), bars("policy", `best-${i}`, p)),
  );
}

byId("five").replaceChildren(...FIVE.map(fiveRow));
byId("beta-slider").addEventListener("input", showBest);
