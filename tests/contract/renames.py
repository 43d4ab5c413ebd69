"""Names that changed since the golden files were written: old -> new.

A row here is a line of the CHANGELOG. None is a name that went without a
successor. Leaf names, tokenizer files and sample order are formats: they have
no table.
"""

# Dotted keys of a config, or sections of it: "data.max_skipped".
CONFIG: dict[str, str | None] = {}
# "command.flag".
FLAGS: dict[str, str | None] = {}
# Fields of metrics.jsonl.
METRICS: dict[str, str | None] = {
  'gan_balance': 'adaptive_weight',
  'samples': None,  # a checksum of image names
}
