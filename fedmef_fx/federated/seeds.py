"""One seed per purpose, round and client, so that no random choice depends on what ran before it."""

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A seed for one purpose, e.g. `derive_seed(config.seed, "client", round_index, client)`.

    Args:
        seed: The seed of the run.
        purpose: What the random numbers are for.
        indices: Round, client and the like.

    Returns:
        An integer in [0, 2^63): the same in every process and on every machine.
    """
    text = ":".join(map(str, (seed, purpose, *indices)))
    # A cryptographic hash, because Python's hash() differs between processes.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
