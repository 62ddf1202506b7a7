"""The Arrow schemas of every table that stages hand each other and users read.

A column's meaning and unit stand in its field metadata: `describe(IMAGES)` prints them.
"""

import pyarrow as pa

SOURCE_SHIFT = 40
"""image_id = (source number << SOURCE_SHIFT) | row number in that source's list."""


def image_id(source_number: int, row: int) -> int:
    """The id of a row of a registered source; never reused, never renumbered."""
    if not 0 <= source_number < 1 << (64 - SOURCE_SHIFT) or not 0 <= row < 1 << SOURCE_SHIFT:
        raise ValueError(f"source {source_number}, row {row}: out of range")
    return (source_number << SOURCE_SHIFT) | row


def column(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = True) -> pa.Field:
    """A field that says what it holds."""
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


def describe(schema: pa.Schema) -> list[tuple[str, str, str]]:
    """(column, type, meaning) of each field, for documentation and `curate doctor`."""
    return [(f.name, str(f.type), (f.metadata or {}).get(b"meaning", b"").decode()) for f in schema]


ID = column("image_id", pa.uint64(), "source number << 40 | row in that source's list", nullable=False)

BOX = pa.struct(
    [
        pa.field("x", pa.float32()),
        pa.field("y", pa.float32()),
        pa.field("width", pa.float32()),
        pa.field("height", pa.float32()),
        pa.field("score", pa.float32()),
    ]
)

STATUSES = ("ok", "duplicate_url", "excluded", "failed", "transient", "dropped")
"""ok: usable · duplicate_url: `duplicate_of` holds it · excluded: robots, opt-out or a blocked domain
forbids it · failed: for good · transient: `download --retry` may bring it · dropped: by a filter."""

IMAGES = pa.schema(
    [
        ID,
        column("source", pa.string(), "pool:NAME, seed:NAME or reference:NAME", nullable=False),
        column("url", pa.string(), "where it was downloaded from; null for imported files"),
        column("sha256", pa.binary(32), "of the bytes as downloaded"),
        column("stored_sha256", pa.binary(32), "of the bytes at the location"),
        column("pixel_sha256", pa.binary(32), "of the decoded RGB pixels with their width and height"),
        column("pca_hash", pa.uint64(), "sign bits of 64 principal components of the 32x32 luminance"),
        column("width", pa.int32(), "pixels, of the stored image"),
        column("height", pa.int32(), "pixels, of the stored image"),
        column("original_width", pa.int32(), "pixels, as downloaded"),
        column("original_height", pa.int32(), "pixels, as downloaded"),
        column("shard", pa.string(), "file that holds the bytes: relative to the run, or a whole URL"),
        column("offset", pa.int64(), "first byte in the shard"),
        column("length", pa.int64(), "bytes"),
        column("status", pa.string(), " | ".join(STATUSES), nullable=False),
        column("error", pa.string(), "class of the failure or reason of the drop, then `: detail`"),
        column("duplicate_of", pa.uint64(), "the image this one repeats (URL, bytes, pixels or PCA hash)"),
        column("nsfw", pa.float32(), "probability of not being safe for work, 0-1"),
        column("faces", pa.list_(BOX), "faces found, boxes in pixels of the stored image"),
        column("faces_blurred", pa.bool_(), "the stored bytes have these faces blurred"),
        column("contrast", pa.float32(), "standard deviation of the 32x32 luminance, 0-128; solid colour is near 0"),
        column("label", pa.string(), "from the folder or a column, for the audit only"),
        column("caption", pa.string(), "alt text or caption of the URL list"),
    ]
)

DUPLICATES = pa.schema(
    [
        ID,
        column("component_id", pa.uint64(), "smallest image_id of its self-component", nullable=False),
        column("kept", pa.bool_(), "stays in the pool", nullable=False),
        column("reason", pa.string(), "kept | self | reference | exact | hash", nullable=False),
        column("nearest_id", pa.uint64(), "nearest image of the pool above the stored threshold"),
        column("similarity", pa.float32(), "cosine to nearest_id"),
        column("reference_component_id", pa.uint64(), "smallest image_id of its component in the relative graph"),
        column(
            "references",
            pa.list_(
                pa.struct(
                    [
                        pa.field("reference_set", pa.string()),
                        pa.field("reference_id", pa.uint64()),
                        pa.field("similarity", pa.float32()),
                    ]
                )
            ),
            "direct hits among the reference sets, at most 8, best first",
        ),
    ]
)

EDGES = pa.schema(
    [
        column("low_space", pa.uint8(), "0: pool and seeds, n: the n-th reference set", nullable=False),
        column("low", pa.uint64(), "the smaller node of the pair, in (space, id) order", nullable=False),
        column("high_space", pa.uint8(), "0: pool and seeds, n: the n-th reference set", nullable=False),
        column("high", pa.uint64(), "the larger node of the pair", nullable=False),
        column("similarity", pa.float32(), "float64 dot product of the stored vectors, rounded", nullable=False),
    ]
)
"""A maximum spanning forest: its components at every threshold are those of the whole graph."""


