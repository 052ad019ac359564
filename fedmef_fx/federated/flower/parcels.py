"""What travels in a Flower message: one array of bytes, and a few numbers and texts beside it.

One array, because Flower sends each one by itself: hundreds of small ones take many times as long as their bytes.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedmef_fx.errors import WireError

__all__ = ["QUERY", "TRAIN", "fields_of", "packed", "payload_of"]

TRAIN: Final = "train.fedmef"
QUERY: Final = "query.fedmef"

_FIELDS: Final = "fedmef.fields"
_PAYLOAD: Final = "fedmef.payload"
_KEY: Final = "bytes"


def packed(payload: bytes = b"", **fields: str | int | bool) -> Any:
    """The content of a message.

    Args:
        payload: Bytes.
        fields: What stands beside them.
    """
    array = Array(np.frombuffer(payload, dtype=np.uint8))
    return RecordDict({_PAYLOAD: ArrayRecord({_KEY: array}), _FIELDS: ConfigRecord(dict(fields))})


def payload_of(content: Any) -> bytes:
    """The bytes of a message.

    Raises:
        WireError: It has none.
    """
    record = content.array_records.get(_PAYLOAD)
    if record is None or list(record) != [_KEY]:
        raise WireError("got a Flower message without a payload of fedmef_fx; expected one array of bytes")
    try:
        array = record[_KEY].numpy()
    except Exception as error:  # whatever numpy makes of a stranger's bytes
        raise WireError(f"got a payload that is no array: {type(error).__name__}; expected bytes") from error
    if array.dtype != np.uint8 or array.ndim != 1:
        raise WireError(f"got a payload of {array.dtype}{list(array.shape)}; expected bytes")
    return bytes(array.tobytes())


def fields_of(content: Any) -> Mapping[str, Any]:
    """What stands beside the bytes; empty where nothing does."""
    return dict(content.config_records.get(_FIELDS) or {})
