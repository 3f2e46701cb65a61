"""A page to try a model in a browser: an image, its caption (which can be edited), the reconstruction, similarities.

    pip install "uae_jax[demo]"
    python -m uae_jax.demo
    python -m uae_jax.demo --checkpoint /weights/UAE --dtype bfloat16 --longclip longclip-L.pt --dinov2 dinov2-large

Similarities are computed by the encoders of the checkpoint and by those that the flags name. The built-in model is
shown beside the model that its training started from.
"""

import argparse
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uae_jax.command_line import in_range, run_command, stay_offline
from uae_jax.model_flags import add_model_flags, load_model

if TYPE_CHECKING:
    import gradio
    from PIL import Image

    from uae_jax.api import Model
    from uae_jax.evaluation.similarities import Similarities

stay_offline()
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

ENCODERS = {
    "clip": "CLIP folder",
    "longclip": "Long-CLIP folder, or the published file",
    "dinov2": "DINOv2 folder",
    "dinov3": "DINOv3 folder",
}
HEADERS = ("encoder", "similarity")
EXAMPLES = 8  # held-out scenes to click
FIRST = "The first picture compiles the model, which takes up to a minute; the next ones are quick."
# small images fill their frame, pixel by pixel
STYLE = (
    ".picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }"
    ".buttons button { min-height: 44px; }"  # a thumb's
)
Rows = list[list[Any]]


def _whole(number: float | None) -> int:
    """A number of the page; raises ValueError for an empty field and for what is out of range."""
    if number is None or not 0 <= number < 2**31:
        raise ValueError(f"the number is {number}; it must be in 0 .. {2**31 - 1}")
    return int(number)


class Page:
    """What the buttons of the page do.

    Args:
      model: writes captions and generates images.
      similarities: compares two images.
      before: loads the model from before its training; None where there is none to compare with.
    """

    def __init__(self, model: "Model", similarities: "Similarities", before: "Callable[[], Model] | None" = None):
        self.model, self.similarities, self._load_before = model, similarities, before
        self._before: Model | None = None
        self.compiled = False  # whether the model has drawn a picture

    def scene(self, number: float) -> "Image.Image":
        """Built-in scene `number` of the held-out ones."""
        from PIL import Image

        from uae_jax.data.sources import SceneSource

        return Image.fromarray(SceneSource("test", captions="full")[_whole(number)].image)

    def caption(self, image: "Image.Image | None", number: float) -> str:
        """The caption of an image; `number` chooses its random tokens.

        Raises:
          ValueError: there is no image.
        """
        if image is None:
            raise ValueError("choose an image first")
        numbers = [_whole(number)]
        return self.model.caption([image], sample_ids=numbers)[0]

    def draw(self, image: "Image.Image | None", text: str, number: float) -> "tuple[Image.Image, Rows]":
        """An image generated from a text, and its similarities to `image` if given; `number` chooses the noise.

        Raises:
          ValueError: the text is empty or too long.
        """
        if not text.strip():
            raise ValueError("write a text first, or press Caption")
        return self._drawn(image, text, number)

    def _drawn(self, image: "Image.Image | None", text: str, number: float) -> "tuple[Image.Image, Rows]":
        """`draw` of any text: the caption of a model may be empty."""
        numbers = [_whole(number)]
        generated = self.model.generate([text], sample_ids=numbers)[0]
        self.compiled = True
        rows = (
            []
            if image is None
            else [[name, f"{value:.3f}"] for name, value in self.similarities(image, generated).items()]
        )
        return generated, rows

    @property
    def compares(self) -> bool:
        """Whether there is a model from before the training."""
        return self._load_before is not None

    def before(self, image: "Image.Image | None", number: float) -> "tuple[str, Image.Image]":
        """Caption and reconstruction by the model from before its training.

        Raises:
          ValueError: there is no image, or no such model.
        """
        if self._load_before is None:
            raise ValueError("this model has none from before its training beside it")
        if image is None:
            raise ValueError("choose an image first")
        if self._before is None:
            self._before = self._load_before()
        result = self._before.reconstruct([image], sample_ids=[_whole(number)])[0]
        return f"not trained yet: {result.caption}", result.image

    def reconstruct(self, image: "Image.Image | None", number: float) -> "tuple[str, Image.Image, Rows]":
        """Caption, reconstruction and similarities; see `caption` and `draw`."""
        text = self.caption(image, number)
        return text, *self._drawn(image, text, number)


