"""Triplets of captions: a language model writes an edit of each; what was answered is kept.

    python jobs/write_triplets.py --captions runs/laion/captions --out runs/laion \
        --model gpt-4o-mini --max-usd 20 --usd-per-million 0.15 0.60
    python jobs/write_triplets.py --captions runs/laion/captions --out runs/laion \
        --model my-model --base-url http://localhost:8000/v1 --api-key-env none
    python jobs/write_triplets.py --captions runs/q/captions --out runs/q --writer local
    ray job submit --working-dir . \
        --runtime-env-json '{"env_vars": {"OPENAI_API_KEY": "..."}}' -- \
        python jobs/write_triplets.py --captions /shared/run/captions --out /shared/run \
        --model gpt-4o-mini --actors 4 --max-usd 20 --usd-per-million 0.15 0.60

    python jobs/write_triplets.py --captions /shared/run/captions --out /shared/run \
        --model gpt-4o-mini --journal s3://bucket/run/journal
    python jobs/write_triplets.py --captions s3://bucket/run/captions --out s3://bucket/run \
        --model gpt-4o-mini

<out>/triplets, <out>/rejects/triplets and the page <out>/triplets.html come out. Whenever it is
stopped, the same command goes on; <out>/journal has every reply from the moment it arrived, and one
in a bucket (endpoint, region and credentials as in jobs/collect_captions.py) a second later, or as
long as the upload takes. Nothing that it has is asked for again: a kill loses at most the requests
in flight, and with a bucket the replies that were not uploaded yet. The status is 0 when all is
written, 3 when a spending cap or a used-up quota stopped it (raise it and run the same command
again), 1 for any other failure and 2 for a wrong flag.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import custom_resources, is_web_address, require_place, require_uri

NOT_LOCAL = (
    "journal",
    "form",
    "examples",
    "temperature",
    "moderation",
    "requests_per_minute",
    "tokens_per_minute",
    "max_tokens",
    "max_usd",
    "usd_per_million",
    "retry_rejects",
)
"""Flags that mean nothing with --writer local; a cap that bounds nothing is no cap."""


@dataclass(frozen=True, kw_only=True)
class WriteTriplets:
    """A dataset of captions in, a dataset of triplets out."""

    captions: str
    """Dataset of captions, as jobs/collect_captions.py makes it; here or s3://."""
    out: str = "runs/captions"
    """Folder for the datasets and the journal; all nodes have to reach it, here or s3://."""
    journal: str | None = None
    """Where the replies are kept, here or s3://; by default <out>/journal."""
    writer: Literal["openai", "local"] = "openai"
    """A model behind an OpenAI-compatible server, or a causal LM in processes of this cluster."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What runs the model of --writer local; auto takes vLLM where it is installed, for a --model
    with whole --gpus."""
    model: str | None = None
    """The server's name of it; or a transformers folder, here or s3://..., by default the
    miniature's writer."""
    base_url: str = "https://api.openai.com/v1"
    """Of the server's API, to the version: hosted, vLLM, Ollama, `transformers serve`."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; "none" where the server wants none."""
    form: Literal["chat", "completions"] = "chat"
    """Chat with examples; or the paper's text form, for a model that was fine-tuned for it."""
    examples: Path | None = None
    """File of triplets to show in the chat form; by default the package's own."""
    shots: int = 8
    """Examples shown with each caption."""
    seed: int = 0
    """Of the choice of examples, or of the local model's draws."""
    temperature: float | Literal["server"] = 0.7
    """Of the sampling; "server" sends none, as models that reason want it."""
    max_reply_tokens: int = 256
    """Tokens of the longest reply. Not of --writer local."""
    structured: Literal["auto", "json_schema", "off"] = "auto"
    """Whether chat replies are bound to a JSON schema."""
    moderation: bool = False
    """Show captions and replies to the server's moderation; what it flags is rejected."""
    concurrency: int = 64
    """Requests in flight of each actor; captions in a batch of --writer local."""
    actors: int = 1
    """Processes that ask, or that hold the local model."""
    gpus: float = 0.0
    """GPUs of each actor of --writer local."""
    actor_resources: tuple[str, ...] = ()
    """Custom resources of each actor, such as writer=1: it stays on nodes that have some."""
    requests_per_minute: float | None = None
    """Of all actors together, retries included."""
    tokens_per_minute: float | None = None
    """Of all actors together, in and out."""
    max_tokens: int | None = None
    """Tokens in and out after which the run stops; what the journal has from before counts."""
    max_usd: float | None = None
    """US dollars after which the run stops; needs --usd-per-million."""
    usd_per_million: tuple[float, float] | None = None
    """Prices of a million tokens read and of a million written."""
    timeout: float = 120.0
    """Seconds without a byte after which a request is given up."""
    attempts: int = 10
    """Requests for one caption before it is given up."""
    max_no_reply: float = 0.05
    """Share of captions that may be left without a reply; above it the run fails."""
    retry_rejects: bool = False
    """Ask again for captions that had no reply when the triplets were finished."""
    held_out: float = 0.05
    """Share of triplets that no editor is trained on."""

    def __post_init__(self) -> None:
        if self.writer == "openai" and not self.model:
            raise ValueError("--model names a model at the server")
        told = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if self.writer == "local" and told.intersection(NOT_LOCAL):
            flag = next(name for name in NOT_LOCAL if name in told).replace("_", "-")
            raise ValueError(f"--{flag} is of --writer openai, and --writer local has none")
        in_bucket = (self.model or "").startswith("s3://")
        if (
            self.writer == "local"
            and self.model
            and not in_bucket
            and not Path(self.model).is_dir()
        ):
            raise ValueError(f"--model {self.model}: there is no such folder")
        if not is_web_address(self.base_url):
            raise ValueError("--base-url is like https://host/v1")
        for name in ("captions", "out", "journal"):
            place = getattr(self, name) or ""
            if "://" in place and not place.startswith(("file://", "s3://")):
                raise ValueError(f"--{name} {place}: a folder here or s3://bucket/folder")
        if self.examples is not None and not self.examples.is_file():
            raise ValueError(f"--examples {self.examples}: there is no such file")
        for name in ("concurrency", "actors", "max_reply_tokens", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        for name in ("requests_per_minute", "tokens_per_minute", "max_tokens", "max_usd"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is above 0")
        if self.temperature != "server" and not 0 <= self.temperature <= 2:
            raise ValueError('--temperature lies in [0, 2], or is "server"')
        if not all(0 <= price < float("inf") for price in self.usd_per_million or ()):
            raise ValueError("--usd-per-million are two prices of at least 0")
        if self.max_usd is not None and self.usd_per_million is None:
            raise ValueError("--max-usd needs --usd-per-million, the prices of reading and writing")
        if self.shots < 0 or self.gpus < 0 or not self.timeout > 0:
            raise ValueError("--shots and --gpus are at least 0, --timeout is above 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError("--seed lies in [0, 2**63)")
        if not (0 <= self.held_out < 1 and 0 <= self.max_no_reply <= 1):
            raise ValueError("--held-out lies in [0, 1), --max-no-reply in [0, 1]")
        custom_resources("--actor-resources", self.actor_resources)
        require_uri("--out", self.out, written=True)


def main(job: WriteTriplets) -> int:
    """Write the triplets, or find that they are there; returns the exit status."""
    from ip2p_ray.stages import run

    write = _ask if job.writer == "openai" else _write
    return run.guarded("write_triplets", lambda: write(job))


def _ask(job: WriteTriplets) -> None:
    """By a model at a server."""
    from ip2p_ray import storage
    from ip2p_ray.stages import journals, replies, reply_rows, run
    from ip2p_ray.stages.triplets import ask_triplets
    from ip2p_ray.triplets.endpoint import Endpoint
    from ip2p_ray.triplets.examples import load_examples
    from ip2p_ray.triplets.limits import LimitsConfig
    from ip2p_ray.triplets.writer import WriterConfig

    read, wrote = job.usd_per_million or (None, None)
    config = WriterConfig(
        model=job.model or "",
        form=job.form,
        temperature=None if job.temperature == "server" else job.temperature,
        max_tokens=job.max_reply_tokens,
        shots=job.shots,
        seed=job.seed,
        moderation=job.moderation,
    )
    out = storage.absolute(job.out)
    journal = storage.absolute(job.journal or storage.join(out, "journal"))
    asking = replies.Asking(
        journal=journal,
        signs=None if storage.is_local(journal) else out,
        endpoint=Endpoint(
            base_url=job.base_url,
            api_key_env=None if job.api_key_env == "none" else job.api_key_env,
            structured=job.structured,
            timeout_s=job.timeout,
            attempts=job.attempts,
        ),
        limits=LimitsConfig(
            requests_per_minute=job.requests_per_minute,
            tokens_per_minute=job.tokens_per_minute,
            max_tokens=job.max_tokens,
            max_usd=job.max_usd,
            usd_per_million_prompt_tokens=read,
            usd_per_million_completion_tokens=wrote,
        ),
        actors=job.actors,
        concurrency=job.concurrency,
        max_no_reply=job.max_no_reply,
        custom=custom_resources("--actor-resources", job.actor_resources),
    )
    examples = load_examples(job.examples) if job.form == "chat" and job.shots else []
    captions = storage.absolute(job.captions)
    with run.locked(out):
        if job.retry_rejects:
            count = reply_rows.drop_unanswered(out)
            print(f"write_triplets: {count:,} captions without a reply are asked about again")
        if storage.is_local(journal):
            require_place("--journal", storage.local_path(journal), folder=True)
        with journals.held(journal, out):
            replies.check(captions, out, config, examples=examples, endpoint=asking.endpoint)
            held = run.Resources(actors=job.actors, custom=asking.custom)
            with run.ray_to_make(storage.join(out, "replies"), workers=job.actors, actors=[held]):
                made = ask_triplets(
                    captions,
                    out,
                    config,
                    examples=examples,
                    asking=asking,
                    held_out=job.held_out,
                )
    _tell(job, made.rows)


def _write(job: WriteTriplets) -> None:
    """By a causal LM in this cluster."""
    from ip2p_ray import presets, storage
    from ip2p_ray.clip import Clip
    from ip2p_ray.copies import local_folder
    from ip2p_ray.errors import ConfigError
    from ip2p_ray.miniature.weights import WEIGHTS
    from ip2p_ray.stages import replies, run, vllm_writer
    from ip2p_ray.stages.triplets import TripletConfig, write_triplets
    from ip2p_ray.triplets.local_writer import LocalWriter

    captions = storage.absolute(job.captions)
    replies.require_captions(captions)
    engine = vllm_writer.chosen(job.engine, model=job.model, gpus=job.gpus)
    writer = storage.absolute(job.model or WEIGHTS / "writer")
    if engine == "vllm" and not storage.is_local(writer):
        raise ConfigError(
            f"vLLM wants a folder that its nodes have: copy {writer} there, or take "
            "--engine transformers"
        )
    here = Path(local_folder(writer))
    if engine == "transformers":
        LocalWriter.check(here)  # or a sentence that says what is wrong with it
    judge = None if job.model else str(WEIGHTS / "judge")
    models = {
        "writer": presets.folder_fingerprint(here),
        "judge": Clip.load(judge).fingerprint() if judge else "openai",
    }
    out = storage.absolute(job.out)
    resources = run.Resources(
        actors=job.actors,
        batch_size=job.concurrency,
        gpus=job.gpus,
        cpus=0.5,
        custom=custom_resources("--actor-resources", job.actor_resources),
    )
    replies_at = storage.join(out, "replies")
    with (
        run.locked(out),
        run.ray_to_make(replies_at, workers=job.actors, actors=[resources]),
    ):
        made = write_triplets(
            captions,
            out,
            TripletConfig(seed=job.seed, held_out=job.held_out),
            writer=writer,
            judge=judge,
            models=models,
            resources=resources,
            engine=engine,
        )
    _tell(job, made.rows)


def _tell(job: WriteTriplets, rows: int) -> None:
    out = job.out.rstrip("/")
    print(f"write_triplets: {out}/triplets has {rows:,} rows; look at {out}/triplets.html")


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(WriteTriplets, config=(tyro.conf.FlagCreatePairsOff,))))
