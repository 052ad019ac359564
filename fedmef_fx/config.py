"""`Config`: every choice a transformation makes, validated when it is made and readable as JSON."""

import dataclasses
import fnmatch
import json
import math
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, Self, get_args, get_type_hints

from torch import nn

from fedmef_fx.display.sizes import parse_bytes
from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.bit_planes import BITS, Bits
from fedmef_fx.packing.block_code import Levels, Rounding
from fedmef_fx.sparsity.granularity import parse_granularity

__all__ = ["SAVED_BITS", "Config", "check_config", "is_ignored"]

SAVED_BITS: Final[Mapping[str, Bits]] = MappingProxyType({"int8": 8, "int4": 4, "int2": 2})
"""Bits per element of the values of `Config.saved_precision` but "exact"."""

_TYPE_PREFIX: Final = "type:"


class _Unset:
    """Stands for a field that is chosen by what the others say."""

    def __repr__(self) -> str:
        return "chosen"


_UNSET: Final[Any] = _Unset()
_FORMER: Final[Mapping[str, Any]] = MappingProxyType(
    {"activation_bits": None, "adjustment_space": "parameter", "weight_storage": "dense"}
)
"""What was done before there were these fields, where that is not their default."""


def _ignore_entry(entry: object) -> str:
    """A module type becomes the string that also stands for it in JSON; a name or glob stays unchanged."""
    if isinstance(entry, type):
        return f"{_TYPE_PREFIX}{entry.__module__}.{entry.__qualname__}"
    if isinstance(entry, str) and entry:
        return entry
    raise ConfigError(
        f"Config.ignore: got {entry!r}; expected module names, globs or module types, "
        'e.g. ignore=("fc", "layer1.*", torch.nn.Linear)'
    )


def _pass_texts(passes: object) -> tuple[str, ...]:
    texts = (passes,) if isinstance(passes, str) else passes
    if isinstance(texts, tuple | list) and all(isinstance(text, str) for text in texts):
        return tuple(text for text in texts if text.strip())
    raise ConfigError(
        f'Config.passes: got {passes!r}; expected texts, e.g. passes=("rescale-residuals",); passes that are objects '
        "are for fedmef_fx.transform(model, config, passes=...)"
    )


def _named(value: object) -> tuple[tuple[str, Any], ...] | None:
    """A mapping or pairs of names and values as a tuple; None for anything else."""
    entries = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(e, list | tuple) and len(e) == 2 for e in entries):
        return None
    pairs = tuple((name, item) for name, item in entries)
    return pairs if all(isinstance(name, str) and name for name, _ in pairs) else None


