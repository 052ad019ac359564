"""The web example in a browser, and its file in Node: packed weights decode themselves in WebAssembly, too."""

import functools
import http.server
import json
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, NoBrowserError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "web"
# Where `npm install` puts packages: for the tests, and for who tries the example.
MODULES = [Path(sys.prefix) / "node_modules", EXAMPLE / "node_modules"]


@pytest.fixture(scope="module")
def modules() -> Path:
    for folder in MODULES:
        if (folder / "onnxruntime-web").is_dir():
            return folder
    pytest.skip(f"needs onnxruntime-web: npm install --prefix {sys.prefix} onnxruntime-web")


@pytest.fixture(scope="module")
def site(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    runpy.run_path(str(EXAMPLE / "make_model.py"))["main"](folder, epochs=3)
    for name in ("index.html", "classify.mjs"):
        shutil.copy(EXAMPLE / name, folder)
    (folder / "node_modules").symlink_to(modules)
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_classifies_digits_as_torch_does(address: str, site: Path) -> None:
    try:
        browser = Browser()
    except NoBrowserError as error:
        pytest.skip(str(error))
    try:
        browser.driver.get(address)
        summary_of = "return {...document.getElementById('summary').dataset}"
        browser.wait(lambda: "difference" in browser.run(summary_of), seconds=60)
        summary = browser.run(summary_of)
        digits = json.loads((site / "digits.json").read_text(encoding="utf-8"))
        assert float(summary["difference"]) < 1e-3
        assert int(summary["bytes"]) == (site / "model.onnx").stat().st_size < 0.5 * digits["dense_bytes"]
        seen = browser.run("return [...document.querySelectorAll('#digits li')].map(item => Number(item.dataset.seen))")
        assert seen == np.argmax(digits["logits"], axis=1).tolist()
        assert not [message for message in browser.messages() if "favicon" not in str(message)]
    finally:
        browser.close()


@pytest.mark.parametrize("package", ["onnxruntime-web", "onnxruntime-node"])
def test_node_computes_what_torch_does(package: str, modules: Path, site: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (modules / package).is_dir():
        pytest.skip(f"needs node and {package}: npm install --prefix {sys.prefix} {package}")
    digits = json.loads((site / "digits.json").read_text(encoding="utf-8"))
    images, expected = (np.array(digits[name], np.float32) for name in ("images", "logits"))
    images.tofile(tmp_path / "in.bin")
    command = [node, str(ROOT / "benchmarks" / "_client.mjs"), str(modules / package), str(site / "model.onnx")]
    command += [str(tmp_path / "in.bin"), f"{len(images)},1,8,8", "float32", str(tmp_path / "out.bin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- a fixed program
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RESULT ")
    found = np.fromfile(tmp_path / "out.bin", np.float32).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-3)
