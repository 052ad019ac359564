import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import magnitude_masks, random_masks


@given(size=st.integers(0, 40), seed=st.integers(-3, 2**70), data=st.data())
def test_random_masks_have_the_exact_count_and_depend_on_the_seed_alone(size, seed, data):
    count = data.draw(st.integers(0, size))
    mask = random_masks({"w": (size,)}, {"w": count}, seed=seed)["w"]
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == count
    torch.manual_seed(size)
    assert torch.equal(mask, random_masks({"w": (size,)}, {"w": count}, seed=seed)["w"])


def test_adding_a_layer_does_not_change_the_masks_of_the_others():
    shapes = {"a.weight": (8, 3, 3, 3), "b.weight": (10, 72)}
    counts = {"a.weight": 50, "b.weight": 100, "new.weight": 4}
    few = random_masks(shapes, counts, seed=3)
    more = random_masks({"new.weight": (4, 4), **shapes}, counts, seed=3)
    assert all(torch.equal(few[name], more[name]) for name in shapes)


def test_layers_and_seeds_have_different_masks():
    shapes, counts = {"features.1": (100,), "features.10": (100,)}, {"features.1": 50, "features.10": 50}
    first = random_masks(shapes, counts, seed=0)
    assert not torch.equal(first["features.1"], first["features.10"])
    assert not torch.equal(first["features.1"], random_masks(shapes, counts, seed=1)["features.1"])


def test_a_random_mask_is_the_same_on_every_machine():
    mask = random_masks({"w": (10,)}, {"w": 3}, seed=0)["w"]
    assert mask.nonzero().squeeze(1).tolist() == [1, 5, 9]


def test_random_masks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    random_masks({"w": (10,)}, {"w": 3}, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@given(values=st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]), max_size=12), data=st.data())
def test_magnitude_masks_keep_the_largest_and_of_ties_the_first(values, data):
    count = data.draw(st.integers(0, len(values)))
    mask = magnitude_masks({"w": torch.tensor(values)}, {"w": count})["w"]
    expected = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))[:count]
    assert mask.nonzero().squeeze(1).tolist() == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_masks_work_for_every_precision_and_layout(dtype):
    weight = torch.arange(-12, 12).reshape(2, 3, 2, 2).to(dtype)
    expected = weight.abs() >= 11
    mask = magnitude_masks({"w": weight.contiguous(memory_format=torch.channels_last)}, {"w": 3})["w"]
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("count", [-1, 5])
def test_a_count_that_the_size_does_not_allow_is_rejected(count):
    with pytest.raises(ConfigError, match=f"'w': got count {count}; expected 0 <= count <= 4"):
        random_masks({"w": (2, 2)}, {"w": count}, seed=0)
    with pytest.raises(ConfigError, match="expected 0 <= count <= 4"):
        magnitude_masks({"w": torch.ones(2, 2)}, {"w": count})


def test_a_missing_count_is_rejected():
    with pytest.raises(ConfigError, match="no count for 'w'; counts are given for: v"):
        random_masks({"w": (2, 2)}, {"v": 1}, seed=0)


def test_weights_that_are_no_numbers_are_rejected():
    with pytest.raises(ConfigError, match="not a number"):
        magnitude_masks({"w": torch.tensor([1.0, float("nan")])}, {"w": 1})