def _pairs(value: object) -> tuple[tuple[str, float], ...]:
    """`Config.layer_sparsity` in the form in which it is stored and hashed."""
    pairs = _named(value)
    if pairs is not None and all(
        isinstance(g, int | float) and not isinstance(g, bool) and 0 <= g < 1 for _, g in pairs
    ):
        return pairs
    raise ConfigError(
        f"Config.layer_sparsity: got {value!r}; expected names or globs with numbers in [0, 1), e.g. "
        'layer_sparsity={"layer1.*": 0.5}'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What `fedmef_fx.transform` does to a model, and how FedMef then adjusts its masks.

    Attributes:
        density: Active share of the prunable weights, in (0, 1]. 1 prunes nothing and inserts no masks.
        allocation: How layers share the budget: `"erk"` (Erdos-Renyi-Kernel; Evci et al., ICML 2020) or `"uniform"`.
        mask_init: Initial masks: `"random"` (the paper's) or `"magnitude"` (for trained weights).
        normalization: `"nsconv"` turns Conv + BatchNorm into normalised sparse convolutions, `"keep"` leaves BatchNorm.
        nsconv_statistics: Mean and deviation of an NSConv kernel over its `"active"` weights or over `"all"` of them,
            which is better where rows have few active weights, as depthwise kernels do, see docs/methods.md.
        residual: `"rescale"` divides the sum of two NSConv branches by sqrt(2), so that variance stays bounded with
            depth; `"none"` leaves the sum. Only graphs in which an NSConv was made are touched.
        activation_sparsity: gamma, the share of a saved activation that is dropped, in [0, 1). Forward and the
            gradients of inputs stay exact; weight gradients become approximate. Where neither it nor `activation_bits`
            is given, nothing is dropped and everything is coded in 2 bits; where it is given alone, values are kept, so
            that 0 leaves all saved tensors alone. With `layer_sparsity` or `packed_dtype` alone it is 0.9.
        activation_bits: 1, 2, 3, 4 or 8: what a layer keeps of its input is coded in that many bits an element, in
            blocks: all of it where nothing is dropped (of a ReLU's result the positive part, as its mask is kept
            anyway), else what is not dropped. None keeps values, in `packed_dtype`.
        activation_block: Elements per block of that code, a multiple of 8: each block has its own scale and offset.
        activation_levels: What its codes stand for: numbers that lie evenly between the block's ends (`"range"`), or
            means of the values next to them (`"centroids"`), of which 2 ** bits are stored per block.
        activation_rounding: `"stochastic"`, so that weight gradients are unbiased, or `"nearest"`.
        threshold_sample: Elements sampled to estimate a pruning threshold.
        threshold_interval: Training steps between two estimates of the same threshold.
        granularity: What masks switch on and off: single weights (`"weight"`), whole output channels (`"channel"`),
            which `fedmef_fx.compact` then removes, or N of every M consecutive inputs (`"N:M"`, such as `"2:4"`), which
            fixes the density to N / M: `density` then has no effect, except 1, which prunes nothing.
        channel_multiple: Channel masks keep channels in multiples of this, and at least that many.
        packed_dtype: Type of the values that activation pruning keeps: the `"same"` as the activation's, or
            `"bfloat16"` or `"float16"`, where they are rounded, and clamped to what the format holds.
        saved_precision: How what must not be pruned is saved (inputs of normalisations and smooth activations,
            results of softmax, operands of products and attention): `"exact"`, or `"int8"`, `"int4"` or `"int2"`, so
            many bits per element, with a scale and an offset per 256. Forward stays exact; gradients become
            approximate.
        weight_storage: `"dense"`: parameters keep their shape, with a boolean mask next to them. `"packed"`: of a
            masked weight only the active values exist, as a parameter `[active]` with a bitmap next to it, and so do
            its gradient and its optimizer state; it is dense for one layer at a time. Weights that Python code may
            read stay dense, see `docs/memory-packed-weights.md`.
        ignore: Module names (exact or glob) and module types whose parameters are never pruned and whose
            layers are left alone. Types are stored as `"type:module.Name"`.
        output_layer: Whether the weights that make what the model returns are `"pruned"` like all others, or stay
            `"dense"`, as in the paper.
        mask_frozen: Whether weights with `requires_grad=False` are masked, too, such as the base weights under LoRA
            adapters, which are pruned once and then stay. By default they stay dense.
        adjustment_space: What pruning, extrusion and growth look at: `"effective"`, the weights of an NSConv as they
            take effect (w_hat, see `docs/effective-space.md`), or `"parameter"`, theta as the paper writes it. For
            other layers the two are the same.
        adjustment_rate: alpha of the schedule k_l(t), in (0, 1]. The paper: 0.4; the authors' code: 0.2.
        adjustment_interval: Delta_R, rounds between two adjustment rounds. The paper: 10; short ones are better, see
            docs/choosing.md.
        adjustment_stop: R_stop, the round from which masks stay fixed; None for the last round of a run.
        extrusion_strength: lambda of the surrogate loss (Eq. 2), >= 0; 0 turns extrusion off.
        gradient_clipping: Adaptive gradient clipping (Brock et al., 2021): the largest allowed ratio of a unit's
            gradient norm to its weight norm; None turns it off. Used by `fedmef_fx.federated`.
        layer_sparsity: gamma of single layers, as pairs of a name or glob and a number in [0, 1), e.g.
            `{"layer1.*": 0.5}`. The last that fits a layer counts, and at most `activation_sparsity` is used. Of an
            input that several layers share the first one's counts.
        layer_bits: `activation_bits` of single layers, in the same form, None for values: `{"conv1": 4, "head": None}`.
            Only with `activation_bits`.
        micro_batch: Samples for which activations are kept at a time in federated training, see
            `fedmef_fx.training.micro_batches`; None for whole batches.
        memory_budget: Bytes that a training step may take, as a number or text such as `"64MB"` or `"1.5GiB"`. With
            example inputs `transform` then chooses formats, `layer_sparsity` and `micro_batch` so that the predicted
            peak fits, with the least error of the gradients; `fedmef_fx.memory_plan` tells what and why.
        budget_optimizer: The optimizer whose state counts in the budget.
        passes: Passes that run after those of the other fields, as text: `("rescale-residuals", "my-pass{k=3}")`, or
            one text with `;` between them. Names are those of this package and of installed packages that offer passes,
            see `docs/passes.md`. What `transform(passes=...)` is given stands here afterwards, so that files and
            federations know it.
        seed: Seed of every random choice: masks, clients, batches.

    Raises:
        ConfigError: A value out of range; the message gives the field, the value and the range.

    Example:
        >>> Config(density=0.2).density
        0.2
        >>> Config.from_json(Config(seed=7).to_json()).seed
        7
    """

    density: float = 0.1
    allocation: Literal["erk", "uniform"] = "erk"
    mask_init: Literal["random", "magnitude"] = "random"
    normalization: Literal["nsconv", "keep"] = "nsconv"
    nsconv_statistics: Literal["active", "all"] = "active"
    residual: Literal["rescale", "none"] = "rescale"
    activation_sparsity: float = _UNSET
    threshold_sample: int = 8192
    threshold_interval: int = 8
    granularity: str = "weight"
    channel_multiple: int = 8
    activation_bits: Bits | None = _UNSET
    activation_block: int = 256
    activation_levels: Levels = "range"
    activation_rounding: Rounding = "stochastic"
    packed_dtype: Literal["same", "bfloat16", "float16"] = "same"
    saved_precision: Literal["exact", "int8", "int4", "int2"] = "exact"
    weight_storage: Literal["dense", "packed"] = "packed"
    ignore: tuple[str | type, ...] = ()
    output_layer: Literal["pruned", "dense"] = "pruned"
    mask_frozen: bool = False
    adjustment_space: Literal["effective", "parameter"] = "effective"
    adjustment_rate: float = 0.4
    adjustment_interval: int = 3
    adjustment_stop: int | None = None
    extrusion_strength: float = 0.02
    gradient_clipping: float | None = None
    layer_sparsity: tuple[tuple[str, float], ...] = ()
    layer_bits: tuple[tuple[str, Bits | None], ...] = ()
    micro_batch: int | None = None
    memory_budget: int | str | None = None
    budget_optimizer: Literal["sgd", "sgd-momentum", "adam", "adamw"] = "sgd-momentum"
    passes: tuple[str, ...] = ()
    seed: int = 0

    _chosen: ClassVar[frozenset[str]]  # names of the fields that were not given, of each configuration

    def __post_init__(self) -> None:
        self._choose_activations()
        if isinstance(self.ignore, str | type):
            raise ConfigError(f"Config.ignore: got {self.ignore!r}; expected a tuple, e.g. ignore=({self.ignore!r},)")
        if not isinstance(self.ignore, tuple | list):
            raise ConfigError(f'Config.ignore: got {self.ignore!r}; expected a tuple, e.g. ignore=("fc",)')
        object.__setattr__(self, "ignore", tuple(_ignore_entry(entry) for entry in self.ignore))
        object.__setattr__(self, "passes", _pass_texts(self.passes))
        self._check_choices()
        if not isinstance(self.mask_frozen, bool):
            raise ConfigError(f"Config.mask_frozen: got {self.mask_frozen!r}; expected True or False")
        self._check_number("density", low=0.0, high=1.0, open_low=True)
        self._check_number("activation_sparsity", low=0.0, high=1.0, open_high=True)
        self._check_number("adjustment_rate", low=0.0, high=1.0, open_low=True)
        self._check_number("extrusion_strength", low=0.0)
        self._check_code()
        self._check_integer("threshold_sample", low=64)
        self._check_integer("threshold_interval", low=1)
        object.__setattr__(self, "layer_sparsity", _pairs(self.layer_sparsity))
        self._check_layer_bits()
        if self.micro_batch is not None:
            self._check_integer("micro_batch", low=1)
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, name="Config.memory_budget")
        self._check_integer("adjustment_interval", low=1)
        self._check_integer("channel_multiple", low=1)
        parse_granularity(self.granularity)
        self._check_integer("seed", low=0, high=2**64 - 1)  # what torch's generators take
        if self.adjustment_stop is not None:
            self._check_integer("adjustment_stop", low=0)
        if self.gradient_clipping is not None:
            self._check_number("gradient_clipping", low=0.0, open_low=True)

    def _choose_activations(self) -> None:
        """What is kept of activations where that is not said: who names a sparsity means values, exact ones at 0.

        So does who names other things that only values have: sparsities of single layers, a type.
        """
        chosen = {name for name in ("activation_sparsity", "activation_bits") if getattr(self, name) is _UNSET}
        means_values = bool(self.layer_sparsity) or self.packed_dtype != "same"
        drops = "activation_bits" in chosen and means_values
        if "activation_bits" in chosen:
            object.__setattr__(self, "activation_bits", 2 if "activation_sparsity" in chosen and not drops else None)
        if "activation_sparsity" in chosen:
            object.__setattr__(self, "activation_sparsity", 0.9 if drops else 0.0)
        object.__setattr__(self, "_chosen", frozenset(chosen))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle; fields that came after it are what was done before."""
        self.__dict__.update({**_FORMER, "_chosen": frozenset(), **state})

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            if getattr(hint, "__origin__", None) is Literal and getattr(self, name) not in choices:
                allowed = " | ".join(map(repr, choices))
                raise ConfigError(f"Config.{name}: got {getattr(self, name)!r}; expected {allowed}")

    def _check_code(self) -> None:
        bits = self.activation_bits
        if bits is not None and (type(bits) is not int or bits not in BITS):
            allowed = ", ".join(map(str, BITS))
            raise ConfigError(f"Config.activation_bits: got {bits!r}; expected {allowed}, or None for values")
        self._check_integer("activation_block", low=8)
        if self.activation_block % 8:
            raise ConfigError(
                f"Config.activation_block: got {self.activation_block!r}; expected a multiple of 8, such as 64 or 256"
            )
        if bits == 8 and self.activation_levels == "centroids":
            raise ConfigError(
                "Config.activation_levels: got 'centroids' with activation_bits=8; expected at most 4 bits, or 'range'"
            )

    def _check_layer_bits(self) -> None:
        pairs = _named(self.layer_bits)
        if pairs is None or not all(bits is None or (type(bits) is int and bits in BITS) for _, bits in pairs):
            raise ConfigError(
                f"Config.layer_bits: got {self.layer_bits!r}; expected names or globs with "
                f"{', '.join(map(str, BITS))} or None, e.g. layer_bits={{'layer1.*': 4}}"
            )
        if pairs and self.activation_bits is None:
            raise ConfigError(
                f"Config.layer_bits: got {self.layer_bits!r} with activation_bits=None; expected bits for all other "
                "layers, too, e.g. activation_bits=2"
            )
        object.__setattr__(self, "layer_bits", pairs)

    def _check_number(
        self, name: str, *, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False
    ) -> None:
        value = getattr(self, name)
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"
        # A comparison, as math.isfinite raises on integers that no float can hold; it is false for NaN too.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not is_number or value < low or value > high or (open_low and value == low) or (open_high and value == high):
            raise ConfigError(f"Config.{name}: got {value!r}; expected a number in {interval}")

    def _check_integer(self, name: str, *, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < low or (high is not None and value > high):
            expected = f">= {low}" if high is None else f"in [{low}, {high}]"
            raise ConfigError(f"Config.{name}: got {value!r}; expected an integer {expected}")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """FedMef as published: every switch at the paper's value.

        Top-k pruning of activations (gamma 0.9) whose values are kept as they are, weights in dense form, NSConv with
        statistics over the active weights, random ERK masks, adjustments every 10 rounds with alpha 0.4, extrusion
        with lambda 1e-4, all of it by theta itself, an output layer that is not pruned.

        Args:
            **changes: Fields that differ.

        Example:
            >>> config = Config.paper(density=0.2)
            >>> config.activation_sparsity, config.activation_bits, config.output_layer
            (0.9, None, 'dense')
        """
        published: dict[str, Any] = {
            "allocation": "erk",
            "mask_init": "random",
            "normalization": "nsconv",
            "nsconv_statistics": "active",
            "activation_sparsity": 0.9,
            "activation_bits": None,
            "packed_dtype": "same",
            "saved_precision": "exact",
            "weight_storage": "dense",
            "output_layer": "dense",
            "adjustment_space": "parameter",
            "adjustment_rate": 0.4,
            "adjustment_interval": 10,
            "extrusion_strength": 1e-4,
        }
        return cls(**{**published, **changes})

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; validated again, and what was not given is chosen again."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in self._chosen]
        return type(self)(**{**{name: getattr(self, name) for name in names}, **changes})

    def to_json(self) -> str:
        """The configuration as JSON text that `Config.from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, *, is_stored: bool = False) -> Self:
        """Read what `to_json` wrote; fields left out take their defaults.

        Args:
            text: A JSON object.
            is_stored: Whether it was stored with a model or a run: a field that an earlier version did not know then
                stands for what that version did.

        Raises:
            ConfigError: Not a JSON object, an unknown field, or a value out of range.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:  # JSONDecodeError, or an integer with more digits than Python converts
            raise ConfigError(f"Config.from_json: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"Config.from_json: got a JSON {type(fields).__name__}; expected an object")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(names))
        if unknown:
            raise ConfigError(
                f"Config.from_json: unknown field {', '.join(map(repr, unknown))}; known fields: {', '.join(names)}"
            )
        for name in ("ignore", "passes"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        return cls(**({**_FORMER, **fields} if is_stored else fields))


def check_config(config: object, *, where: str) -> None:
    """Whether something can stand where a function takes `config: Config | None`.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(config, Config | None):
        raise ConfigError(
            f"{where}: config: got {config!r:.80}; expected a fedmef_fx.Config, e.g. Config(density=0.1), or None; "
            "fields in a dictionary become one with Config(**fields)"
        )


def is_ignored(patterns: Iterable[str | type], name: str, module: nn.Module) -> bool:
    """Whether `Config.ignore` names a module: by its exact name, a glob, or one of its types."""
    types = {f"type:{base.__module__}.{base.__qualname__}" for base in type(module).__mro__}
    return any(
        str(pattern) in types if str(pattern).startswith("type:") else fnmatch.fnmatchcase(name, str(pattern))
        for pattern in patterns
    )
