"""Adapters for other libraries: one module per library, with the library's name, which imports it.

torch (AveragedModel), timm, lightly, lightning, diffusers, transformers, mmengine, ignite,
ultralytics.
"""
