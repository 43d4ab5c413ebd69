"""tf.train.Example without tensorflow: features of bytes and of integers.

The messages are those of tensorflow/core/example/{example,feature}.proto, read
and written by protobuf. Float features are not supported, and are skipped.
"""

import functools
from collections.abc import Iterable, Mapping

_MESSAGES = """
  name: "example" syntax: "proto3"
  message_type { name: "Example"
    field { name: "features" number: 1 type_name: "Features" } }
  message_type { name: "Features" field { name: "feature"
    number: 1 label: LABEL_REPEATED type_name: "Entry" } }
  message_type { name: "Entry"
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type_name: "Feature" } }
  message_type { name: "Feature"
    field { name: "bytes_list" number: 1 type_name: "BytesList" }
    field { name: "int64_list" number: 3 type_name: "Int64List" } }
  message_type { name: "BytesList" field { name: "value"
    number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
  message_type { name: "Int64List" field { name: "value"
    number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
"""


@functools.cache
def _example_class() -> type:
  # Imported here because only such records need it.
  from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
  )

  file = text_format.Parse(_MESSAGES, descriptor_pb2.FileDescriptorProto())
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('Example'))


def decode(record: bytes) -> dict[str, list[bytes] | list[int]]:
  """{feature: its values} of a serialized Example.

  Raises:
    ValueError: the record is not an Example.
  """
  from google.protobuf.message import DecodeError

  try:
    entries = _example_class().FromString(record).features.feature
  except DecodeError:
    raise ValueError('the record is no tf.train.Example') from None
  return {
    entry.key: [*(entry.value.bytes_list.value or entry.value.int64_list.value)]
    for entry in entries
  }


def encode(features: Mapping[str, Iterable[int]]) -> bytes:
  """A serialized Example of int64 features."""
  example = _example_class()()
  for key, values in features.items():
    entry = example.features.feature.add(key=key)
    entry.value.int64_list.value.extend(values)
  return example.SerializeToString(deterministic=True)
