"""Distances, FID's network, the rules of GenEval and DPG-Bench: as other software has them."""
