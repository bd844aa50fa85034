"""The paper in miniature: a drawn ImageNet.

The whole method is run on it: `python -m toy`.
"""
