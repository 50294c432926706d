"""Which of torch's functions look at elements one by one, which reduce all of them, and which look at none.

By name: a function, its method and its in-place variant share one (``torch.add``, ``Tensor.add``, ``Tensor.add_``).
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    """
    abs absolute acos acosh add addcdiv addcmul alias angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin
    asinh atan atan2 atanh bfloat16 bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor bool byte ceil celu char clamp clamp_max clamp_min clip clone contiguous copy copysign cos cosh cpu cuda
    deg2rad detach digamma div divide double elu empty_like eq equal_to erf erfc erfinv exp exp2 expit expm1 fill
    fix float float_power floor floor_divide fmax fmin fmod frac full_like ge gelu greater greater_equal gt half
    hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 int isclose isfinite isinf isnan isneginf isposinf
    isreal ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and
    logical_not logical_or logical_xor logit logsigmoid long lt masked_fill maximum minimum mish mul multiply
    nan_to_num ne neg negative nextafter not_equal ones_like polygamma positive pow rad2deg reciprocal relu relu6
    remainder round rsqrt rsub selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign
    special_expit sqrt square sub subtract tan tanh threshold to true_divide trunc type type_as where xlogy zero
    zeros_like
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __div__ __rdiv__ __truediv__ __rtruediv__ __floordiv__
    __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__ __and__ __rand__ __or__ __ror__
    __xor__ __rxor__ __lshift__ __rlshift__ __rshift__ __rrshift__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    """
)
"""Each element of the result comes from the operands' elements at its place (which broadcast)."""

IN_PLACE_OPERATORS = _names(
    """
    __iadd__ __isub__ __imul__ __idiv__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__
    """
)
"""Elementwise as well, into the first operand."""

RANDOM = _names("rand_like randn_like randint_like")
"""New tensors of a whole one's shape, drawn whole: every rank of the unit draws the same, and keeps its part."""

REDUCTIONS = _names("sum mean norm linalg_vector_norm max min amax amin any all count_nonzero")
"""Called without a dimension, they make one number of all elements."""

LOCAL = _names(
    """
    backward dense_dim detach_ dim element_size get_device has_names is_coalesced is_complex is_conj
    is_contiguous is_cuda is_distributed is_floating_point is_inference is_neg is_nonzero is_pinned is_same_size
    is_set_to is_shared is_signed is_sparse is_storage is_tensor ndimension new_empty new_full new_ones new_tensor
    new_zeros requires_grad_ result_type retain_grad share_memory_ sparse_dim storage storage_offset storage_type
    untyped_storage _is_view _is_zerotensor _nnz _typed_storage
    can_cast promote_types get_default_dtype __hash__ __dlpack_device__ _has_compatible_shallow_copy_type
    """
)
"""They look at no element, and say of a shard what they would say of the whole."""

SHAPE_OF_OTHER = {"view_as": "view", "reshape_as": "reshape", "expand_as": "expand"}
"""Methods that take only the shape of their argument, and those that take a shape."""
