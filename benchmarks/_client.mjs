// A file in onnxruntime for Node, or for the web (WebAssembly), for `clients.py`:
//     node _client.mjs PACKAGE_FOLDER FILE INPUT SHAPE TYPE RESULT
// INPUT and RESULT are raw numbers of a row-major tensor; RESULT is of float32.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { performance } from "node:perf_hooks";

const [folder, file, input, shape, type, result] = process.argv.slice(2);
const require = createRequire(join(folder, "package.json"));
const ort = require(folder);
const { version } = require(join(folder, "package.json"));
const isWeb = folder.endsWith("web");
const options = isWeb ? { executionProviders: ["wasm"] } : { intraOpNumThreads: 1, logSeverityLevel: 3 };
if (isWeb) ort.env.wasm.numThreads = 1;

const raw = readFileSync(input);
const buffer = raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.byteLength);
const data = type === "int64" ? new BigInt64Array(buffer) : new Float32Array(buffer);
const tensor = new ort.Tensor(type, data, shape.split(",").map(Number));

const seconds = async (action) => {
  const start = performance.now();
  const value = await action();
  return [value, (performance.now() - start) / 1000];
};
const [session, load] = await seconds(() => ort.InferenceSession.create(new Uint8Array(readFileSync(file)), options));
const step = async () => (await session.run({ [session.inputNames[0]]: tensor }))[session.outputNames[0]];
const output = await step();
const times = [];
for (let i = 0; i < 3; i++) times.push((await seconds(step))[1]);
writeFileSync(result, Buffer.from(output.data.buffer, output.data.byteOffset, output.data.byteLength));
console.log(`RESULT ${JSON.stringify({ version, load, run: Math.min(...times) })}`);
process.exit(0);