def build(page: Page, name: str) -> "gradio.Blocks":
    """The page; gradio's client can call its functions by their names.

    Args:
      page: what the buttons do.
      name: of the model, shown on the page.
    """
    import gradio as gr

    with gr.Blocks(title="UAE", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# UAE: an auto-encoder whose code is text\nModel: {name}. The captioner describes the image; the "
            "decoder reconstructs it from the caption alone."
        )
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    type="pil", format="png", label="Image", height=320, elem_classes="picture", elem_id="picture"
                )
                with gr.Row(elem_classes="buttons"):
                    both = gr.Button("Reconstruct", variant="primary", elem_id="both")
                    caption = gr.Button("Caption", elem_id="write")
                    draw = gr.Button("Generate from the caption", elem_id="draw")
                gr.Examples([[page.scene(index)] for index in range(EXAMPLES)], [picture], label="Held-out scenes")
                with gr.Row():
                    scene = gr.Number(0, label="Built-in scene", precision=0, minimum=0, elem_id="scene")
                    show = gr.Button("Show this scene", elem_id="show")
                text = gr.Textbox(label="Caption (edit it and generate again)", lines=4, elem_id="caption")
            with gr.Column():
                drawn = gr.Image(
                    type="pil",
                    format="png",
                    label="Reconstruction",
                    height=320,
                    interactive=False,
                    elem_classes="picture",
                    elem_id="drawn",
                )
                table = gr.Dataframe(
                    headers=list(HEADERS),
                    label="Similarity of image and reconstruction (cosine)",
                    interactive=False,
                    elem_id="table",
                )
                number = gr.Number(0, label="Noise number", precision=0, minimum=0, maximum=2**31 - 1, elem_id="number")
                if page.compares:
                    with gr.Accordion("The same picture before training", open=True):
                        old_text = gr.Textbox(label="Caption", interactive=False, elem_id="old_caption")
                        old = gr.Image(
                            type="pil",
                            format="png",
                            label="Reconstruction",
                            height=240,
                            interactive=False,
                            elem_classes="picture",
                            elem_id="old_drawn",
                        )
        one_at_a_time: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1)
        show.click(_told(page.scene), scene, picture, api_name="scene")
        caption.click(_told(page.caption), [picture, number], text, api_name="caption", **one_at_a_time)
        draw.click(_told(page.draw), [picture, text, number], [drawn, table], api_name="draw", **one_at_a_time)
        done = both.click(
            _told(page.reconstruct), [picture, number], [text, drawn, table], api_name="reconstruct", **one_at_a_time
        )
        if page.compares:
            done.success(_told(page.before), [picture, number], [old_text, old], api_name="before", **one_at_a_time)
    return blocks


def _told(function: Callable) -> Callable:
    """The function; the page shows the message of an expected error."""
    import gradio as gr

    def call(*arguments: Any) -> Any:
        page = getattr(function, "__self__", None)
        if isinstance(page, Page) and not page.compiled and function.__name__ != "scene":
            gr.Info(FIRST)
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_model_flags(parser)
    for name, text in ENCODERS.items():
        parser.add_argument(
            f"--{name}",
            default="",
            metavar="PATH",
            help=f"{text} for the similarities (default: the checkpoint's, if it has one)",
        )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 for the whole network")
    parser.add_argument("--port", default=7860, help="port to serve at", **in_range(int, low=0, high=65_535))
    parser.add_argument("--share", action="store_true", help="also serve at a public address of gradio")
    parser.set_defaults(run=run)


def open_page(options: argparse.Namespace) -> "gradio.Blocks":
    """The page of parsed flags.

    Raises:
      ValueError, FileNotFoundError: gradio is not installed, or model or encoders cannot be read.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError('the page needs gradio; run: pip install "uae_jax[demo]"') from None
    from uae_jax import api
    from uae_jax.evaluation.similarities import Similarities

    model = load_model(options, inputs=1)
    paths = {name: path for name in ENCODERS if (path := getattr(options, name))}
    before = (lambda: api.load("start", dtype=options.dtype)) if options.checkpoint in ("", "trained") else None
    name = options.checkpoint or "built-in, trained through all four stages"
    page = Page(model, Similarities(model, paths), before)
    return build(page, f"{name} ({model.warning})" if model.warning else name)


def check_port(host: str, port: int) -> None:
    """Says at once that a port is in use, before a model is read.

    Raises:
      ValueError: something listens there, or the address is not one of this machine.
    """
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot serve at {host}:{port} ({error.strerror}); choose another --port") from error


def run(options: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    check_port(options.host, options.port)
    page = open_page(options)
    page.launch(server_name=options.host, server_port=options.port, share=options.share, css=STYLE)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    run_command("uae_jax.demo", __doc__, add_arguments, arguments)


if __name__ == "__main__":
    main()
