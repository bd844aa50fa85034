"""Numbers that have references: distances, FID's network, GenEval's rules (Tables 1 and 2)."""
