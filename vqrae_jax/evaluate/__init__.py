"""Measuring a tokenizer: metrics, an evaluator, pictures."""
