"""The page: what stands where, and what happens when somebody touches it."""

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
from ip2p_ray.images import decode_image, encode_png, fit_image, to_pil
from ip2p_ray.remote_editor import Edited, Preview, RemoteEditor
from serve import page_words as words

MAX_PIXELS = 25_000_000
"""Of a picture that the page takes; the service may take fewer."""
KEPT = 24
"""Tries that the history holds."""
PREVIEWS = 8
SEEDS = 2**31
SESSION_S = 6 * 3600
FILES_S = 24 * 3600

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    # the style sheet names the fonts of the system: nothing is fetched
    font=[gr.themes.Font("sans-serif")],
    font_mono=[gr.themes.Font("monospace")],
).set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
CSS = Path(__file__).with_name("page.css").read_text("utf-8")
HEAD = f"<script>{Path(__file__).with_name('page.js').read_text('utf-8')}</script>"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """Where the settings stand before anybody moves them."""

    text_guidance_scale: float
    image_guidance_scale: float
    steps: int
    max_steps: int


class Page:
    """The components and what they do; one for all visitors."""

    def __init__(self, editor: RemoteEditor, defaults: Defaults, *, drawn_only: bool) -> None:
        self._editor, self._defaults = editor, defaults
        with gr.Blocks(
            title="Change a picture with a sentence",
            analytics_enabled=False,
            delete_cache=(3600, FILES_S),
        ) as self.blocks:
            self._build(drawn_only)
            self._connect()

    def _build(self, drawn_only: bool) -> None:
        gr.HTML(
            "<header><h1>Change a picture with a sentence</h1>"
            "<p>Choose a picture, say what should be different, and look.</p></header>"
        )
        self.history = gr.State([], time_to_live=SESSION_S)
        with gr.Row(elem_id="bench"):
            with gr.Column(min_width=300, elem_id="asking"):
                self._build_asking()
            with gr.Column(min_width=300, elem_id="showing"):
                self._build_showing()
            with gr.Column(min_width=300, elem_id="tuning"):
                self._build_settings()
                if drawn_only:
                    gr.Markdown(words.DRAWN_ONLY, elem_id="note")

    def _build_asking(self) -> None:
        self.key = gr.Textbox(
            label="Key",
            info="This editor asks who you are. The key is sent with each picture and not kept.",
            type="password",
            visible=False,
            elem_id="key",
        )
        self.picture = gr.Image(
            label="Your picture",
            type="filepath",
            format="png",
            image_mode=None,
            sources=["upload", "clipboard"],
            buttons=[],
            height=320,
            elem_id="picture",
        )
        # Gradio opens the file here, and has no words for one that is no picture; `uploaded` has
        self.picture.preprocess = _path_of  # type: ignore[method-assign]
        folder = self.picture.GRADIO_CACHE
        shipped = []
        for scene in words.SCENES:
            caption, drawn = words.drawn(scene)
            # the script of the page tells the name to those who cannot see the picture
            name = f"{caption.replace(' ', '-')}.png"
            shipped.append(save_bytes_to_cache(encode_png(to_pil(drawn)), name, folder))
        self.shipped_files = shipped
        self.shipped = gr.Dataset(
            label="Or one of these",
            components=[gr.Image(visible=False, format="png", type="filepath")],
            samples=[[path] for path in shipped],
            type="index",
            elem_id="shipped",
        )
        self.instruction = gr.Textbox(
            label="What should change?",
            placeholder="make it night",
            lines=1,
            max_lines=1,
            max_length=1000,
            elem_id="instruction",
        )
        self.examples = gr.Dataset(
            show_label=False,
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text in words.INSTRUCTIONS],
            type="values",
            elem_id="examples",
        )
        with gr.Row():
            self.go = gr.Button("Edit", variant="primary", elem_id="go")
            self.stop = gr.Button("Stop", visible=False, elem_id="stop")

    def _build_settings(self) -> None:
        defaults = self._defaults
        with gr.Accordion("Settings and advice", open=False, elem_id="settings"):
            self.text_scale = gr.Slider(
                1.0,
                15.0,
                defaults.text_guidance_scale,
                step=0.25,
                label="Follow the sentence",
                info="Higher changes more (text guidance scale).",
                elem_id="text-scale",
            )
            self.image_scale = gr.Slider(
                1.0,
                3.0,
                defaults.image_guidance_scale,
                step=0.05,
                label="Keep the picture",
                info="Higher changes less (image guidance scale).",
                elem_id="image-scale",
            )
            self.steps = gr.Slider(
                1,
                defaults.max_steps,
                defaults.steps,
                step=1,
                label="Steps",
                elem_id="steps",
            )
            self.fresh = gr.Checkbox(True, label="A new seed each time", elem_id="fresh")
            self.seed = gr.Number(
                0,
                label="Seed",
                info="The same seed and settings give the same picture.",
                precision=0,
                minimum=0,
                maximum=2**53 - 1,
                elem_id="seed",
            )
            gr.Markdown(words.ADVICE, elem_id="advice")

    def _build_showing(self) -> None:
        self.stage = gr.HTML(words.IDLE, elem_id="stage")
        self.slider = gr.ImageSlider(
            label="Before and after",
            format="png",
            type="filepath",
            buttons=["fullscreen"],
            interactive=False,
            visible=False,
            max_height=640,
            elem_id="slider",
        )
        self.caption = gr.Markdown(visible=False, elem_id="caption")
        with gr.Row(visible=False, elem_id="after") as self.after:
            self.again = gr.Button("Another seed", size="sm", elem_id="again")
            self.more = gr.Button("Change more", size="sm", elem_id="more")
            self.less = gr.Button("Change less", size="sm", elem_id="less")
            self.onward = gr.Button("Go on from here", size="sm", elem_id="onward")
            self.download = gr.DownloadButton("Download", size="sm", elem_id="download")
        self.gallery = gr.Gallery(
            label="What was tried",
            format="png",
            columns=4,
            fit_columns=False,
            allow_preview=False,
            object_fit="contain",
            height="auto",
            buttons=[],
            interactive=False,
            visible=False,
            elem_id="history",
        )

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
        checking: dict[str, Any] = {
            "inputs": [self.key],
            "outputs": [self.key, self.stage, self.text_scale, self.image_scale, self.steps],
            **private,
        }
        self.blocks.load(self.check, **checking)

    async def check(self, key: str | None) -> dict[Any, Any]:
        """Whether the service is there, wants a key, and where its settings stand."""
        try:
            models = await self._editor.amodels(api_key=key)
        except AccessError as error:
            return {self.key: gr.update(visible=True), self.stage: words.told_error(error)}
        except Ip2pError as error:
            return {self.stage: words.told_error(error)}
        said = models[0].get("defaults") if models else None
        stands = said if isinstance(said, dict) else {}
        sliders = {
            "text_guidance_scale": self.text_scale,
            "image_guidance_scale": self.image_scale,
            "steps": self.steps,
        }
        return {sliders[name]: value for name, value in stands.items() if name in sliders} or {
            self.stage: gr.skip()
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


def _path_of(payload: Any) -> str | None:
    """Of an uploaded file, which Gradio has found to lie among the uploaded ones."""
    return None if payload is None else payload.path


def _quarter(scale: float) -> float:
    return round(scale * 4) / 4


def _address(data: bytes) -> str:
    kind = Image.MIME.get(Image.open(io.BytesIO(data)).format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
