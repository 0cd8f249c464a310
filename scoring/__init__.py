"""What a model says of an example."""
