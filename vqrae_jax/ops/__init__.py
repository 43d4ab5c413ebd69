"""Pure functions on arrays: no parameters, no modules, no config."""
