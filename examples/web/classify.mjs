// Loads model.onnx, whose packed weights decode themselves, and classifies the digits of digits.json.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

const SIDE = 8;

function drawn(pixels) {
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  const context = canvas.getContext("2d");
  const most = Math.max(...pixels);
  context.fillStyle = "white";
  context.fillRect(0, 0, SIDE, SIDE);
  pixels.forEach((value, i) => {
    context.fillStyle = `rgb(0 0 0 / ${Math.max(value, 0) / most})`;
    context.fillRect(i % SIDE, Math.floor(i / SIDE), 1, 1);
  });
  return canvas;
}

function largest(row) {
  return row.indexOf(Math.max(...row));
}

function show(pixels, label, seen) {
  const item = document.createElement("li");
  item.append(drawn(pixels), `${seen}`);
  item.dataset.seen = seen;
  if (seen !== label) {
    item.className = "wrong";
    item.append(` (is ${label})`);
  }
  document.getElementById("digits").append(item);
}

async function main() {
  ort.env.wasm.numThreads = 1; // several need headers that a plain file server does not send
  const [bytes, digits] = await Promise.all([
    fetch("model.onnx").then((answer) => answer.arrayBuffer()),
    fetch("digits.json").then((answer) => answer.json()),
  ]);
  const start = performance.now();
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const loaded = performance.now() - start;
  const count = digits.labels.length;
  const input = new ort.Tensor("float32", Float32Array.from(digits.images.flat()), [count, 1, SIDE, SIDE]);
  const output = (await session.run({ [session.inputNames[0]]: input }))[session.outputNames[0]];
  const classes = output.data.length / count;
  const rows = digits.labels.map((_, i) => [...output.data.slice(i * classes, (i + 1) * classes)]);
  rows.forEach((row, i) => show(digits.images[i], digits.labels[i], largest(row)));

  const difference = Math.max(...rows.flatMap((row, i) => row.map((value, j) => Math.abs(value - digits.logits[i][j]))));
  const right = rows.filter((row, i) => largest(row) === digits.labels[i]).length;
  const summary = document.getElementById("summary");
  summary.textContent =
    `${right} of ${count} digits right. The file has ${bytes.byteLength.toLocaleString()} bytes, ` +
    `${(digits.dense_bytes / bytes.byteLength).toFixed(1)} times fewer than its dense weights, and was ready after ` +
    `${loaded.toFixed(0)} ms. Largest difference from torch: ${difference.toExponential(1)}.`;
  Object.assign(summary.dataset, { right, count, difference, bytes: bytes.byteLength });
}

main().catch((error) => {
  document.getElementById("summary").textContent = `The model cannot be shown: ${error.message}`;
});
