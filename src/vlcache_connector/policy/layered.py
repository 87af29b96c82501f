"""Recompute fewer tokens in deeper layers, as a profile of the model says: the layer-aware policy of VLCache
(arXiv:2512.12977).

A profile (`policy.profile`) is made by `vlcache calibrate`. It says how the layers share what there is to spend: a
ratio buys the same number of tokens times layers as in other policies. Which tokens they are, and what becomes of the
others, is as in `shifted`.

Cost: that of `shifted` at the same ratio, and more rows in the first layers than it has.
"""

from vlcache_connector.errors import OptionError
from vlcache_connector.policy.profile import Profile
from vlcache_connector.policy.shifted import Shifted


class Layered(Shifted):
    name = "layered"

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def check(self, model: str, num_layers: int) -> None:
        """Raises `OptionError` when the profile is of another model than this, which has so many layers."""
        layers = len(self._profile.shares)
        if self._profile.model != model or layers != num_layers:
            counts = f", of {layers} layers where this one has {num_layers}" if layers != num_layers else ""
            raise OptionError(
                f"option 'profile' names a file that was made for another model{counts}; make one for this model with "
                "`vlcache calibrate`"
            )

    def ratios(self, ratio: float, num_layers: int) -> tuple[float, ...]:
        return self._profile.ratios(ratio)
