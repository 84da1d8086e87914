// The bar at the top: which policy the page shows.
"use strict";

const PLAY_MILLISECONDS = 1000; // between two moments
let playing = null; // the timer while the slider moves by itself
let stopped = false; // whether the reader chose this round of this run: Play then goes on from it

function showPolicy() {
  const moments = FACTS.runs[state.run];
  const { round, pairs, loss, accuracy } = moments[state.moment];
  const slider = byId("moment");
  slider.max = moments.length - 1;
  slider.value = state.moment;
  slider.disabled = moments.length === 1;
  byId("play").disabled = moments.length === 1;
  document.querySelector(`input[name=run][value=${state.run}]`).checked = true;

  const text = `round ${round.toLocaleString("en")}`;
  slider.setAttribute("aria-valuetext", text);
  byId("round").textContent = text;
  let log = "the policy is the SFT model";
  if (pairs > 0) {
    log = `${pairs} pairs, loss ${loss.toFixed(2)}, accuracy ${accuracy.toFixed(2)}`;
  }
  byId("log").textContent = log;
  for (const node of document.querySelectorAll(".policy-name")) {
    node.textContent = policyName();
  }
}

function play() {
  const last = FACTS.runs[state.run].length - 1;
  if (!stopped || state.moment === last) {
    setPolicy(state.run, 0);
  }
  byId("play").textContent = "❚❚ Pause";
  playing = setInterval(() => {
    setPolicy(state.run, state.moment + 1);
    if (state.moment === FACTS.runs[state.run].length - 1) {
      pause();
    }
  }, PLAY_MILLISECONDS);
}

// byReader: whether the reader stopped here, by a pause or with the slider.
function pause(byReader = false) {
  clearInterval(playing);
  playing = null;
  stopped = byReader;
  byId("play").textContent = "▶ Play";
}

byId("play").addEventListener("click", () => (playing === null ? play() : pause(true)));

byId("moment").addEventListener("input", (event) => {
  pause(true);
  setPolicy(state.run, Number(event.target.value));
});

for (const input of document.querySelectorAll("input[name=run]")) {
  input.addEventListener("change", () => {
    pause();
    // The same round in another run; the SFT model has only one.
    setPolicy(input.value, Math.min(state.moment, FACTS.runs[input.value].length - 1));
  });
}

updates.push(showPolicy);
