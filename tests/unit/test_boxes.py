import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dion.sharding.blocks import boxes


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_boxes_tile_a_piece_of_a_tensor(
    shape: tuple[int, ...], bounds: tuple[float, float]
) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start, stop = sorted(round(bound * whole.numel()) for bound in bounds)
    place = start
    for offset, box, corner in boxes(shape, start, stop):
        assert offset == place  # in the order of memory, without gaps
        place += torch.Size(box).numel()
        index = tuple(slice(c, c + b) for c, b in zip(corner, box, strict=True))
        expected = torch.arange(offset, place).view(box)
        assert torch.equal(whole[index], expected)  # and contiguous
    assert place == max(start, stop)
    assert len(list(boxes(shape, start, stop))) <= 2 * len(shape) - 1
