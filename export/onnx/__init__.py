"""From a plain module to an ONNX file, checked in onnxruntime."""
