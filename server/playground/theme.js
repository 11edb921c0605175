// The colour theme: of the system, or the one chosen here. Loaded before the first paint, so the page never flashes.

const KEY = "nbest.theme";
const chosen = localStorage.getItem(KEY) ?? "auto";
document.documentElement.dataset.theme = chosen;

addEventListener("DOMContentLoaded", () => {
  const select = document.getElementById("theme");
  select.value = chosen;
  select.addEventListener("change", () => {
    document.documentElement.dataset.theme = select.value;
    localStorage.setItem(KEY, select.value);
  });
});
