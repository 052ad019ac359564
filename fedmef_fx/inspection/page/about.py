"""What made a page: versions, day, configuration, command."""

import datetime
import os
import platform
import sys
import time
from typing import Any

import torch

from fedmef_fx.config import Config

__all__ = ["about"]


def about(config: Config | None, command: str | None) -> dict[str, Any]:
    """The facts, as JSON values.

    The day is that of `SOURCE_DATE_EPOCH`, if the environment has it, so that pages can be made again to the byte.

    Args:
        config: What the model was transformed with.
        command: The command line that wrote the page.
    """
    version = sys.modules[__name__.partition(".")[0]].__version__  # of the whole package, which this room is below
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    seconds = time.time() if epoch is None else int(epoch)
    return {
        "date": datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat(),
        "versions": f"fedmef_fx {version}, torch {torch.__version__}, Python {platform.python_version()}",
        "config": None if config is None else repr(config),
        "command": command,
    }
