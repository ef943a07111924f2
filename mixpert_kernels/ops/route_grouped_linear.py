"""route_grouped_linear: route, then the LayerNorm and the first linear layer of each tile's expert, as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixpert_kernels.backends import pick
from mixpert_kernels.routing import Routing

from . import grouped_layer_norm as layer_norm
from . import grouped_linear as linear
from . import route as routing
from ._checks import autocast_dtype
