"""Scoring: measures how difficult the rows of a data set are for a model."""
