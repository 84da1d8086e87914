// Answers of a model, and where DPO put its credit in them: as in eval.py.
"use strict";

// A generator of uniform numbers from 0 to 1: Tommy Ettinger's mulberry32.
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// MAX_LEN uniform numbers for each of n answers. An answer uses its own numbers, one for each
// token, so it is the same whatever the other answers are.
function uniformNumbers(seed, n) {
  return Float64Array.from({ length: n * MAX_LEN }, randomNumbers(seed));
}

// n answers to a target, lines of ids with prompt and end token. uniforms: from `uniformNumbers`,
// or null to decode greedily. A line that fills MAX_LEN tokens stops there, without an end token.
function sample(model, target, n, uniforms) {
  const prompt = encode(`${target}=`);
  const lines = Array.from({ length: n }, () => [...prompt]);
  const ended = new Array(n).fill(false);
  const cache = model.emptyCache(n);
  for (let position = 0; position < MAX_LEN - 1 && ended.includes(false); position++) {
    const ids = lines.map((line) => line[position] ?? 0); // a line that has ended goes on with 0s
    const logits = model.step(ids, position, cache); // (V, n)
    const t = position + 1;
    if (t < prompt.length) {
      continue;
    }
    for (let i = 0; i < n; i++) {
      if (!ended[i]) {
        const uniform = uniforms === null ? null : uniforms[i * MAX_LEN + t];
        const id = chooseToken(logits, i, n, uniform);
        lines[i].push(id);
        ended[i] = id === END;
      }
    }
  }
  return lines;
}

// transformer.choose_tokens, for line i of n. uniform: null takes the likeliest token.
function chooseToken(logits, i, n, uniform) {
  const column = VOCAB.map((_, token) => logits[token * n + i]);
  const largest = Math.max(...column);
  if (uniform === null) {
    return column.indexOf(largest);
  }
  // A uniform number between 0 and the total falls into token k's interval with probability p_k.
  let total = 0;
  const cumulative = column.map((logit) => (total += Math.exp(logit - largest)));
  return cumulative.findIndex((end) => end > uniform * total);
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const exp = Array.from(logits, (logit) => Math.exp(logit - largest));
  const total = exp.reduce((sum, value) => sum + value, 0);
  return exp.map((value) => value / total);
}

// eval.credit: the reward of each token of an answer (ids), beta (log pi - log pi_ref). `tokens`
// has for each token after `=` its reward, and what both models expected in its place.
function credit(policy, reference, line, beta) {
  const policyLogits = policy.logits(line);
  const referenceLogits = reference.logits(line);
  const tokens = [];
  let policyLogp = 0;
  let referenceLogp = 0;
  for (let t = line.indexOf(EQUALS) + 1; t < line.length; t++) {
    const policyProbs = softmax(policyLogits[t - 1]); // (V,), of the token at t
    const referenceProbs = softmax(referenceLogits[t - 1]);
    const logp = Math.log(policyProbs[line[t]]);
    const refLogp = Math.log(referenceProbs[line[t]]);
    const reward = beta * (logp - refLogp);
    const before = decode(line.slice(0, t));
    tokens.push({ token: VOCAB[line[t]], before, reward, policyProbs, referenceProbs });
    policyLogp += logp;
    referenceLogp += refLogp;
  }
  return { line, tokens, policyLogp, referenceLogp, reward: beta * (policyLogp - referenceLogp) };
}
