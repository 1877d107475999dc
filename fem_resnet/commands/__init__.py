"""The commands of `python -m fem_resnet` that have no folder of their own."""
