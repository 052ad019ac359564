"""How the active values of a tensor and their positions become bytes, and back: numpy alone, no ONNX.

Three position codes, of which `positions.encode_positions` takes the smallest, and four kinds of values. Every `decode`
here is the reference for the ONNX subgraph of the same code in `fedmef_fx.export.onnx.decode_graph`.
"""
