"""The paper in miniature: a toy ImageNet that is drawn, and the whole method run on it."""
