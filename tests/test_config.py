import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError, FedmefError

# 10**400 is an integer that no float can hold.
NOT_NUMBERS: list[object] = [math.nan, math.inf, -math.inf, 10**400, True, None, "0.5", [0.5]]
NOT_INTEGERS: list[object] = [1.0, math.nan, True, "1", [1]]

BAD_VALUES: dict[str, list[object]] = {
    "density": [0, 0.0, -0.1, 1.5, *NOT_NUMBERS],
    "allocation": ["ERK", "", None, 1],
    "mask_init": ["zeros", None],
    "normalization": ["batchnorm", None, True],
    "nsconv_statistics": ["none", None],
    "residual": ["sqrt2", None],
    "packed_dtype": ["float32", "int8", None],
    "saved_precision": ["int3", "bfloat16", None],
    "activation_sparsity": [-0.1, 1, 1.0, 1.5, *NOT_NUMBERS],
    "activation_bits": [0, 5, 16, 2.0, "2", True, [2]],
    "activation_block": [0, 4, 100, -64, None, *NOT_INTEGERS],
    "activation_levels": ["even", None],
    "activation_rounding": ["up", None, True],
    "threshold_sample": [63, 0, -1, None, *NOT_INTEGERS],
    "threshold_interval": [0, -1, None, *NOT_INTEGERS],
    "granularity": ["Channel", "4:2", "4:4", "0:4", "2:", "2:4:8", "", None, 2],
    "channel_multiple": [0, -8, None, *NOT_INTEGERS],
    "weight_storage": ["sparse", None],
    "ignore": ["fc", nn.Linear, None, 3, {"fc": 1}, ("",), ("fc", 3), (None,), (nn.ReLU(),)],
    "output_layer": ["kept", None, True],
    "adjustment_space": ["theta", "", None, True],
    "adjustment_rate": [0, -0.4, 1.01, *NOT_NUMBERS],
    "adjustment_interval": [0, -10, None, *NOT_INTEGERS],
    "adjustment_stop": [-1, *NOT_INTEGERS],
    "extrusion_strength": [-1e-9, *NOT_NUMBERS],
    "gradient_clipping": [0, -0.01, *(value for value in NOT_NUMBERS if value is not None)],
    "layer_sparsity": ["fc", 0.5, None, ("fc",), {"fc": 1.0}, {"fc": -0.1}, {"": 0.5}, {3: 0.5}, {"fc": None}],
    "layer_bits": [
        "fc",
        4,
        None,
        ("fc",),
        {"fc": 5},
        {"fc": 2.0},
        {"": 4},
    ],
    "micro_batch": [0, -1, *NOT_INTEGERS],
    "memory_budget": [0, -1, "", "64 parsecs", "-3MB", "1e3", 1.0, math.nan, True, [1]],
    "mask_frozen": [0, 1, None, "yes"],
    "budget_optimizer": ["lion", None],
    "passes": [None, 3, (3,), {"a": 1}, (None,), [b"pack-weights"]],
    "seed": [-1, 2**64, None, *NOT_INTEGERS],  # torch's generators take 64 bits
}

EDGE_VALUES: dict[str, list[Any]] = {
    "density": [1, 1.0, 5e-324],
    "activation_sparsity": [0, 0.0, math.nextafter(1.0, 0.0)],
    "activation_bits": [None, 1, 2, 3, 4, 8],
    "activation_block": [8, 64, 256],
    "threshold_sample": [64],
    "threshold_interval": [1],
    "granularity": ["channel", "1:2", "1:4", "4:8"],
    "channel_multiple": [1],
    "adjustment_rate": [1, 1e-9],
    "adjustment_interval": [1],
    "adjustment_stop": [None, 0],
    "extrusion_strength": [0, 1e9],
    "gradient_clipping": [None, 1e-9],
    "layer_sparsity": [(), (("layer1.*", 0), ("fc", 0.99))],
    "micro_batch": [None, 1],
    "memory_budget": [None, 1, "64MB", "1.5GiB"],
    "seed": [0, 2**63, 2**64 - 1],
    "ignore": [(), ("fc", "layer1.*")],
}

