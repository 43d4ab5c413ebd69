"""An encoder, a quantizer and a loss outside of vqrae_jax, for its configs."""
