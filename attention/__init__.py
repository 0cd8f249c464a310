"""Sparse attention that is trained in. Nothing stands here yet: see the changelog for what has landed."""
