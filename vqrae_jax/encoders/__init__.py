"""The encoders that a config may name: specs, no modules, no weights.

A row is a function of nothing that gives an `EncoderSpec`'s fields; a family
is one file.
"""

from vqrae_jax.encoders import siglip

ENCODERS = {**siglip.ROWS}
