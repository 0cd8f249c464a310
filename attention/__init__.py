"""Trainable sparse attention: block selectors, and how they are attached to transformers models."""
