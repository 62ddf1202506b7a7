"""`curate embed`: images to vectors, with any of the models that `embeddings/models` knows."""

from typing import Annotated, Any

import typer

from cli import session
from cli.options import config_options
from curation.errors import UserError
from pipelines.stages import embed
from pipelines.stages.embed import EmbedConfig

HELP = """Embed the pool images that dedup kept, and the seeds; several models decode each image once.

Models: mobilenet_v2 and sscd work without a network; open_clip:ARCH/PRETRAINED and timm:NAME (DINOv2 included) come
from a hub; sscd:FILE.torchscript.pt and checkpoint:FOLDER are files of yours. An image that cannot be decoded is
counted with its reason and listed under unreadable/.

With --images and --out and no run: tables of images from elsewhere (image_id, shard, offset, length).

Example: curate embed runs/a --model mobilenet_v2,timm:vit_small_patch14_dinov2.lvd142m
"""

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="models, comma-separated: mobilenet_v2, sscd, sscd_distilled, sscd:FILE, open_clip:ARCH/PRETRAINED, "
        "timm:NAME, checkpoint:FOLDER [default: embed.models of the run, else mobilenet_v2]",
        show_default=False,
    ),
]
ImagesOption = Annotated[
    str | None,
    typer.Option("--images", help="folder of Parquet tables of images, in place of a run", show_default=False),
]
OutOption = Annotated[
    str | None, typer.Option("--out", help="with --images: folder for the vectors", show_default=False)
]


def register_embed(app: typer.Typer) -> None:
    """Add `curate embed`."""

    @app.command("embed", help=HELP)
    @config_options(EmbedConfig, leave_out=("models",))
    def embed_command(
        overrides: dict[str, Any],
        run: session.RunArgument = None,
        model: ModelOption = None,
        images: ImagesOption = None,
        out: OutOption = None,
        ray_address: session.RayOption = None,
        workers: session.WorkersOption = None,
        memory_per_worker: session.MemoryOption = None,
        rebuild: session.RebuildOption = False,
        as_json: session.JsonOption = False,
    ) -> None:
        if run is not None and (images is not None or out is not None):
            raise UserError("give a run directory, or --images and --out, not both")
        if run is None and (images is None or out is None):
            raise UserError(
                "give a run directory, or --images and --out; example: curate embed runs/a --model mobilenet_v2"
            )
        if model is not None:
            overrides["models"] = model
        config = session.resolve(EmbedConfig, run, "embed", overrides)
        session.carry_out(
            lambda context: embed.execute(context, config, images=images),
            as_json,
            stage="embed",
            run=run,
            out=out,
            rebuild=rebuild,
            ray_address=ray_address,
            workers=workers,
            memory_per_worker=memory_per_worker,
        )
