"""The columns of latents.parquet, which describing writes and publishing and browsing read, and kinds of labels. Torch-free."""

import pyarrow

NO_RULE, RARE = "none", "rare"
"""Kinds in explanations.parquet that are no labels: no rule was found, or too few firings. They hold tokens."""
UNLABELLED = (NO_RULE, RARE)

_TOKEN_VALUES = pyarrow.list_(pyarrow.struct([("token", pyarrow.int32()), ("value", pyarrow.float32())]))

SCHEMA = pyarrow.schema(
    [
        ("latent", pyarrow.int32()),
        ("firings", pyarrow.int64()),
        ("frequency", pyarrow.float32()),
        ("mean_activation", pyarrow.float32()),
        ("max_activation", pyarrow.float32()),
        ("held_out_firings", pyarrow.int64()),
        ("held_out_frequency", pyarrow.float32()),
        ("histogram", pyarrow.list_(pyarrow.int32())),
        ("quantiles", pyarrow.list_(pyarrow.float32())),
        (
            "examples",
            pyarrow.list_(
                pyarrow.struct(
                    [
                        ("sequence", pyarrow.int32()),
                        ("position", pyarrow.int32()),
                        ("group", pyarrow.int8()),
                        ("start", pyarrow.int32()),
                        ("activations", pyarrow.list_(pyarrow.float16())),
                    ]
                )
            ),
        ),
        ("top_logits", _TOKEN_VALUES),
        ("bottom_logits", _TOKEN_VALUES),
        ("raw_top_logits", _TOKEN_VALUES),
        ("raw_bottom_logits", _TOKEN_VALUES),
        (
            "neighbours",
            pyarrow.list_(
                pyarrow.struct(
                    [
                        ("relation", pyarrow.int8()),
                        ("sae", pyarrow.int32()),
                        ("latent", pyarrow.int32()),
                        ("cosine", pyarrow.float32()),
                    ]
                )
            ),
        ),
        (
            "cofiring",
            pyarrow.list_(pyarrow.struct([("latent", pyarrow.int32()), ("count", pyarrow.int32()), ("phi", pyarrow.float32())])),
        ),
        ("position_profile", pyarrow.list_(pyarrow.float32())),
        (
            "tokens",
            pyarrow.list_(pyarrow.struct([("token", pyarrow.int32()), ("count", pyarrow.int32()), ("share", pyarrow.float32())])),
        ),
        ("token_entropy", pyarrow.float32()),
        ("token_predictability", pyarrow.float32()),
    ]
)
"""Every column of latents.parquet, in order."""
