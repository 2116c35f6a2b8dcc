"""Records on disk to token ids: `records` (contract), `formats` (recognise, convert), `sources` (read, mix, split),
`render` (the only text-to-token code), `collate` (ragged rows to tensors). Importing any of them is cheap."""
