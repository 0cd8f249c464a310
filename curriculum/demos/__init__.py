"""Demonstrations of a few-shot prompt: select, order, assemble, and keep the query out of its own prompt."""
