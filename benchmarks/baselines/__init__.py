"""What others do, on the same layers: short baselines written from their papers, and their packages where installed."""
