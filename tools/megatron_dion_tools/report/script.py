"""What the report does where scripts run: search, and values under the pointer."""

SCRIPT = """
"use strict";

// As `number` in charts.py.
function number(value) {
  if (value === null) return "NaN";
  return Math.abs(value) >= 10000
    ? Math.round(value).toLocaleString("en")
    : String(Number(value.toPrecision(4)));
}

function nearest(places, wanted) {
  let best = 0;
  places.forEach((place, i) => {
    if (Math.abs(place - wanted) < Math.abs(places[best] - wanted)) best = i;
  });
  return best;
}

// Tells the values of the curves under the pointer.
function follow(chart) {
  const plot = chart.querySelector(".plot");
  const cursor = plot.querySelector(".cursor");
  const where = chart.querySelector(".where");
  const shown = [...chart.querySelectorAll(".value")];
  const last = shown.map((value) => value.textContent);
  const series = JSON.parse(chart.dataset.series);
  const [low, high] = JSON.parse(chart.dataset.domain);
  const densest = series.reduce((a, b) => (b[0].length > a[0].length ? b : a))[0];

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const iteration = densest[nearest(densest, low + share * (high - low))];
    const place = (100 * (iteration - low)) / (high - low) + "%";
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    where.textContent = "iteration " + iteration;
    series.forEach(([places, values], i) => {
      shown[i].textContent = number(values[nearest(places, iteration)]);
    });
  });
  plot.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    where.textContent = "";
    shown.forEach((value, i) => { value.textContent = last[i]; });
  });
}

// Gives a folded table a field that leaves the rows with all words that are written into it.
function makeSearchable(details) {
  const rows = [...details.querySelectorAll("tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const field = document.createElement("input");
  const count = document.createElement("span");
  const search = document.createElement("label");
  field.type = "search";
  field.placeholder = "words that a row must have";
  search.className = "search";
  search.append(field, count);
  details.querySelector("summary").after(search);

  function show() {
    const words = field.value.toLowerCase().split(/\\s+/);
    let found = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      found += row.hidden ? 0 : 1;
    });
    count.textContent = found + " of " + rows.length;
  }
  field.addEventListener("input", show);
  show();
}

document.querySelectorAll(".chart").forEach(follow);
document.querySelectorAll(".searched").forEach(makeSearchable);
"""
