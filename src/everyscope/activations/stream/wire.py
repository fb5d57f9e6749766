"""What clients and activation servers say to each other: strict small JSON for requests, Arrow for rows.

    action describe   {"site", "boot_id"}             -> Described: sizes and identity, and the folder for a client on this host
    action lease      LeaseRequest                    -> Leased: a server forgets who stays silent for lease_seconds
    action renew      {"lease"}                       -> {}
    action release    {"lease"}                       -> {}
    action places     {"site"}                        -> Places: which token each row is of
    action counters   {}                              -> counters as JSON
    action metrics    {}                              -> the same as Prometheus reads it
    do_get            Ticket                          -> one chunk, in record batches of some MiB

Requests name sites and chunks, never files. A request beyond its size, with an unknown field or a value out of range is refused
before anything else looks at it. Rows travel as fixed-size binary, since Arrow has no bfloat16; the number format and the chunk's
xxh3 stand in the schema's metadata. A refusal carries a code (`Refusal`) by which clients know what to do about it.
"""

import base64
from enum import Enum
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field, ValidationError

from everyscope.activations.shards.format import CARRIER, RowDtype
from everyscope.activations.shards.statistics import StatisticsRecord
from everyscope.base.schema import Schema

PROTOCOL = 2
"""Version of this vocabulary; a server and a client of different ones refuse each other."""
MESSAGE_BYTES = 4 << 20
"""Bytes of rows in one record batch, so that the network and the copying work at the same time [bytes]."""
MAX_TICKET_BYTES = 1024
"""Longest ticket that is looked at [bytes]."""
MAX_ACTION_BYTES = 1 << 20
"""Longest request of an action that is looked at; the seen bits of 6 million chunks fit [bytes]."""
NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*$"
"""What trainers may be called, with at most 128 characters; a slash is for people, as no name becomes a path."""

Order = Literal["fixed", "any"]
"""fixed: one deterministic sequence for all; any: whichever chunk the server has that the trainer had not, kept in a journal."""
Request = TypeVar("Request", bound=Schema)


class Refusal(Enum):
    """Why a server did not do what was asked."""

    REQUEST = "request"
    """The request is malformed, too large, or names what is not there: asking again is useless."""
    LEASE = "lease"
    """The lease is unknown here or has lapsed: take a new one."""
    REPLACED = "replaced"
    """Another process has taken a lease under the same trainer's name: end."""
    BUSY = "busy"
    """No room for another trainer: wait, or give the server a larger buffer."""
    WAIT = "wait"
    """The chunk is not there yet: ask again."""
    EXHAUSTED = "exhausted"
    """By the server's account the trainer has had every chunk of this epoch: tell it what was seen by a new lease."""
    DRAINING = "draining"
    """The server is about to end: wait for its return."""
    DATA = "data"
    """The rows cannot be read, as from a damaged shard: end."""


class Describe(Schema):
    """Ask what a server knows of a site."""

    protocol: int
    """The client's version of the vocabulary."""
    site: str = Field(max_length=256)
    """The site's folder name, as in resid_post/layer_3."""
    boot_id: str | None = Field(default=None, max_length=64)
    """The client's host since its last start; None asks for no files."""


class Described(Schema):
    """What a server knows of a site."""

    protocol: int
    """The server's version of the vocabulary."""
    site: str
    """The site's folder name."""
    identity: str
    """Content id of the manifest, and with it of every byte."""
    num_rows: int = Field(gt=0)
    """Rows of the whole site, of which this server holds a slice [rows]."""
    d_in: int = Field(gt=0)
    """Size of the activations."""
    dtype: RowDtype
    """Number format of the rows."""
    statistics: StatisticsRecord
    """Figures over all rows."""
    chunk_rows: int = Field(gt=0)
    """Rows of a chunk [rows]."""
    slice_index: int = Field(ge=0)
    """Which slice of the chunks this server holds."""
    slice_count: int = Field(gt=0)
    """How many slices there are."""
    lease_seconds: float = Field(gt=0)
    """A trainer that is silent for longer loses its lease [s]."""
    in_flight: int = Field(gt=0)
    """Chunks that one trainer may have under way at most [chunks]."""
    folder: str | None
    """Where the shards lie, for a client on the same host that may read them itself; else None."""


class PlacesRequest(Schema):
    """Ask which tokens a site's rows are of."""

    site: str = Field(max_length=256)
    """The site's folder name."""


class Places(Schema):
    """Which tokens a site's rows are of."""

    places: str
    """A content id, equal for sites whose rows belong together."""


class LeaseRequest(Schema):
    """Make oneself known as a trainer."""

    trainer: str = Field(pattern=NAME, max_length=128)
    """The trainer's name; a new lease under a name replaces the old one."""
    site: str = Field(max_length=256)
    """The site's folder name."""
    order: Order
    """In which order it will ask."""
    epoch: int = Field(ge=0, lt=2**48)
    """Passes over the site that it has finished [epochs]."""
    seen: str = Field(default="", max_length=MAX_ACTION_BYTES)
    """For order any: a bit for each chunk of the server's slice that it had in this epoch, in base64."""


