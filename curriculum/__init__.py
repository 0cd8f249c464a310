"""What to do with the ranks: order demonstrations, order training data."""
