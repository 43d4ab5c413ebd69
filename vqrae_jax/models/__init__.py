"""Whole networks: encoder, decoder, and the tokenizer made of both."""
