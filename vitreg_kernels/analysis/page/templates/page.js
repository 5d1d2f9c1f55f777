"use strict";
// A control sets one number, which the style sheet turns into the tile that is seen; the readings below it follow.
const pictures = document.getElementById("pictures");
const controls = document.querySelectorAll("[data-sets]");
function show(control) {
  const name = control.dataset.sets;
  pictures.style.setProperty("--" + name, control.value);
  for (const reading of document.querySelectorAll(`[data-follows="${name}"]`)) {
    const captions = JSON.parse(reading.dataset.captions);
    reading.textContent = captions[Math.min(control.value, captions.length - 1)];
  }
  const output = control.parentElement.querySelector("output");
  if (output) output.value = control.value;
}
for (const control of controls) {
  control.addEventListener("input", () => show(control));
  show(control); // a browser may have kept an earlier choice over a reload
}
// Left and right change the block from anywhere that does not use these keys itself.
document.addEventListener("keydown", (event) => {
  const slider = document.querySelector('[data-sets="layer"]');
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!slider || !step || document.activeElement !== document.body || event.ctrlKey || event.altKey || event.metaKey) return;
  slider.value = Number(slider.value) + step;
  show(slider);
  event.preventDefault();
});
