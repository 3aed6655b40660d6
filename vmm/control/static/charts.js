// Two small charts in SVG. Every function draws anew into an empty <svg>.

const NAMESPACE = "http://www.w3.org/2000/svg";
const LEFT = 74;
const RIGHT = 550;
const TOP = 12;
const BOTTOM = 172;

function element(name, attributes, text) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  if (text !== undefined) {
    made.textContent = text;
  }
  return made;
}

// The round number at or above a maximum that makes an axis readable: a power of two for bytes.
function roundUpBytes(maximum) {
  return 2 ** Math.ceil(Math.log2(Math.max(maximum, 1)));
}

function roundUp(maximum) {
  const step = 10 ** Math.floor(Math.log10(Math.max(maximum, 1)));
  return [1, 2, 4, 6, 8, 10].map((factor) => factor * step).find((top) => top >= maximum);
}

function gridLines(svg, top, format) {
  for (const part of [0, 0.5, 1]) {
    const y = BOTTOM - part * (BOTTOM - TOP);
    svg.append(
      element("line", { x1: LEFT, x2: RIGHT, y1: y, y2: y, class: "grid" }),
      element("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, format(part * top)),
    );
  }
}

// points: [seconds, value, value...]; names: a class for each value.
export function lines(svg, points, names, format) {
  svg.replaceChildren();
  const last = Math.max(points.length ? points[points.length - 1][0] : 0, 1);
  const top = roundUpBytes(Math.max(1024, ...points.flatMap((point) => point.slice(1))));
  gridLines(svg, top, format);
  const x = (seconds) => LEFT + (seconds / last) * (RIGHT - LEFT);
  const y = (value) => BOTTOM - (value / top) * (BOTTOM - TOP);
  names.forEach((name, index) => {
    const path = points.map((point, at) => {
      const place = `${x(point[0]).toFixed(1)},${y(point[index + 1]).toFixed(1)}`;
      return `${at ? "L" : "M"}${place}`;
    });
    if (path.length) {
      svg.append(element("path", { d: path.join(""), class: `line ${name}` }));
    }
  });
  svg.append(
    element("text", { x: LEFT, y: 192 }, "0 s"),
    element("text", { x: RIGHT, y: 192, "text-anchor": "end" }, `${last.toFixed(last < 10 ? 1 : 0)} s`),
  );
}

// counts[i] of what took [2^i, 2^(i+1)) microseconds.
export function latencies(svg, counts, format) {
  svg.replaceChildren();
  const used = counts.flatMap((count, index) => (count ? [index] : []));
  if (!used.length) {
    return;
  }
  const first = Math.max(used[0] - 1, 0);
  const end = Math.min(used[used.length - 1] + 2, counts.length);
  const top = roundUp(Math.max(2, ...counts));
  gridLines(svg, top, (count) => String(Math.round(count)));
  const width = (RIGHT - LEFT) / (end - first);
  const every = Math.ceil((end - first) / 8);
  for (let index = first; index < end; index += 1) {
    const height = (counts[index] / top) * (BOTTOM - TOP);
    const x = LEFT + (index - first) * width;
    const bar = { x: x + 2, y: BOTTOM - height, width: width - 4, height, rx: 2, class: "bar" };
    const drawn = element("rect", bar);
    drawn.append(element("title", {}, `${counts[index]} of ${format(2 ** index * 1e3)} or more`));
    svg.append(drawn);
    if ((index - first) % every === 0) {
      svg.append(element("text", { x, y: 192, "text-anchor": "middle" }, format(2 ** index * 1e3)));
    }
  }
}
