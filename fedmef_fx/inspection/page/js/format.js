// Numbers and names for people.

/** Three significant digits: 999, 1.23k, 45.6M. */
function count(number) {
  for (const unit of ["", "k", "M", "G"]) {
    if (Math.abs(number) < 999.5) return `${Number(number.toPrecision(3))}${unit}`;
    number /= 1000;
  }
  return `${Number(number.toPrecision(3))}T`;
}

/** 12.3 kB, in powers of 1000. */
function bytes(number) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(number) < 999.5) return `${Number(number.toPrecision(3))} ${unit}`;
    number /= 1000;
  }
  return `${Number(number.toPrecision(3))} TB`;
}

/** A share as per cent, with more digits where it is small. */
function percent(share) {
  const value = share * 100;
  return `${value === 0 || value >= 9.95 ? value.toFixed(0) : value.toPrecision(2)} %`;
}

/** A value of a weight or a loss. */
const decimal = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());

const sizes = (shape) => (shape.length ? shape.join(" × ") : "scalar");

/** Names can have any length; both ends tell something, so the middle goes. */
function shorten(text, most = 60) {
  if (text.length <= most) return text;
  const half = Math.floor((most - 1) / 2);
  return `${text.slice(0, half)}…${text.slice(-half)}`;
}

/** Whether some weights of a parameter may be pruned: of a transformed model, or in a file. */
const hasMask = (row) => row.tier !== null || row.active < row.weights;

// A pass has the same colour in every page; which one that is stands in the document.
let passColours = [];

const passColour = (index) => passColours[index];
