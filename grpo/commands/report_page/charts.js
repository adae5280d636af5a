"use strict";
// The curves: one plotly figure per panel, zoomed together, smoothed on demand.

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Exponential moving average with bias correction; weight 0 leaves the values as they are, null stays a gap.
function smoothed(values, weight) {
  let mean = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

function traces(chart, weight) {
  const stacked = chart.kind === "stack";
  return chart.series.flatMap((line, i) => {
    const color = cssColor(`--c${i % 6}`);
    const sparse = line.x.length <= 12 || line.key.startsWith("eval/");
    const base = { x: line.x, type: "scatter", name: line.name, legendgroup: line.name };
    const main = {
      ...base, y: stacked ? line.y : smoothed(line.y, weight), mode: sparse && !stacked ? "lines+markers" : "lines",
      line: { color, width: stacked ? 0.5 : 1.8 }, marker: { color, size: 6 },
      ...(stacked ? { stackgroup: "one", fillcolor: color } : {}),
      hovertemplate: "%{y:.5g}",
    };
    if (stacked || weight === 0) return [main];
    return [{ ...base, y: line.y, mode: "lines", line: { color, width: 1 }, opacity: 0.22, showlegend: false, hoverinfo: "skip" }, main];
  });
}

// A constant curve would get an axis of -1 to 1 around it, whatever its size.
function constantRange(chart) {
  const values = chart.series.flatMap((line) => line.y).filter((value) => value !== null);
  const low = Math.min(...values), high = Math.max(...values);
  return low === high && low !== 0 && chart.kind === "line" ? { range: [low - Math.abs(low) / 2, low + Math.abs(low) / 2] } : {};
}

function layout(chart) {
  const ink = cssColor("--quiet"), line = cssColor("--line");
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, tickfont: { size: 11 }, automargin: true };
  return {
    margin: { l: 46, r: 8, t: 6, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 }, hovermode: "x unified", hoverlabel: { bgcolor: cssColor("--panel") },
    showlegend: chart.series.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    xaxis: { ...axis, title: { text: "step", font: { size: 11 } } },
    yaxis: { ...axis, type: chart.kind === "log" ? "log" : "linear", exponentformat: "power", ...constantRange(chart) },
  };
}

function drawCharts(charts) {
  const holder = document.getElementById("charts");
  const plots = charts.map((chart) => {
    const panel = element("div", "chart");
    panel.append(element("h3", "", chart.title), element("p", "", chart.hint));
    const plot = panel.appendChild(element("div", "plot"));
    holder.append(panel);
    return plot;
  });
  const options = { displayModeBar: false, responsive: true };
  const slider = document.getElementById("smoothing");
  const draw = () => plots.forEach((plot, i) =>
    Plotly.react(plot, traces(charts[i], Number(slider.value)), layout(charts[i]), options));
  draw();
  slider.addEventListener("input", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  plots.forEach((plot) => plot.on("plotly_relayout", (change) => zoomAll(plots, plot, change)));
}

let zooming = false;

function zoomAll(plots, source, change) {
  const range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  const reset = change["xaxis.autorange"];
  if (zooming || (range[0] === undefined && !reset)) return;
  zooming = true;
  const update = reset ? { "xaxis.autorange": true } : { "xaxis.range": range };
  const others = plots.filter((plot) => plot !== source).map((plot) => Plotly.relayout(plot, update));
  Promise.all(others).finally(() => { zooming = false; });
}
