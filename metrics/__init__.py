"""What evaluate.py measures with: distances, the network of FID, tables."""