CONFIGS = st.builds(
    Config,
    density=st.floats(0, 1, exclude_min=True),
    allocation=st.sampled_from(["erk", "uniform"]),
    mask_init=st.sampled_from(["random", "magnitude"]),
    normalization=st.sampled_from(["nsconv", "keep"]),
    nsconv_statistics=st.sampled_from(["active", "all"]),
    residual=st.sampled_from(["rescale", "none"]),
    activation_sparsity=st.floats(0, 1, exclude_max=True),
    activation_bits=st.sampled_from([None, 1, 2, 3, 4]),
    activation_block=st.sampled_from([64, 256]),
    activation_levels=st.sampled_from(["range", "centroids"]),
    activation_rounding=st.sampled_from(["stochastic", "nearest"]),
    threshold_sample=st.integers(64, 10**6),
    threshold_interval=st.integers(1, 10**6),
    ignore=st.lists(st.text(min_size=1) | st.sampled_from([nn.Linear, nn.Conv2d])).map(tuple),
    adjustment_space=st.sampled_from(["effective", "parameter"]),
    adjustment_rate=st.floats(0, 1, exclude_min=True),
    adjustment_interval=st.integers(1, 10**6),
    adjustment_stop=st.none() | st.integers(0, 10**6),
    extrusion_strength=st.floats(0, allow_infinity=False),
    gradient_clipping=st.none() | st.floats(0, exclude_min=True, allow_infinity=False),
    layer_sparsity=st.lists(st.tuples(st.text(min_size=1), st.floats(0, 1, exclude_max=True))).map(tuple),
    micro_batch=st.none() | st.integers(1, 10**6),
    memory_budget=st.none() | st.integers(1, 10**12) | st.sampled_from(["64MB", "1.5 GiB"]),
    seed=st.integers(0, 2**64 - 1),
)


def test_every_field_has_bad_values() -> None:
    assert {field.name for field in dataclasses.fields(Config)} == BAD_VALUES.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_VALUES.items() for value in values],
    ids=lambda part: str(part)[:24],  # one of the values has 400 digits
)
def test_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^Config\.{name}: got .*; expected ") as caught:
        Config(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FedmefError)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDGE_VALUES.items() for value in values])
def test_edge_of_the_range_is_accepted(name: str, value: object) -> None:
    assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0}, "Config.density: got 0; expected a number in (0, 1]"),
        ({"density": 1.5}, "Config.density: got 1.5; expected a number in (0, 1]"),
        ({"density": math.nan}, "Config.density: got nan; expected a number in (0, 1]"),
        ({"activation_sparsity": 1}, "Config.activation_sparsity: got 1; expected a number in [0, 1)"),
        ({"extrusion_strength": -1}, "Config.extrusion_strength: got -1; expected a number in [0, inf)"),
        ({"threshold_interval": 0.5}, "Config.threshold_interval: got 0.5; expected an integer >= 1"),
        ({"allocation": "even"}, "Config.allocation: got 'even'; expected 'erk' | 'uniform'"),
        ({"ignore": "fc"}, "Config.ignore: got 'fc'; expected a tuple, e.g. ignore=('fc',)"),
    ],
)
def test_message_gives_field_value_and_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**changes)
    assert str(caught.value) == message


def test_ignored_types_are_stored_by_name() -> None:
    config = Config(ignore=("fc", nn.Linear))
    assert config.ignore == ("fc", "type:torch.nn.modules.linear.Linear")
    assert Config(ignore=config.ignore) == config


def test_ignore_may_be_a_list() -> None:
    assert Config(ignore=["fc", nn.Linear]) == Config(ignore=("fc", nn.Linear))  # type: ignore[arg-type]  # on purpose


def test_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().density = 0.5  # type: ignore[misc]  # what the test is about


def test_equal_configs_are_interchangeable_as_keys() -> None:
    assert {Config(seed=1): "a"}[Config(seed=1)] == "a"