class Leased(Schema):
    """A lease."""

    lease: str
    """The word that stands for it in tickets."""
    identity: str
    """Content id of what the server serves now."""
    slice_index: int
    """Which slice it holds."""
    slice_count: int
    """Of how many."""
    chunk_rows: int
    """Rows of a chunk [rows]."""


class Renew(Schema):
    """Keep, or give back, a lease."""

    lease: str = Field(max_length=64)
    """The lease."""


class Ticket(Schema):
    """Ask for one chunk: a certain one, or any that the trainer had not in this epoch."""

    lease: str = Field(max_length=64)
    """The trainer's lease."""
    chunk: int | None = Field(default=None, ge=0, lt=2**48)
    """The chunk; None for any."""
    epoch: int = Field(default=0, ge=0, lt=2**48)
    """For any: the epoch in which it is wanted."""
    request: int = Field(default=0, ge=0, lt=2**62)
    """For any: a number that stands for this request, so that asking again after a lost answer gives the same chunk."""


class Nothing(Schema):
    """A request, or an answer, without content."""


class BadRequest(Exception):
    """What a client sent is not in this vocabulary; the message says why and repeats none of it."""


def parse(kind: type[Request], body: bytes | memoryview, limit: int) -> Request:
    """A request of `kind` from at most `limit` bytes of JSON; BadRequest for anything else."""
    if len(body) > limit:
        raise BadRequest(f"a request of {len(body)} bytes; at most {limit} are taken")
    try:
        return kind.model_validate_json(bytes(body), strict=True)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in problem["loc"]) or "request"
        raise BadRequest(f"{where}: {problem['type']}; expected {', '.join(kind.model_fields) or 'an empty object'}") from error


def encode(message: Schema) -> bytes:
    """A message as the bytes that travel."""
    return message.model_dump_json().encode()


def pack_seen(seen: np.ndarray) -> str:
    """A boolean array as base64 of its bits."""
    return base64.b64encode(np.packbits(seen).tobytes()).decode()


def unpack_seen(text: str, count: int) -> np.ndarray:
    """The `count` booleans of `pack_seen`; BadRequest where there are more or fewer. No text stands for nothing seen."""
    if not text:
        return np.zeros(count, bool)
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadRequest("seen: no base64") from error
    if len(raw) != -(-count // 8):
        raise BadRequest(f"seen: {len(raw)} bytes; expected {-(-count // 8)}")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(bool)


class ChunkHead(Schema):
    """What stands in the schema's metadata of a chunk that travels."""

    identity: str
    """Content id of the site."""
    site: str
    """The site's folder name."""
    chunk: int
    """Which chunk."""
    rows: int
    """Its rows [rows]."""
    d_in: int
    """Size of the activations."""
    dtype: RowDtype
    """Number format of the rows."""
    xxh3: str
    """xxh3 of the rows' bytes, in hexadecimal."""

    @property
    def row_bytes(self) -> int:
        """Size of a row [bytes]."""
        return self.d_in * CARRIER[self.dtype].itemsize


HEAD = b"everyscope"
"""The metadata's key."""


def checksum(rows: np.ndarray) -> str:
    """The xxh3 (64 bits) of a chunk's bytes, in hexadecimal."""
    return xxhash.xxh3_64(rows.data).hexdigest()


def chunk_table(head: ChunkHead, address: int, owner: object) -> pa.Table:
    """A chunk in memory as record batches, without a copy; they keep `owner` alive until the last of them is sent."""
    whole = pa.foreign_buffer(address, head.rows * head.row_bytes, owner)
    field = pa.field("rows", pa.binary(head.row_bytes), nullable=False)
    schema = pa.schema([field], metadata={HEAD: encode(head)})
    step = max(1, MESSAGE_BYTES // head.row_bytes)
    batches = []
    for start in range(0, head.rows, step):
        count = min(step, head.rows - start)
        part = whole.slice(start * head.row_bytes, count * head.row_bytes)
        batches.append(pa.RecordBatch.from_arrays([pa.Array.from_buffers(field.type, count, [None, part])], schema=schema))
    return pa.Table.from_batches(batches, schema)


def batch_memory(batch: pa.RecordBatch, head: ChunkHead) -> tuple[pa.Buffer, int, int]:
    """Where the rows of a record batch lie: a buffer, the offset in it [bytes], their number. BadRequest where there are none."""
    column = batch.column(0)
    if batch.num_columns != 1 or column.type != pa.binary(head.row_bytes) or column.null_count:
        raise BadRequest("a record batch of another form")
    data = column.buffers()[1]
    if data is None or data.size < (column.offset + len(column)) * head.row_bytes:
        raise BadRequest("a record batch without its rows")
    return data, column.offset * head.row_bytes, len(column)
