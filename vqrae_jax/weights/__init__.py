"""Published weights: files in, a model's leaves out, and back.

  source = files.open_weights('decoder.pt')          {key: lazy array}
  leaves = load.Pretrained(source, table, target).load()
  arrays = load.export(table, leaves)                the same table backwards

The tables themselves stand with the models they serve. No torch, no
transformers.
"""
