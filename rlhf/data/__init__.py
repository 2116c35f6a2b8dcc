"""From records on disk to token ids: the record contract, file formats, reading, mixing, splitting, rendering with the
chat template, and collation. It loads no model; importing any module here is fast."""
