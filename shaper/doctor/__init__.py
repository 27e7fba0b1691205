"""`shaper doctor`: whether this machine can run the shaper, and how it fares now.

`findings` has the values and the document, `screen` draws it. What can hang or crash runs in
a child with a deadline (`bounded`): the driver (`gpu_probe`), and vLLM's imports
(`shaper.doctor.import_check`). The checks are small functions that return findings:
`software`, `host`, `gpus`, `server`, `groups`. `shaper.cli.doctor` puts them together.
"""
