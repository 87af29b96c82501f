"""Plans as `vlcache explain` shows them; a real server's are in e2e/test_serving.py."""

from collections.abc import Sequence
from typing import Any

from vlcache_connector.explain import lines

SCATTERED = [[5, 6], [9, 10], [14, 17], [20, 21], [31, 32], [40, 41], [44, 46], [60, 61]]
GAPS = [[6, 9], [10, 14], [17, 20], [21, 31], [32, 40], [41, 44], [46, 60], [61, 65]]


def report(
    recomputed: list[list[int]], reused: list[list[int]], deeper: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    counts = {f"{name}_tokens": 0 for name in ("prefix_cached", "reused", "recomputed", "computed")}
    span: dict[str, Any] = {"modality": "image", "offset": 5, "length": 60, "is_known": True}
    span |= {"reused": reused, "recomputed": recomputed, "deeper": deeper}
    plan = {"covered": [0, 65], "spans": [span], "recomputed": [[0, 5], *recomputed]}
    return counts | {"approximate": True, "plan": plan}


def test_few_runs_are_all_shown() -> None:
    assert "image 0    tokens 5-64: recomputed 5, 9-10; reused 6-8, 11-64" in list(
        lines(report([[5, 6], [9, 11]], [[6, 9], [11, 65]]))
    )


def test_of_many_runs_the_first_are_shown_and_all_are_counted() -> None:
    shown = list(lines(report(SCATTERED, GAPS)))
    assert (
        "image 0    tokens 5-64: recomputed 11 tokens in 8 runs (5, 9, 14-16, 20, 31, 40, ...); "
        "reused 49 tokens in 8 runs (6-8, 10-13, 17-19, 21-30, 32-39, 41-43, ...)"
    ) in shown
    assert "recomputed 16 tokens in 9 runs (0-4, 5, 9, 14-16, 20, 31, ...), in every layer" in shown


def test_a_span_without_recomputed_tokens_says_so() -> None:
    assert "image 0    tokens 5-64: recomputed none; reused 5-64" in list(lines(report([], [[5, 65]])))


def test_a_video_is_called_one() -> None:
    seen = report([], [[5, 65]])
    (image,) = seen["plan"]["spans"]
    video = image | {"modality": "video", "offset": 70, "is_known": False}
    shown = list(lines(seen | {"plan": seen["plan"] | {"spans": [image, video]}}))
    assert "image 0    tokens 5-64: recomputed none; reused 5-64" in shown
    assert "video 1    tokens 70-129: not in the store" in shown


def test_deeper_layers_say_how_much_they_recompute() -> None:
    deeper = [{"layer": 2, "count": 3, "recomputed": [[5, 8]]}, {"layer": 4, "count": 1, "recomputed": [[5, 6]]}]
    shown = list(lines(report([[5, 9]], [[5, 65]], deeper)))
    assert (
        "image 0    tokens 5-64: recomputed 5-8, 3 of them from layer 2 on, 1 of them from layer 4 on; reused 5-64"
    ) in shown
    assert "recomputed 0-4, 5-8, in the first layers" in shown
