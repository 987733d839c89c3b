"""The paper's step: a writer is fine-tuned on hand-written triplets, and scored before and after.

    python jobs/finetune_writer.py --backend openai --model davinci-002 --out runs/davinci
    python jobs/finetune_writer.py --backend openai --model gpt-4o-mini --form chat --out runs/mini
    python jobs/finetune_writer.py --backend local --model path/to/causal-lm --out runs/local
    ray job submit --working-dir . -- python jobs/finetune_writer.py \
        --backend local --model s3://bucket/causal-lm --gpus 1 --out s3://bucket/writer

At a server the new model's name is printed: give it to jobs/write_triplets.py (--form completions,
or chat). A local one is the folder <out>/writer, here or in a bucket. One that scores worse than
the model it was made from is kept too, and a warning says so. The same command goes on where it was
stopped; nothing is uploaded, created or paid for twice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import custom_resources, is_web_address, require_uri


@dataclass(frozen=True, kw_only=True)
class FinetuneWriter:
    """Examples in, a fine-tuned writer and its scores out."""

    backend: Literal["openai", "local"]
    """A job at an OpenAI-compatible server, or Ray Train in this cluster."""
    out: str = "runs/writer"
    """Folder of the state, or of the model, and of the scores; of --backend local also s3://..."""
    model: str | None = None
    """The server's name of the model to start from; or a transformers folder, here or s3://..., by
    default the miniature's writer."""
    examples: str | None = None
    """File of triplets, here or s3://...; by default the package's own."""
    held_out: float = 0.1
    """Share of the examples that is only scored with."""
    epochs: int = 1
    """Passes over the examples; the paper's is one."""
    seed: int = 0
    """Of the order of the examples."""
    form: Literal["completion", "chat"] = "completion"
    """Of --backend openai: the paper's text form, or messages for a model that only chats."""
    suffix: str | None = None
    """Of --backend openai: part of the new model's name."""
    base_url: str = "https://api.openai.com/v1"
    """Of --backend openai: the server's API, to the version."""
    api_key_env: str = "OPENAI_API_KEY"
    """Of --backend openai: environment variable that holds the key; "none" for no key."""
    poll: float = 15.0
    """Of --backend openai: seconds between two looks at the job."""
    score: bool = True
    """Of --backend openai: ask both models about the held-out examples; this costs their price."""
    batch_size: int = 8
    """Of --backend local: examples of one optimizer step."""
    learning_rate: float = 2e-5
    """Of --backend local: AdamW's highest."""
    workers: int = 1
    """Of --backend local: processes that train together."""
    gpus: float = 0.0
    """Of --backend local: GPUs of each of them."""
    worker_resources: tuple[str, ...] = ()
    """Of --backend local: custom resources of each of them, such as trainer=1."""

    def __post_init__(self) -> None:
        if self.backend == "openai" and not self.model:
            raise ValueError("--model names the server's model to start from")
        if self.backend == "local" and self.model and "://" not in self.model:
            if not Path(self.model).is_dir():
                raise ValueError(f"--model {self.model}: there is no such folder")
        elif self.backend == "local" and self.model:
            require_uri("--model", self.model)
        if self.examples is not None and "://" not in self.examples:
            if not Path(self.examples).is_file():
                raise ValueError(f"--examples {self.examples}: there is no such file")
        elif self.examples is not None:
            require_uri("--examples", self.examples)
        require_uri("--out", self.out, written=True)
        if self.backend == "openai" and self.out.startswith("s3://"):
            raise ValueError(f"--out {self.out}: of --backend openai a folder here")
        if not is_web_address(self.base_url):
            raise ValueError("--base-url is like https://host/v1")
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        if not (self.learning_rate > 0 and self.poll > 0 and self.gpus >= 0):
            raise ValueError("--learning-rate and --poll are above 0, --gpus is at least 0")
        if not 0 < self.held_out < 1:
            raise ValueError("--held-out lies in (0, 1)")
        custom_resources("--worker-resources", self.worker_resources)


def main(job: FinetuneWriter) -> int:
    """Fine-tune, or go on with it; returns the exit status."""
    from ip2p_ray import storage
    from ip2p_ray.stages import finetuning, run
    from ip2p_ray.triplets.examples import load_examples

    def work() -> None:
        for place in filter(None, (job.out, job.examples, job.model)):
            storage.check(place)
        file = None if job.examples is None else storage.files_at(job.examples)[0]
        examples = load_examples(file)
        with run.locked(job.out):
            tune = _at_server if job.backend == "openai" else _here
            tuned: finetuning.Tuned = tune(job, examples)
        for name, score in (("before", tuned.before), ("after", tuned.after)):
            if score is not None:
                print(f"finetune_writer: {name}: {score.line()}")
        print(f"finetune_writer: the new model is {tuned.model}")
        if tuned.warning is not None:
            print(f"finetune_writer: warning: {tuned.warning}")

    return run.guarded("finetune_writer", work)


def _at_server(job: FinetuneWriter, examples: list) -> object:
    from ip2p_ray.stages.finetuning import finetune_at_server
    from ip2p_ray.triplets.endpoint import Endpoint
    from ip2p_ray.triplets.openai_finetune import TuningConfig

    config = TuningConfig(
        model=job.model or "", form=job.form, epochs=job.epochs, suffix=job.suffix, seed=job.seed
    )
    key = None if job.api_key_env == "none" else job.api_key_env
    return finetune_at_server(
        examples,
        str(job.out),
        config,
        endpoint=Endpoint(base_url=job.base_url, api_key_env=key),
        held_out=job.held_out,
        scored=job.score,
        poll_s=job.poll,
    )


def _here(job: FinetuneWriter, examples: list) -> object:
    from ip2p_ray import presets, storage
    from ip2p_ray.copies import local_folder
    from ip2p_ray.miniature.weights import WEIGHTS
    from ip2p_ray.stages.finetuning import finetune_here
    from ip2p_ray.stages.run import Resources, local_ray
    from ip2p_ray.triplets.local_finetune import LocalTuningConfig
    from ip2p_ray.triplets.local_writer import LocalWriter

    writer = storage.absolute(job.model or WEIGHTS / "writer")
    here = Path(local_folder(writer))
    LocalWriter.check(here)  # or a sentence that says what is wrong with it
    config = LocalTuningConfig(
        epochs=job.epochs,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        seed=job.seed,
    )
    resources = Resources(
        actors=job.workers,
        cpus=1.0,
        gpus=job.gpus,
        custom=custom_resources("--worker-resources", job.worker_resources),
    )
    with local_ray(workers=job.workers, actors=[resources]):
        return finetune_here(
            examples,
            storage.absolute(job.out),
            config,
            writer=writer,
            fingerprint=presets.folder_fingerprint(here),
            held_out=job.held_out,
            resources=resources,
        )


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(FinetuneWriter)))
