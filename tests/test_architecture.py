"""The import rule, checked over the syntax tree; this file is the architecture's document.

A line may import its own line and any above it in this list, never one below.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

LINES = (
    {
        *("schema", "errors", "images", "report", "atomic", "command", "settings"),
        *("files", "distinct", "places", "language", "memory", "intervals"),
        *("parquet", "model_files", "logs"),
    },
    {"captions", "triplets", "diffusion", "prompt_to_prompt", "clip", "dino"},
    {
        *("candidates", "pairs", "generator", "filtering", "search"),
        *("mapped", "latents", "pictures", "training", "checkpoint"),
        *("rules", "layouts", "edit_sets", "own_pairs", "export"),
    },
    # presets gathers the configs of the lines above; nothing above reads it
    {
        *(
            "editor",
            "engine",
            "remote_editor",
            "picture_folder",
            "evaluation",
            "gallery",
            "miniature",
            "presets",
            "previews",
            "card",
        ),
        *("trials", "answerers", "baselines", "measures", "trial_page"),
    },
    {
        *("storage", "s3", "objects", "object_files", "lease", "mirror", "copies"),
        *("notes", "status", "estimate", "completeness"),
    },
    {"stages"},
    {"benchmark"},
    {"jobs", "serve"},
)
TESTING = "testing"
"""The fakes: may import any of the library; of the library only `benchmark` imports them."""

ONLY_IN = {
    "ray": ("stages", "jobs", "serve"),
    "boto3": ("objects", "s3"),
    "botocore": ("objects", "s3"),
    "moto": (TESTING,),
    "openai": ("triplets.endpoint", "triplets.writer", "triplets.openai_finetune", "remote_editor"),
    "open_clip": ("clip", "miniature", TESTING),
}
"""Which parts may import a heavy or optional library."""

MEASURED = ("jobs.benchmark", "serve.benchmark")
"""The one job that imports of the service, to measure it, and what it imports."""

RENAMING = {"rename", "renames", "mkdtemp", "mkstemp"}
"""Calls of whoever replaces files in its own way; only `atomic` does."""


class Import(NamedTuple):
    """One imported module, and where."""

    line: int
    module: str


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every absolute dotted name that the source of `module` imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield from (Import(node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def part_of(module: str) -> str:
    """The name below ip2p_ray, or the module itself for jobs and serve; "" for the package."""
    return module.removeprefix("ip2p_ray").removeprefix(".")


def line_of(part: str) -> int | None:
    """The index in LINES of a part such as "diffusion.noise"."""
    head = part.split(".")[0]
    return next((index for index, line in enumerate(LINES) if head in line), None)


def is_in(part: str, places: tuple[str, ...]) -> bool:
    return any(part == place or part.startswith(f"{place}.") for place in places)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, a sentence each."""
    part = part_of(module)
    own = line_of(part)
    found = []
    for line, name in imports(source, module, is_package):
        where = f"{module}:{line} imports {name}"
        library = name.split(".")[0]
        if library in ONLY_IN and not is_in(part, ONLY_IN[library]):
            found.append(f"{where}: {library} is only for {', '.join(ONLY_IN[library])}")
        if library not in ("ip2p_ray", "jobs", "serve"):
            continue
        other = part_of(name)
        theirs = line_of(other)
        if module == "ip2p_ray":
            found.append(f"{where}: the package itself imports nothing")
        elif is_in(other, (TESTING,)) and not is_in(part, (TESTING, "benchmark")):
            found.append(f"{where}: {TESTING} is for tests")
        elif is_in(part, ("serve",)) and is_in(other, ("stages", "jobs")):
            found.append(f"{where}: the service needs no stages")
        elif is_in(part, ("jobs",)) and is_in(other, ("serve",)) and (part, other) != MEASURED:
            found.append(f"{where}: a job needs no service")
        elif None not in (own, theirs) and own < theirs:
            found.append(f"{where}: a lower line never imports a higher one")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module of the project."""
    for top in ("ip2p_ray", "jobs", "serve"):
        for path in sorted((ROOT / top).rglob("*.py")):
            names = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(names[:-1] if names[-1] == "__init__" else names), path


def test_no_module_breaks_the_import_rule():
    found = [
        sentence
        for module, path in modules()
        for sentence in violations(path.read_text("utf-8"), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_every_module_has_its_place():
    parts = {part_of(module) for module, _ in modules()} - {""}
    assert not {part for part in parts if line_of(part) is None and not is_in(part, (TESTING,))}


def renamings(source: str) -> list[int]:
    """The lines on which a method or function of RENAMING is called."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        called.lineno
        for called in calls
        if (isinstance(called, ast.Attribute) and called.attr in RENAMING)
        or (isinstance(called, ast.Name) and called.id in RENAMING)
    ]


