"""The study of a GPU: `python -m bench.studies.gpu`; docs/gpu-study.md."""
