/* The sweep's report: charts into the places that the page keeps for them, and the copy button. */
"use strict";
(() => {
  const charts = window.servefitCharts;
  const { sweep, labels } = JSON.parse(document.getElementById("sweep").textContent);

  function fill(place, specs) {
    const grid = document.querySelector(`[data-charts="${place}"]`);
    if (!grid) return;
    const drawable = specs.filter((spec) => spec.x.values.length);
    drawable.forEach((spec) => charts.mount(grid, spec));
  }

  /** Without the clipboard's permission the command is selected, for the keyboard to copy. */
  async function copyCommand() {
    const code = document.getElementById("command");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) return charts.say("Selected: copy with Ctrl+C.");
    }
    const button = document.getElementById("copy");
    button.textContent = "Copied";
    charts.say("The command was copied.");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }

  /** Paper is light whatever the screen is, and narrower: the canvases are drawn again for it. */
  function printing(on) {
    document.documentElement.classList.toggle("paper", on);
    for (const details of document.querySelectorAll("details")) details.open = on;
    charts.redraw();
  }

  fill("curve", [window.servefitSpecs.curve(sweep, labels)]);
  fill("latency", window.servefitSpecs.latencies(sweep));
  fill("server", window.servefitSpecs.server(sweep));
  fill("energy", window.servefitSpecs.energy(sweep));
  document.getElementById("copy").addEventListener("click", copyCommand);
  addEventListener("beforeprint", () => printing(true));
  addEventListener("afterprint", () => printing(false));
})();
