"""The page: what stands where."""

import dataclasses
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from ip2p_ray.images import encode_png, to_pil
from serve import page_words as words

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
class Defaults:
    """Where the settings stand before anybody moves them."""

    text_guidance_scale: float
    image_guidance_scale: float
    steps: int
    max_steps: int


class Layout:
    """The components; one for all visitors."""

    def __init__(self, defaults: Defaults) -> None:
        self._defaults = defaults
        with gr.Blocks(
            title="Change a picture with a sentence",
            analytics_enabled=False,
            delete_cache=(3600, FILES_S),
        ) as self.blocks:
            self._build()

    def _build(self) -> None:
        gr.HTML(
            "<header><h1>Change a picture with a sentence</h1>"
            "<p>Choose a picture, say what should be different, and look.</p></header>"
        )
        self.history = gr.State([], time_to_live=SESSION_S)
        # of each setting where it stands at first and where the service wants it
        self.said = gr.JSON(visible=False)
        with gr.Row(elem_id="bench"):
            with gr.Column(min_width=300, elem_id="asking"):
                self._build_asking()
            with gr.Column(min_width=300, elem_id="showing"):
                self._build_showing()
            with gr.Column(min_width=300, elem_id="tuning"):
                self._build_settings()
                self.note = gr.Markdown(words.DRAWN_ONLY, visible=False, elem_id="note")

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


def _path_of(payload: Any) -> str | None:
    """Of an uploaded file, which Gradio has found to lie among the uploaded ones."""
    return None if payload is None else payload.path
