"use strict";
// Values under the pointer. A chart's numbers lie in #data under its name; places are in the drawing's own units.
const charts = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

function shape(name, attributes) {
  const element = document.createElementNS(document.querySelector("svg").namespaceURI, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  return element;
}

function nearest(places, x) {
  let low = 0, high = places.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - places[low - 1] < places[low] - x ? low - 1 : low;
}

function tell(lines, event) {
  tip.replaceChildren(...lines.map((line) => {
    const row = document.createElement("div");
    row.textContent = line;
    return row;
  }));
  tip.hidden = false;
  const right = document.documentElement.scrollLeft + document.documentElement.clientWidth;
  const left = event.pageX + 14 + tip.offsetWidth > right ? event.pageX - 14 - tip.offsetWidth : event.pageX + 14;
  tip.style.left = Math.max(0, left) + "px";
  tip.style.top = event.pageY + 14 + "px";
}

function pointAtLines(chart, x, pointer) {
  // Lines may have their readings at different places: the nearest of any is told of all that have one there.
  let at = null;
  for (const line of chart.lines) {
    const place = line.x[nearest(line.x, x)];
    if (at === null || Math.abs(place - x) < Math.abs(at - x)) at = place;
  }
  const told = [];
  pointer.append(shape("line", { x1: at, x2: at, y1: chart.top, y2: chart.bottom }));
  for (const line of chart.lines) {
    const index = nearest(line.x, at);
    if (Math.abs(line.x[index] - at) > 0.2) continue;
    if (!told.length) told.push(chart.x + " " + line.at[index]);
    told.push((chart.lines.length > 1 ? line.name + " " : "") + line.value[index]);
    pointer.append(shape("circle", { style: "fill: " + line.colour, cx: at, cy: line.y[index], r: 4 }));
  }
  return told;
}

function pointAtCells(chart, x, y, pointer) {
  const column = Math.min(chart.cells.length - 1, Math.max(0, Math.floor((x - chart.left) / chart.wide)));
  const row = Math.min(chart.rows.length - 1, Math.max(0, Math.floor((y - chart.top) / chart.tall)));
  const place = { x: chart.left + column * chart.wide, y: chart.top + row * chart.tall };
  pointer.append(shape("rect", { ...place, width: chart.wide, height: chart.tall - 1 }));
  return [chart.x + " " + chart.at[column], chart.rows[row] + " " + chart.cells[column][row]];
}

for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = charts[figure.dataset.chart], svg = figure.querySelector("svg"), pointer = svg.querySelector(".pointer");
  const leave = () => { pointer.replaceChildren(); tip.hidden = true; };
  const move = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    pointer.replaceChildren();
    tell(chart.lines ? pointAtLines(chart, place.x, pointer) : pointAtCells(chart, place.x, place.y, pointer), event);
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
}
// A link to a stage opens it.
addEventListener("hashchange", () => { const at = document.querySelector(location.hash); if (at) at.open = true; });
if (location.hash) { const at = document.getElementById(location.hash.slice(1)); if (at && "open" in at) at.open = true; }
