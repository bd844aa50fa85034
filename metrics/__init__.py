"""What evaluate.py measures with: distances of features, FID's network, the paper's tables."""
