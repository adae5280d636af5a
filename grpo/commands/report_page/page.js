"use strict";
// Puts the page together from the data that stands in it.

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

function short(number) {
  return String(Number(number.toPrecision(4)));
}

function row(cells) {
  const line = element("tr");
  for (const cell of cells) line.append(element("td", "", cell));
  return line;
}

function drawHead(data) {
  document.getElementById("run-name").textContent = data.name;
  for (const [name, value] of data.summary) {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    document.getElementById("summary").append(pair);
  }
  for (const verdict of data.verdicts) {
    const box = element("div", `verdict ${verdict.tone}`);
    box.append(element("div", "label", verdict.label), element("div", "value", verdict.value), element("div", "note", verdict.note));
    document.getElementById("verdicts").append(box);
  }
}

function drawTables(data) {
  document.getElementById("config").append(...data.config.map(row));
  for (const start of data.starts) {
    const table = element("table");
    table.append(row(["time", start.time]), row(["resumed", start.resumed ? "yes" : "no"]), row(["command", start.command.join(" ")]));
    table.append(row(["host", start.host]), ...Object.entries(start.versions).map(row));
    document.getElementById("starts").append(table);
  }
}

const data = JSON.parse(document.getElementById("data").textContent);
drawHead(data);
drawTables(data);
drawSamples(data.samples);
drawCharts(data.charts);
