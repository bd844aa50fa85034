"""How training and evaluation are measured and shown: distances, FID, tables, curves, speed."""
