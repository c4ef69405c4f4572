"""The teacher in other libraries' terms: a file for each, named as the library, which is imported only there.

torch (AveragedModel), timm, lightly, lightning, diffusers, transformers.
"""
