"""What the kernels raise on purpose."""

from __future__ import annotations


class UnsupportedPlanError(ValueError, TypeError, RuntimeError):
    """No backend takes these tensors with this plan: their dtype, head dimension, strides or device, or the plan's blocks.

    The call itself is sound, so a caller may compute it with dense attention instead. A plan that was built for other tensors
    is not such a case: it is a mistake of the caller, and raises a plain ``ValueError``.

    It is also a ``TypeError`` and a ``RuntimeError`` because that is what earlier versions raised for dtypes and devices.
    """
