"""The page in a real browser: it loads in silence, finds, shows, toggles, works by keyboard and on a narrow screen."""

from pathlib import Path

import pytest
import torch
from browser import NARROW, WIDE, Browser
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.federated.history import History
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.models import mobilenet_v2, resnet18
from tests.capture.models import build
from tests.inspection.models import HOSTILE_NAMES, Encoder, VisionTransformer, hostile, two_convolutions
from tests.inspection.steps import comparison, step_memory

pytestmark = pytest.mark.slow

MODELS = {
    "resnet18": (resnet18, lambda: torch.randn(1, 3, 32, 32), "layer1.0.conv2"),
    "mobilenet_v2": (mobilenet_v2, lambda: torch.randn(1, 3, 32, 32), "features.2.conv.1.0"),
    "vit": (VisionTransformer, lambda: torch.randn(1, 3, 16, 16), "blocks.1.mlp.up"),
    "encoder": (Encoder, lambda: torch.randint(50, (2, 6)), "layers.1.mlp.up"),
}

OVERFLOW = "return document.documentElement.scrollWidth - window.innerWidth"
FOCUSED = "return document.activeElement.textContent"
PANEL = "return document.querySelector('.panel').innerText"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page per model."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    return {name: _write(folder / f"{name}.html", make(), inputs()) for name, (make, inputs, _) in MODELS.items()}


def _write(path: Path, model: nn.Module, x: Tensor) -> Path:
    sparse = fedmef_fx.transform(
        model, Config(density=0.2, weight_storage="dense"), example_inputs=(x,) if isinstance(model, Encoder) else None
    )
    fedmef_fx.inspect(sparse, (x,)).to_html(path)
    return path


