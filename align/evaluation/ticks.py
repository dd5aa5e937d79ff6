"""Where the numbers of an axis stand."""

from __future__ import annotations

import math


def ticks(low: float, high: float, most: int) -> tuple[list[float], float]:
    """At most ``most`` and one round numbers from ``low`` to ``high``, and how far they are apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-6)
    return [n * step for n in range(first, first + most + 1) if n * step <= high + 1e-6 * step], step