def test_only_one_module_replaces_files_and_folders():
    found = {
        module: lines
        for module, path in modules()
        if not is_in(part_of(module), ("atomic",)) and (lines := renamings(path.read_text("utf-8")))
    }
    assert not found
    assert renamings("import os\nos.rename(a, b)\nPath(a).rename(b)\nmkdtemp()") == [2, 3, 4]


GUARDED = {
    **dict.fromkeys(("ParquetFile", "read_table", "read_schema", "read_metadata"), "parquet"),
    **dict.fromkeys(("open_file", "open_stream", "ParquetDataset", "read_pandas"), "parquet"),
    **dict.fromkeys(("torch.load", "jit.load", "pickle.load", "pickle.loads"), "miniature.fit"),
    **dict.fromkeys(("cloudpickle.loads", "joblib.load", "np.load", "numpy.load"), "nothing"),
}
"""Calls that can run what is in a file, by the end of their names, and the module that may."""

WITH_CODE = ("AutoTokenizer", "AutoConfig", "AutoModel", "loader")
"""Of transformers, whose from_pretrained would run code that a folder brings, if it is let."""


def unguarded(source: str, part: str) -> list[str]:
    """A sentence for each call that reads what others wrote past its guard."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        given = {ast.unparse(word.value) for word in node.keywords if word.arg is None}
        where = f"{part}:{node.lineno} calls {owner}.{node.func.attr}"
        for name in (node.func.attr, f"{owner}.{node.func.attr}"):
            allowed = GUARDED.get(name, part)
            if not is_in(part, (allowed,)) and owner not in ("parquet", "storage"):
                found.append(f"{where}: only {allowed} does")
        if node.func.attr == "from_pretrained":
            if not owner.endswith(("Tokenizer", "Config")) and "SAFETENSORS" not in given:
                found.append(f"{where} without SAFETENSORS")
            if owner in WITH_CODE and not given & {"NO_CODE"}:
                found.append(f"{where} without NO_CODE")
    return found


def test_files_of_others_are_read_where_they_are_checked():
    found = [
        sentence
        for module, path in modules()
        if not is_in(part_of(module), (TESTING, "serve"))
        for sentence in unguarded(path.read_text("utf-8"), part_of(module))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "call",
    [
        "pq.ParquetFile(path)",
        "pq.read_table(path)",
        "pa.ipc.open_file(source)",
        "torch.load(path)",
        "pickle.loads(data)",
        "np.load(path)",
        "AutoencoderKL.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoModel.from_pretrained(folder, **SAFETENSORS)",
    ],
)
def test_a_planted_reader_is_caught(call):
    assert len(unguarded(call, "stages.pairs")) == 1


@pytest.mark.parametrize(
    ("call", "part"),
    [
        ("pq.ParquetFile(path)", "parquet"),
        ("parquet.read_table(path)", "stages.pairs"),
        ("torch.load(path, weights_only=True)", "miniature.fit"),
        ("AutoModel.from_pretrained(folder, **SAFETENSORS, **NO_CODE)", "dino"),
        ("CLIPTokenizer.from_pretrained(folder)", "dino"),
    ],
)
def test_a_guarded_reader_passes(call, part):
    assert unguarded(call, part) == []


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "misc", "core", "manager"])
def test_no_module_is_named_after_nothing(name):
    assert name not in {part for module, _ in modules() for part in module.split(".")}


def test_everything_is_ascii():
    texts = [path for _, path in modules()] + sorted((ROOT / "tests").rglob("*.py"))
    assert [str(path) for path in texts if not path.read_bytes().isascii()] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ip2p_ray", "import ip2p_ray.schema"),
        ("ip2p_ray.schema", "from ip2p_ray.clip import Clip"),
        ("ip2p_ray.schema", "from ip2p_ray import clip"),
        ("ip2p_ray.schema", "from . import clip"),
        ("ip2p_ray.schema", "import ip2p_ray.diffusion.noise as noise"),
        ("ip2p_ray.diffusion.noise", "from ..training import loop"),
        ("ip2p_ray.diffusion.noise", "def late():\n    from ip2p_ray.pairs import PairConfig"),
        ("ip2p_ray.clip", "from ip2p_ray.pairs import PairConfig"),
        ("ip2p_ray.pairs", "from ip2p_ray.presets import PAPER"),
        ("ip2p_ray.training.loop", "from ip2p_ray.editor import Editor"),
        ("ip2p_ray.editor", "from ip2p_ray.storage import local_path"),
        ("ip2p_ray.storage", "from ip2p_ray.stages import run"),
        ("ip2p_ray.stages.pairs", "from jobs.quickstart import main"),
        ("serve.app", "from ip2p_ray.stages import run"),
        ("serve.app", "import jobs.quickstart"),
        ("jobs.quickstart", "from serve.app import build"),
        ("jobs.quickstart", "from serve import benchmark"),
        ("jobs.benchmark", "from serve import app"),
        ("jobs.benchmark", "from serve.benchmark_run import compare"),
        ("ip2p_ray.benchmark.load", "from serve import benchmark"),
        ("ip2p_ray.benchmark.load", "from ray import serve"),
        ("serve.benchmark_replicas", "from ip2p_ray.testing import stable_diffusion_1_5"),
        ("ip2p_ray.editor", "from ip2p_ray.testing import tiny_stable_diffusion"),
        ("ip2p_ray.stages.pairs", "from ip2p_ray.benchmark import measure"),
        ("ip2p_ray.benchmark.pairs", "import ray"),
        ("ip2p_ray.pairs", "import ray"),
        ("ip2p_ray.training.loop", "from ray import train"),
        ("ip2p_ray.pairs", "if TYPE_CHECKING:\n    import ray.data"),
        ("ip2p_ray.testing", "import ray"),
        ("ip2p_ray.testing", "from openai import OpenAI"),
        ("ip2p_ray.triplets.reply", "from openai import OpenAI"),
        ("ip2p_ray.stages.pairs", "import boto3"),
        ("ip2p_ray.storage", "import boto3"),
        ("ip2p_ray.pairs", "import open_clip"),
        ("ip2p_ray.clipping", "import open_clip"),
    ],
)
def test_a_planted_violation_is_caught(module, source):
    assert len(violations(source, module)) == 1


def test_a_relative_import_of_a_package_starts_at_the_package():
    source = "from ..storage import local_path"
    assert violations(source, "ip2p_ray.diffusion", is_package=True)
    assert not violations("from . import noise", "ip2p_ray.diffusion", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ip2p_ray.schema", "import hashlib\nfrom ip2p_ray.errors import ConfigError"),
        ("ip2p_ray.schema", "from ip2p_ray import __version__"),
        ("ip2p_ray.pairs", "from ip2p_ray.filtering import Thresholds"),
        ("ip2p_ray.presets", "from ip2p_ray.training.loop import TrainConfig"),
        ("ip2p_ray.miniature.train", "import open_clip\nfrom ip2p_ray.presets import MINIATURE"),
        ("ip2p_ray.clip", "import open_clip"),
        ("ip2p_ray.triplets.writer", "import openai"),
        ("ip2p_ray.objects", "import boto3"),
        ("ip2p_ray.benchmark.pairs", "from ip2p_ray.testing import stable_diffusion_1_5"),
        ("jobs.benchmark", "from ip2p_ray.benchmark.pairs import compare"),
        ("jobs.benchmark", "from serve import benchmark"),
        ("serve.benchmark_run", "from ray import serve\nfrom ip2p_ray.benchmark import load"),
        ("ip2p_ray.stages.pairs", "import ray.data\nfrom ip2p_ray import storage"),
        ("ip2p_ray.testing", "from ip2p_ray.testing.server import FaultyServer"),
        ("ip2p_ray.testing", "import open_clip\nfrom ip2p_ray.editor import Editor"),
        ("jobs.quickstart", "import ray\nfrom ip2p_ray.stages import run\nimport jobs.edit"),
        ("serve.app", "from ray import serve\nfrom ip2p_ray.editor import Editor"),
        ("ip2p_ray.pairs", "import rayon"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(source, module) == []
