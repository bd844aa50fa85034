"""What training and evaluation are looked at with: distances, the network of FID, tables, curves, speed."""
