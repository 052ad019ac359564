"""The pictures of the docs, taken from real pages in a real browser: `make docs-images`.

The models are transformed and, where training is shown, trained again.
"""

import io
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.federated.demo import run_demo
from fedmef_fx.models import resnet18

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # tests are no part of the installed package

from browser import NARROW, Browser  # noqa: E402 - found by the line above

from tests.inspection.models import Encoder  # noqa: E402 - the same

FOLDER = ROOT / "docs" / "images"


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pages = _pages(Path(folder))
        browser = Browser()
        try:
            _take(browser, pages)
        finally:
            browser.close()


def _pages(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    pages = {name: folder / f"{name}.html" for name in ("resnet18", "encoder", "digits")}
    image, ids = torch.randn(1, 3, 32, 32), torch.randint(50, (2, 6))
    model = resnet18()
    sparse = fedmef_fx.transform(model, Config(density=0.1), example_inputs=(image,))
    fedmef_fx.inspect(sparse, (image,)).to_html(pages["resnet18"], title="ResNet18", original=model)
    encoder = fedmef_fx.transform(Encoder(), Config(density=0.2), example_inputs=(ids,))
    fedmef_fx.inspect(encoder, (ids,)).to_html(pages["encoder"])
    history = run_demo(seed=0).history
    trained = fedmef_fx.inspect(history.model, (torch.randn(1, 1, 8, 8),))
    trained.to_html(pages["digits"], title="digits_cnn", history=history)
    return pages


def _take(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"])
    browser.press("/")
    browser.press("layer2.0.conv1", "\ue007")
    _save(browser, "page-graph")
    browser.press("b")
    _save(browser, "page-before")
    browser.open(pages["resnet18"], size=(1280, 640))
    browser.click("#tab-layers")
    _save(browser, "page-layers")
    browser.click("#tab-passes")
    _save(browser, "page-passes")
    # A layer is chosen: the overview beside the graph would show where the source of the model lies on this machine.
    browser.open(pages["encoder"], dark=True)
    browser.press("/")
    browser.press("layers.0.attention.proj", "\ue007")
    _save(browser, "page-partial-dark")
    browser.open(pages["digits"])
    browser.click("#tab-training")
    _save(browser, "page-training")
    browser.open(pages["digits"], size=NARROW)
    _save(browser, "page-narrow")
    browser.open(pages["digits"], size=NARROW, dark=True)
    browser.click("#tab-layers")
    _save(browser, "page-narrow-dark")


def _save(browser: Browser, name: str) -> None:
    target = FOLDER / f"{name}.png"
    Image.open(io.BytesIO(browser.picture())).convert("RGB").save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
