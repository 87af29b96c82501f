"""Sizes of the grid model: a Qwen3-VL."""

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 128, 5, 4, 2, 64, 256
GROUP = HEADS // KV_HEADS
VISION_HIDDEN, VISION_DEPTH, VISION_MLP = 64, 2, 128
PATCH_VALUES, SIDE = 384, 32  # values and positions (a side) of patches
ROPE_THETA = 5e6
MROPE_SECTION = (12, 10, 10)
EPS = 1e-6
