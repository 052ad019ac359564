import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.models import REFERENCE_MODELS, digits_cnn, mobilenet_v2, resnet18, resnet50

# Smaller than the real images where the architecture allows it; [channels, height, width].
INPUT_SHAPES = {
    "digits_cnn": (1, 8, 8),
    "resnet18": (3, 16, 16),
    "resnet50": (3, 64, 64),
    "mobilenet_v2": (3, 16, 16),
    "vit_tiny": (3, 32, 32),
}


def _batch(name: str, *, size: int = 2) -> Tensor:
    return torch.randn(size, *INPUT_SHAPES[name])


def test_every_reference_model_is_tested() -> None:
    assert REFERENCE_MODELS.keys() == INPUT_SHAPES.keys() | {"gpt2_bytes"}  # see test_transformers.py


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("digits_cnn", 67_754),
        ("resnet18", 11_173_962),
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 2_236_682),
        ("vit_tiny", 5_362_762),
        ("gpt2_bytes", 4_837_376),
    ],
)
def test_parameter_count(name: str, count: int) -> None:
    with torch.device("meta"):
        model = REFERENCE_MODELS[name]()

    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert f"{count:,} parameters" in (REFERENCE_MODELS[name].__doc__ or "")


@pytest.mark.parametrize("name", INPUT_SHAPES)
def test_training_step_reaches_every_parameter(name: str) -> None:
    model = REFERENCE_MODELS[name](num_classes=7)

    logits = model(_batch(name))
    logits.square().sum().backward()

    assert logits.shape == (2, 7)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", INPUT_SHAPES)
def test_eval_depends_on_each_sample_alone_and_leaves_buffers(name: str) -> None:
    model = REFERENCE_MODELS[name]().double().eval()
    batch = _batch(name).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with torch.no_grad():
        together = model(batch)
        alone = model(batch[:1])

    # Another batch size may choose another convolution algorithm, which adds up in another order: float64's rounding.
    torch.testing.assert_close(together[:1], alone, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in INPUT_SHAPES if name != "vit_tiny"])
def test_training_forward_updates_every_running_mean(name: str) -> None:
    model = REFERENCE_MODELS[name]()

    with torch.no_grad():
        model(_batch(name))

    means = [module.running_mean for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert means
    assert all(mean is not None and mean.abs().max() > 0 for mean in means)


@pytest.mark.parametrize(
    ("name", "shape", "final"),
    [
        ("resnet18", (3, 32, 32), (512, 4, 4)),
        ("resnet50", (3, 224, 224), (2048, 7, 7)),
        ("mobilenet_v2", (3, 32, 32), (1280, 4, 4)),
    ],
)
def test_resolution_before_the_average(name: str, shape: tuple[int, int, int], final: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = REFERENCE_MODELS[name]().eval()
        batch = torch.empty(1, *shape)
    seen: list[torch.Size] = []
    model.get_submodule("avgpool").register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))

    model(batch)

    assert seen == [(1, *final)]


def test_names_are_those_of_published_checkpoints() -> None:
    with torch.device("meta"):
        resnet = resnet50().state_dict()
        mobilenet = mobilenet_v2().state_dict()

    assert len(resnet) == 320
    assert resnet["conv1.weight"].shape == (64, 3, 7, 7)
    assert resnet["layer1.0.downsample.1.running_var"].shape == (256,)
    assert resnet["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert resnet["fc.bias"].shape == (1000,)
    assert len(mobilenet) == 314
    assert mobilenet["features.0.1.running_mean"].shape == (32,)
    assert mobilenet["features.1.conv.1.weight"].shape == (16, 32, 1, 1)
    assert mobilenet["features.2.conv.1.0.weight"].shape == (96, 1, 3, 3)
    assert mobilenet["features.18.0.weight"].shape == (1280, 320, 1, 1)
    assert mobilenet["classifier.1.weight"].shape == (10, 1280)


def test_resnet18_takes_other_channel_counts() -> None:
    assert resnet18(num_classes=2, in_channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize("name", INPUT_SHAPES)
@pytest.mark.parametrize("num_classes", [0, -1, 2.0, True])
def test_bad_number_of_classes(name: str, num_classes: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: got num_classes={num_classes!r}; expected an integer >= 1"):
        REFERENCE_MODELS[name](num_classes=num_classes)


def test_digits_cnn_learns_the_digits() -> None:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.from_numpy(digits.target)
    train, test = torch.randperm(len(labels)).split([1437, 360])
    model = digits_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    for _ in range(6):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()
    assert accuracy > 0.97
