"""Training: a step that updates a state made only of arrays, in a loop."""
