"""Gradients of route by PyTorch's own ops: deterministic, an image at a time, and without a word to the host.

A router's gradient takes a few kilobytes of arithmetic and is needed in the router's stage of training alone, which
caches features: kernels of their own would save launches only.
"""

from mixpert_kernels.backends.reference.route import route_backward as route_backward
