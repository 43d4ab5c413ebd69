"""Images to batches of uint8 on the host; no device is touched here."""
