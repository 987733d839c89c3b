"""The builder of the Serve application: `serve run serve/config.yaml`, or `serve.app:build`.

`from __future__ import annotations` must stay away: it would switch the typed arguments off.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from ip2p_ray.engine import EngineConfig
from serve.api import ApiConfig
from serve.deployment import EditorReplica, Front, ReplicaConfig
from serve.form import Limits

EDITOR = "Editor"
"""Name of the deployment with the engines."""


class ServiceConfig(BaseModel):
    """Everything that may be said of the service; keys are not, they come from the environment."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    """Folder, hub id or s3://... of an editor; by default the miniature's."""
    name: str | None = None
    """Under which clients know it; by default the last part of `model`, or "miniature"."""
    device: str = "cpu"
    """Where replicas compute, "cuda" with `num_gpus`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs that each replica holds."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that each replica holds."""
    resources: dict[str, float] = {}
    """Custom resources that each replica holds: it stays on nodes that have some."""
    front_resources: dict[str, float] = {}
    """The same of each of `fronts`."""
    threads: int = Field(default=1, ge=1)
    """Of torch in a step; on a CPU two more threads encode and decode."""
    batch_size: int = Field(default=8, ge=1)
    """Requests a replica takes steps of at a time."""
    max_ongoing: int | None = Field(default=None, ge=1)
    """Requests a replica holds, the batch among them; by default twice the batch."""
    max_queued: int = Field(default=32, ge=1)
    """Requests that wait for a replica in each of `fronts`; beyond, 429 is answered at once."""
    min_replicas: int = Field(default=1, ge=0)
    """0 ends the last replica when nothing is asked for; the next request waits for a start."""
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing: float | None = Field(default=None, gt=0)
    """Requests a replica is meant to have at a time; more ask for another. By default the batch."""
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    look_back_s: float = Field(default=15.0, gt=0)
    """Seconds over which ongoing requests are averaged to tell how many replicas are wanted; more
    than the 10 s after which replicas report."""
    drain_s: float = Field(default=60.0, ge=0)
    """Seconds that a replica which is to end may take for what it has begun."""
    fronts: int = Field(default=1, ge=1)
    """Processes that speak HTTP."""
    max_body_mb: float = Field(default=20.0, gt=0)
    upload_s: float = Field(default=120.0, gt=0)
    """Seconds in which a request's body must have come."""
    max_pictures: int = Field(default=4, ge=1)
    """The largest n."""
    max_steps: int = Field(default=100, ge=1)
    deadline_s: float = Field(default=300.0, gt=0)
    """The most that a request may take."""
    allow_unauthenticated: bool = False
    """Answer other machines without API keys."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Pictures of each key, and of each of `fronts`."""
    cors_origins: list[str] = []
    log_prompts: bool = False
    page: str | None = None
    """Route of the page, to which `/` leads."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}"
            )
        if self.device != "cpu" and not self.num_gpus:
            raise ValueError(f"device {self.device} needs num_gpus")
        return self

    @property
    def served_name(self) -> str:
        """The model's name for clients."""
        if self.name or self.model is None:
            return self.name or "miniature"
        return self.model.rstrip("/").rpartition("/")[2]

    @property
    def most_ongoing(self) -> int:
        """Requests that a replica holds."""
        return self.max_ongoing or 2 * self.batch_size

    @property
    def replica(self) -> ReplicaConfig:
        """What each replica is told."""
        # Serve bounds what a replica holds; each request may be of several pictures
        waiting = self.most_ongoing * self.max_pictures
        return ReplicaConfig(
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            engine=EngineConfig(batch_size=self.batch_size, max_waiting=waiting),
        )

    @property
    def api(self) -> ApiConfig:
        """What the front is told."""
        return ApiConfig(
            model=self.served_name,
            limits=Limits(
                body_bytes=int(self.max_body_mb * 2**20),
                upload_s=self.upload_s,
                pictures=self.max_pictures,
                steps=self.max_steps,
                deadline_s=self.deadline_s,
            ),
            allow_unauthenticated=self.allow_unauthenticated,
            requests_per_minute=self.requests_per_minute,
            cors_origins=tuple(self.cors_origins),
            log_prompts=self.log_prompts,
            page=self.page,
        )


def build(args: ServiceConfig) -> Application:
    """The application that Serve runs."""
    return application(args)


def application(config: ServiceConfig, replica: type[Any] = EditorReplica) -> Application:
    """As `build`, with another kind of replica: any class with `EditorReplica`'s methods."""
    deployment: Any = serve.deployment
    most_waiting = config.max_queued + config.max_replicas * config.most_ongoing
    editor = deployment(replica).options(
        name=EDITOR,
        user_config={"model": config.model},
        max_ongoing_requests=config.most_ongoing,
        max_queued_requests=config.max_queued,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        max_constructor_retry_count=3,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing or config.batch_size,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            look_back_period_s=config.look_back_s,
        ),
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "resources": config.resources,
        },
    )
    front = deployment(Front).options(
        name="Front",
        num_replicas=config.fronts,
        # refusing is its work too, so it takes far more than may wait
        max_ongoing_requests=200 + 2 * most_waiting,
        # a replica's requests are sent again, what a front has begun is lost with it
        graceful_shutdown_timeout_s=max(config.drain_s, config.deadline_s),
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0.1, "resources": config.front_resources},
        logging_config={"enable_access_log": False},
    )
    return front.bind(
        config.api,
        editor.bind(config.replica),
        deployment=EDITOR,
        scales_to_zero=config.min_replicas == 0,
    )
