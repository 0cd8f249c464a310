"""Sparse attention that is trained in: selectors, and how they join the models of transformers."""
