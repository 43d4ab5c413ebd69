"""Training: one step that moves a state of nothing but arrays, in a loop."""
