// A line chart of some columns over time, as SVG. Arrow keys and the pointer move a cursor that is read out.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 152, TOP = 8, BOTTOM = 20, LEFT = 54, RIGHT = 6;

export const clock = seconds => new Date(seconds * 1000).toLocaleTimeString([], {hour12: false});

/** An element with attributes and children; `text` is its text. */
export function made(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** The least of 1, 2, 2.5 and 5 times a power of ten that gives at most `count` steps up to `top`. */
function step(top, count) {
  const power = 10 ** Math.floor(Math.log10(top / count));
  return [1, 2, 2.5, 5, 10].map(n => n * power).find(n => n * count >= top * 0.999);
}

export class Chart {
  /** `series`: [{key, label, look: "a" | "b", area}]; `format` writes a figure; `plan` names the plan's line. */
  constructor(parent, {title, series, format, plan}) {
    Object.assign(this, {title, series, format, plan, rows: null, place: null, level: null});
    this.legend = made("p", {class: "legend"});
    this.readout = made("p", {class: "readout"});
    this.svg = made("svg:svg", {
      role: "slider", tabindex: 0, "aria-label": `${title}, a moment of it; arrow keys move`,
      "aria-valuemin": 0, "aria-valuemax": 0, "aria-valuenow": 0, "aria-valuetext": "no figures yet",
    });
    parent.append(made("div", {class: "chart"}, made("h3", {text: title}), this.legend, this.svg, this.readout));
    this.svg.addEventListener("keydown", event => this.key(event));
    this.svg.addEventListener("pointermove", event => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.move(null));
    this.svg.addEventListener("blur", () => this.move(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  /** `rows`: {at: [...], key: [...]}; `span` in seconds; `level`: the plan's figure, or null. */
  show(rows, span, level) {
    const held = this.place === null ? null : this.rows.at[this.place];
    Object.assign(this, {rows, span, level});
    if (held !== null) {  // the cursor stays at its time while the samples move on
      const place = rows.at.findIndex(at => at >= held);
      this.place = place < 0 ? null : place;
    }
    this.draw();
  }

  key(event) {
    if (!this.rows?.at.length) return;
    const last = this.rows.at.length - 1, now = this.place ?? last;
    const jump = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -30, PageUp: 30}[event.key];
    if (event.key === "Escape") this.move(null);
    else if (event.key === "Home") this.move(0);
    else if (event.key === "End") this.move(last);
    else if (jump) this.move(Math.min(last, Math.max(0, now + jump)));
    else return;
    event.preventDefault();
  }

  point(event) {
    if (!this.rows?.at.length) return;
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const at = this.end - this.span * (1 - (x - LEFT) / (this.width - LEFT - RIGHT));
    let best = 0;
    this.rows.at.forEach((one, place) => {
      if (Math.abs(one - at) < Math.abs(this.rows.at[best] - at)) best = place;
    });
    this.move(best);
  }

  move(place) {
    this.place = place;
    this.draw();
  }

  draw() {
    const {rows, svg} = this;
    this.width = svg.clientWidth;
    if (!rows || !rows.at.length || !this.width) return;
    this.end = rows.at.at(-1);
    const values = this.series.flatMap(one => rows[one.key]).filter(value => value !== null);
    const most = Math.max(...values, this.level ?? 0, 1e-9) * 1.06;
    const tick = most > 1e-6 ? step(most, 4) : 0.25, top = most > 1e-6 ? most : 1;
    const across = at => LEFT + (this.width - LEFT - RIGHT) * (1 - (this.end - at) / this.span);
    const up = value => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top;
    const parts = [];
    for (let value = 0; value <= top; value += tick) {
      parts.push(made("svg:line", {class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: up(value), y2: up(value)}));
      parts.push(made("svg:text", {class: "tick", x: LEFT - 6, y: up(value) + 4, "text-anchor": "end",
        text: this.format(value)}));
    }
    const marks = this.span > 1000 ? [60, 45, 30, 15, 0] : [5, 4, 3, 2, 1, 0];
    for (const minutes of marks) {
      const anchor = minutes === 0 ? "end" : "middle", x = across(this.end - minutes * 60);
      parts.push(made("svg:text", {class: "tick", x, y: HEIGHT - 4, "text-anchor": anchor,
        text: minutes ? `−${minutes} min` : "now"}));
    }
    if (this.level) {
      parts.push(made("svg:line", {class: "plan", x1: LEFT, x2: this.width - RIGHT, y1: up(this.level), y2: up(this.level)}));
    }
    for (const one of this.series) parts.push(...this.line(one, across, up));
    const place = this.place ?? rows.at.length - 1;
    if (this.place !== null) {
      const x = across(rows.at[place]);
      parts.push(made("svg:line", {class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM}));
      for (const one of this.series) {
        const value = rows[one.key][place];
        if (value !== null) parts.push(made("svg:circle", {class: one.look, cx: x, cy: up(value), r: 3.5}));
      }
    }
    svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    svg.replaceChildren(...parts);
    this.tell(place);
  }

  /** A line with gaps where there are no figures; a figure by itself is a dot. */
  line(one, across, up) {
    const {rows} = this, values = rows[one.key];
    let path = "", begin = null, fill = "";
    values.forEach((value, place) => {
      if (value === null) { begin = null; return; }
      const x = across(rows.at[place]).toFixed(1), y = up(value).toFixed(1);
      const lonely = begin === null && (values[place + 1] ?? null) === null;
      path += begin === null ? `M${x} ${y}${lonely ? "h0" : ""}` : `L${x} ${y}`;
      if (begin === null) { begin = x; fill += `M${x} ${up(0)}L${x} ${y}`; } else fill += `L${x} ${y}`;
      if ((values[place + 1] ?? null) === null) fill += `L${x} ${up(0)}Z`;
    });
    const drawn = [made("svg:path", {class: one.look, d: path})];
    if (one.area) drawn.unshift(made("svg:path", {class: `${one.look} area`, d: fill}));
    return drawn;
  }

  tell(place) {
    const figure = value => value === null || value === undefined ? "–" : this.format(value, true);
    const {rows} = this, last = rows.at.length - 1;
    const words = this.series.map(one => `${one.label} ${figure(rows[one.key][place])}`).join(", ");
    const keys = this.series.map(one => made("span", {class: one.look}, made("i", {class: one.look, "aria-hidden": "true"}),
      `${one.label} `, made("b", {text: figure(rows[one.key][last])})));
    if (this.level) keys.push(made("span", {}, made("i", {class: "plan", "aria-hidden": "true"}), `${this.plan} `,
      made("b", {text: figure(this.level)})));
    this.legend.replaceChildren(...keys);
    const told = `${clock(rows.at[place])}: ${words}`;
    this.readout.textContent = this.place === null ? "" : told;
    this.svg.setAttribute("aria-valuemax", last);
    this.svg.setAttribute("aria-valuenow", place);
    this.svg.setAttribute("aria-valuetext", told);
  }
}
