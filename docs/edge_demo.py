"""Run an exported model with numpy and onnxruntime alone: python edge_demo.py model.onnx [input.npy]."""

import hashlib
import sys
import time

import numpy as np
import onnxruntime

path = sys.argv[1]
with open(path, "rb") as file:
    data = file.read()
# The last 86 bytes are the digest of all others (docs/onnx.md).
if hashlib.sha256(data[:-86]).hexdigest().encode() != data[-64:]:
    sys.exit(f"{path} is damaged")

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])  # decodes the weights, once
(model_input,) = session.get_inputs()
if len(sys.argv) > 2:
    x = np.load(sys.argv[2])
else:
    shape = [size if isinstance(size, int) else 1 for size in model_input.shape]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

session.run(None, {model_input.name: x})  # the first run allocates
start = time.perf_counter()
logits = session.run(None, {model_input.name: x})[0]
milliseconds = (time.perf_counter() - start) * 1e3
print(f"{len(data)} bytes, {milliseconds:.2f} ms, classes {logits.argmax(axis=1).tolist()}")
