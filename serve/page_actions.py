"""The page: what happens when somebody touches it."""

import asyncio
import base64
import dataclasses
import io
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image

from ip2p_ray.errors import AccessError, ImageError, Ip2pError
from ip2p_ray.images import decode_image, encode_png, fit_image
from ip2p_ray.remote_editor import Edited, Preview, RemoteEditor
from serve import page_words as words
from serve.page_layout import Defaults, Layout

MAX_PIXELS = 25_000_000
"""Of a picture that the page takes; the service may take fewer."""
KEPT = 24
"""Tries that the history holds."""
PREVIEWS = 8
SEEDS = 2**31
STANDS = """(said, ...set) =>
    set.map((value, place) => said && value === said[place][0] ? said[place][1] : value)"""
"""Settings that stand where they stood at first go where the service says; in the browser."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Try:
    """One entry of the history; pictures are files in the page's cache."""

    picture: str
    """What was uploaded or chosen."""
    before: str
    """The same at the size of the edited one."""
    after: str
    instruction: str
    seed: int
    text_guidance_scale: float
    image_guidance_scale: float
    steps: int
    seconds: float | None = None

    @property
    def line(self) -> str:
        """Its settings."""
        took = "" if self.seconds is None else f" \u00b7 {self.seconds:.1f} s"
        return (
            f"seed {self.seed} \u00b7 follow {self.text_guidance_scale:g} \u00b7 keep "
            f"{self.image_guidance_scale:g} \u00b7 {self.steps} steps{took}"
        )