def _search(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('search').focus()")
    browser.press(text, "\ue007")  # Enter


@pytest.mark.parametrize("name", MODELS)
def test_page_loads_in_silence_and_asks_nobody(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    assert browser.run("return document.querySelectorAll('[role=treeitem]').length") > 3
    assert browser.messages() == []
    assert browser.requests() == [pages[name].as_uri()]


@pytest.mark.parametrize("name", MODELS)
def test_search_finds_a_layer_and_shows_its_mask(browser: Browser, pages: dict[str, Path], name: str) -> None:
    layer = MODELS[name][2]
    browser.open(pages[name])
    _search(browser, layer)
    assert f"{layer}.weight" in browser.run(PANEL)
    browser.wait(lambda: browser.run("const i = document.querySelector('.mask img'); return i.complete"))
    width, height = browser.run(
        "const i = document.querySelector('.mask img'); return [i.naturalWidth, i.naturalHeight]"
    )
    assert width > 1
    assert height > 1
    assert browser.run("return document.querySelectorAll('[aria-selected=true][role=treeitem]').length") == 1
    assert browser.messages() == []


@pytest.mark.parametrize("name", MODELS)
def test_toggle_changes_the_picture(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    after = browser.picture()
    browser.click(".segmented input[value=before]")
    before = browser.picture()
    assert before != after
    browser.click(".segmented input[value=after]")
    assert browser.messages() == []
    assert browser.run("return document.querySelector('.segmented input[value=after]').checked")


@pytest.mark.parametrize("name", MODELS)
def test_details_are_text_that_people_can_read(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name])
    boxes = browser.run("return document.querySelectorAll('.item').length")
    for index in range(0, boxes, 3):
        browser.run(f"document.querySelectorAll('.item')[{index}]?.click()")
        shown = browser.run(PANEL)
        assert not {"[object", "undefined", "NaN", "null"} & set(shown.replace(" ", "\n").split("\n"))
    assert browser.messages() == []


@pytest.mark.parametrize("name", MODELS)
def test_narrow_screen_needs_no_sideways_scrolling(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], size=NARROW)
    _search(browser, MODELS[name][2])
    for tab in ("graph", "layers", "passes"):
        browser.click(f"#tab-{tab}")
        assert browser.run(OVERFLOW) <= 0, tab
    assert browser.messages() == []


@pytest.mark.parametrize("name", ["data-dependent", "attention", "rich", "in-place"])
def test_everything_of_a_hard_model_can_be_opened(browser: Browser, tmp_path: Path, name: str) -> None:
    model, inputs = build(name)
    args, kwargs = inputs()
    sparse = fedmef_fx.transform(
        model, Config(density=0.5, weight_storage="dense"), example_inputs=args, example_kwargs=kwargs
    )
    fedmef_fx.inspect(sparse, args, example_kwargs=kwargs).to_html(tmp_path / "page.html", original=model)
    browser.open(tmp_path / "page.html")
    choices = browser.run("return document.querySelectorAll('.segmented input').length")
    for index in reversed(range(choices)):
        browser.run(f"document.querySelectorAll('.segmented input')[{index}].click()")
        browser.click("[aria-label='Open every module']")
        browser.run("for (const box of [...document.querySelectorAll('.item')]) box.click()")
        assert browser.run("return document.querySelectorAll('.item.layer, .item.opaque').length") > 0
        assert browser.run("return document.querySelectorAll('.layer-ways path').length") > 0
    assert browser.messages() == []


def test_keyboard_alone_is_enough(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"])
    browser.press("\ue004")  # Tab
    assert browser.run(FOCUSED) == "Skip to the content"
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.press("layer2.0.conv1", "\ue007")
    assert browser.run("return document.activeElement.getAttribute('role')") == "treeitem"
    assert browser.run(FOCUSED).startswith("conv1")
    browser.press("\ue015")  # down
    assert not browser.run(FOCUSED).startswith("conv1")
    browser.press("\ue012")  # left: to the block
    assert browser.run("return document.activeElement.ariaExpanded") == "true"
    browser.press("\ue012")  # left: closes it
    assert browser.run("return document.activeElement.ariaExpanded") == "false"
    browser.press("\ue007")  # Enter
    assert "layer2.0" in browser.run(PANEL)
    browser.press("\ue00c")  # Escape
    assert "What was rewritten" in browser.run(PANEL)
    browser.press("b")
    assert browser.run("return document.querySelector('.segmented input[value=before]').checked")
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_themes_follow_the_system_and_the_button(browser: Browser, pages: dict[str, Path]) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    browser.open(pages["vit"])
    light = browser.run(ground)
    browser.click("#theme")
    assert browser.run(ground) != light
    browser.open(pages["vit"], dark=True)
    dark = browser.run(ground)
    assert dark != light
    browser.click("#theme")
    assert browser.run(ground) == light


def test_a_legend_entry_shows_only_what_its_pass_changed(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["resnet18"])
    assert browser.run("return document.querySelectorAll('.item.dim').length") == 0
    browser.run(
        "[...document.querySelectorAll('.legend button')].find((b) => b.textContent === 'shrink-saved').click()"
    )
    shown = browser.run("return [...document.querySelectorAll('.item.op:not(.dim) .name')].map((n) => n.textContent)")
    assert set(shown) == {"relu", "avgpool"}


def test_memory_and_training_can_be_read_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    after, before = step_memory(saved=4), step_memory(saved=40)
    rounds = [_round(0, accuracy=0.5), _round(1, accuracy=0.75, churn={"conv1.weight": 3})]
    found = fedmef_fx.inspect(two_convolutions())
    found.to_html(page, memory=after, memory_before=before, history=History(rounds))
    for size in (WIDE, NARROW):
        browser.open(page, size=size)
        browser.click("#tab-memory")
        assert browser.run(OVERFLOW) <= 0
        assert "Peak 12 B instead of 48 B: 75 % less" in browser.run("return document.body.innerText")
        browser.run("document.querySelector('.view-memory .chart').focus()")
        browser.press(*["\ue014"] * 4)  # right
        assert "saved 0 B" in browser.run("return document.querySelector('.view-memory output').textContent")
        picture = browser.picture()
        browser.click(".view-memory input[value=before]")
        assert browser.picture() != picture
        browser.click("#tab-training")
        assert browser.run(OVERFLOW) <= 0
        assert "accuracy 75 %" in browser.run("return document.querySelector('.view-training output').textContent")
        assert "conv1.weight" in browser.run("return document.querySelector('.view-training table').textContent")
    assert browser.messages() == []


def _round(index: int, *, accuracy: float, churn: dict[str, int] | None = None) -> RoundRecord:
    return RoundRecord(
        round_index=index,
        adjusted=bool(churn),
        clients=(0,),
        train_loss=1.0,
        test_loss=None,
        test_accuracy=accuracy,
        density=0.5,
        bytes_down=10,
        bytes_up=10,
        seconds=0.1,
        peak_saved_bytes=5,
        churn=churn or {},
    )


def test_comparison_is_a_page_of_its_own(browser: Browser, tmp_path: Path) -> None:
    comparison().to_html(tmp_path / "page.html")
    for size in (WIDE, NARROW):
        browser.open(tmp_path / "page.html", size=size)
        shown = browser.run("return document.body.innerText")
        assert "From round 1 to <b>round 2</b>" in shown
        assert "75 % of the active weights are the same (Jaccard); 1 grown, 1 pruned." in shown
        assert browser.run("return document.querySelectorAll('tbody tr').length") == 2
        names = "return [...document.querySelectorAll('tbody td:first-child')].map((cell) => cell.textContent)"
        assert browser.run(names) == ["a.weight", "b.weight"]
        browser.click("th.c-density button")
        assert browser.run(names) == ["b.weight", "a.weight"]
        assert browser.run("return document.querySelector('th.c-density').ariaSort") == "ascending"
        assert browser.run(OVERFLOW) <= 0
    assert browser.messages() == []


HOSTILE = [
    *HOSTILE_NAMES,
    "</script><script>broken = 1</script>",
    "\u202eright-to-left",
    "<img src=x onerror='broken = 1'>",
]


def test_hostile_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "<b>&quot;.html"
    model = hostile(*HOSTILE)
    fedmef_fx.inspect(model, (torch.ones(1, 2),)).to_html(page)
    browser.open(page)
    assert browser.messages() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.run("return window.broken === undefined")
    assert browser.run("return document.querySelectorAll('script').length") == 2
    assert browser.run("return document.querySelectorAll('img, b b').length") == 0
    for name in HOSTILE:
        parts = "const d = JSON.parse(document.getElementById('document').textContent);"
        assert browser.run(
            f"{parts} return d.parameters.some((p) => p.parameter === arguments[0])", f"{name}.weight"
        ), name
    _search(browser, "<script>alert")
    assert "<script>alert(1)</script>.weight" in browser.run(PANEL)
    browser.click("#tab-layers")
    browser.open(page, size=NARROW)
    assert browser.run(OVERFLOW) <= 0


def test_nothing_runs_that_is_not_the_page_itself(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    fedmef_fx.inspect(two_convolutions()).to_html(page)
    browser.open(page)
    inject = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s);"
    # The driver's own scripts are exempt from the policy, elements that they add are not.
    browser.run(f"{inject} document.body.append(Object.assign(new Image(), {{src: 'https://example.org/x.png'}}))")
    assert browser.run("return window.broken === undefined")
    assert len([message for message in browser.messages() if "Content Security Policy" in message]) == 2
