"""Step-3: configuration, checkpoint, weights and the order of its layers."""