class Page(Layout):
    """The components and what they do; one for all visitors."""

    def __init__(self, editor: RemoteEditor, defaults: Defaults) -> None:
        super().__init__(defaults)
        self._editor = editor
        with self.blocks:
            self._connect()

    def _connect(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        at_once = {**private, "queue": False}
        settings = [self.text_scale, self.image_scale]
        inputs = [
            self.picture,
            self.instruction,
            *settings,
            self.steps,
            self.fresh,
            self.seed,
            self.key,
            self.history,
        ]
        outputs = [
            *(self.stage, self.slider, self.caption, self.after, self.download, self.gallery),
            *(self.go, self.stop, self.seed, self.key, self.history),
        ]
        editing: dict[str, Any] = {
            "inputs": inputs,
            "outputs": outputs,
            "concurrency_limit": None,
            "trigger_mode": "once",
            **private,
        }
        asked = gr.on([self.go.click, self.instruction.submit], self.edit, **editing)
        begun = [asked]
        for button, change in (
            (self.again, self.another_seed),
            (self.more, self.change_more),
            (self.less, self.change_less),
        ):
            moved = button.click(
                change, [*settings, self.seed], [*settings, self.fresh, self.seed], **at_once
            )
            begun.append(moved.then(self.edit, **editing))
        # one after the other: a late preview would take the place of what `stopped` shows
        self.stop.click(None, cancels=begun, **at_once).then(
            self.stopped, None, [self.stage, self.go, self.stop], **at_once
        )
        self.shipped.click(self.choose, [self.shipped], [self.picture, self.examples], **at_once)
        self.examples.click(
            lambda sample: sample[0], [self.examples], [self.instruction], **at_once
        )
        self.picture.upload(
            self.uploaded,
            [self.picture],
            [*(self.picture, self.stage, self.slider, self.caption, self.after), self.examples],
            **at_once,
        )
        self.gallery.select(
            self.look_again,
            [self.history],
            [
                *(self.stage, self.slider, self.caption, self.after, self.download),
                *(self.picture, self.instruction, *settings, self.steps, self.fresh, self.seed),
            ],
            **at_once,
        )
        self.onward.click(self.go_on, [self.download], [self.picture], **at_once)
        sliders = [*settings, self.steps]
        checked = self.blocks.load(
            self.check, [self.key], [self.key, self.stage, self.note, self.said], **private
        )
        # in the browser, at once: an answer that brought values would take back what was set since
        checked.then(None, [self.said, *sliders], sliders, js=STANDS, **at_once)

    async def check(self, key: str | None) -> dict[Any, Any]:
        """Whether the service is there, wants a key, and where its settings stand."""
        try:
            models = await self._editor.amodels(api_key=key)
        except AccessError as error:
            return {self.key: gr.update(visible=True), self.stage: words.told_error(error)}
        except Ip2pError as error:
            return {self.stage: words.told_error(error)}
        model = models[0] if models else {}
        said = model.get("defaults")
        stands = said if isinstance(said, dict) else {}
        here = dataclasses.asdict(self._defaults)
        names = ("text_guidance_scale", "image_guidance_scale", "steps")
        return {
            self.note: gr.update(visible=model.get("id") == "miniature"),
            self.said: [[here[name], stands.get(name, here[name])] for name in names],
        }

    async def edit(
        self,
        picture: str | None,
        instruction: str,
        text_scale: float,
        image_scale: float,
        steps: int,
        fresh: bool,
        seed: float | None,
        key: str | None,
        history: list[Try],
    ) -> AsyncIterator[dict[Any, Any]]:
        """Shows the edit while it is made, then the edited picture, then files it."""
        if picture is None:
            yield self._instead(words.told("Choose a picture first."))
            return
        if not instruction.strip():
            yield self._instead(words.told("Say what should change.", 'As in "make it night".'))
            return
        yield {
            **self._instead(words.working(0, 0, None)),
            self.go: gr.update(visible=False),
            self.stop: gr.update(visible=True),
        }
        began = time.monotonic()
        idle = {self.go: gr.update(visible=True), self.stop: gr.update(visible=False)}
        found: Edited | None = None
        try:
            data = await asyncio.to_thread(Path(picture).read_bytes)
            async for event in self._editor.stream(
                data,
                instruction.strip(),
                previews=PREVIEWS,
                api_key=key or None,
                # a browser's numbers are exact to 2**53, the service's own seeds go further
                seed=secrets.randbelow(SEEDS) if fresh or seed is None else int(seed),
                steps=int(steps),
                text_guidance_scale=text_scale,
                image_guidance_scale=image_scale,
            ):
                if isinstance(event, Preview):
                    shown = words.working(event.step, event.steps, _address(event.data))
                    yield {self.stage: gr.update(value=shown)}
                else:
                    found = event
        except Ip2pError as error:
            asks = {self.key: gr.update(visible=True)} if isinstance(error, AccessError) else {}
            yield {**idle, **asks, self.stage: gr.update(value=words.told_error(error))}
            return
        except OSError:
            words_ = words.told("The picture is gone.", "Choose it again.")
            yield {**idle, self.stage: gr.update(value=words_)}
            return
        assert found is not None
        tried = await asyncio.to_thread(
            self._filed,
            picture,
            data,
            found,
            Try(
                picture=picture,
                before="",
                after="",
                instruction=instruction.strip(),
                seed=found.seed,
                text_guidance_scale=text_scale,
                image_guidance_scale=image_scale,
                steps=int(steps),
                seconds=time.monotonic() - began,
            ),
        )
        history = [tried, *history][:KEPT]
        yield {
            **idle,
            **self._shown(tried),
            self.gallery: gr.update(value=_thumbnails(history), visible=True, selected_index=None),
            self.seed: tried.seed,
            self.history: history,
        }

    def _filed(self, picture: str, data: bytes, edited: Edited, tried: Try) -> Try:
        """The try with its pictures in the cache."""
        after = edited.image
        before = fit_image(decode_image(data, max_pixels=MAX_PIXELS), after.size)
        folder = self.picture.GRADIO_CACHE
        name = re.sub(r"[^a-z0-9]+", "-", tried.instruction.lower())[:40].strip("-") or "edited"
        return dataclasses.replace(
            tried,
            picture=picture,
            before=save_bytes_to_cache(encode_png(before), "before.png", folder),
            after=save_bytes_to_cache(edited.data, f"{name}-{tried.seed}.png", folder),
        )

    def _instead(self, text: str) -> dict[Any, Any]:
        """The updates that show a text in the place of an edited picture."""
        hidden = (self.slider, self.caption, self.after)
        return {
            self.stage: gr.update(value=text, visible=True),
            **{part: gr.update(visible=False) for part in hidden},
        }

    def _shown(self, tried: Try) -> dict[Any, Any]:
        """The updates that show a try in large."""
        quoted = re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", tried.instruction)
        return {
            self.stage: gr.update(visible=False),
            self.slider: gr.update(value=(tried.before, tried.after), visible=True),
            self.caption: gr.update(value=f"**{quoted}**  \n{tried.line}", visible=True),
            self.after: gr.update(visible=True),
            self.download: tried.after,
        }

    def look_again(self, history: list[Try], event: gr.SelectData) -> dict[Any, Any]:
        """A try of the history in large, and its settings where they were."""
        if not 0 <= event.index < len(history):
            return {self.stage: gr.skip()}
        tried = history[event.index]
        return {
            **self._shown(tried),
            self.picture: tried.picture,
            self.instruction: tried.instruction,
            self.text_scale: tried.text_guidance_scale,
            self.image_scale: tried.image_guidance_scale,
            self.steps: tried.steps,
            self.fresh: False,
            self.seed: tried.seed,
        }

    def stopped(self) -> dict[Any, Any]:
        """What stands there after a stop."""
        return {
            self.stage: gr.update(value=words.IDLE, visible=True),
            self.go: gr.update(visible=True),
            self.stop: gr.update(visible=False),
        }

    def another_seed(self, text: float, image: float, seed: float) -> list[Any]:
        """The same settings with a seed of the service's choice."""
        return [text, image, True, seed]

    def change_more(self, text: float, image: float, seed: float) -> list[Any]:
        """The same seed, the sentence followed more and the picture kept less."""
        return [min(_quarter(text * 1.25), 15.0), max(round(image - 0.15, 2), 1.0), False, seed]

    def change_less(self, text: float, image: float, seed: float) -> list[Any]:
        """The other way."""
        return [max(_quarter(text / 1.25), 1.0), min(round(image + 0.15, 2), 3.0), False, seed]

    def choose(self, index: int) -> dict[Any, Any]:
        """A shipped picture, and instructions that fit it."""
        samples = [[text] for text in words.suggestions(words.SCENES[index])]
        return {
            self.picture: self.shipped_files[index],
            self.examples: gr.Dataset(samples=samples),
        }

    def uploaded(self, picture: str | None) -> dict[Any, Any]:
        """Refuses at once what is no picture."""
        samples = gr.Dataset(samples=[[text] for text in words.INSTRUCTIONS])
        if picture is None:
            return {self.examples: samples}
        try:
            decode_image(Path(picture).read_bytes(), max_pixels=MAX_PIXELS)
        except ImageError as error:
            return {
                self.picture: None,
                **self._instead(words.told_error(error)),
            }
        return {self.examples: samples}

    def go_on(self, edited: str | None) -> str | None:
        """The edited picture as the next one to edit."""
        return edited


def _thumbnails(history: list[Try]) -> list[tuple[str, str]]:
    return [(tried.after, f"{tried.instruction} ({tried.line})") for tried in history]


def _quarter(scale: float) -> float:
    return round(scale * 4) / 4


def _address(data: bytes) -> str:
    kind = Image.MIME.get(Image.open(io.BytesIO(data)).format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
