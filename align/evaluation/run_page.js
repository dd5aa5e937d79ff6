"use strict";
// Values under the pointer, and samples through time. The page reads without: charts are drawn, the last samples shown.

const nearest = (values, wanted) => {
  let best = 0;
  for (let k = 1; k < values.length; k++) if (Math.abs(values[k] - wanted) < Math.abs(values[best] - wanted)) best = k;
  return best;
};

for (const svg of document.querySelectorAll("svg.chart")) {
  const plot = svg.parentElement, width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
  const numbers = (group, name) => group.dataset[name].split(" ").map(Number);
  let lines, tip, cursor;
  const leave = () => { tip?.remove(); cursor?.remove(); tip = cursor = undefined; };
  const point = (event) => {
    lines ??= [...svg.querySelectorAll("g.run")].map((group) => ({
      group, at: numbers(group, "at"), x: numbers(group, "x"), y: numbers(group, "y"),
    }));
    const shown = lines.filter((line) => getComputedStyle(line.group).display !== "none");
    if (!shown.length) return leave();
    const box = svg.getBoundingClientRect();
    const wanted = (event.clientX - box.left) / box.width * width;
    const places = shown.flatMap((line) => line.at), x = places[nearest(places, wanted)];
    if (!tip) {
      tip = plot.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
      cursor = svg.insertBefore(document.createElementNS("http://www.w3.org/2000/svg", "line"), svg.firstChild);
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("y1", 8);
      cursor.setAttribute("y2", height - 22);
    }
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const first = shown.find((line) => line.at.includes(x));
    const rows = [Object.assign(document.createElement("div"), {
      textContent: `${svg.dataset.axis}: ${Math.round(first.x[first.at.indexOf(x)]).toLocaleString("en")}`,
    })];
    for (const line of shown) {
      const k = nearest(line.at, x);
      if (Math.abs(line.at[k] - x) > 12) continue;  // it has no value here
      const row = document.createElement("div");
      row.className = [...line.group.classList].find((name) => /^r\d$/.test(name));
      row.append(document.createElement("i"), `${line.group.dataset.name} `, document.createElement("b"));
      row.lastChild.textContent = line.y[k];
      rows.push(row);
    }
    tip.replaceChildren(...rows);
    const left = x / width * box.width, room = box.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, left > box.width / 2 ? left - tip.offsetWidth - 12 : left + 12))}px`;
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
}

const time = document.querySelector(".time");
if (time) {
  const [button, slider, output] = time.children, steps = slider.dataset.steps.split(" ").map(Number);
  const show = () => {
    const step = steps[slider.value];
    output.textContent = `update ${step}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const strip of document.querySelectorAll(".strip")) {
      const frames = [...strip.children], past = frames.filter((frame) => Number(frame.dataset.step) <= step);
      const shown = past.length ? past[past.length - 1] : frames[0];
      for (const frame of frames) frame.hidden = frame !== shown;
    }
  };
  let playing;
  const stop = () => { clearInterval(playing); playing = undefined; button.textContent = "▶"; };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (playing) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    button.textContent = "❚❚";
    show();
    playing = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === steps.length - 1) stop();
    }, 600);
  });
  show();
}
