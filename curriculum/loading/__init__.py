"""Order training data by difficulty: a plan of every batch, and a loader that follows it exactly."""
