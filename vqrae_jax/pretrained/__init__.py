"""Published weights under their published keys: weight tables and loading."""
