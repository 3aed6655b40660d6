// Figures as people read them.

const BINARY = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  let unit = 0;
  while (count >= 1024 && unit < BINARY.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${BINARY[unit]}`;
}

export function rate(bytesPerSecond) {
  return `${bytes(bytesPerSecond)}/s`;
}

export function milliseconds(count) {
  if (count < 1000) {
    return `${Math.round(count)} ms`;
  }
  return count < 100_000 ? `${(count / 1000).toFixed(1)} s` : `${Math.round(count / 60_000)} min`;
}

export function nanoseconds(count) {
  return count < 1e6 ? `${Math.round(count / 1e3)} µs` : milliseconds(count / 1e6);
}

export function number(count) {
  return Math.round(count).toLocaleString("en");
}

export function percent(part) {
  return `${(Math.floor(part * 1000) / 10).toFixed(1)} %`;
}

export function clock(seconds) {
  const time = new Date(seconds * 1000);
  const two = (count) => String(count).padStart(2, "0");
  const text = `${two(time.getHours())}:${two(time.getMinutes())}:${two(time.getSeconds())}`;
  return `${text}.${String(time.getMilliseconds()).padStart(3, "0")}`;
}
