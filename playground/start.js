// The last script: show everything for the first time, and offer what tests call.
"use strict";

window.playground = {
  runs: Object.keys(FACTS.runs),
  // The rounds of a run whose policy is here. A moment is an index into this list.
  moments: (run) => FACTS.runs[run].map(({ round }) => round),
  // Logits of the token after the list `ids`.
  logits: (run, moment, ids) => Array.from(modelOf(run, moment).logits(ids).at(-1)),
  // n sampled answers to a target as ids, and the greedy one.
  sample: (run, moment, target, n, seed) =>
    sample(modelOf(run, moment), target, n, uniformNumbers(seed, n)),
  greedy: (run, moment, target) => sample(modelOf(run, moment), target, 1, null)[0],
};

setTarget(state.target);
updates.filter((update) => update !== ask).forEach((update) => update());
lookAtLargest("rejected");
showNextTokens();
sampleToJudge(reference);
showBest();
