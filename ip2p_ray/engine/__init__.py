"""Many edits at once, batched step by step; knows no Ray.

request --submit--> waiting --preparation--> ready --admission between steps--> running
                                                                                   |
picture <--result-- ticket <--decoding, blending of the mask-- finished <--last step
"""

from ip2p_ray.engine.loop import Engine, EngineConfig
from ip2p_ray.engine.observer import Observer
from ip2p_ray.engine.request import EngineRequest, Preview, Ticket

__all__ = ["Engine", "EngineConfig", "EngineRequest", "Observer", "Preview", "Ticket"]
