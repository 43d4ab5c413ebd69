"""Linen blocks: they know specs, never an encoder or a quantizer by name."""
