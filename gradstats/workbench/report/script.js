"use strict";
(() => {
  const root = document.documentElement;
  const parsed = (id) => JSON.parse(document.getElementById(id).textContent);

  // ---- colours ---------------------------------------------------------------------------------
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const KEY = "gradstats-theme";
  const kept = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const show = (theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    const dark = (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
    root.classList.toggle("is-dark", dark);
    button.setAttribute("aria-pressed", String(dark));
    return dark;
  };
  show(kept());
  button.hidden = false;
  system.addEventListener("change", () => show(null));
  button.addEventListener("click", () => {
    const next = root.classList.contains("is-dark") ? "light" : "dark";
    show(next);
    try { localStorage.setItem(KEY, next); } catch { /* not kept, then */ }
  });

  // ---- reading points off the figures ----------------------------------------------------------
  const made = (tag, text, colour) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (colour !== undefined) node.className = `c${colour}`;
    return node;
  };
  const written = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const end = (ends, i) => (ends && ends[i] !== null ? written(ends[i]) : "no end");
  const fraction = ([low, high, log], value) =>
    ((log ? Math.log10(value) : value) - low) / (high - low);

  const nearest = (line, scale, at) => {
    let best = -1, least = Infinity;
    line.x.forEach((x, i) => {
      if (x === null || line.y[i] === null) return;
      const away = Math.abs(fraction(scale, x) - at);
      if (away < least) { least = away; best = i; }
    });
    return best;
  };

  const attach = (plot, figure) => {
    const cross = plot.querySelector(".cross"), tip = plot.querySelector(".tip");
    const stops = [...new Set(figure.lines.flatMap((line) => line.x.filter((x) => x !== null)))]
      .sort((a, b) => a - b);
    let position = -1;
    const hide = () => { cross.hidden = true; tip.hidden = true; };
    const point = (at) => {
      const found = figure.lines
        .map((line) => ({ line, i: nearest(line, figure.x, at) }))
        .filter(({ i }) => i >= 0);
      if (!found.length) return;
      const away = ({ line, i }) => Math.abs(fraction(figure.x, line.x[i]) - at);
      const chosen = found.reduce((a, b) => (away(b) < away(a) ? b : a));
      const x = chosen.line.x[chosen.i], left = fraction(figure.x, x);
      const near = found.filter(({ line, i }) => Math.abs(fraction(figure.x, line.x[i]) - left) < 0.02);
      cross.replaceChildren();
      cross.style.left = `${100 * left}%`;
      tip.replaceChildren(made("b", `${written(x)}  ${figure.labels.x}`));
      for (const { line, i } of near) {
        const dot = made("i", undefined, line.c);
        dot.style.top = `${100 * (1 - fraction(figure.y, line.y[i]))}%`;
        cross.append(dot);
        const row = made("div");
        let text = `${line.name}: ${written(line.y[i])}`;
        if (line.low || line.high) {
          text += ` (${end(line.low, i)} to ${end(line.high, i)})`;
        }
        row.append(made("i", undefined, line.c), made("span", text));
        tip.append(row);
      }
      cross.hidden = false;
      tip.hidden = false;
      if (left > 0.5) { tip.style.left = "auto"; tip.style.right = `calc(${100 * (1 - left)}% + 10px)`; }
      else { tip.style.right = "auto"; tip.style.left = `calc(${100 * left}% + 10px)`; }
    };
    const follow = (event) => {
      const box = plot.getBoundingClientRect();
      point(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(stops.length / 20));
      const moves = {
        ArrowLeft: position - (event.shiftKey ? far : 1), ArrowRight: position + (event.shiftKey ? far : 1),
        Home: 0, End: stops.length - 1,
      };
      if (event.key === "Escape") hide();
      if (!(event.key in moves)) return;
      event.preventDefault();
      position = Math.min(stops.length - 1, Math.max(0, moves[event.key]));
      point(fraction(figure.x, stops[position]));
    });
  };
  parsed("figures").forEach((figure, i) => attach(document.getElementById(`plot-${i}`), figure));

  // ---- raw data --------------------------------------------------------------------------------
  document.querySelectorAll(".raw").forEach((pre) => {
    pre.closest("details").addEventListener("toggle", () => {
      if (!pre.textContent) pre.textContent = JSON.stringify(parsed(pre.dataset.from), null, 1);
    });
  });
  document.querySelectorAll(".download").forEach((download) => {
    download.hidden = false;
    download.addEventListener("click", () => {
      const text = JSON.stringify(parsed(download.dataset.from));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = download.dataset.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  });
})();
