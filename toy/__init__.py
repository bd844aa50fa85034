"""The paper in miniature: a drawn ImageNet, and the whole method run on it."""
