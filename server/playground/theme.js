// Light or dark: as the system has it, or as chosen here. Loaded before the page is painted, so that it never flashes.

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
