"""Models of timm, transformers and torchvision that were not looked at while the exporter was written.

None is loaded from anywhere: all are small, or made small by their arguments, and start from random weights.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["HeldOut", "held_out", "load_libraries"]

_WORDS: Final = 99
_LIBRARIES: Final = ("torchvision", "timm", "transformers")

# Name of timm: side of its images, arguments.
_TIMM: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "tf_efficientnet_lite0": (64, {}),
    "tf_mobilenetv3_small_minimal_100": (64, {}),
    "tf_mixnet_s": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "tinynet_e": (64, {}),
    "regnety_002": (64, {}),
    "nf_regnet_b0": (64, {}),
    "res2net50_26w_4s": (64, {"layers": (1, 1, 1, 1)}),
    "skresnet18": (64, {}),
    "densenetblur121d": (64, {"block_config": (2, 2, 2, 2)}),
    "ghostnet_050": (64, {}),
    "dla46x_c": (64, {}),
    "ese_vovnet19b_slim": (64, {}),
    "dpn48b": (64, {}),
    "mobileone_s0": (64, {}),
    "repvit_m0_9": (64, {}),
    "poolformer_s12": (64, {}),
    "convmixer_768_32": (64, {}),
    "convnextv2_atto": (64, {}),
    "inception_next_atto": (64, {}),
    "starnet_s050": (64, {}),
    "mambaout_femto": (64, {}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "gmixer_12_224": (64, {"img_size": 64}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "edgenext_xx_small": (64, {}),
    "levit_128s": (224, {}),
    "efficientformer_l1": (224, {}),
    "efficientvit_b0": (64, {}),
    "swiftformer_xs": (224, {}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "convit_tiny": (64, {"img_size": 64, "depth": 4, "local_up_to_layer": 2}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 3}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "twins_svt_small": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1)}),
    "volo_d1_224": (64, {"img_size": 64}),
}
_TORCHVISION: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "mnasnet0_5": (64, {}),
    "swin_t": (64, {}),
    "deeplabv3_mobilenet_v3_large": (64, {"weights_backbone": None}),
    "fcn_resnet50": (64, {"weights_backbone": None}),
    "r2plus1d_18": (32, {}),
}
_TEXT: Final[dict[str, Any]] = {
    "vocab_size": _WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_GROUPED: Final = {**_TEXT, "num_key_value_heads": 2}
_PATCHES: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_PAIR: Final[dict[str, Any]] = {
    "vocab_size": _WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Name: its configuration's class, its own, what it reads, arguments of the configuration.
_TRANSFORMERS: Final[dict[str, tuple[str, str, str, dict[str, Any]]]] = {
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        "text",
        {"vocab_size": _WORDS, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "electra": ("ElectraConfig", "ElectraModel", "text", {**_TEXT, "embedding_size": 16}),
    "mobilebert": (
        "MobileBertConfig",
        "MobileBertModel",
        "text",
        {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 32},
    ),
    "deberta": (
        "DebertaConfig",
        "DebertaModel",
        "text",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "convbert": ("ConvBertConfig", "ConvBertModel", "text", {**_TEXT, "embedding_size": 32, "head_ratio": 2}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        "tokens",
        {
            "vocab_size": _WORDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", "tokens", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "tokens", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", "tokens", _TEXT),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        "tokens",
        {"vocab_size": _WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "t5": (
        "T5Config",
        "T5Model",
        "pair",
        {"vocab_size": _WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "bart": ("BartConfig", "BartModel", "pair", {**_PAIR, "max_position_embeddings": 64}),
    "whisper": (
        "WhisperConfig",
        "WhisperModel",
        "speech",
        {**_PAIR, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", "image", _PATCHES),
    "beit": ("BeitConfig", "BeitModel", "image", _PATCHES),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        "image",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 16,
        },
    ),
    "mobilenet_v1": ("MobileNetV1Config", "MobileNetV1Model", "image", {"depth_multiplier": 0.25, "min_depth": 8}),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTModel",
        "image",
        {
            "image_size": 64,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 64],
            "num_attention_heads": 4,
        },
    ),
    "regnet": (
        "RegNetConfig",
        "RegNetModel",
        "image",
        {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        "both",
        {"text_config": {**_TEXT, "max_position_embeddings": 32}, "vision_config": _PATCHES},
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOut:
    """A model that is made when it is asked for.

    Attributes:
        name: With its library's before it.
        build: Makes it, with random weights.
        inputs: Positional and keyword arguments of a call, for a batch size.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def load_libraries() -> Mapping[str, types.ModuleType]:
    """The libraries that are installed, by name; of torchvision its Python code is enough."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    # Where this folder is searched for modules, a script of it has the name of a library.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LIBRARIES:
            with contextlib.suppress(ImportError):
                found[name] = _torchvision() if name == "torchvision" else importlib.import_module(name)
        if "torchvision" in found:
            found["torchvision"] = importlib.import_module("torchvision.models")
    return found


def _torchvision() -> types.ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # built for another torch: without its compiled operators the models still work
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        return importlib.import_module("torchvision")


def held_out(libraries: Mapping[str, types.ModuleType]) -> Iterator[HeldOut]:
    """All models of the libraries that are there.

    Args:
        libraries: As `load_libraries` returns them.
    """
    if "timm" in libraries:
        for name, (side, options) in _TIMM.items():
            yield HeldOut(f"timm/{name}", _made_by_timm(libraries["timm"], name, options), _images(side))
    if "torchvision" in libraries:
        for name, (side, options) in _TORCHVISION.items():
            video = (4,) if name == "r2plus1d_18" else ()
            yield HeldOut(
                f"torchvision/{name}",
                _made_by_torchvision(libraries["torchvision"], name, options),
                _images(side, *video),
            )
    if "transformers" in libraries:
        for name, (config, cls, kind, options) in _TRANSFORMERS.items():
            build = _made_by_transformers(libraries["transformers"], config, cls, options)
            side = 32 if options is _PATCHES or kind == "both" else 64
            yield HeldOut(f"transformers/{name}", build, _arguments(kind, side))


def _made_by_timm(timm: Any, name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **options)  # type: ignore[no-any-return]


def _made_by_torchvision(models: Any, name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, num_classes=10, **options)  # type: ignore[no-any-return]


def _made_by_transformers(library: Any, config: str, cls: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(library, cls)(getattr(library, config)(**options))  # type: ignore[no-any-return]


def _images(side: int, *frames: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda batch: ((torch.randn(batch, 3, *frames, side, side),), {})


def _arguments(kind: str, side: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    def words(batch: int, length: int = 12) -> Tensor:
        return torch.randint(5, _WORDS, (batch, length))

    def arguments(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named: dict[str, Any] = {}
        if kind in ("text", "tokens", "pair", "both"):
            named["input_ids"] = words(batch)
        if kind == "text":
            named["attention_mask"] = torch.ones(batch, 12, dtype=torch.int64)
            named["attention_mask"][-1, -3:] = 0
        if kind in ("image", "both"):
            named["pixel_values"] = torch.randn(batch, 3, side, side)
        if kind == "speech":
            named["input_features"] = torch.randn(batch, 16, 40)
        if kind in ("pair", "speech"):
            named["decoder_input_ids"] = words(batch, 7)
        return (), named

    return arguments
