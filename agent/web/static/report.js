/* The report of a sweep, or of two beside each other (beside.js): charts into the places that the
   page keeps for them, and the buttons that copy a command. */
"use strict";
(() => {
  const charts = window.servefitCharts;
  const data = JSON.parse(document.getElementById("data").textContent);
  const places = (window.servefitBeside ?? window.servefitSpecs.places)(data);

  function fill(place, specs) {
    const grid = document.querySelector(`[data-charts="${place}"]`);
    if (!grid) return;
    const drawable = specs.filter((spec) => spec.x.values.length);
    drawable.forEach((spec) => charts.mount(grid, spec));
  }

  /** Without the clipboard's permission the command is selected, for the keyboard to copy. */
  async function copyCommand({ currentTarget: button }) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) return charts.say("Selected: copy with Ctrl+C.");
    }
    button.textContent = "Copied";
    charts.say("The command was copied.");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }

  for (const [place, specs] of Object.entries(places)) fill(place, specs);
  for (const button of document.querySelectorAll(".command button")) {
    button.addEventListener("click", copyCommand);
  }
})();
