"""Linen modules built from specs; they know no encoder or quantizer by name."""
