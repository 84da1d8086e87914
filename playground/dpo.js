// The DPO loss of one pair, as in dpo.py's dpo_loss, and pairs of answers.
"use strict";

function sigmoid(x) {
  return 1 / (1 + Math.exp(-x));
}

// log sigmoid(x), without overflow for any x.
function logSigmoid(x) {
  return Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));
}

// What DPO makes of one pair. chosen, rejected: from `credit`.
// h = log(pi(chosen) / pi_ref(chosen)) - log(pi(rejected) / pi_ref(rejected)); the loss is
// -log sigmoid(beta h). Its slope on the policy's log-probability of the chosen answer is
// -beta sigmoid(-beta h), and on that of the rejected answer the negative of it.
function dpoLoss(chosen, rejected, beta) {
  const chosenLogRatio = chosen.policyLogp - chosen.referenceLogp;
  const rejectedLogRatio = rejected.policyLogp - rejected.referenceLogp;
  const h = chosenLogRatio - rejectedLogRatio;
  return { h, margin: beta * h, loss: -logSigmoid(beta * h), weight: beta * sigmoid(-beta * h) };
}

// dpo.pair_up: the first chosen answer with the first rejected one, and so on. What is left over,
// because there are more of one kind, is dropped.
function pairUp(chosen, rejected) {
  const n = Math.min(chosen.length, rejected.length);
  return chosen.slice(0, n).map((line, i) => [line, rejected[i]]);
}
