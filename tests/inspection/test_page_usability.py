"""The page for people: a small head, a readable graph, links, keys, colours, narrow windows, accessibility."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import NARROW, Browser
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.inspection import inspect
from fedmef_fx.models import resnet18
from tests.inspection.models import Encoder, VisionTransformer, two_convolutions

pytestmark = pytest.mark.slow

LAPTOP = (1280, 800)
PANEL = "return document.querySelector('.panel').innerText"
OVERFLOW = "return document.documentElement.scrollWidth - window.innerWidth"
INSIDE = """
const window_ = document.querySelector('.canvas').getBoundingClientRect();
return [...document.querySelectorAll('.item')].filter((item) => {
  const { top, bottom, left, right } = item.getBoundingClientRect();
  return top >= window_.top && bottom <= window_.bottom && left >= window_.left && right <= window_.right;
}).length
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    x, ids = torch.randn(1, 3, 32, 32), torch.randint(50, (2, 6))
    model = resnet18()
    sparse = fedmef_fx.transform(model, Config(density=0.1, weight_storage="dense"), example_inputs=(x,))
    steps = {"memory": fedmef_fx.memory(sparse, (x,)), "memory_before": fedmef_fx.memory(model, (x,))}
    inspect(sparse, (x,)).to_html(
        folder / "resnet18.html", original=model, command="fedmef-fx inspect resnet18", **steps
    )
    encoder = fedmef_fx.transform(Encoder(), Config(density=0.2), example_inputs=(ids,))
    inspect(encoder, (ids,)).to_html(folder / "encoder.html", memory=fedmef_fx.memory(encoder, (ids,)))
    deep = VisionTransformer(depth=16)
    inspect(deep, (torch.randn(1, 3, 16, 16),)).to_html(folder / "deep.html")
    return {path.stem: path for path in folder.iterdir()}


