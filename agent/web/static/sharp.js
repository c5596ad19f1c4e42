/* Runs before uPlot, which reads devicePixelRatio once: canvases get at least two pixels per CSS
   pixel, so that a chart printed or zoomed from an ordinary screen is not blurred. */
"use strict";
(() => {
  const native = Object.getOwnPropertyDescriptor(window, "devicePixelRatio");
  Object.defineProperty(window, "devicePixelRatio", {
    configurable: true,
    get: () => Math.max(2, native?.get ? native.get.call(window) : 1),
  });
})();
