"""editor -> metrics: questions to editors in actors, CLIP's judgement and the oracle's."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ip2p_ray import evaluation, storage
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.sample import text_to_image
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.evaluation import ANSWERS, QUESTIONS, EvaluationConfig
from ip2p_ray.images import decode_image, encode_png, to_pil
from ip2p_ray.miniature import scores
from ip2p_ray.miniature.scenes import draw, edits
from ip2p_ray.miniature.scores import EditTask
from ip2p_ray.report import Report
from ip2p_ray.stages import plan, run
from ip2p_ray.training.unet import widen