def clusters_schema(levels: int) -> pa.Schema:
    """`image_id`, `cluster_1` (leaf) ... `cluster_L` (coarsest), `distance`."""
    fields = [ID]
    fields += [
        column(f"cluster_{k}", pa.int32(), "index into the centroids of this level", nullable=False)
        for k in range(1, levels + 1)
    ]
    fields.append(column("distance", pa.float32(), "Euclidean, to the leaf's centroid", nullable=False))
    return pa.schema(fields)


def centroids_schema(dimension: int) -> pa.Schema:
    """One row per cluster of one level."""
    return pa.schema(
        [
            column("cluster", pa.int32(), "index in its level, from 0", nullable=False),
            column("parent", pa.int32(), "cluster of the next coarser level, null at the coarsest"),
            column("size", pa.int64(), "images below it", nullable=False),
            column("centroid", pa.list_(pa.float32(), dimension), "mean of its members", nullable=False),
        ]
    )


RETRIEVAL = pa.schema(
    [
        ID,
        column("seed_set", pa.string(), "name of the seed set that drew it", nullable=False),
        column("seed_id", pa.uint64(), "image_id of the seed; in cluster mode the nearest seed of that cluster"),
        column("mode", pa.string(), "sample | cluster", nullable=False),
        column("rank", pa.int32(), "from 0: by similarity to the seed, or in hash order within the cluster"),
        column("similarity", pa.float32(), "cosine to seed_id"),
        column("cluster_id", pa.int32(), "leaf cluster it was taken from; null in sample mode"),
    ]
)

BALANCE = pa.schema(
    [
        ID,
        column("rank", pa.int64(), "from 0, in the order the sampler took them", nullable=False),
        column("cluster_id", pa.int32(), "leaf cluster", nullable=False),
    ]
)

MIX = pa.schema(
    [
        ID,
        column("sources", pa.list_(pa.string()), "what brought it: seed:NAME, retrieve:NAME, balance", nullable=False),
        column("nominal", pa.int64(), "times it was brought, the paper's count", nullable=False),
        column("weight", pa.float32(), "expected draws per epoch, relative to 1", nullable=False),
    ]
)

MANIFEST = pa.schema(
    [
        *[
            IMAGES.field(name)
            for name in (
                "image_id",
                "source",
                "url",
                "sha256",
                "stored_sha256",
                "pixel_sha256",
                "pca_hash",
                "width",
                "height",
                "original_width",
                "original_height",
                "shard",
                "offset",
                "length",
                "nsfw",
                "faces",
                "faces_blurred",
                "contrast",
                "label",
                "caption",
            )
        ],
        column("component_id", pa.uint64(), "smallest image_id of its self-component"),
        column("clusters", pa.list_(pa.int32()), "cluster path, leaf first"),
        column("sources", pa.list_(pa.string()), "what brought it: seed:NAME, retrieve:NAME, balance", nullable=False),
        column(
            "retrieved_by",
            pa.list_(
                pa.struct(
                    [
                        pa.field("seed_set", pa.string()),
                        pa.field("seed_id", pa.uint64()),
                        pa.field("mode", pa.string()),
                        pa.field("rank", pa.int32()),
                        pa.field("similarity", pa.float32()),
                    ]
                )
            ),
            "the seeds that drew it, best first",
        ),
        column("weight", pa.float32(), "expected draws per epoch, relative to 1", nullable=False),
    ]
)


def embeddings_schema(dimension: int) -> pa.Schema:
    """`image_id` and an L2-normalised float16 vector. No number is null: so they are read 1.6 times as fast."""
    kind = pa.list_(pa.field("element", pa.float16(), nullable=False), dimension)
    return pa.schema([ID, column("embedding", kind, "L2-normalised", nullable=False)])


ACTIONS, SCOPES = ("drop", "keep", "note"), ("image", "component", "cluster", "host")

DECISIONS = pa.schema(
    [
        column(
            "image_id", pa.uint64(), "an image that the decision covered when it was made; null for a note on a scope"
        ),
        column("action", pa.string(), " | ".join(ACTIONS), nullable=False),
        column("scope", pa.string(), " | ".join(SCOPES) + ": what was decided on", nullable=False),
        column("target", pa.string(), "image id, component id, LEVEL:CLUSTER or host", nullable=False),
        column("author", pa.string(), "who decided", nullable=False),
        column("made_at", pa.timestamp("us", "UTC"), "when; the last decision on an image counts", nullable=False),
        column("note", pa.string(), "why"),
    ]
)
"""One file per batch in RUN/decisions, a row per image it covers: resolved when made, so that readers need no join."""
