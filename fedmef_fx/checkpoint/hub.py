"""`save_pretrained`, `from_pretrained` and `push_to_hub` for models of your own classes, through huggingface_hub.

class Net(nn.Module, SparseHubMixin): ...

sparse = fedmef_fx.transform(Net(width=64), config)
sparse.save_pretrained("net")            # model.safetensors, config.json with width, a model card
again = Net.from_pretrained("net")       # a folder, or a repository such as "owner/net"

A result of `transform` is an instance of the model's own class, so it has these methods, too. The folder holds what
`fedmef_fx.save` writes: active values and one bit per weight.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from fedmef_fx.checkpoint.model_file import load, save
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.graph.compiled import TransformedModule
from fedmef_fx.graph.pipeline import Pass

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
except ImportError as error:
    raise ConfigError(
        "fedmef_fx.checkpoint.hub: huggingface_hub is not installed: pip install 'fedmef-fx[hub]'"
    ) from error

__all__ = ["SparseHubMixin"]

_FILE: Final = "model.safetensors"


class SparseHubMixin(  # type: ignore[call-arg]  # of ModelHubMixin
    ModelHubMixin,
    library_name="fedmef_fx",
    tags=["fedmef", "sparse"],
    paper_url="https://arxiv.org/abs/2403.14737",
):
    """Gives a class of models the methods of `huggingface_hub.ModelHubMixin`, for sparse weights.

    What its `__init__` was called with is stored in `config.json`, as far as that is JSON, and `from_pretrained` calls
    it again. Nothing asks the network unless a repository is named that is not on this machine.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights into a folder.

        Raises:
            ConfigError: The model was not made by `fedmef_fx.transform`.
        """
        if not isinstance(self, nn.Module):
            raise ConfigError(f"save_pretrained: {type(self).__name__} is no torch.nn.Module; expected one that is")
        save(self, save_directory / _FILE)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        example_inputs: Sequence[Any] | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        passes: Sequence[Pass | type[Pass]] = (),
        **options: Any,
    ) -> nn.Module:
        """Make a model, transform it as the stored one was, and read its weights.

        Args:
            model_id: A folder, or a repository.
            revision: Of the repository.
            cache_dir: Where repositories are kept.
            force_download: Whether to fetch what is there.
            local_files_only: Whether to ask the network for nothing.
            token: For private repositories.
            example_inputs: For the transformation, as in `fedmef_fx.load`.
            example_kwargs: For the transformation.
            passes: Of your own, as in `fedmef_fx.load`.
            **options: For `__init__`.

        Raises:
            CheckpointError: The folder holds no weights, or those of another model.
        """
        folder = Path(model_id)
        if folder.is_dir():
            path = folder / _FILE
            if not path.is_file():
                raise CheckpointError(f"from_pretrained: {path}: no such file; expected what save_pretrained writes")
        else:
            path = Path(
                hf_hub_download(
                    model_id,
                    _FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        # A result of `transform` has a class of its own, which is made, not called.
        original = next(base for base in cls.__mro__ if not issubclass(base, TransformedModule))
        model = original(**options)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"from_pretrained: {cls.__name__} is no torch.nn.Module; expected one that is")
        return load(path, model, example_inputs=example_inputs, example_kwargs=example_kwargs, passes=passes)
