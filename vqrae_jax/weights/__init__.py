"""Published weights: from files to a model's leaves, and back.

  source = files.open_weights('decoder.pt')          {key: lazy array}
  leaves = load.Pretrained(source, table, target).load()
  arrays = load.export(table, leaves)                the same table, in reverse

Each table is defined with the model that it is for. No torch, no transformers.
"""
