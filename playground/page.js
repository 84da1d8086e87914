// What the parts of the page share: its state, the models, small helpers.
"use strict";

const BETA = FACTS.beta;
const state = { run: "online", moment: 0, target: 52, seed: 1 };
const updates = []; // functions that are called when the policy changes

// Models, decoded when they are first asked for.
const models = new Map();

function modelOf(run, moment) {
  const name = FACTS.runs[run][moment].model;
  if (!models.has(name)) {
    models.set(name, new Transformer(FACTS.config, unpack(FACTS.models[name])));
  }
  return models.get(name);
}

const reference = modelOf("sft", 0);

function policy() {
  return modelOf(state.run, state.moment);
}

// In words: which policy is shown.
function policyName() {
  if (state.moment === 0) {
    return "the SFT model";
  }
  return `${state.run}, round ${FACTS.runs[state.run][state.moment].round.toLocaleString("en")}`;
}

function setPolicy(run, moment) {
  state.run = run;
  state.moment = moment;
  updates.forEach((update) => update());
}

function byId(id) {
  return document.getElementById(id);
}

// A new element: properties and attributes by name, then children, nodes or text.
function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) {
      node[name] = value;
    } else {
      node.setAttribute(name, value);
    }
  }
  node.append(...children);
  return node;
}

function signed(x, digits = 1) {
  const text = Math.abs(x).toFixed(digits);
  return `${Number(text) === 0 ? "" : x < 0 ? "−" : "+"}${text}`;
}

function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.1) {
    return "<0.1 %";
  }
  return `${value.toFixed(value > 0 && value < 10 ? 1 : 0)} %`;
}

// A probability such as 0.012 or 3.4e-9.
function probability(logp) {
  const p = Math.exp(logp);
  return p >= 0.001 ? p.toFixed(3) : p.toExponential(1).replace("-", "−");
}

// An outcome has a colour and, so that the colour is never the only cue, a sign.
const SIGNS = {
  [ACCEPTED]: ["accepted", "✓✓"],
  [NOT_PREFERRED]: ["right", "✓"],
  [WRONG_SUM]: ["wrong", "✗"],
  [DOES_NOT_PARSE]: ["unparsed", "?"],
};

function sign(outcome) {
  const [name, text] = SIGNS[outcome];
  return element("span", { className: `sign ${name}`, "aria-hidden": "true" }, text);
}

// The outcome in words. A wrong sum is told.
function outcomeText({ outcome, total }) {
  return outcome === WRONG_SUM ? `wrong sum: ${total}` : outcome;
}
