"""How a layer chooses the blocks that it attends to: one interface, and a file for each way."""

from sparsort.attention.selectors.making import make_selector as make_selector
