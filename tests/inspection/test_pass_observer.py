"""Looking at a model between the passes, and stopping after one."""

import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.transformation.recipe import passes_of
from tests.inspection.models import PerMode, two_convolutions

CONFIG = Config(density=0.5, weight_storage="dense")
STEPS = ["capture", *(step.name for step in passes_of(CONFIG))]


def test_print_after_one_pass_shows_the_graphs_as_they_were_then() -> None:
    texts: list[str] = []
    fedmef_fx.transform(two_convolutions(), CONFIG, print_after=["insert-masks"], printer=texts.append)
    (text,) = texts
    assert text.startswith("# after insert-masks\n%input_1 = placeholder[input]\n")
    assert "call_function[masked_weight]" in text
    assert "density=" in text
    assert "nsconv" not in text, "a later pass"


def test_print_after_all_prints_after_every_step_in_order() -> None:
    texts: list[str] = []
    fedmef_fx.transform(two_convolutions(), CONFIG, print_after="all", printer=texts.append)
    assert [text.split()[2] for text in texts] == STEPS
    assert "call_module[conv1]" in texts[0]
    # No residual in this model.
    assert texts[STEPS.index("rescale-residuals")].startswith("# after rescale-residuals (changed nothing)\n")


def test_printing_changes_nothing_and_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    model = two_convolutions()
    printed = fedmef_fx.transform(model, CONFIG, print_after=("capture", "shrink-saved"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if line.startswith("# after")] == [
        "# after capture",
        "# after shrink-saved",
    ]
    assert str(fedmef_fx.inspect(printed)) == str(fedmef_fx.inspect(fedmef_fx.transform(model, CONFIG)))


@pytest.mark.parametrize("stop", STEPS)
@pytest.mark.parametrize("build", [two_convolutions, PerMode])
def test_a_model_that_was_stopped_trains(stop: str, build: type[nn.Module]) -> None:
    model = build()
    x = torch.randn(2, 1, 8, 8) if build is two_convolutions else torch.randn(2, 4)
    stopped = fedmef_fx.transform(model, CONFIG, stop_after=stop)
    assert [r.name.partition("{")[0] for r in fedmef_fx.report(stopped)] == STEPS[: STEPS.index(stop) + 1]
    has_masks = STEPS.index(stop) >= STEPS.index("insert-masks")
    assert bool(fedmef_fx.masks(stopped)) == has_masks
    optimizer = torch.optim.SGD(stopped.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in stopped.parameters()]
    stopped(x).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, stopped.parameters(), strict=True))
    for name, mask in fedmef_fx.masks(stopped).items():
        assert not stopped.get_parameter(name)[~mask].any()
    if not has_masks:
        plain = fedmef_fx.transform(model, CONFIG, stop_after=stop)
        assert torch.equal(plain.eval()(x), model.eval()(x))


def test_a_stopped_model_computes_what_the_passes_until_then_made() -> None:
    model = two_convolutions()
    assert "sign_relu" not in str(fedmef_fx.inspect(fedmef_fx.transform(model, CONFIG, stop_after="normalize-kernels")))
    whole, last = (
        fedmef_fx.transform(model, CONFIG),
        fedmef_fx.transform(model, CONFIG, stop_after="prune-activations"),
    )
    assert str(fedmef_fx.inspect(whole)) == str(fedmef_fx.inspect(last))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"print_after": ["insert-mask"]},
            "print_after: got 'insert-mask'; expected a pass of this configuration: cap",
        ),
        ({"stop_after": "insert-mask"}, "did you mean 'insert-masks'"),
        ({"stop_after": ""}, "stop_after: got ''"),
        ({"print_after": "x-ray"}, "print_after: got 'x-ray'"),
        ({"print_after": ["shrink-saved"], "stop_after": "insert-masks"}, "so never runs"),
    ],
)
def test_passes_that_do_not_run(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fedmef_fx.transform(two_convolutions(), CONFIG, **options)  # type: ignore[arg-type]  # some are mistakes


def test_a_pass_that_the_configuration_leaves_out() -> None:
    config = Config(normalization="keep", weight_storage="dense")
    with pytest.raises(ConfigError, match="got 'normalize-kernels'; expected a pass of this configuration"):
        fedmef_fx.transform(two_convolutions(), config, print_after=["normalize-kernels"])
