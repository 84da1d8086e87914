// The task, as in data.py: tokens, lines as ids, the parser, the judge.
"use strict";

const FACTS = JSON.parse(document.getElementById("models").textContent);
const VOCAB = FACTS.vocab; // id -> token
const EQUALS = VOCAB.indexOf("=");
const END = VOCAB.indexOf("<end>");
const MAX_LEN = FACTS.max_len; // tokens in a line
const [ACCEPTED, NOT_PREFERRED, WRONG_SUM, DOES_NOT_PARSE] = FACTS.outcomes;
const LOWEST_TARGET = 5;
const HIGHEST_TARGET = 100;

// The ids of a text's characters, without an end token.
function encode(text) {
  return [...text].map((character) => VOCAB.indexOf(character));
}

// The text of ids, without end and pad tokens.
function decode(ids) {
  return ids.filter((id) => VOCAB[id].length === 1).map((id) => VOCAB[id]).join("");
}

// {target, terms} of a line such as 100=10+70+20; null for any other text. Terms have one or two
// digits without a leading zero, and are joined by single plus signs.
function parse(text) {
  const match = /^([0-9]{1,3})=([1-9][0-9]?(?:\+[1-9][0-9]?)*)$/.exec(text);
  return match && { target: Number(match[1]), terms: match[2].split("+").map(Number) };
}

// What the judge says of an answer: its outcome, one of FACTS.outcomes, and, if it parses, its
// target, terms and total. line: the ids of prompt, completion and end token.
function judge(line) {
  const text = line.map((id) => VOCAB[id]).join(""); // <end> or <pad> in the middle: does not parse
  const parsed = text.endsWith("<end>") ? parse(text.slice(0, -"<end>".length)) : null;
  if (parsed === null) {
    return { outcome: DOES_NOT_PARSE };
  }
  const { target, terms } = parsed;
  const total = terms.reduce((sum, term) => sum + term, 0);
  let outcome = ACCEPTED;
  if (total !== target) {
    outcome = WRONG_SUM;
  } else if (terms.length !== FACTS.prefer) {
    outcome = NOT_PREFERRED;
  }
  return { outcome, target, terms, total };
}

// The ids of a line such as 100=10+70+20 with its end token; null for any other text.
function lineOfText(text) {
  const parsed = parse(text);
  if (parsed === null || parsed.target < LOWEST_TARGET || parsed.target > HIGHEST_TARGET) {
    return null;
  }
  const line = [...encode(text), END];
  return line.length <= MAX_LEN ? line : null;
}