def test_replace_keeps_the_rest_and_validates() -> None:
    config = Config(density=0.2, seed=3)
    assert config.replace(density=0.5) == Config(density=0.5, seed=3)
    assert config.density == 0.2
    with pytest.raises(ConfigError, match=r"Config\.density"):
        config.replace(density=2)


@given(config=CONFIGS)
def test_json_round_trip(config: Config) -> None:
    assert Config.from_json(config.to_json()) == config


def test_json_leaves_out_take_defaults() -> None:
    assert Config.from_json("{}") == Config()
    assert Config.from_json('{"density": 0.3, "ignore": ["fc"]}') == Config(density=0.3, ignore=("fc",))


def test_json_holds_every_field() -> None:
    assert json.loads(Config().to_json()).keys() == BAD_VALUES.keys()


def test_unknown_field_in_json_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'densty', 'sed'; known fields: density, .*seed"):
        Config.from_json('{"sed": 1, "densty": 0.1}')


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ('"fc"', "str"), ("null", "NoneType")])
def test_json_that_is_no_object(text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"got a JSON {kind}; expected an object"):
        Config.from_json(text)


# The last one: more digits than Python converts to an integer, and so a ValueError that is no JSONDecodeError.
@pytest.mark.parametrize("text", ["", "{", "density: 0.1", "{'density': 0.1}", '{"seed": ' + "9" * 5000 + "}"])
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(ConfigError, match="not JSON") as caught:
        Config.from_json(text)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("text", ['{"density": 2}', '{"density": NaN}', '{"density": true}', '{"ignore": "fc"}'])
def test_values_from_json_are_validated(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^Config\.(density|ignore): got "):
        Config.from_json(text)


@given(text=st.text() | st.dictionaries(st.sampled_from(sorted(BAD_VALUES)), st.none() | st.booleans()).map(json.dumps))
def test_from_json_never_fails_otherwise(text: str) -> None:
    try:
        config = Config.from_json(text)
    except ConfigError:
        return
    assert Config.from_json(config.to_json()) == config


def test_who_names_a_sparsity_means_values() -> None:
    def kept(config: Config) -> tuple[float, int | None]:
        return config.activation_sparsity, config.activation_bits

    assert kept(Config()) == kept(Config().replace(seed=3)) == (0.0, 2)
    assert (
        kept(Config(activation_sparsity=0))
        == kept(Config().replace(seed=3).replace(activation_sparsity=0))
        == (0, None)
    )
    assert (
        kept(Config(activation_sparsity=0.9)) == kept(Config.from_json('{"activation_sparsity": 0.9}')) == (0.9, None)
    )
    assert kept(Config(activation_bits=4)) == (0.0, 4)
    assert kept(Config(activation_bits=4).replace(activation_sparsity=0.5)) == (0.5, 4)
    assert kept(Config(activation_bits=None)) == (0.0, None)
    assert kept(Config(packed_dtype="bfloat16")) == kept(Config(layer_sparsity=(("fc", 0.5),))) == (0.9, None)
    assert kept(Config(packed_dtype="bfloat16", activation_bits=4)) == (0.0, 4)
    for config in (Config(), Config(activation_bits=4), Config(activation_sparsity=0.5)):
        assert Config.from_json(config.to_json()) == config
        assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 -- its own
        assert copy.deepcopy(config).replace(seed=1) == config.replace(seed=1)


def test_what_was_stored_before_there_was_a_field_means_what_was_done_then() -> None:
    """A checkpoint, or a pickle, of a version whose defaults were others."""
    later = {"activation_bits", "adjustment_space", "weight_storage"}
    fields = json.loads(Config(activation_sparsity=0.9).to_json())
    text = json.dumps({name: value for name, value in fields.items() if name not in later})
    stored, pickled = Config.from_json(text, is_stored=True), Config.__new__(Config)
    pickled.__setstate__({name: value for name, value in vars(stored).items() if name not in later | {"_chosen"}})
    for config in (stored, pickled):
        assert (config.activation_bits, config.adjustment_space, config.weight_storage) == (None, "parameter", "dense")
    assert Config.from_json(text).adjustment_space == "effective"
    assert Config.from_json(Config().to_json(), is_stored=True) == Config()
