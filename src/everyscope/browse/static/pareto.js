// Zooming a Pareto plot. The server drew it and says its axes in data-x and data-y: low, high, first pixel, last pixel, kind.
// Points keep their size; lines are stretched with strokes of equal width; ticks are redrawn.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const MOST = 400; // how many times larger than at first

class Axis {
  constructor(text) {
    const [low, high, start, stop, kind] = text.split(" ");
    this.isLog = kind === "log";
    this.start = Number(start);
    this.stop = Number(stop);
    this.low = this.along(Number(low));
    this.high = this.along(Number(high));
    this.factor = 1;
    this.shift = 0;
  }

  along(value) {
    return this.isLog ? Math.log10(value) : value;
  }

  pixel(first) {
    return first * this.factor + this.shift;
  }

  // The value, along the axis, at a pixel of the plot as it is now.
  at(pixel) {
    const first = (pixel - this.shift) / this.factor;
    return this.low + ((first - this.start) / (this.stop - this.start)) * (this.high - this.low);
  }

  place(value) {
    const share = (this.along(value) - this.low) / (this.high - this.low);
    return this.pixel(this.start + share * (this.stop - this.start));
  }

  zoom(pixel, by) {
    const factor = Math.min(MOST, Math.max(1, this.factor * by));
    this.shift = pixel - (pixel - this.shift) * (factor / this.factor);
    this.factor = factor;
    this.hold();
  }

  // What was visible at first always fills the plot.
  hold() {
    const [left, right] = [Math.min(this.start, this.stop), Math.max(this.start, this.stop)];
    this.shift = Math.min(left - left * this.factor, Math.max(right - right * this.factor, this.shift));
  }

  ticks() {
    const ends = [this.at(this.start), this.at(this.stop)];
    if (!this.isLog) return linear(ends[0], ends[1]);
    const [low, high] = ends.map((end) => 10 ** end);
    if (high / low < 5) return linear(low, high);
    const found = [];
    for (let power = Math.floor(ends[0]); power <= ends[1]; power++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    const inside = found.filter((value) => value >= low && value <= high);
    return inside.length <= 8 ? inside : inside.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9);
  }
}

function linear(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough * 0.999);
  const found = [];
  for (let place = Math.ceil(low / step); place * step <= high; place++) found.push(Number((place * step).toPrecision(10)));
  return found;
}

function make(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawTicks(frame, x, y) {
  frame.querySelectorAll(".grid, .tick").forEach((old) => old.remove());
  for (const value of y.ticks()) {
    const place = y.place(value).toFixed(1);
    frame.append(make("line", { class: "grid", x1: x.start, x2: x.stop, y1: place, y2: place }));
    frame.append(make("text", { class: "tick", x: x.start - 5, y: Number(place) + 4, "text-anchor": "end" }, Number(value.toPrecision(6))));
  }
  for (const value of x.ticks()) {
    const place = x.place(value).toFixed(1);
    frame.append(make("text", { class: "tick", x: place, y: y.start + 16, "text-anchor": "middle" }, Number(value.toPrecision(6))));
  }
}

function zoomable(svg) {
  const x = new Axis(svg.dataset.x);
  const y = new Axis(svg.dataset.y);
  const frame = svg.querySelector(".frame");
  const points = [...svg.querySelectorAll(".point")].map((point) => [point, ...point.dataset.at.split(" ").map(Number)]);
  const lines = svg.querySelectorAll(".moving > path");
  const marks = [...svg.querySelectorAll(".point .interval")];

  function draw() {
    for (const [point, across, down] of points) {
      point.setAttribute("transform", `translate(${x.pixel(across).toFixed(1)} ${y.pixel(down).toFixed(1)})`);
    }
    for (const line of lines) line.setAttribute("transform", `matrix(${x.factor} 0 0 ${y.factor} ${x.shift} ${y.shift})`);
    for (const mark of marks) {
      mark.setAttribute("y1", mark.dataset.low * y.factor);
      mark.setAttribute("y2", mark.dataset.high * y.factor);
    }
    drawTicks(frame, x, y);
    svg.classList.toggle("zoomed", x.factor > 1.01);
  }

  function inside(event) {
    const found = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [found.x, found.y];
  }

  function zoom(at, by) {
    x.zoom(at[0], by);
    y.zoom(at[1], by);
    draw();
  }

  function reset() {
    for (const axis of [x, y]) {
      axis.factor = 1;
      axis.shift = 0;
    }
    draw();
  }

  svg.addEventListener("wheel", (event) => {
    if (event.deltaY > 0 && x.factor <= 1) return; // nothing to zoom out of: the page scrolls
    event.preventDefault();
    zoom(inside(event), Math.exp(-event.deltaY / 300));
  }, { passive: false });
  svg.addEventListener("dblclick", (event) => {
    event.preventDefault();
    reset();
  });

  const down = new Map();
  let hasMoved = false;
  svg.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, inside(event));
    hasMoved = false;
  });
  svg.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    if (!before) return;
    const now = inside(event);
    if (down.size === 1 && x.factor > 1) {
      if (Math.hypot(now[0] - before[0], now[1] - before[1]) > 2) {
        hasMoved = true;
        svg.setPointerCapture(event.pointerId);
      }
      if (!hasMoved) return;
      x.shift += now[0] - before[0];
      y.shift += now[1] - before[1];
      x.hold();
      y.hold();
      draw();
    } else if (down.size === 2) {
      hasMoved = true;
      const other = [...down].find(([id]) => id !== event.pointerId)[1];
      const wide = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
      zoom([(now[0] + other[0]) / 2, (now[1] + other[1]) / 2], wide(now) / Math.max(1, wide(before)));
    }
    down.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
    svg.addEventListener(name, (event) => down.delete(event.pointerId));
  }
  svg.addEventListener("click", (event) => {
    if (hasMoved) event.preventDefault(); // the end of a drag is no click on a point
  }, true);
  svg.addEventListener("dragstart", (event) => event.preventDefault());

  const bar = document.createElement("div");
  bar.className = "zoom";
  const middle = [(x.start + x.stop) / 2, (y.start + y.stop) / 2];
  for (const [sign, name, action] of [["+", "Zoom in", () => zoom(middle, 1.6)], ["−", "Zoom out", () => zoom(middle, 1 / 1.6)], ["⟲", "Whole plot", reset]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sign;
    button.setAttribute("aria-label", name);
    button.addEventListener("click", action);
    bar.append(button);
  }
  svg.after(bar);
}

document.querySelectorAll("svg.pareto").forEach(zoomable);
