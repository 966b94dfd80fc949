import pytest

from minference_jax.kernels.tiles import Device, TileConfig, check_triton_tiles, shared_memory_bytes, triton_tiles

H100 = Device(platform="cuda", kind="H100", compute_capability=(9, 0))
RTX = Device(platform="cuda", kind="RTX", compute_capability=(8, 9))
CPU = Device(platform="cpu", kind="cpu")


@pytest.mark.parametrize("device", [H100, RTX, Device(platform="cuda", kind="A100", compute_capability=(8, 0))])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chosen_tiles_fit_the_shared_memory_of_every_card(device, head_dim, itemsize):
    tiles = triton_tiles(device, head_dim, itemsize)
    assert shared_memory_bytes(tiles, head_dim, itemsize) <= device.shared_memory
    check_triton_tiles(tiles, device, head_dim, itemsize)


def test_larger_cards_get_larger_tiles():
    assert triton_tiles(H100, 256, 2).block_kv > triton_tiles(RTX, 256, 2).block_kv


@pytest.mark.parametrize("device", [CPU, Device(platform="cuda", kind="T4", compute_capability=(7, 5))])
def test_other_devices_are_declined_by_name(device):
    with pytest.raises(NotImplementedError, match=f"compute capability 8.0 or later, not {device.kind}"):
        triton_tiles(device, 128, 2)


def test_tiles_that_do_not_fit_are_refused_with_both_sizes():
    huge = TileConfig(block_q=256, block_kv=256)
    with pytest.raises(ValueError, match="needs 328704 bytes of shared memory at head_dim=128, RTX has 101376"):
        check_triton_tiles(huge, RTX, 128, 2)
    check_triton_tiles(huge, CPU, 128, 2)  # it has none to run out of


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_kv": 48}, "block_kv=48 must be a power of two"),
        ({"num_warps": 3}, "num_warps=3 must be a power of two"),
        ({"block_q": 96}, "block_q=96 must be a positive multiple of block_kv=64"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
    ],
)
def test_sizes_that_make_no_tile_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TileConfig(**sizes)
