"""The embedded world: captions, renderer, two tiny pipelines, a preference set, and the scripts that made them.

Nothing in the library knows about it but defaults that name it as strings (:mod:`align.common.assets`).
"""

from align.common.assets import EMBEDDED, locate

__all__ = ["EMBEDDED", "locate"]
