"""The flow on Ray: each module here is one arrow of it, `run` is what they share.

captions -> triplets -> pairs (candidates first) -> latents -> training -> evaluation

A stage reads datasets by URI and leaves datasets whole, each with its manifest; one that is whole
already is not made again, and one that a kill left unfinished is continued.
"""

from __future__ import annotations

import os

# Ray reads most of these while it is imported, so they are set before any stage imports it. A job
# inside a cluster (RAY_ADDRESS is set there) keeps the cluster's settings.
_ANYWHERE = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else every actor with arguments warns (ray issue 53727)
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # run.Progress shows one line for all of a plan
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_LOCAL = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the only switch that binds to 127.0.0.1
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # every report waits for the next check
    "HF_HUB_OFFLINE": "1",
}
for _name, _value in {**_ANYWHERE, **({} if "RAY_ADDRESS" in os.environ else _LOCAL)}.items():
    os.environ.setdefault(_name, _value)
