// Before the page is drawn: the colours that the reader chose, if they did.
"use strict";
{
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* storage is off: the system's colours */ }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
