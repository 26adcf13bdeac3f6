"""Three coordinates in one integer test the same intervals as three pairs of comparisons."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.kernels.plans.interval_encoding import encode_coords, encode_intervals, encoding_fields, inside


@given(shape=st.tuples(*[st.sampled_from([1, 2, 3, 4, 7, 8, 21, 255, 256])] * 3), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_encoded_intervals_are_intervals(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    shifts, guard_bits = encoding_fields(shape)
    sizes = torch.tensor(shape)[:, None]
    at = (torch.rand(3, 50, generator=generator) * sizes).long()
    # Ends past the axis, empty intervals and whole axes are among them.
    ends = (torch.rand(1, 6, 40, generator=generator) * (sizes.repeat_interleave(2, 0) + 2)).long()
    ends[:, 1::2, ::5] = 10_000
    ends[:, 0::2, ::5] = 0
    got = inside(encode_coords(at, shifts), encode_intervals(ends, shifts, guard_bits)[0], guard_bits)
    want = torch.ones(40, 50, dtype=torch.bool)
    for axis in range(3):
        lo, hi = ends[0, 2 * axis], ends[0, 2 * axis + 1]
        want &= (at[axis][None] >= lo[:, None]) & (at[axis][None] < hi[:, None])
    assert torch.equal(got, want)


def test_the_guard_bit_may_be_the_sign_bit():
    shifts, guard_bits = encoding_fields((512, 1024, 1024))
    assert guard_bits < 0
    at = torch.tensor([[0, 511, 300], [0, 1023, 5], [1023, 0, 7]])
    one = torch.tensor([[[300], [512], [5], [6], [7], [1024]]])
    assert inside(encode_coords(at, shifts), encode_intervals(one, shifts, guard_bits)[0], guard_bits).tolist() == [
        [False, False, True]
    ]


def test_a_grid_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match="needs 33 bits"):
        encoding_fields((1024, 1024, 1024))
    with pytest.raises(ValueError, match="needs 36 bits"):
        encoding_fields((2048, 2048, 2048))
