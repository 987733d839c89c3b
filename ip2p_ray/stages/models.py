"""Models as the processes of a cluster find them: those in buckets are copied once to each node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ip2p_ray.copies import local_folder
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.presets import folder_fingerprint


def local_weights(weights: GeneratorWeights) -> GeneratorWeights:
    """The same, of which every part lies on this machine."""
    vae = None if weights.vae is None else local_folder(weights.vae)
    return replace(weights, source=local_folder(weights.source), vae=vae)


def fingerprint(source: str) -> str:
    """Of a folder, local or in a bucket, its content's; a hub id stands for itself."""
    folder = Path(local_folder(source))
    return folder_fingerprint(folder) if folder.is_dir() else source
