"""What the tests of a service on several nodes run: deploys on the Ray of RAY_ADDRESS, and ends."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import ray
from ray import serve
from ray.serve._private import api

from serve import app


def main(port: str, proxies: str, settings: str) -> None:
    """The service with these settings, HTTP proxies on the head only or on every node."""
    api.HTTP_PROXY_TIMEOUT = 600  # Ray's own minute is short on a busy machine
    ray.init(log_to_driver=False)
    serve.shutdown()  # where proxies are cannot be changed
    serve.start(proxy_location=proxies, http_options={"host": "127.0.0.1", "port": int(port)})
    config = app.ServiceConfig(**json.loads(settings))
    serve.run(app.application(config), name="editor", route_prefix="/")


if __name__ == "__main__":
    main(*sys.argv[1:])
