// Formats numbers for people.

export function decimal(value, digits = 2) {
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
}

export function seconds(value) {
  return `${decimal(value, value < 10 ? 2 : 1)} s`;
}

export function whole(value) {
  return value.toLocaleString("en");
}

/** A price with three significant digits, however small it is. */
export function price(value) {
  return value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
}

export function counted(count, noun) {
  return `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
}
