"""Files as they lie on disk, and what they may do: whole or refused when read, whole or absent when written.

Knows bytes, headers, owners and records' rights; not what tensors mean.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.files.disk import checked_header as checked_header
    from lora_lab.files.disk import file_hash as file_hash
    from lora_lab.files.disk import parse_json as parse_json
    from lora_lab.files.disk import read_bin as read_bin
    from lora_lab.files.disk import read_header as read_header
    from lora_lab.files.disk import read_json as read_json
    from lora_lab.files.disk import read_safetensors as read_safetensors
    from lora_lab.files.disk import refuse_existing as refuse_existing
    from lora_lab.files.disk import replacing as replacing
    from lora_lab.files.disk import write_bytes as write_bytes
    from lora_lab.files.disk import write_json as write_json
    from lora_lab.files.streamed import LazyTensors as LazyTensors
    from lora_lab.files.streamed import byte_size as byte_size
    from lora_lab.files.streamed import index_of as index_of
    from lora_lab.files.streamed import open_checkpoint as open_checkpoint
    from lora_lab.files.streamed import shards as shards
    from lora_lab.files.streamed import spooled_writer as spooled_writer
    from lora_lab.files.streamed import streamed_writer as streamed_writer
    from lora_lab.files.streamed import write_safetensors as write_safetensors
    from lora_lab.files.unread import Unread as Unread
    from lora_lab.files.unread import in_memory as in_memory
    from lora_lab.files.unread import later as later

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "disk": (
            "checked_header",
            "file_hash",
            "parse_json",
            "read_bin",
            "read_header",
            "read_json",
            "read_safetensors",
            "refuse_existing",
            "replacing",
            "write_bytes",
            "write_json",
        ),
        "streamed": (
            "LazyTensors",
            "byte_size",
            "index_of",
            "open_checkpoint",
            "shards",
            "spooled_writer",
            "streamed_writer",
            "write_safetensors",
        ),
        "unread": ("Unread", "in_memory", "later"),
    },
)
