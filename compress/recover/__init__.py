"""Recovery after surgery: training against the dense model, and the data for it."""