def test_the_head_is_small_and_a_resnet_is_seen_at_once(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"], size=LAPTOP)
    assert browser.run("return document.querySelector('.canvas').getBoundingClientRect().top") <= 96
    assert browser.run(INSIDE) >= 15
    assert _scale(browser) >= 0.75
    assert browser.run(OVERFLOW) <= 0


def _scale(browser: Browser) -> float:
    item = "document.querySelector('.item')"
    return browser.run(f"return {item}.getBoundingClientRect().width / {item}.offsetWidth")


def test_fit_stays_readable_and_closes_modules(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["deep"], size=LAPTOP)
    browser.click("[aria-label='Open every module']")
    opened = browser.run("return document.querySelectorAll('.item').length")
    assert not browser.run("return document.querySelector('.map').hidden")
    browser.click("[aria-label^='Show everything']")
    shown = browser.run("return document.querySelectorAll('.item').length")
    assert shown < opened
    assert browser.run(INSIDE) == shown
    assert _scale(browser) >= 0.75


def test_the_minimap_leads_to_where_it_is_pressed(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["deep"], size=LAPTOP)
    browser.click("[aria-label='Open every module']")
    place = "return document.querySelector('.stage').style.transform"
    before = browser.run(place)
    browser.click(".map canvas")
    assert browser.run(place) != before
    assert browser.messages() == []


def test_long_names_lose_their_middle(browser: Browser, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("the_beginning_" + "of_a_long_name_" * 5 + "and_its_end", nn.Linear(2, 2))
    inspect(model).to_html(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", size=LAPTOP)
    head, tail = browser.run(
        "return [...document.querySelector('.item.layer .name').children].map((part) => part.getBoundingClientRect())"
    )
    box = browser.run("return document.querySelector('.item.layer').getBoundingClientRect()")
    assert tail["right"] <= box["right"]
    assert head["right"] <= tail["left"] + 1
    assert browser.run("return document.querySelector('.item.layer .name').textContent").endswith("s_end")


def test_a_pass_has_one_colour_on_all_pages(pages: dict[str, Path], tmp_path: Path) -> None:
    dense = fedmef_fx.transform(two_convolutions(), Config(density=0.5, weight_storage="dense", activation_sparsity=0))
    inspect(dense).to_html(tmp_path / "short.html")
    long, short = (
        {entry["name"]: entry["colour"] for entry in _document(path)["passes"]}
        for path in (pages["resnet18"], tmp_path / "short.html")
    )
    assert len(set(long.values())) == len(long)
    assert list(long) != list(short)
    assert short.items() <= long.items() | short.items()
    assert all(long[name] == short[name] for name in long.keys() & short.keys())


def _document(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'id="document">(.*?)</script>', path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return json.loads(text)


class Plumbing(nn.Module):
    """Sizes, arithmetic with them, elements of a tuple, an expanded parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.both = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        left, right = self.both(x).chunk(2, dim=-1)
        rows = torch.cat([self.token.expand(x.size(0), -1, -1), left * right], 1)
        return rows[:, 0] + rows.narrow(1, 0, half + 1).sum(1)


def test_what_only_carries_values_on_is_folded(tmp_path: Path) -> None:
    for x in ((torch.ones(2, 4, 4),), None):
        inspect(Plumbing(), x).to_html(tmp_path / "page.html")
        (view,) = _document(tmp_path / "page.html")["views"]
        boxes = [view["nodes"][part["i"]] for part in view["root"]["c"] if "i" in part]
        assert [box["x"] for box in boxes] == ["x", "both", "chunk", "mul", "cat", "narrow", "sum", "add", "output"]
        rows, columns = zip(*view["root"]["at"], strict=True)
        assert rows == tuple(range(9))
        assert set(columns) == {0}


def test_a_partly_traced_model_opens_closed_and_shows_what_flows(browser: Browser, pages: dict[str, Path]) -> None:
    document = _document(pages["encoder"])
    root = document["views"][-1]["root"]
    assert [part["l"] for part in root["c"]][:3] == ["layers", "pooler", "classifier"]
    assert [edge[:2] for edge in root["e"]] == [[-1, 0], [0, 1], [1, 2], [2, -2]]
    assert [edge[:2] for edge in root["c"][0]["e"]] == [[-1, 0], [0, 1], [1, -2]]
    browser.open(pages["encoder"], size=LAPTOP)
    assert browser.run("return document.querySelectorAll('.item.open').length") == 0


def test_each_parameter_is_drawn_in_one_place(pages: dict[str, Path]) -> None:
    document = _document(pages["encoder"])
    for view in document["views"]:
        regions: dict[int, set[str]] = {}
        for node in view["nodes"]:
            for index in node.get("w", ()):
                regions.setdefault(index, set()).add(node.get("r", node["n"]))
        assert regions
        assert all(len(places) == 1 for places in regions.values())


def test_a_link_leads_to_the_chosen_box(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"], size=LAPTOP)
    browser.press("/")
    browser.press("layer2.0.conv1", "\ue007")
    link = browser.run("return window.location.href")
    assert "#after/" in link
    assert browser.run("return document.querySelector('.panel a').href") == link
    browser.driver.get("about:blank")
    browser.driver.get(link)
    assert "layer2.0.conv1.weight" in browser.run(PANEL)
    browser.run("window.location.hash = '#after/both/node/%'")
    assert browser.messages() == []


def test_a_pass_shows_what_it_did(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"], size=LAPTOP)
    browser.click("#tab-passes")
    browser.run("[...document.querySelectorAll('.view-passes button.chip')].at(-1).click()")
    assert browser.run("return document.querySelector('#tab-graph').ariaSelected") == "true"
    shown = browser.run(PANEL)
    name = _document(pages["resnet18"])["passes"][-1]["name"]
    assert shown.startswith(name)
    assert "Boxes that it changed" in shown
    assert browser.run("return document.querySelectorAll('.item.dim').length") > 0
    browser.click(".legend [aria-pressed=true]")
    assert browser.run("return document.querySelectorAll('.item.dim').length") == 0


def test_a_question_mark_lists_the_keys(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"], size=LAPTOP)
    browser.press("?")
    assert browser.run("return document.querySelector('dialog').open")
    assert "before or after the passes" in browser.run("return document.querySelector('dialog').innerText")
    browser.press("\ue00c")
    assert not browser.run("return document.querySelector('dialog').open")


def test_narrow_tables_show_density_and_reason(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["encoder"], size=NARROW)
    assert browser.run("return document.querySelector('header').getBoundingClientRect().height") <= 96
    browser.click("#tab-layers")
    assert browser.run(OVERFLOW) <= 0
    for column in ("density", "reason"):
        box = browser.run(
            f"return [...document.querySelectorAll('td.c-{column}')].find(e => e.innerText).getBoundingClientRect()"
        )
        assert box["left"] >= 0
        assert box["right"] <= NARROW[0]
        assert box["height"] > 0


def test_memory_marks_the_peak_and_says_what_would_help(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"], size=LAPTOP)
    browser.click("#tab-memory")
    shown = browser.run("return document.querySelector('.view-memory').textContent")
    assert 'Packed weights would help most: Config(weight_storage="packed")' in shown
    assert re.search(r"peak [\d.]+ MB", shown)
    assert browser.run("return document.querySelectorAll('.view-memory .largest li').length") == 10
    assert browser.run("return document.querySelectorAll('.view-memory circle.peak').length") == 1


def test_the_page_says_how_it_was_made(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"], size=LAPTOP)
    browser.click(".about summary")
    shown = browser.run(PANEL)
    assert re.search(r"\d{4}-\d\d-\d\d", shown)
    assert f"torch {torch.__version__}" in shown
    assert "fedmef-fx inspect resnet18" in shown
    assert "density=0.1" in shown


@pytest.mark.parametrize("size", [LAPTOP, NARROW])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_violation(browser: Browser, pages: dict[str, Path], size: tuple[int, int], dark: bool) -> None:
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("needs axe-core: pip install axe-core-python")
    source = (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    browser.open(pages["encoder"], size=size, dark=dark)
    browser.run(source)
    tabs = browser.run("return [...document.querySelectorAll('[role=tab]')].map((tab) => tab.id)")
    for tab in tabs:
        browser.click(f"#{tab}")
        if tab == "tab-graph":
            browser.run("document.querySelectorAll('.item')[2].click()")
        found = browser.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then((r) => done(r.violations.map((v) => [v.id, v.nodes.map((n) =>"
            " n.target.join(' ') + ' ' + n.failureSummary)])))"
        )
        assert found == [], tab
