"""The five activations and their derivatives, in float32."""

import triton
import triton.language as tl


@triton.jit
def _tanh(z):
    # 1 - 2 / (exp(2z) + 1): exact limits at both ends, where exp overflows to inf or underflows to 0.
    return 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) for z float32."""
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "quick_gelu":
        return z * _sigmoid(1.702 * z)
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return z


@triton.jit
def activate_grad(z, ACTIVATION: tl.constexpr):
    """act'(z) for z float32; relu'(0) = 0."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "gelu_tanh":
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        du = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
        # With q = exp(-2 |u|), 1 - tanh(u)^2 = 4 q / (1 + q)^2: no digit is lost where tanh is near -1 or 1.
        q = tl.exp(-2.0 * tl.abs(u))
        p = 1.0 / (1.0 + q)
        return tl.where(u < 0.0, q * p, p) + 2.0 * z * du * q * p * p
    elif ACTIVATION == "quick_gelu":
        s = _sigmoid(1.702 * z)
        return s + 1.702 * z * s * (1.0 - s)
    elif ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    else:
        return tl.full(z.shape, 1.0, tl.float32)
