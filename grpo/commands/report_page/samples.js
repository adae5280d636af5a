"use strict";
// Completions with their rewards, filtered. Texts are a model's: they go in as text, never as markup.

const PAGE_SIZE = 25;

function sign(number) {
  return number > 0 ? "above" : number < 0 ? "below" : "";
}

function chips(sample) {
  const row = element("div", "chips");
  const tone = sample.advantage > 0 ? "good" : sample.advantage < 0 ? "bad" : "";
  row.append(element("span", "chip", `step ${sample.step} · group ${sample.group} · sample ${sample.sample}`));
  row.append(element("span", `chip ${tone}`, `reward ${short(sample.reward)}`));
  row.append(element("span", `chip ${tone}`, `advantage ${sample.advantage > 0 ? "+" : ""}${short(sample.advantage)}`));
  for (const [name, value] of Object.entries(sample.breakdown)) row.append(element("span", "chip", `${name} ${short(value)}`));
  row.append(element("span", "chip", `${sample.num_tokens} tokens`));
  row.append(element("span", sample.finish_reason === "stop" ? "chip" : "chip bad", `ended: ${sample.finish_reason}`));
  row.append(element("span", "chip", sample.domain));
  return row;
}

function titled(title, text) {
  const part = element("div");
  part.append(element("h4", "", title), element("pre", "", text));
  return part;
}

function card(sample) {
  const box = element("article", `sample ${sign(sample.advantage)}`);
  const texts = element("div", "texts");
  texts.append(titled("prompt", sample.prompt), titled("completion", sample.completion));
  if (sample.answer !== null) texts.append(titled("reference answer", sample.answer));
  box.append(chips(sample), texts);
  return box;
}

function options(select, values, all) {
  select.append(new Option(all, ""));
  for (const value of values) select.append(new Option(value, value));
}

function readFilter() {
  const value = (id) => document.getElementById(id).value;
  const bound = (id, none) => (value(id) === "" ? none : Number(value(id)));
  return {
    step: value("f-step"), domain: value("f-domain"), kind: value("f-kind"), order: value("f-order"),
    low: bound("f-min", -Infinity), high: bound("f-max", Infinity), text: value("f-text").toLowerCase(),
  };
}

function matches(sample, filter) {
  if (filter.step !== "" && String(sample.step) !== filter.step) return false;
  if (filter.domain !== "" && sample.domain !== filter.domain) return false;
  if (filter.kind === "above" && !(sample.advantage > 0)) return false;
  if (filter.kind === "below" && !(sample.advantage < 0)) return false;
  if (filter.kind === "length" && sample.finish_reason !== "length") return false;
  if (sample.reward < filter.low || sample.reward > filter.high) return false;
  return filter.text === "" || `${sample.prompt}\n${sample.completion}`.toLowerCase().includes(filter.text);
}

const ORDERS = {
  "step": (a, b) => b.step - a.step,
  "reward": (a, b) => b.reward - a.reward,
  "-reward": (a, b) => a.reward - b.reward,
  "length": (a, b) => b.num_tokens - a.num_tokens,
};

function drawSamples(samples) {
  const unique = (key) => [...new Set(samples.map((sample) => sample[key]))];
  options(document.getElementById("f-step"), unique("step").sort((a, b) => a - b), "all");
  options(document.getElementById("f-domain"), unique("domain").sort(), "all");
  const holder = document.getElementById("samples"), more = document.getElementById("more");
  let shown = PAGE_SIZE;
  const draw = () => {
    const filter = readFilter();
    const found = samples.filter((sample) => matches(sample, filter)).sort(ORDERS[filter.order]);
    document.getElementById("f-count").textContent = `${found.length} of ${samples.length}`;
    holder.replaceChildren(...found.slice(0, shown).map(card));
    more.style.display = found.length > shown ? "block" : "none";
  };
  for (const id of ["f-step", "f-domain", "f-kind", "f-min", "f-max", "f-order", "f-text"]) {
    document.getElementById(id).addEventListener("input", () => { shown = PAGE_SIZE; draw(); });
  }
  more.addEventListener("click", () => { shown += PAGE_SIZE; draw(); });
  draw();
}
