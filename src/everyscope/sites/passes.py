"""How many blocks of text a forward pass takes. Torch-free.

A CPU is full with a few blocks. A GPU is not: a small model on a thousand tokens is all launches. There a pass takes as many
blocks as fill the device, as far as what is kept of it fits. The numbers below do not depend on what a resumed run could find
otherwise, such as how much memory is free: how many rows a product has may change its last bits.
"""

TOKENS = 2**14
"""Of a pass on a GPU, where memory allows [tokens]."""
KEPT_BYTES = 2**32
"""For what a pass on a GPU keeps: activations on their way to the host, logits [bytes]."""


def blocks_at_once(least: int, context: int, device: str, bytes_per_token: int) -> int:
    """Blocks of `context` tokens in one forward pass of a model on `device`: `least`, which a config asks for, or more on a GPU.

    `bytes_per_token` is what is kept of each token [bytes].
    """
    if device.partition(":")[0] == "cpu":
        return least
    return max(least, min(TOKENS, KEPT_BYTES // max(1, bytes_per_token)) // context)
