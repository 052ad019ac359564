"""Write the files of the page: a packed sparse classifier of digits, and digits to try it on.

    python make_model.py && npm install && python -m http.server 8000

Then open http://localhost:8000. The model decodes itself while onnxruntime loads it.
"""

import json
from pathlib import Path

import torch
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.data import load_digits
from fedmef_fx.models import digits_cnn

FOLDER = Path(__file__).parent


def main(folder: Path = FOLDER, *, epochs: int = 8) -> None:
    """Train for a few seconds, and write `model.onnx` and `digits.json`."""
    torch.manual_seed(0)
    train, test = load_digits(seed=0)
    images, labels = train.tensors
    model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    tried, right = (tensor[:40] for tensor in test.tensors)
    report = fedmef_fx.export_onnx(model, folder / "model.onnx", example_inputs=(tried,), weights="packed")
    with torch.no_grad():
        expected = model.eval()(tried)
    digits = {"images": tried.flatten(1).tolist(), "labels": right.tolist(), "logits": expected.tolist()}
    (folder / "digits.json").write_text(json.dumps({**digits, "dense_bytes": report.dense_bytes}), encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
